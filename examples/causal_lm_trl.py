"""Supervised fine-tuning of SmolLM2-135M-Instruct through TRL, with a `VeraModel`.

    python examples/causal_lm_trl.py

The chats are short questions and answers of chatterbot-corpus; the loss is that of the answers.
"""

import torch
from datasets import Dataset
from trl import SFTConfig

from _assets import check, fresh, quiet
from _causal_lm import answer_loss, chats, check_result, generate, load, show_samples
from veratune import VeraConfig, VeraModel, get_peft_model, parameter_groups
from veratune.integrations.trl import VeraSFTTrainer

STEPS = 40


def main() -> None:
    quiet()
    output = fresh("runs/examples/causal-lm-trl")
    base, tokenizer = load()
    train, held_out = chats()
    before = answer_loss(base, tokenizer, held_out)
    show_samples(base, tokenizer, "before:")
    model = get_peft_model(base, VeraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = VeraSFTTrainer(
        model,
        SFTConfig(
            output_dir=str(output),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            warmup_steps=4,
            logging_steps=10,
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            max_length=128,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in train]),
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(parameter_groups(model, lr=1e-2)), None),
    )
    trainer.train()
    show_samples(model, tokenizer, "after:")
    model.save_pretrained(output / "adapter")
    check_result(model, tokenizer, output / "adapter", before, held_out)
    again = VeraModel.from_pretrained(load()[0], output / "adapter")
    question = held_out[0][0]["content"]
    same = torch.equal(generate(again, tokenizer, question), generate(model, tokenizer, question))
    check(same, "the adapter on a fresh base model generates the same tokens")


if __name__ == "__main__":
    main()
