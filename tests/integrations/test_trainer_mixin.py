"""`VeraTrainerMixin` before trainers of one's own, and transformers' Trainer, which stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tiny_models import TARGETS, main_output, tiny_model
from trainers import NoHub, Rows, arguments, assert_pushed, losses, state, trained_with_its_best
from veratune import CheckpointError, VeraConfig, VeraModel, get_peft_model
from veratune.integrations.trainer import DIGESTS_NAME, VeraTrainer, VeraTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")


class Theirs(transformers.Trainer):
    """A trainer that somebody else wrote."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class Mine(VeraTrainerMixin, Theirs):
    pass


class MineForText(VeraTrainerMixin, transformers.Seq2SeqTrainer):
    pass


class TextRows(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def model_of(kind: str) -> VeraModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_model(kind), VeraConfig(r=4, target_modules=TARGETS[kind], vera_dropout=0.1))


def rows_of(kind: str, count: int = 12) -> Rows:
    return Rows(count) if kind == "bert" else TextRows(count)


def trainer_of(kind: str, directory: Path, make: Callable[..., Any] = Mine, **settings: Any) -> Any:
    return make(model_of(kind), arguments_for(make, directory, **settings), train_dataset=rows_of(kind))


def arguments_for(make: Any, directory: Path, **settings: Any) -> transformers.TrainingArguments:
    given = arguments(directory, **settings)
    if make is not MineForText:
        return given
    own = transformers.Seq2SeqTrainingArguments(given.output_dir)
    vars(own).update(vars(given))
    return own


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 4


# GPT-2's head is its table of tokens, which the plain Trainer could not write at all.
@pytest.mark.parametrize(("kind", "make"), [("bert", Mine), ("gpt2", Mine), ("gpt2", MineForText)])
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
        *("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", DIGESTS_NAME),
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
    trainer = trained_with_its_best(Mine, tmp_path)
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


def test_a_checkpoint_with_the_complete_model_is_refused(tmp_path: Path) -> None:
    trainer_of("bert", tmp_path, transformers.Trainer, max_steps=4).train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    trainer = trainer_of("bert", tmp_path, max_steps=8)
    before = state(trainer.model)
    with pytest.raises(CheckpointError, match=r"has no adapter.*It has a full model"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(before, state(trainer.model), strict=True))


def test_it_trains_as_vera_trainer_does(tmp_path: Path) -> None:
    mine = trainer_of("bert", tmp_path / "mine", max_steps=4)
    mine.train()
    ours = trainer_of("bert", tmp_path / "ours", VeraTrainer, max_steps=4)
    ours.train()
    assert losses(mine) == losses(ours) and len(losses(mine)) == 4
    assert all(torch.equal(a, b) for a, b in zip(state(mine.model), state(ours.model), strict=True))


def test_rates_that_a_class_chooses_itself_stay(tmp_path: Path) -> None:
    class Chosen(transformers.Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.SGD(trained, lr=0.7)
            return self.optimizer

    class MineChosen(VeraTrainerMixin, Chosen):
        pass

    optimizer = trainer_of("bert", tmp_path, MineChosen, learning_rate=5e-5).create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [0.7]


def test_a_mixin_behind_a_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Theirs precedes VeraTrainerMixin.*class Late\(VeraTrainerMixin, Theirs"):
        type("Late", (Theirs, VeraTrainerMixin), {})
    with pytest.raises(TypeError, match="Late: Theirs precedes VeraTrainerMixin"):
        type("Late", (Theirs, VeraTrainerMixin, transformers.Trainer), {})
    derived: Any = type("Derived", (type("More", (Mine,), {}), VeraTrainerMixin), {})
    assert derived.save_model is VeraTrainerMixin.save_model


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Mine trains a VeraModel, not a BertFor"):
        Mine(tiny_model("bert"), arguments(tmp_path), train_dataset=Rows())


def test_transformers_trainer_is_not_changed(tmp_path: Path) -> None:
    before = dict(vars(transformers.Trainer))
    trainer_of("bert", tmp_path / "mine", max_steps=4).train()
    assert dict(vars(transformers.Trainer)) == before
    trainer_of("bert", tmp_path / "plain", transformers.Trainer, max_steps=4).train()
    assert (tmp_path / "plain" / "checkpoint-4" / "model.safetensors").is_file()


def test_push_to_hub_uploads_the_adapter_and_not_the_model(hub: NoHub, tmp_path: Path) -> None:
    trainer = trainer_of("bert", tmp_path, max_steps=4, hub_model_id="someone/adapter", push_to_hub=True)
    trainer.train()
    trainer.push_to_hub()
    assert_pushed(hub, trainer, tmp_path)
