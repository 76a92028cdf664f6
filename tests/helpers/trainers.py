from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainingArguments

from tiny_models import tiny_model
from veratune import VeraConfig, VeraModel, get_peft_model


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int = 12) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, 50, (count, 7), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 3}


def model_of(**settings: Any) -> VeraModel:
    torch.manual_seed(0)
    return get_peft_model(
        tiny_model("bert"), VeraConfig(r=4, target_modules="all-linear", vera_dropout=0.1, **settings)
    )


def arguments(directory: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        str(directory),
        **{
            "per_device_train_batch_size": 2,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "save_steps": 4,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "seed": 3,
            **settings,
        },
    )


def losses(trainer: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state(model: VeraModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.adapter_state("default").parameters()]


def trained_with_its_best(kind: type[transformers.Trainer], tmp_path: Path) -> transformers.Trainer:
    """A trainer after eight steps, of which a made-up metric finds the second checkpoint's the best."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = kind(
        model_of(),
        arguments(tmp_path, **settings, metric_for_best_model="accuracy", max_steps=8),
        train_dataset=Rows(),
        eval_dataset=Rows(7),
        compute_metrics=lambda output: {"accuracy": -float(trainer.state.global_step)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    return trainer


def assert_pushed(hub: "NoHub", trainer: Any, directory: Path) -> None:
    """The last upload is of the adapter alone, and a new model loads it from the directory."""
    _, files = hub.uploads[-1]
    assert "adapter_model.safetensors" in files and not any(name.startswith("model") for name in files)
    loaded = VeraModel.from_pretrained(tiny_model("bert"), directory)
    assert all(torch.equal(a, b) for a, b in zip(state(loaded), state(trainer.model), strict=True))


class NoHub:
    """Notes what would be uploaded, as (repository, files). There is no network in tests."""

    repo_id = "someone/adapter"
    commit_url = "https://huggingface.co/someone/adapter/commit/1"

    def __init__(self) -> None:
        self.uploads: list[tuple[str, set[str]]] = []

    def done(self) -> bool:
        return True  # an upload in the background

    def create_repo(self, *_: Any, **__: Any) -> "NoHub":
        return self

    def upload_folder(
        self, *, repo_id: str, folder_path: str, ignore_patterns: Any = None, allow_patterns: Any = None, **_: Any
    ) -> "NoHub":
        files = (str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file())
        kept = filter_repo_objects(files, ignore_patterns=ignore_patterns, allow_patterns=allow_patterns)
        self.uploads.append((repo_id, set(kept)))
        return self
