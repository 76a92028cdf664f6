"""transformers' own Trainer, unchanged but for `install()`, on a VeraModel and on what is none."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tiny_models import TARGETS, main_output, tiny_inputs, tiny_model
from trainers import NoHub, Rows, arguments, losses, state, trained_with_its_best
from veratune import CheckpointError, VeraConfig, VeraModel, get_peft_model
from veratune.integrations.trainer import VeraTrainer, install

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
METHODS = ("_save", "_load_from_checkpoint", "_load_best_model")


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    before = {name: getattr(transformers.Trainer, name) for name in METHODS}
    install()
    patched = {name: getattr(transformers.Trainer, name) for name in METHODS}
    assert all(patched[name] is not before[name] for name in METHODS)
    install()
    assert all(getattr(transformers.Trainer, name) is patched[name] for name in METHODS)
    yield
    for name, method in before.items():
        setattr(transformers.Trainer, name, method)


class TextRows(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def model_of(kind: str) -> VeraModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_model(kind), VeraConfig(r=4, target_modules=TARGETS[kind], vera_dropout=0.1))


def rows_of(kind: str, count: int = 12) -> Rows:
    return Rows(count) if kind == "bert" else TextRows(count)


def trainer_of(kind: str, directory: Path, make: Callable[..., Any] = transformers.Trainer, **settings: Any) -> Any:
    return make(model_of(kind), arguments(directory, **settings), train_dataset=rows_of(kind))


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 4


class Mine(transformers.Trainer):
    """A user's own, with a method of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


# GPT-2's head is its table of tokens, which the plain Trainer could not write at all.
@pytest.mark.parametrize(
    ("kind", "make"), [("bert", transformers.Trainer), ("gpt2", transformers.Trainer), ("bert", Mine)]
)
def test_checkpoints_are_adapters_and_training_goes_on_from_them_to_the_bit(
    kind: str, make: Any, tmp_path: Path
) -> None:
    whole = trainer_of(kind, tmp_path / "whole", make)
    whole.train()
    interrupted = trainer_of(kind, tmp_path / "parts", make)
    interrupted.add_callback(Stop())
    interrupted.train()
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert {path.name for path in checkpoint.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
    }
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    trained = {parameter.numel() for parameter in interrupted.model.adapter_state("default").parameters()}
    assert {tensor.numel() for tensor in tensors.values()} == trained
    assert sum(t.numel() for t in tensors.values()) == interrupted.model.get_nb_trainable_parameters()[0]
    resumed = trainer_of(kind, tmp_path / "parts", make)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 12
    assert all(torch.equal(a, b) for a, b in zip(state(resumed.model), state(whole.model), strict=True))
    loaded = VeraModel.from_pretrained(tiny_model(kind), tmp_path / "parts" / "checkpoint-12")
    with torch.no_grad():
        assert torch.equal(main_output(loaded, kind), main_output(whole.model.eval(), kind))


def test_the_best_checkpoint_is_put_back(tmp_path: Path) -> None:
    trainer = trained_with_its_best(transformers.Trainer, tmp_path)
    best = VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "checkpoint-2")
    last = VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "checkpoint-8")
    assert all(torch.equal(a, b) for a, b in zip(state(trainer.model), state(best), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(state(trainer.model), state(last), strict=True))
    assert trainer.predict(Rows(5)).predictions.shape == (5, 3)


def test_a_checkpoint_that_is_not_an_adapters_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    trainer_of("bert", tmp_path, max_steps=4).train()
    path = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    trainer = trainer_of("bert", tmp_path, max_steps=8)
    before = state(trainer.model)
    with pytest.raises(CheckpointError, match="adapter_model"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(before, state(trainer.model), strict=True))


def test_a_whole_model_from_before_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        for name in METHODS:
            without.setattr(transformers.Trainer, name, getattr(transformers.Trainer, name).__wrapped__)
        whole = trainer_of("bert", tmp_path / "whole")
        whole.train()
        first = trainer_of("bert", tmp_path / "parts")
        first.add_callback(Stop())
        first.train()
    assert (tmp_path / "parts" / "checkpoint-4" / "model.safetensors").is_file()
    resumed = trainer_of("bert", tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert not (tmp_path / "parts" / "checkpoint-12" / "model.safetensors").exists()


def test_other_models_and_trainers_are_as_before(tmp_path: Path) -> None:
    plain = transformers.Trainer(tiny_model("bert"), arguments(tmp_path / "plain", max_steps=4), train_dataset=Rows())
    plain.train()
    assert (tmp_path / "plain" / "checkpoint-4" / "model.safetensors").is_file()
    again = transformers.Trainer(tiny_model("bert"), arguments(tmp_path / "plain", max_steps=5), train_dataset=Rows())
    again.train(resume_from_checkpoint=True)
    assert losses(again)[:4] == losses(plain) and again.state.global_step == 5
    ours = trainer_of("bert", tmp_path / "ours", VeraTrainer, max_steps=4)
    ours.train()
    loaded = VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "ours" / "checkpoint-4")
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_inputs("bert")).logits, ours.model.eval()(**tiny_inputs("bert")).logits)


def test_push_to_hub_uploads_the_adapter_and_not_the_model(hub: NoHub, tmp_path: Path) -> None:
    trainer = trainer_of("bert", tmp_path, max_steps=4, hub_model_id="someone/adapter", push_to_hub=True)
    trainer.train()
    trainer.push_to_hub()
    _, files = hub.uploads[-1]
    assert "adapter_model.safetensors" in files and not any(name.startswith("model") for name in files)
    loaded = VeraModel.from_pretrained(tiny_model("bert"), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(state(loaded), state(trainer.model), strict=True))
