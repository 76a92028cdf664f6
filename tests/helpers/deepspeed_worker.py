"""What each process of `test_distributed` runs on DeepSpeed's engine, on CPUs."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
import transformers

from distributed_worker import ROWS, batches, leave, model_for, what_is_refused
from trainer_worker import gathered, losses, trainer_for

# Sums over shared memory, which would be compiled at the first use; gloo's do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def through_trainer(stage: int, output: Path, base: Path, checkpoint: Path | None) -> None:
    """Train as `trainer_worker` does, with a base model that transformers loads for DeepSpeed, or go on from there."""
    torch.set_num_threads(1)
    emptied: list[bool] = []
    config = transformers.AutoConfig.from_pretrained(base)

    def load(_: str) -> Any:
        model = getattr(transformers, config.architectures[0]).from_pretrained(base)
        emptied.append(all(parameter.numel() == 0 for parameter in model.parameters()))
        return model.eval()

    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    count = int(os.environ["WORLD_SIZE"])
    if checkpoint is None:
        # The best is the first one, whose adapter is not the last.
        best = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
        best |= {"metric_for_best_model": "steps_left", "greater_is_better": True}
        trainer = trainer_for(output, count, config.model_type, load, settings, **best)
        trainer.compute_metrics = lambda _: {"steps_left": 8.0 - trainer.state.global_step}
        trainer.train()
        trainer.save_model(str(output / "best"))
    else:
        trainer = trainer_for(output, count, config.model_type, load, settings)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    fingerprints = gathered(trainer.model.projection_scheme("default").fingerprint())
    if dist.get_rank() == 0:
        found = {"losses": losses(trainer), "emptied": emptied, "fingerprints": fingerprints}
        (output / "result.json").write_text(json.dumps(found))
    leave()


def main(stage: int, output: Path) -> None:
    """Train as `distributed_worker.train` does, and save the adapter."""
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    model = model_for("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = ROWS // count
    settings = {
        "train_micro_batch_size_per_gpu": rows,
        # All parameters are spread, the small ones too.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1 otherwise
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    share = slice(rank * rows, (rank + 1) * rows)
    losses = []
    for batch in batches():
        loss = engine(**{name: values[share] for name, values in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    gathered: list[Any] = [None] * count
    dist.all_gather_object(gathered, losses)
    model.save_pretrained(output / "adapter", is_main_process=rank == 0)
    held = sum(parameter.numel() for parameter in model.parameters())
    dist.barrier()  # none may read the adapter before it is there
    refused = what_is_refused(model, output / "adapter", output / f"none-{rank}") if stage == 3 else {}
    with torch.no_grad():
        after = float(engine(**{name: values[share] for name, values in batches()[0].items()}).loss)
    model.save_pretrained(output / "after", is_main_process=rank == 0)
    said: list[Any] = [None] * count
    dist.all_gather_object(said, (refused, after, sorted(path.name for path in output.glob("none-*"))))
    if rank == 0:
        result = {
            "losses": [sum(each) / count for each in zip(*gathered, strict=True)],
            "held": held,
            "refused": [messages for messages, _, _ in said],
            "after": sum(loss for _, loss, _ in said) / count,
            "exported": [names for _, _, names in said],
        }
        (output / "result.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        resumed = Path(sys.argv[4]) if len(sys.argv) > 4 else None
        through_trainer(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), resumed)
    else:
        main(int(sys.argv[1]), Path(sys.argv[2]))
