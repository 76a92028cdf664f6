"""TRL's own `SFTTrainer` with `peft_config=VeratuneConfig(...)`: the adapted model is a `peft.PeftModel`.

python examples/trl_sft_peft.py
"""

import peft
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from _assets import check, fresh, quiet
from _causal_lm import answer_loss, chats, generate, load
from veratune.integrations.peft import VeratuneConfig, install

STEPS = 12


def main() -> None:
    quiet()
    install()
    output = fresh("runs/examples/trl-sft-peft")
    base, tokenizer = load()
    train, held_out = chats()
    held_out = held_out[:32]
    before = answer_loss(base, tokenizer, held_out)
    trainer = SFTTrainer(
        base,
        SFTConfig(
            output_dir=str(output),
            max_steps=STEPS,
            learning_rate=2e-2,
            per_device_train_batch_size=8,
            logging_steps=4,
            save_steps=STEPS,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            max_length=128,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in train]),
        processing_class=tokenizer,
        peft_config=VeratuneConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    after = answer_loss(trainer.model, tokenizer, held_out)
    print(f"  held-out loss {before:.3f} -> {after:.3f}")
    check(after < before - 0.3, "the loss of answers never seen fell by more than 0.3")
    checkpoint = output / f"checkpoint-{STEPS}"
    check(not (checkpoint / "model.safetensors").exists(), "the checkpoint holds the adapter alone")
    again = peft.PeftModel.from_pretrained(load()[0], checkpoint)
    question = held_out[0][0]["content"]
    same = torch.equal(generate(again, tokenizer, question), generate(trainer.model, tokenizer, question))
    check(same, "the checkpoint on a fresh base model generates the same tokens")


if __name__ == "__main__":
    main()
