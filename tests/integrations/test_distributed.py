"""Two processes on one machine (gloo): the same losses as one, projections whole in each, one adapter saved."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_worker import ROWS, batches, model_for, train
from tiny_models import tiny_model
from trainer_worker import trainer_for
from trainers import losses
from veratune import VeraModel

WORKER = Path(__file__).parents[1].joinpath("helpers", "distributed_worker.py")
DEEPSPEED = Path(__file__).parents[1].joinpath("helpers", "deepspeed_worker.py")
# What writes an adapter in other formats.
EXPORTS = ["export_peft", "export_lora", "export_lora for vLLM", "export_gguf"]
TRAINER = Path(__file__).parents[1].joinpath("helpers", "trainer_worker.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def launch(way: str, output: Path, adapter: Path | None = None, count: int = 2) -> dict[str, Any]:
    command = [sys.executable, str(WORKER), way, str(output), *([] if adapter is None else [str(adapter)])]
    return finished(command, output, count)


def finished(command: list[str], output: Path, count: int = 2) -> dict[str, Any]:
    """Run a command in each of several processes and return what the first one has found."""
    output.mkdir()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    result: dict[str, Any] = json.loads((output / "result.json").read_text())
    return result


def accelerated(way: str, kind: str, output: Path, checkpoint: Path | None = None, count: int = 2) -> dict[str, Any]:
    """Run the Trainer's worker as `accelerate launch` does, which calls several processes "multi_gpu" whatever runs."""
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={count}"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    command += [str(TRAINER), way, kind, str(output), *([] if checkpoint is None else [str(checkpoint)])]
    run = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result: dict[str, Any] = json.loads((output / "result.json").read_text())
    return result


def vectors(model: VeraModel) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in model.adapter_state("default").parameters()]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(way: str, tmp_path: Path) -> None:
    alone = model_for("bert")
    expected = train(alone, slice(0, ROWS), batches())
    result = launch(way, tmp_path / "two")
    assert result["losses"] == pytest.approx(expected, rel=1e-5)
    assert len(set(result["fingerprints"])) == 1 and result["whole_projections"] is True
    for messages in result["refused"] if way == "fsdp2" else []:  # what needs whole parameters
        assert list(messages) == [*EXPORTS, "add_adapter", "load_adapter", "merge_adapter", "merge_and_unload"]
        assert all("across processes ((Shard(dim=0),))" in message for message in messages.values()), messages
        assert not list((tmp_path / "two").glob("none-*"))
    saved = model_for("bert", tmp_path / "two" / "adapter")
    for ours, theirs in zip(vectors(saved), vectors(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    # On with another number of processes: from two to one, and from one to two.
    on = train(saved, slice(0, ROWS), batches())
    again = launch(way, tmp_path / "again", tmp_path / "two" / "adapter")
    assert again["losses"] == pytest.approx(on, rel=1e-5)
    alone.save_pretrained(tmp_path / "one")
    grown = launch(way, tmp_path / "grown", tmp_path / "one")
    assert grown["losses"] == pytest.approx(train(alone, slice(0, ROWS), batches()), rel=1e-5)
    for each in (result, again, grown):
        assert each["written"] == [1, 0]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_trainer_goes_on_with_another_number_of_processes(kind: str, tmp_path: Path) -> None:
    """Through `accelerate launch` and DDP, with the optimizer's state: two processes to one, one to two."""
    alone = trainer_for(tmp_path / "alone", 1, kind)
    alone.train()
    expected = losses(alone)
    assert len(expected) == 8
    two = accelerated("ddp", kind, tmp_path / "two")
    assert two["distributed"].endswith("MULTI_CPU") and len(set(two["fingerprints"])) == 1
    # Both checkpoints, by the first process alone.
    assert two["written"] == [["checkpoint-4", "checkpoint-8"], []]
    assert two["losses"] == pytest.approx(expected, rel=1e-4)
    less = trainer_for(tmp_path / "less", 1, kind)
    less.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-4"))
    assert losses(less) == pytest.approx(expected, rel=1e-4)
    more = accelerated("ddp", kind, tmp_path / "more", tmp_path / "alone" / "checkpoint-4")
    assert more["losses"] == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(vectors(less.model), vectors(alone.model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_the_trainer_saves_a_sharded_model_whole_and_once(tmp_path: Path) -> None:
    result = accelerated("fsdp2", "bert", tmp_path / "out")
    assert result["written"] == [["sharded"], []]
    saved = VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "out" / "sharded")
    for ours, theirs in zip(vectors(saved), vectors(trainer_for(tmp_path, 1, "bert").model), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", ["tensor-parallel", "tensor-parallel-peft"])
def test_a_tensor_parallel_base_is_refused_unchanged(way: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    result = launch(way, tmp_path / "out", tmp_path / "base")
    assert len(result["messages"]) == 2 and len(set(result["messages"])) == 1
    assert "sharded across processes" in result["messages"][0] and "layers.0.self_attn.q_proj" in result["messages"][0]
    assert result["unchanged"] is True


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_learns_what_one_process_does(stage: int, tmp_path: Path) -> None:
    alone = model_for("bert")
    expected = train(alone, slice(0, ROWS), batches())
    result = finished([sys.executable, str(DEEPSPEED), str(stage), str(tmp_path / "out")], tmp_path / "out")
    assert result["losses"] == pytest.approx(expected, rel=1e-5)
    assert result["held"] == (0 if stage == 3 else sum(p.numel() for p in alone.parameters()))
    for name in ("adapter", "after"):
        saved = model_for("bert", tmp_path / "out" / name)
        for ours, theirs in zip(vectors(saved), vectors(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert result["after"] == pytest.approx(float(alone.eval()(**batches()[0]).loss), rel=1e-4)
    # What needs whole parameters is refused in each process, and changes nothing.
    puts = ["add_adapter", "load_adapter", "restore", "merge_adapter", "merge_and_unload"]
    for messages in result["refused"]:
        assert list(messages) == ([*EXPORTS, *puts] if stage == 3 else [])
        assert all("by DeepSpeed's ZeRO-3" in message for message in messages.values()), messages
        assert all("one process" in messages[name] for name in messages if name not in puts[:3])
    assert result["exported"] == [[], []]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize(("kind", "stage"), [("bert", 2), ("gpt2", 3), ("mixtral", 3)])
def test_the_trainer_with_deepspeed(kind: str, stage: int, tmp_path: Path) -> None:
    """On a base model that transformers loads for DeepSpeed: for ZeRO-3, it is spread before it is adapted."""
    tiny_model(kind).save_pretrained(tmp_path / "base")
    alone = trainer_for(tmp_path / "alone", 1, kind)
    alone.train()

    def launched(name: str, *checkpoint: Path) -> dict[str, Any]:
        command = [sys.executable, str(DEEPSPEED), str(stage), str(tmp_path / name), str(tmp_path / "base")]
        return finished([*command, *map(str, checkpoint)], tmp_path / name)

    result = launched("two")
    assert result["emptied"] == [stage == 3]
    assert len(result["fingerprints"]) == 2 and len(set(result["fingerprints"])) == 1
    assert result["losses"] == pytest.approx(losses(alone), rel=1e-4)
    saved = VeraModel.from_pretrained(tiny_model(kind), tmp_path / "two" / "checkpoint-8").adapter_state("default")
    expected = alone.model.adapter_state("default")
    assert saved.vectors.keys() == expected.vectors.keys() and saved.saved.keys() == expected.saved.keys()
    for name, own in expected.vectors.items():
        torch.testing.assert_close(saved.vectors[name], own, rtol=1e-3, atol=1e-5)
    for name, head in expected.saved.items():
        torch.testing.assert_close(saved.saved[name], head, rtol=1e-3, atol=1e-5)
    # The engine's own part of a checkpoint holds what is trained, and no tied name of what is not.
    states = list((tmp_path / "two" / "checkpoint-4").glob("global_step4/*model_states.pt"))
    trained = {name for name, parameter in alone.model.named_parameters() if parameter.requires_grad}
    assert len(states) == (2 if stage == 3 else 1)
    for path in states:
        held = torch.load(path, weights_only=False)
        assert held["module"].keys() == trained and not held["frozen_param_fragments"]
    first, last, best = (
        [v.clone() for v in vectors(VeraModel.from_pretrained(tiny_model(kind), tmp_path / "two" / name))]
        for name in ("checkpoint-4", "checkpoint-8", "best")
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(best, first, strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(best, last, strict=True))
    again = launched("again", tmp_path / "two" / "checkpoint-4")
    assert again["losses"] == pytest.approx(losses(alone), rel=1e-4)
    assert not (tmp_path / "again" / "checkpoint-4").exists()
