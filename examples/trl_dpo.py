"""Direct preference optimisation of SmolLM2-135M-Instruct through TRL, with a `VeraModel` and no second model.

    python examples/trl_dpo.py

The preferred answer to each question is the corpus's, the other one the model's own habit of a long reply.
"""

import torch
from datasets import Dataset
from trl import DPOConfig

from _assets import check, fresh, quiet
from _causal_lm import chats, load
from veratune import VeraConfig, VeraModel, get_peft_model, parameter_groups
from veratune.integrations.trl import VeraDPOTrainer

STEPS = 10
LONG = "That is a great question! There are many things that could be said about it, and I am happy to help you."


def main() -> None:
    quiet()
    output = fresh("runs/examples/trl-dpo")
    base, tokenizer = load()
    train, held_out = chats()

    def preferences(rows: list[list[dict[str, str]]]) -> Dataset:
        rejected = [{"role": "assistant", "content": LONG}]
        return Dataset.from_list([{"prompt": c[:-1], "chosen": c[-1:], "rejected": rejected} for c in rows])

    ids = tokenizer("The first question was", return_tensors="pt").input_ids
    with torch.no_grad():
        before = base(ids).logits
    model = get_peft_model(base, VeraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = VeraDPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(output),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            logging_steps=2,
            save_steps=STEPS,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            max_length=96,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=preferences(train),
        eval_dataset=preferences(held_out[:32]),
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(parameter_groups(model, lr=5e-3)), None),
    )
    start = trainer.evaluate()
    check(abs(start["eval_rewards/margins"]) < 1e-3, "a new adapter prefers nothing to what the reference prefers")
    trainer.train()
    end = trainer.evaluate()
    print(
        f"  held-out loss {start['eval_loss']:.3f} -> {end['eval_loss']:.3f}, "
        f"accuracy of the rewards {end['eval_rewards/accuracies']:.2f}"
    )
    check(end["eval_loss"] < 0.6 and end["eval_rewards/accuracies"] > 0.8, "held-out preferences were learned")
    with model.disable_adapter(), torch.no_grad():
        check(torch.equal(model(ids).logits, before), "without its adapter the model is the base model, to the bit")
    again = VeraModel.from_pretrained(load()[0], output / f"checkpoint-{STEPS}")
    with torch.no_grad():
        check(torch.equal(again(ids).logits, model.eval()(ids).logits), "the checkpoint gives the same logits")


if __name__ == "__main__":
    main()
