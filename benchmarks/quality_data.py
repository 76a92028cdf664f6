"""The quality study's folder of tasks and weights: rows as token ids, and a small encoder in half precision.

A folder holds `study.json`, `model.safetensors` and one `<task>.safetensors` a task. It needs no tokenizer, no data
package and no hub, so that it can be taken to a machine that has none of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

PAD = 0
"""The token id that fills rows up; no row holds it otherwise."""

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Texts as token ids (rows, length), filled up with `PAD`, and their labels (rows,); both int64."""

    token_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.token_ids.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: of its file.
        classes: how many labels there are.
        epochs: how often a run sees the training rows.
        digest: identifies the rows, their order and their parts.
        rows: the parts' rows, by name (`PARTS`).
    """

    name: str
    classes: int
    epochs: int
    digest: str
    rows: Mapping[str, Rows]


@dataclass(frozen=True)
class Study:
    """What a folder holds."""

    tasks: Mapping[str, Task]
    config: dict[str, Any]
    weights: dict[str, Tensor]
    digest: str

    def new_model(self, classes: int, device: torch.device) -> BertForSequenceClassification:
        """Return the encoder in float32 with a classification head, whose weights are not set yet."""
        config = BertConfig(**self.config, num_labels=classes)
        with torch.device("meta"):
            model = BertForSequenceClassification._from_config(config, attn_implementation="sdpa")
        model.to_empty(device=device)
        positions = torch.arange(config.max_position_embeddings, device=device)[None]
        model.bert.embeddings.position_ids = positions
        model.bert.embeddings.token_type_ids = torch.zeros_like(positions)
        weights = {name: weight.to(device, torch.float32) for name, weight in self.weights.items()}
        model.bert.load_state_dict(weights)
        return model


def split(token_ids: Sequence[Sequence[int]], labels: Sequence[int], length: int) -> Rows:
    """Return texts, each as long as it is, as `Rows` of one length."""
    filled = torch.full((len(token_ids), length), PAD, dtype=torch.int64)
    for row, ids in enumerate(token_ids):
        filled[row, : len(ids)] = torch.tensor(ids)
    return Rows(filled, torch.tensor(labels))


def write_task(folder: Path, name: str, classes: int, epochs: int, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Write a task's rows, and return what `study.json` says of it."""
    tensors = {f"{part}_ids": rows[part].token_ids.to(torch.int16) for part in PARTS}
    tensors |= {f"{part}_labels": rows[part].labels.to(torch.int16) for part in PARTS}
    save_file(tensors, folder / f"{name}.safetensors")
    return {"classes": classes, "epochs": epochs, "digest": _digest(tensors)}


def write_study(
    folder: Path, tasks: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write the encoder, rounded to half precision, and what `write_task` returned for each task."""
    halves = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors")
    values = {"tasks": tasks, "config": config, "digest": _digest(halves)}
    (folder / "study.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_study(folder: Path) -> Study:
    """Read a folder that `python benchmarks/quality.py prepare` wrote."""
    path = folder / "study.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `python benchmarks/quality.py prepare --data {folder}` first")
    values = json.loads(path.read_text(encoding="utf-8"))
    tasks = {name: _read_task(folder, name, **described) for name, described in values["tasks"].items()}
    return Study(tasks, values["config"], load_file(folder / "model.safetensors"), values["digest"])


def _read_task(folder: Path, name: str, classes: int, epochs: int, digest: str) -> Task:
    tensors = load_file(folder / f"{name}.safetensors")
    if _digest(tensors) != digest:
        raise SystemExit(
            f"{folder / name}.safetensors is not the one that study.json describes: prepare the data again"
        )
    rows = {part: Rows(tensors[f"{part}_ids"].long(), tensors[f"{part}_labels"].long()) for part in PARTS}
    return Task(name, classes, epochs, digest, rows)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        sha.update(tensors[name].contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
