"""Two processes with DeepSpeed's ZeRO-3 through `VeraTrainer` (gloo): parameters spread, small checkpoints.

torchrun --nproc_per_node 2 examples/deepspeed_zero.py
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported

import deepspeed
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, TrainingArguments

from _assets import check, fresh, quiet
from _topics import rows
from ddp import STEPS, adapted
from veratune.integrations.trainer import VeraTrainer

# Sums over shared memory, which would be compiled at the first use; gloo's do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
OUTPUT = "runs/examples/deepspeed_zero"
ZERO = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def trainer_for(checkpoint_every: int) -> VeraTrainer:
    # The arguments come first: with DeepSpeed they tell transformers how to load a model.
    arguments = TrainingArguments(
        OUTPUT,
        deepspeed=ZERO,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        save_steps=checkpoint_every,
        logging_steps=1,
        learning_rate=3e-3,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    train, _, tokenizer = rows()
    collator = DataCollatorWithPadding(tokenizer)
    trainer = VeraTrainer(adapted(), arguments, data_collator=collator, train_dataset=train)
    trainer.model_accepts_loss_kwargs = False  # a classifier's loss is a mean
    return trainer


def losses(trainer: VeraTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    quiet()
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    first = dist.get_rank() == 0
    if first:
        check(dist.get_world_size() == 2, "there are two processes")
        directory = fresh(OUTPUT)
    dist.barrier()
    trainer = trainer_for(STEPS // 2)
    trainer.train()
    spread = sum(parameter.numel() for parameter in trainer.model.parameters()) == 0
    resumed = trainer_for(STEPS)
    resumed.train(resume_from_checkpoint=f"{OUTPUT}/checkpoint-{STEPS // 2}")
    if first:
        print(f"  loss {losses(trainer)[0]:.4f} -> {losses(trainer)[-1]:.4f}")
        check(spread, "no process holds a whole parameter")
        pairs = zip(losses(resumed), losses(trainer), strict=True)
        worst = max(abs(ours - theirs) for ours, theirs in pairs)
        check(worst < 1e-4, f"going on from a checkpoint gives the same losses (largest difference {worst:.1e})")
        size = sum(path.stat().st_size for path in (directory / f"checkpoint-{STEPS}").rglob("*") if path.is_file())
        # The model's 22.7 million numbers are 91 MB; what is trained, and the optimizer's state of it, is not.
        check(size < 4_000_000, f"a checkpoint, with the optimizer's state, is {size / 1e6:.1f} MB")
        saved = load_file(directory / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
        trained = [parameter.ds_numel for parameter in trainer.model.parameters() if parameter.requires_grad]
        whole = sorted(tensor.numel() for tensor in saved.values()) == sorted(trained)
        check(whole and len(saved) == 2 * 37 + 2, "the adapter of 37 layers and the head were saved whole")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
