"""transformers' Trainer on a VeraModel: as it is, and with checkpoints that hold adapters alone."""

import inspect
import random
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainingArguments

from tiny_models import randomise_trainable, tiny_inputs, tiny_model
from trainers import NoHub, Rows, arguments, assert_pushed, losses, model_of, state, trained_with_its_best
from veratune import CheckpointError, VeraConfig, VeraModel, get_peft_model, parameter_groups
from veratune.integrations.trainer import DIGESTS_NAME, VeraTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")


def test_the_signature_is_the_models() -> None:
    model = model_of()
    assert inspect.signature(model.forward) == inspect.signature(model.base_model.forward)
    assert transformers.utils.generic.find_labels(type(model)) == ["labels"]
    assert torch.equal(model(**tiny_inputs("bert")).logits, model.forward(**tiny_inputs("bert")).logits)


@pytest.mark.parametrize("trainer_class", [transformers.Trainer, VeraTrainer])
def test_training_goes_on_to_the_bit_where_it_was_interrupted(trainer_class: Any, tmp_path: Path) -> None:
    whole = trainer_class(model_of(), arguments(tmp_path / "whole"), train_dataset=Rows())
    whole.train()
    interrupted = trainer_class(model_of(), arguments(tmp_path / "parts"), train_dataset=Rows())

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 4

    interrupted.add_callback(Stop())
    interrupted.train()
    assert interrupted.state.global_step == 4
    resumed = trainer_class(model_of(), arguments(tmp_path / "parts"), train_dataset=Rows())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(state(resumed.model), state(whole.model), strict=True))


def test_checkpoints_hold_the_adapter_and_nothing_of_the_model(tmp_path: Path) -> None:
    trainer = VeraTrainer(model_of(), arguments(tmp_path, max_steps=4), train_dataset=Rows())
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in names and not any(name.startswith("model") for name in names)
    loaded = VeraModel.from_pretrained(tiny_model("bert"), checkpoint)
    with torch.no_grad():
        expected = trainer.model.eval()(**tiny_inputs("bert")).logits
        assert torch.equal(loaded(**tiny_inputs("bert")).logits, expected)


def test_the_best_checkpoint_is_put_back_and_evaluation_has_loss_and_metrics(tmp_path: Path) -> None:
    trainer = trained_with_its_best(VeraTrainer, tmp_path)
    best = VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(state(trainer.model), state(best), strict=True))
    assert {"eval_loss", "eval_accuracy"} <= set(trainer.evaluate())
    assert trainer.predict(Rows(5)).predictions.shape == (5, 3)


def test_columns_that_the_model_does_not_take_are_dropped_and_two_rates_are_used(tmp_path: Path) -> None:
    class WithText(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "text": "words"}

    model = model_of()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-2, head_lr=4e-3))
    before = state(model)
    trainer = VeraTrainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=WithText(), optimizers=(optimizer, None)
    )
    trainer.train()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [2e-2, 4e-3]
    assert all(not torch.equal(a, b) for a, b in zip(before, state(model), strict=True))


def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    other = get_peft_model(tiny_model("bert"), VeraConfig(r=4, target_modules=["query"]))
    other.save_pretrained(tmp_path / "layers")
    rank = get_peft_model(tiny_model("bert"), VeraConfig(r=5, target_modules="all-linear"))
    rank.save_pretrained(tmp_path / "rank")
    key = get_peft_model(tiny_model("bert"), VeraConfig(r=4, target_modules="all-linear", projection_prng_key=1))
    key.save_pretrained(tmp_path / "key")
    model = model_of()
    before = state(model)
    for name, message in (("layers", "is missing"), ("rank", "not have the shapes"), ("key", "different projections")):
        with pytest.raises(CheckpointError, match=message):
            model.restore(tmp_path / name)
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))


def _inside(path: Path, data: bytes) -> int:
    """Return the place of a byte that counts: not one of a header or of what fills the space between the parts."""
    if path.suffix == ".safetensors":
        return len(data) - 5
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    header = largest.header_offset
    name, extra = struct.unpack_from("<HH", data, header + 26)
    return int(header + 30 + name + extra + largest.file_size // 2)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_checkpoint_names_the_file_and_changes_nothing(name: str, damage: str, tmp_path: Path) -> None:
    VeraTrainer(model_of(), arguments(tmp_path, max_steps=4), train_dataset=Rows()).train()
    path = tmp_path / "checkpoint-4" / name
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[_inside(path, data)] ^= 0xFF
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2 if damage == "cut" else 0])
    model = model_of()
    before = state(model)
    trainer = VeraTrainer(model, arguments(tmp_path, max_steps=8), train_dataset=Rows())
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))


def test_a_checkpoint_without_its_state_or_adapter_is_refused(tmp_path: Path) -> None:
    VeraTrainer(model_of(), arguments(tmp_path, max_steps=4), train_dataset=Rows()).train()
    trainer = VeraTrainer(model_of(), arguments(tmp_path, max_steps=8), train_dataset=Rows())
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    checkpoint = tmp_path / "checkpoint-4"
    state_file = checkpoint / "trainer_state.json"
    text = state_file.read_text()
    state_file.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is not a JSON file"):
        trainer.train(resume_from_checkpoint=True)
    state_file.unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state\.json does not exist"):
        trainer.train(resume_from_checkpoint=True)
    state_file.write_text(text)
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no adapter"):
        trainer.train(resume_from_checkpoint=True)


def test_merged_adapters_are_not_trained(tmp_path: Path) -> None:
    model = model_of()
    model.merge_adapter()
    trainer = VeraTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=Rows())
    with pytest.raises(ValueError, match=r"\['default'\] are merged and would not be trained: call unmerge_adapter"):
        trainer.train()
    model.unmerge_adapter()
    before = state(model)
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, state(model), strict=True))


@pytest.mark.parametrize("trainer_class", [transformers.Trainer, VeraTrainer])
def test_labels_and_predictions_are_those_of_the_plain_model(trainer_class: Any, tmp_path: Path) -> None:
    model = randomise_trainable(model_of(), std=0.2).eval()
    trainer = trainer_class(model, arguments(tmp_path))
    assert trainer.label_names == ["labels"]
    ours = trainer.predict(Rows(5))
    plain = transformers.Trainer(model.merge_and_unload(), arguments(tmp_path)).predict(Rows(5))
    assert ours.predictions.shape == (5, 3)
    torch.testing.assert_close(torch.tensor(ours.predictions), torch.tensor(plain.predictions), rtol=1e-3, atol=1e-4)
    assert (ours.label_ids == plain.label_ids).all()
    assert ours.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], rel=1e-4)


@pytest.mark.parametrize("through", ["trainer", "model"])
def test_push_to_hub_uploads_the_adapter_and_not_the_model(through: str, hub: NoHub, tmp_path: Path) -> None:
    settings = arguments(tmp_path / "adapter", max_steps=4, hub_model_id="someone/adapter")
    trainer = VeraTrainer(model_of(), settings, train_dataset=Rows())
    trainer.train()
    if through == "trainer":
        trainer.push_to_hub(commit_message="an adapter")
    else:
        assert trainer.model.push_to_hub("someone/adapter") == hub.commit_url
    ((repository, files),) = hub.uploads
    assert repository == "someone/adapter"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= files
    assert not any("checkpoint" in name or name.startswith("model") for name in files)
    if through == "trainer":
        loaded = VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "adapter")
        assert all(torch.equal(a, b) for a, b in zip(state(loaded), state(trainer.model), strict=True))


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_pushing_while_training(strategy: str, hub: NoHub, tmp_path: Path) -> None:
    settings = arguments(
        tmp_path, max_steps=4, save_steps=2, push_to_hub=True, hub_model_id="someone/adapter", hub_strategy=strategy
    )
    trainer = VeraTrainer(model_of(), settings, train_dataset=Rows())
    trainer.train()
    trainer.push_to_hub()
    assert_pushed(hub, trainer, tmp_path)


def test_vectors_and_heads_have_rates_of_their_own(tmp_path: Path) -> None:
    """The vectors the one given, or VeRA's in place of transformers' default; heads and biases a tenth."""
    default = TrainingArguments("x").learning_rate
    for given, vectors_rate in ((2e-2, 2e-2), (default, 1e-2)):
        model = get_peft_model(tiny_model("bert"), VeraConfig(r=4, bias="all"))
        settings = arguments(tmp_path, learning_rate=given, weight_decay=0.1, max_steps=1)
        trainer = VeraTrainer(model, settings, train_dataset=Rows())
        if given == default:
            with pytest.warns(UserWarning, match="is the default of TrainingArguments.* trained at 0.01"):
                trainer.create_optimizer()
        else:
            trainer.create_optimizer()
        rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert rates.keys() == {id(p) for p in named.values()}
        for name, parameter in named.items():
            expected = vectors_rate if "vera_lambda_" in name else vectors_rate / 10
            assert rates[id(parameter)] == pytest.approx(expected), name
            assert decay[id(parameter)] == (0.0 if "bias" in name else 0.1), name
    optimizer = torch.optim.SGD(parameter_groups(model, lr=2e-2))
    given_one = VeraTrainer(model, arguments(tmp_path), train_dataset=Rows(), optimizers=(optimizer, None))
    assert given_one.create_optimizer() is optimizer and optimizer.param_groups[0]["lr"] == 2e-2


def test_rates_that_will_not_do_are_warned_of(tmp_path: Path) -> None:
    for rate, message in ((1e-4, "is low for VeRA"), (2.0, "is high for VeRA")):
        with pytest.warns(UserWarning, match=message):
            parameter_groups(model_of(), lr=rate)
        with pytest.warns(UserWarning, match=message):
            VeraTrainer(model_of(), arguments(tmp_path, learning_rate=rate), train_dataset=Rows()).create_optimizer()
    for usual in (1e-3, 3e-2, 0.1):
        parameter_groups(model_of(), lr=usual)


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="VeraTrainer trains a VeraModel, not a BertFor"):
        VeraTrainer(tiny_model("bert"), arguments(tmp_path, max_steps=1), train_dataset=Rows())


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_a_file_is_refused(name: str, digests: bool, tmp_path: Path) -> None:
    VeraTrainer(model_of(), arguments(tmp_path, max_steps=4), train_dataset=Rows()).train()
    (tmp_path / "checkpoint-4" / name).unlink()
    if not digests:
        if name == "rng_state.pth":
            pytest.skip("other trainers do not always write it")
        (tmp_path / "checkpoint-4" / DIGESTS_NAME).unlink()
    model = model_of()
    before = state(model)
    trainer = VeraTrainer(model, arguments(tmp_path, max_steps=8), train_dataset=Rows())
    with pytest.raises(CheckpointError, match=f"{name} does not exist"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))


def test_any_flipped_bit_beside_the_adapter_is_found_before_anything_changes(tmp_path: Path) -> None:
    VeraTrainer(model_of(), arguments(tmp_path, max_steps=4), train_dataset=Rows()).train()
    model = model_of()
    before = state(model)
    trainer = VeraTrainer(model, arguments(tmp_path, max_steps=8), train_dataset=Rows())
    checkpoint, generator = tmp_path / "checkpoint-4", random.Random(0)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        data = (checkpoint / name).read_bytes()
        for place in [0, 5, len(data) - 1, *(generator.randrange(len(data)) for _ in range(60))]:
            damaged = bytearray(data)
            damaged[place] ^= 1 << generator.randrange(8)
            (checkpoint / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is damaged"):
                trainer._load_from_checkpoint(str(checkpoint))
        (checkpoint / name).write_bytes(data)
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))
    trainer._load_from_checkpoint(str(checkpoint))
    assert any(not torch.equal(a, b) for a, b in zip(before, state(model), strict=True))
