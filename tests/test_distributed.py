"""Two processes on one machine (gloo): the same losses as one, projections whole in each, one adapter saved."""

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
from veratune import VeraModel

WORKER = Path(__file__).with_name("distributed_worker.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def launch(way: str, output: Path, adapter: Path | None = None, count: int = 2) -> dict[str, Any]:
    output.mkdir()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    command = [sys.executable, str(WORKER), way, str(output), *([] if adapter is None else [str(adapter)])]
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


def vectors(model: VeraModel) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in model.adapter_state("default").parameters()]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(way: str, tmp_path: Path) -> None:
    alone = model_for("bert")
    expected = train(alone, slice(0, ROWS), batches())
    result = launch(way, tmp_path / "two")
    assert result["losses"] == pytest.approx(expected, rel=1e-5)
    assert len(set(result["fingerprints"])) == 1 and result["whole_projections"] is True
    saved = model_for("bert", tmp_path / "two" / "adapter")
    for ours, theirs in zip(vectors(saved), vectors(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    # On with another number of processes.
    on = train(saved, slice(0, ROWS), batches())
    again = launch(way, tmp_path / "again", tmp_path / "two" / "adapter")
    assert again["losses"] == pytest.approx(on, rel=1e-5)
