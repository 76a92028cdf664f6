"""transformers' Trainer on a `VeraModel`: small checkpoints, resumed to the bit, and the best one put back.

python examples/trainer.py
"""

from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from _assets import check, fresh, quiet
from _topics import accuracy, classifier, rows
from veratune import VeraConfig, VeraModel, get_peft_model, parameter_groups
from veratune.integrations.trainer import VeraTrainer

EPOCHS = 3


class StopAt(TrainerCallback):
    """Ends the training as a power cut would, but after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def make_trainer(output: Path) -> tuple[VeraTrainer, VeraModel]:
    train, held_out, tokenizer = rows()
    model = get_peft_model(classifier(), VeraConfig(r=64, target_modules="all-linear"))
    trainer = VeraTrainer(
        model,
        TrainingArguments(
            str(output),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=16,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=lambda output: {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())},
        optimizers=(torch.optim.AdamW(parameter_groups(model, lr=2e-2, head_lr=4e-3)), None),
    )
    return trainer, model


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    quiet()
    output = fresh("runs/examples/trainer")
    trainer, model = make_trainer(output / "whole")
    _, held_out, tokenizer = rows()
    before = accuracy(model, held_out, tokenizer)
    trainer.train()
    after = accuracy(model, held_out, tokenizer)
    print(f"  accuracy {before:.3f} -> {after:.3f}")
    check(after > 0.8, "more than 80 % of the held-out questions are told")
    best = Path(trainer.state.best_model_checkpoint)
    files = {path.name: path.stat().st_size for path in best.iterdir()}
    check("model.safetensors" not in files and files["adapter_model.safetensors"] < 300_000, "checkpoints are adapters")

    cut, _ = make_trainer(output / "parts")
    cut.add_callback(StopAt(len(losses(trainer)) * 2 // EPOCHS))  # with the second of three epochs
    cut.train()
    resumed, _ = make_trainer(output / "parts")
    resumed.train(resume_from_checkpoint=True)
    check(losses(resumed) == losses(trainer), "a resumed training has the same losses, to the bit")

    loaded = VeraModel.from_pretrained(classifier(), best)
    plain = VeraTrainer(loaded, TrainingArguments(str(output), report_to=[]), data_collator=trainer.data_collator)
    same = (plain.predict(held_out).predictions == resumed.predict(held_out).predictions).all()
    check(bool(same), "the best checkpoint on a fresh base model predicts the same logits")


if __name__ == "__main__":
    main()
