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

from distributed_worker import ROWS, batches, leave, model_for


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
    if rank == 0:
        held = sum(parameter.numel() for parameter in model.parameters())
        result = {"losses": [sum(each) / count for each in zip(*gathered, strict=True)], "held": held}
        (output / "result.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
