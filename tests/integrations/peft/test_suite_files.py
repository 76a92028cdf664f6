"""What PEFT writes and reads of adapters on veratune's layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_suite import HEADS, KINDS, base, call, outputs, trainable, tuned, vectors_of
from reference import relative
from tiny_models import randomise_trainable

peft = pytest.importorskip("peft")

from veratune.config import PEFT_TYPE  # noqa: E402
from veratune.integrations.peft.layers import TunedLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
Make = Callable[..., Any]
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_saving_and_loading(self, peft_config: Make, kind: str, tmp_path: Path) -> None:
        model = tuned(kind, peft_config(kind))
        expected = outputs(model, kind)
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "adapter_config.json", "README.md"}
        loaded = peft.PeftModel.from_pretrained(base(kind), tmp_path)
        assert torch.equal(outputs(loaded, kind), expected) and not trainable(loaded)
        state, again = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(loaded)
        assert state.keys() == again.keys() and len(load_file(tmp_path / WEIGHTS)) == len(state)
        assert all(torch.equal(state[name], again[name]) for name in state)
        named = peft.PeftModel.from_pretrained(base(kind), tmp_path, adapter_name="other", is_trainable=True)
        assert torch.equal(outputs(named, kind), expected) and trainable(named) == set(vectors_of(named, "other"))

    def test_training_goes_on_after_loading(self, peft_config: Make, kind: str, tmp_path: Path) -> None:
        tuned(kind, peft_config(kind)).save_pretrained(tmp_path)
        gradients = []
        for model in (
            tuned(kind, peft_config(kind)),
            peft.PeftModel.from_pretrained(base(kind), tmp_path, is_trainable=True),
        ):
            call(model.train(), kind).square().sum().backward()
            gradients.append([p.grad for p in vectors_of(model).values()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    def test_loading_without_filling_the_memory_first(self, peft_config: Make, kind: str, tmp_path: Path) -> None:
        model = tuned(kind, peft_config(kind))
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=True)
        assert not any(p.is_meta for p in loaded.parameters())
        assert torch.equal(outputs(loaded, kind), outputs(model, kind))
        loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
        loaded.set_adapter("other")
        assert torch.equal(outputs(loaded, kind), outputs(model, kind))
        assert {p.dtype for p in vectors_of(loaded, "other").values()} == {torch.float32}
        empty = peft.get_peft_model(base(kind), peft_config(kind), low_cpu_mem_usage=True)
        assert all(p.is_meta for p in vectors_of(empty).values())
        peft.set_peft_model_state_dict(empty, peft.get_peft_model_state_dict(model), low_cpu_mem_usage=True)
        assert torch.equal(outputs(empty, kind), outputs(model, kind))

    def test_several_adapters_have_folders(self, peft_config: Make, kind: str, tmp_path: Path) -> None:
        model = tuned(kind, peft_config(kind))
        model.add_adapter("other", peft_config(kind))
        model.set_adapter("other")
        randomise_trainable(model, seed=8, std=0.3)
        second = outputs(model, kind)
        model.save_pretrained(tmp_path / "all")
        model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
        assert (tmp_path / "all" / WEIGHTS).exists() and (tmp_path / "all" / "other" / WEIGHTS).exists()
        assert not (tmp_path / "one" / WEIGHTS).exists() and (tmp_path / "one" / "other" / WEIGHTS).exists()
        with pytest.raises(ValueError, match="invalid `selected_adapters`"):
            model.save_pretrained(tmp_path / "none", selected_adapters=["unknown"])
        loaded = peft.PeftModel.from_pretrained(base(kind), tmp_path / "all")
        loaded.load_adapter(tmp_path / "one" / "other", "other")
        model.set_adapter("default")
        assert torch.equal(outputs(loaded, kind), outputs(model, kind))
        loaded.set_adapter("other")
        assert torch.equal(outputs(loaded, kind), second)

    def test_a_state_has_no_adapters_names(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind), "a-name")
        state = peft.get_peft_model_state_dict(model, adapter_name="a-name")
        assert state and not any("a-name" in key for key in state)
        other = peft.get_peft_model(base(kind), peft_config(kind))
        result = peft.set_peft_model_state_dict(other, state)
        assert not result.unexpected_keys
        assert torch.equal(outputs(other, kind), outputs(model, kind))


def test_names_that_are_parts_of_others(peft_config: Make, tmp_path: Path) -> None:
    """Adapters called like a layer, like a part of another's name, like a vector."""
    names = ["lin", "lin0", "default", "default_2", "lambda_b"]
    model = tuned("mlp", peft_config(), names[0])
    expected = {names[0]: outputs(model, "mlp")}
    for seed, name in enumerate(names[1:]):
        model.add_adapter(name, peft_config())
        model.set_adapter(name)
        randomise_trainable(model, seed=seed, std=0.3)
        expected[name] = outputs(model, "mlp")
    model.save_pretrained(tmp_path)
    for name in names:
        path = tmp_path if name == "default" else tmp_path / name
        kept = [key for key in load_file(path / WEIGHTS) if "vera_lambda_" in key]
        assert len(kept) == 4, (name, kept)
        loaded = peft.PeftModel.from_pretrained(base("mlp"), path)
        assert torch.equal(outputs(loaded, "mlp"), expected[name])


@pytest.mark.parametrize("kind", list(HEADS))
def test_heads_and_biases_are_saved(peft_config: Make, kind: str, tmp_path: Path) -> None:
    model = tuned(kind, peft_config(kind, modules_to_save=[HEADS[kind]]))
    model.save_pretrained(tmp_path / "head")
    loaded = peft.PeftModel.from_pretrained(base(kind), tmp_path / "head")
    assert torch.equal(outputs(loaded, kind), outputs(model, kind))
    model.add_adapter("plain", peft_config(kind))
    loaded.load_adapter(tmp_path / "head", "again")
    loaded.set_adapter("again")
    model.set_adapter("default")
    assert torch.equal(outputs(loaded, kind), outputs(model, kind))
    for bias in ("all", "vera_only"):
        model = tuned(kind, peft_config(kind, bias=bias))
        model.save_pretrained(tmp_path / bias)
        loaded = peft.PeftModel.from_pretrained(base(kind), tmp_path / bias)
        assert torch.equal(outputs(loaded, kind), outputs(model, kind))


def test_a_configuration_comes_back_as_it_was(peft_config: Make, tmp_path: Path) -> None:
    settings = {"vera_dropout": 0.25, "d_initial": 0.3, "projection_prng_key": 77, "bias": "vera_only", "r": 5}
    config = peft_config(**settings, modules_to_save=["head"], task_type=None, revision="main")
    peft.get_peft_model(base("mlp"), config).save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config) and loaded.inference_mode is True
    differing = {name for name, value in config.to_dict().items() if loaded.to_dict()[name] != value}
    assert differing <= {"inference_mode", "auto_mapping"}
    assert settings.items() <= json.loads((tmp_path / "adapter_config.json").read_text()).items()
    model = peft.PeftModel.from_pretrained(base("mlp"), tmp_path, config=loaded)
    assert model.peft_config["default"] is loaded


def test_no_pickles_are_needed(peft_config: Make, tmp_path: Path) -> None:
    model = tuned("mlp", peft_config())
    model.save_pretrained(tmp_path, safe_serialization=True)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = peft.PeftModel.from_pretrained(base("mlp"), tmp_path, use_safetensors=True)
    assert torch.equal(outputs(loaded, "mlp"), outputs(model, "mlp"))


def test_a_name_that_is_there_is_loaded_over(peft_config: Make, tmp_path: Path) -> None:
    model = tuned("mlp", peft_config())
    expected = outputs(model, "mlp")
    model.save_pretrained(tmp_path)
    other = tuned("mlp", peft_config(), seed=12)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(other, "mlp"), expected)


def test_missing_and_unknown_tensors_are_reported(peft_config: Make, tmp_path: Path) -> None:
    if peft_config().peft_type == PEFT_TYPE:
        pytest.skip("PEFT's own files; veratune's are in test_files.py")
    tuned("mlp", peft_config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.lin0.vera_lambda_b"
    save_file(
        {**{k: v for k, v in tensors.items() if k != name}, "base_model.model.foo.bar": torch.ones(1)},
        tmp_path / WEIGHTS,
        metadata={"format": "pt"},
    )
    with pytest.warns(UserWarning, match=r"missing adapter keys.*lin0\.vera_lambda_b"):
        peft.PeftModel.from_pretrained(base("mlp"), tmp_path)
    model = tuned("mlp", peft_config())
    result = model.load_adapter(tmp_path, "other")
    assert result.unexpected_keys == ["base_model.model.foo.bar"]
    assert [key for key in result.missing_keys if key.endswith(".other")] == [f"{name}.other"]


def test_another_rank_in_the_file_is_refused(peft_config: Make, tmp_path: Path) -> None:
    if peft_config().peft_type == PEFT_TYPE:
        pytest.skip("PEFT's own files; veratune's are in test_files.py")
    tuned("mlp", peft_config(r=5)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({**values, "r": 4, "save_projection": False} if "save_projection" in values else {**values, "r": 4})
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(base("mlp"), tmp_path)


def test_adapters_of_other_ranks_are_loaded_beside_each_other(peft_config: Make, tmp_path: Path) -> None:
    expected = {}
    for rank in (6, 2, 9):
        model = tuned("bert", peft_config("bert", r=rank))
        expected[rank] = outputs(model, "bert")
        model.save_pretrained(tmp_path / str(rank))
    model = peft.PeftModel.from_pretrained(base("bert"), tmp_path / "6", adapter_name="6")
    for rank in (2, 9):
        model.load_adapter(tmp_path / str(rank), str(rank))
    for rank in (9, 2, 6):
        model.set_adapter(str(rank))
        assert torch.equal(outputs(model, "bert"), expected[rank])


def test_auto_classes_find_the_base_model(peft_config: Make, tmp_path: Path) -> None:
    plain = base("bert")
    plain.save_pretrained(tmp_path / "base")
    model = type(plain).from_pretrained(tmp_path / "base")
    model = randomise_trainable(peft.get_peft_model(model, peft_config("bert", task_type="SEQ_CLS")), 7, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))
    assert any(isinstance(module, TunedLayer) for module in loaded.modules())


def test_a_card_is_written_and_one_that_is_there_is_kept(peft_config: Make, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nmeta: hello\n---\n# My card\n")
    tuned("mlp", peft_config()).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# My card" in card and "library_name: peft" in card and "PEFT" in card


@pytest.mark.parametrize("save_projection", [True, False])
def test_projections_are_written_where_pefts_own_configuration_says_so(
    peft_config: Make, save_projection: bool, tmp_path: Path
) -> None:
    if type(peft_config()) is not peft.VeraConfig:
        pytest.skip("PEFT's own files; veratune's are in test_files.py")
    model = tuned("mlp", peft_config(save_projection=save_projection))
    model.add_adapter("other", peft_config(save_projection=save_projection, r=6))
    model.save_pretrained(tmp_path)
    for path, rank in ((tmp_path, 4), (tmp_path / "other", 6)):
        tensors = load_file(path / WEIGHTS)
        found = {key: tuple(value.shape) for key, value in tensors.items() if "vera_lambda" not in key}
        shapes = {"base_model.vera_A": (rank, 20), "base_model.vera_B": (20, rank)}
        assert found == (shapes if save_projection else {})
    loaded = peft.PeftModel.from_pretrained(base("mlp"), tmp_path)
    assert relative(outputs(loaded, "mlp"), outputs(model, "mlp")) == 0.0
