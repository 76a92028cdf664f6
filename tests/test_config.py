import copy
import inspect
import json
import pickle

import peft
import pytest
import torch
from peft import TaskType

from small_net import small_adapted
from veratune import VeRAConfig, VeraConfig, get_peft_model, parameter_groups


def test_defaults_are_the_papers_and_pefts():
    config = VeraConfig()
    assert (config.r, config.d_initial, config.vera_dropout, config.bias) == (256, 0.1, 0.0, "none")
    assert (config.projection, config.save_projection, config.route) == ("per_dimension", False, "auto")
    assert config.projection_prng_key == 0
    assert config.peft_type == "VERATUNE"
    assert VeRAConfig is VeraConfig


BAD_VALUES = [
    ("r", 0),
    ("r", -4),
    ("r", True),
    ("r", 2.0),
    ("r", "256"),
    ("r", 1 << 30),
    ("target_modules", ""),
    ("target_modules", []),
    ("target_modules", [""]),
    ("target_modules", ["query", 3]),
    ("target_modules", 3),
    ("target_modules", "(unclosed"),
    ("exclude_modules", []),
    ("exclude_modules", "[a"),
    ("layers_to_transform", -1),
    ("layers_to_transform", []),
    ("layers_to_transform", [0, "1"]),
    ("layers_to_transform", [0, -2]),
    ("layers_to_transform", True),
    ("layers_to_transform", 1.5),
    ("layers_pattern", []),
    ("layers_pattern", 1),
    ("rank_pattern", ["query"]),
    ("rank_pattern", {"query": 0}),
    ("rank_pattern", {"query": 2.5}),
    ("rank_pattern", {"(": 2}),
    ("rank_pattern", {3: 2}),
    ("modules_to_save", "classifier"),
    ("modules_to_save", [1]),
    ("d_initial", float("nan")),
    ("d_initial", float("inf")),
    ("d_initial", 0.0),
    ("d_initial", "0.1"),
    ("d_initial", None),
    ("vera_dropout", 1.0),
    ("vera_dropout", -0.1),
    ("vera_dropout", float("nan")),
    ("vera_dropout", True),
    ("bias", "lora_only"),
    ("bias", None),
    ("init_weights", 1),
    ("projection_prng_key", 1.0),
    ("projection_prng_key", 1 << 64),
    ("projection_prng_key", -(1 << 63) - 1),
    ("projection", "shared"),
    ("save_projection", "yes"),
    ("route", "fast"),
    ("route", ["auto"]),
    ("task_type", "CLASSIFY"),
    ("inference_mode", None),
    ("base_model_name_or_path", 3),
    ("revision", b"main"),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=lambda value: str(value)[:30])
def test_bad_values_name_the_field_and_the_value(field, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        VeraConfig(**{field: value})
    message = str(caught.value)
    assert field in message
    shown = next(iter(value.items())) if isinstance(value, dict) else (value,)
    assert any(repr(part) in message for part in shown)
    assert "must be" in message or "regular expression" in message


BAD_COMBINATIONS = [
    ({"layers_pattern": "layer"}, ["layers_pattern", "layers_to_transform"]),
    ({"layers_to_transform": 0, "target_modules": ".*query"}, ["layers_to_transform", "target_modules"]),
    ({"route": "dense", "vera_dropout": 0.1}, ["route", "vera_dropout"]),
    ({"projection": "peft", "rank_pattern": {"query": 8}}, ["projection", "rank_pattern"]),
]


@pytest.mark.parametrize(("settings", "named"), BAD_COMBINATIONS, ids=str)
def test_bad_combinations_name_both_fields(settings, named):
    with pytest.raises(ValueError, match=r"cannot be combined|only applies") as caught:
        VeraConfig(**settings)
    assert all(name in str(caught.value) for name in named)


def test_sets_and_tuples_become_lists_in_a_fixed_order():
    config = VeraConfig(target_modules={"value", "query"}, modules_to_save=("head",), layers_to_transform=(3, 1, 3))
    assert config.target_modules == ["query", "value"]
    assert config.modules_to_save == ["head"]
    assert config.layers_to_transform == [1, 3]


def test_pefts_enum_is_taken():
    assert VeraConfig(task_type=TaskType.SEQ_CLS).task_type == "SEQ_CLS"


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(),
        VeraConfig(
            r=8,
            target_modules=["a"],
            exclude_modules="x.*",
            layers_to_transform=[0, 2],
            layers_pattern=["layers"],
            rank_pattern={"a": 4},
            modules_to_save=["head"],
            d_initial=0.5,
            vera_dropout=0.25,
            bias="all",
            init_weights=False,
            projection_prng_key=2**64 - 1,
            save_projection=True,
            route="factored",
            task_type="SEQ_CLS",
            inference_mode=True,
            base_model_name_or_path="owner/name",
            revision="main",
        ),
    ],
)
def test_json_round_trip(config):
    assert VeraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_foreign_and_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="LORA"):
        VeraConfig.from_dict({"peft_type": "LORA", "r": 8})
    with pytest.raises(ValueError, match="lora_alpha"):
        VeraConfig.from_dict({"r": 8, "lora_alpha": 16})


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("lora_alpha", "VeRA has no alpha"),
        ("lora_dropout", "use vera_dropout"),
        ("lora_rank", "use r, which is higher"),
        ("fan_in_fan_out", "Conv1D is recognized"),
        ("use_rslora", "leave it out"),
        ("use_dora", "leave it out"),
        ("init_lora_weights", "init_weights"),
        ("target_module", "use target_modules"),
        ("modules_to_sav", "did you mean modules_to_save?"),
        ("xyz", "the fields are r, target_modules"),
    ],
)
def test_the_habits_of_lora_are_told_what_serves_instead(field, remedy):
    from veratune.integrations.peft import VeratuneConfig, install

    install()
    for config in (VeraConfig, VeratuneConfig):
        if field == "xyz" and config is not VeraConfig:
            continue
        with pytest.raises(TypeError) as caught:
            config(**{field: 16, "lora_dropout": 0.1})
        assert f"unexpected keyword argument {field!r}: " in str(caught.value) and remedy in str(caught.value)
        assert "'lora_dropout': use vera_dropout" in str(caught.value)
    assert list(inspect.signature(VeraConfig).parameters)[:2] == ["r", "target_modules"]


def test_configurations_in_the_wrong_function():
    def linear():
        return torch.nn.Sequential(torch.nn.Linear(2, 2))

    for wrong, message in (
        (peft.LoraConfig(), "whose fields differ from those of LoraConfig; peft.get_peft_model takes a LoraConfig"),
        (peft.VeraConfig(), "the same fields except fan_in_fan_out"),
        ({"r": 4}, "create one with veratune.VeraConfig"),
    ):
        with pytest.raises(TypeError) as caught:
            get_peft_model(linear(), wrong)
        assert message in str(caught.value) and ("same fields" in message) == ("same fields" in str(caught.value))
    for task in (None, "SEQ_CLS"):
        for ask in (peft.get_peft_model, peft.PeftModel, lambda m, c: peft.inject_adapter_in_model(c, m)):
            with pytest.raises(AttributeError, match=r"veratune\.get_peft_model.* VeratuneConfig"):
                ask(linear(), VeraConfig(task_type=task))


def test_configurations_are_copied_pickled_and_compared():
    config = VeraConfig(r=8, rank_pattern={"a": 4})
    assert copy.copy(config) == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config != VeraConfig()
    assert not hasattr(config, "is_prompt_learning") and not hasattr(config, "nothing")
    with pytest.raises(AttributeError, match="'VeraConfig' object has no attribute 'nothing'"):
        _ = config.nothing


def test_replace_validates():
    with pytest.raises(ValueError, match="r=0"):
        VeraConfig().replace(r=0)


@pytest.mark.parametrize("pattern", ["a{99999999999999}", "(" * 5000 + ")" * 5000])
def test_absurd_patterns(pattern):
    with pytest.raises(ValueError, match=r"target_modules.*is not a regular expression"):
        VeraConfig(target_modules=pattern)
    with pytest.raises(ValueError, match="rank_pattern"):
        VeraConfig(rank_pattern={"(?i)0": 2})
    with pytest.raises(ValueError, match="layers_pattern"):
        VeraConfig(layers_pattern="h(", layers_to_transform=0)


def test_numbers_that_are_too_large():
    with pytest.raises(ValueError, match=r"d_initial.*must be a finite number"):
        VeraConfig(d_initial=10**400)
    for settings in ({"lr": -1.0}, {"head_lr": float("nan")}, {"weight_decay": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            parameter_groups(small_adapted(), **settings)
