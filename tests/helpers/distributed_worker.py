"""What each process of `test_distributed` runs: some steps of training, in one of several ways of sharing them."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tiny_models import tiny_inputs, tiny_model
from veratune import VeraConfig, VeraModel, get_peft_model, projection_pool
from veratune.checkpoint import native

STEPS, ROWS = 4, 4


def leave() -> NoReturn:
    """End this process without the interpreter's end.

    What holds a process group, such as the mesh of a sharded model, keeps gloo's threads alive after the group is
    destroyed. One that lets go of a tensor while the interpreter ends wants its lock, and torch aborts the process.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 50, (STEPS, ROWS, 7), generator=generator)
    return [{"input_ids": rows, "labels": rows[:, 0] % 3} for rows in ids]


def model_for(kind: str, adapter: Path | None = None) -> VeraModel:
    base = tiny_model(kind)
    if adapter is not None:
        return VeraModel.from_pretrained(base, adapter, is_trainable=True)
    torch.manual_seed(0)
    return get_peft_model(base, VeraConfig(r=4, target_modules="all-linear"))


def train(model: nn.Module, share: slice, steps: list[dict[str, torch.Tensor]]) -> list[float]:
    """Return the losses of this process's rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in steps:
        loss = model(**{name: rows[share] for name, rows in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def shared(model: VeraModel, way: str) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp2":
        for layer in model.base_model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    return model


def what_is_refused(model: VeraModel, saved: Path, output: Path) -> dict[str, str]:
    """Return the messages of what needs whole parameters, by its name; what works has none."""
    attempts: dict[str, Any] = {
        "export_peft": lambda: model.export_peft(output),
        "export_lora": lambda: model.export_lora(output),
        "export_lora for vLLM": lambda: model.export_lora(output, engine="vllm"),
        "export_gguf": lambda: model.export_gguf(output),
        "add_adapter": lambda: model.add_adapter("new", VeraConfig(r=4, target_modules="all-linear")),
        "load_adapter": lambda: model.load_adapter(saved, "new"),
        "restore": lambda: model.restore(saved),
        "merge_adapter": model.merge_adapter,
        "merge_and_unload": model.merge_and_unload,
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def main(way: str, output: Path, adapter: Path | None) -> None:
    """Train in this process; rank and number of processes come from the environment."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    if way.startswith("tensor-parallel"):
        assert adapter is not None
        tensor_parallel(adapter, output, through_peft=way.endswith("peft"))
        return
    written: list[Path] = []
    write = native.write_tensors

    def counting(path: Path, *args: Any) -> None:
        written.append(path)
        write(path, *args)

    native.write_tensors = counting
    model = model_for("bert", adapter)
    trained = shared(model, way)
    rows = ROWS // count
    losses = train(trained, slice(rank * rows, (rank + 1) * rows), batches())
    gathered: list[Any] = [None] * count
    dist.all_gather_object(gathered, losses)
    fingerprints: list[Any] = [None] * count
    dist.all_gather_object(fingerprints, model.projection_scheme("default").fingerprint())
    held = [(info.side, info.rank, info.width) for info in projection_pool.summary()]
    widths = {(layer.in_features, layer.out_features) for layer in model.vera_layers().values()}
    model.save_pretrained(output / "adapter", is_main_process=rank == 0)
    refused: list[Any] = [None] * count
    if way == "fsdp2":
        dist.barrier()  # none may read the adapter before it is there
        dist.all_gather_object(refused, what_is_refused(model, output / "adapter", output / f"none-{rank}"))
    writers: list[Any] = [None] * count
    dist.all_gather_object(writers, len(written))
    if rank == 0:
        means = [sum(each) / count for each in zip(*gathered, strict=True)]
        whole = sorted({("A", 4, n) for n, _ in widths} | {("B", 4, m) for _, m in widths}) == sorted(held)
        result = {"losses": means, "fingerprints": fingerprints, "whole_projections": whole, "written": writers}
        result["refused"] = refused
        (output / "result.json").write_text(json.dumps(result))
    leave()


def tensor_parallel(base: Path, output: Path, *, through_peft: bool) -> None:
    """Try to adapt a model whose weights are spread over the processes, and note what is said and what is changed."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, tp_plan="auto").eval()
    inputs = {**tiny_inputs("llama"), "use_cache": False}
    with torch.no_grad():
        before = model(**inputs).logits
    names = {name: type(module) for name, module in model.named_modules()}
    try:
        if through_peft:
            import peft

            from veratune.integrations.peft import VeratuneConfig, install

            install()
            peft.get_peft_model(model, VeratuneConfig(r=4, target_modules=["q_proj", "o_proj"]))
        else:
            get_peft_model(model, VeraConfig(r=4, target_modules="all-linear"))
        message = "nothing was said"
    except ValueError as error:
        message = str(error)
    with torch.no_grad():
        same = torch.equal(model(**inputs).logits, before)
    unchanged = same and names == {name: type(module) for name, module in model.named_modules()}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (message, unchanged))
    if dist.get_rank() == 0:
        result = {"messages": [said for said, _ in found], "unchanged": all(same for _, same in found)}
        (output / "result.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
