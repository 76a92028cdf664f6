"""What each process of `test_distributed` runs through transformers' Trainer, started by accelerate's launcher."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from distributed_worker import leave
from tiny_models import tiny_model
from trainers import losses
from veratune import VeraConfig, get_peft_model
from veratune.checkpoint import native
from veratune.integrations.trainer import VeraTrainer

GLOBAL_BATCH = 4


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.ids = torch.randint(3, 50, (24, 7), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.kind == "bert":
            return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 3}
        # Rows of different numbers of learned tokens, whose mean is not the mean of the processes' means.
        return {"input_ids": self.ids[index], "labels": self.ids[index].where(torch.arange(7) > index % 4, -100)}


def trainer_for(
    output: Path,
    count: int,
    kind: str,
    base: Callable[[str], Any] = tiny_model,
    deepspeed: dict[str, Any] | None = None,
    **settings: Any,
) -> VeraTrainer:
    # The arguments come first: with DeepSpeed they tell transformers how to load a model.
    arguments = TrainingArguments(
        str(output),
        per_device_train_batch_size=GLOBAL_BATCH // count,
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        seed=3,
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed,
        **settings,
    )
    torch.manual_seed(0)
    model = get_peft_model(base(kind), VeraConfig(r=4, target_modules="all-linear"))
    trainer = VeraTrainer(model, arguments, train_dataset=Rows(kind), eval_dataset=Rows(kind))
    # transformers multiplies the loss by the number of processes, and only language models divide it by all tokens.
    trainer.model_accepts_loss_kwargs = kind != "bert"
    return trainer


def gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def main(way: str, kind: str, output: Path, checkpoint: Path | None) -> None:
    """Train with DDP, from a checkpoint if there is one, or save a model that is sharded (FSDP2)."""
    torch.set_num_threads(1)
    written: list[str] = []
    write = native.write_tensors

    def counting(path: Path, *args: Any) -> None:
        written.append(path.parent.name)
        write(path, *args)

    native.write_tensors = counting
    trainer = trainer_for(output, int(os.environ["WORLD_SIZE"]), kind)
    if way == "fsdp2":
        for layer in trainer.model.base_model.bert.encoder.layer:
            fully_shard(layer)
        trainer.save_model(str(output / "sharded"))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    found = {
        "losses": losses(trainer),
        "written": gathered(written),
        "fingerprints": gathered(trainer.model.projection_scheme("default").fingerprint()),
        "distributed": str(trainer.args.distributed_state.distributed_type),
    }
    if dist.get_rank() == 0:
        (output / "result.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
