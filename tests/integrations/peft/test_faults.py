"""What the `peft` package (0.21.2) does wrong with VeRA, each beside a test that veratune does it right.

A test of `peft` that fails after an update says that the fault is gone there, and that our documentation should say so.
"""

import copy
import dataclasses
import math

import peft
import pytest
import torch
from peft.tuners.vera.layer import VeraLayer as PeftVeraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from reference import relative
from tiny_models import main_output, randomise_trainable, tiny_model
from veratune import VeraConfig, VeraModel, get_peft_model

RANK = 8
TOLERANCE = 1e-5  # float32, three layers; see test_peft_interop.py
CHANGE = 0.05

NARROW = ["first"]
WIDE = ["first", "wide", "last"]

pytestmark = [
    # PEFT says this of every adapter with save_projection=False, whether or not it goes wrong.
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.wide = nn.Linear(6, 20)
        self.last = nn.Linear(20, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.wide(torch.tanh(self.first(x)))))


def net(dtype=torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net().to(dtype)


def output(model: nn.Module, dtype=torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(-2, 2, 12, dtype=dtype).view(3, 4))


def peft_config(**settings) -> peft.VeraConfig:
    return peft.VeraConfig(**{"r": RANK, "target_modules": WIDE, **settings})


def peft_net(seed=7, dtype=torch.float32, **settings) -> peft.PeftModel:
    return randomise_trainable(peft.get_peft_model(net(dtype), peft_config(**settings)), seed)


def vera_config(**settings) -> VeraConfig:
    return VeraConfig(**{"r": RANK, "target_modules": WIDE, **settings})


def vera_net(seed=7, dtype=torch.float32, adapter_name="default", **settings) -> VeraModel:
    return randomise_trainable(get_peft_model(net(dtype), vera_config(**settings), adapter_name), seed)


def add_random(model: peft.PeftModel | VeraModel, name: str, config, seed: int) -> None:
    model.add_adapter(name, config)
    model.set_adapter(name)
    randomise_trainable(model, seed)


def outputs(model: peft.PeftModel | VeraModel, *names: str) -> list[torch.Tensor]:
    """The output with each of these adapters active; all differ from each other and from the base model's."""
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(output(model))
    different = [output(net()), *found]
    for index, one in enumerate(different):
        assert all(relative(one, other) > CHANGE for other in different[index + 1 :])
    return found


# (a) An adapter beside one of other shapes


@pytest.fixture
def two_shapes(tmp_path):
    """Two PEFT checkpoints without projections, of layers of other widths, and what the narrow one computes."""
    peft_net(save_projection=False).save_pretrained(tmp_path / "wide")
    narrow = peft_net(seed=8, target_modules=NARROW, save_projection=False)
    narrow.save_pretrained(tmp_path / "narrow")
    assert relative(output(narrow), output(net())) > CHANGE
    return tmp_path, output(narrow)


def test_peft_computes_an_adapter_with_the_projections_of_another(two_shapes):
    directory, alone = two_shapes
    model = peft.PeftModel.from_pretrained(net(), directory / "wide")
    model.load_adapter(directory / "narrow", "narrow")
    model.set_adapter("narrow")
    assert relative(output(model), alone) > CHANGE


def test_an_adapter_computes_the_same_beside_others(two_shapes):
    directory, expected = two_shapes
    alone = VeraModel.from_pretrained(net(), directory / "narrow")
    assert relative(output(alone), expected) < TOLERANCE

    model = VeraModel.from_pretrained(net(), directory / "wide")
    model.load_adapter(directory / "narrow", "narrow")
    beside = outputs(model, "default", "narrow")[1]
    assert torch.equal(beside, output(alone))

    # And the other way round, in veratune's own format and scheme.
    vera_net(seed=8, target_modules=NARROW).save_pretrained(directory / "own")
    own = output(VeraModel.from_pretrained(net(), directory / "own"))
    model.load_adapter(directory / "own", "own")
    assert torch.equal(outputs(model, "default", "narrow", "own")[2], own)


@pytest.fixture
def trained_beside(tmp_path):
    """A PEFT checkpoint with the projections of a wider adapter, which it was trained beside, and its output."""
    model = peft_net()
    add_random(model, "narrow", peft_config(target_modules=NARROW), seed=8)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "narrow" / "adapter_model.safetensors")["base_model.vera_A"].shape == (RANK, 20)
    assert relative(output(model), output(net())) > CHANGE
    return tmp_path / "narrow", output(model)


def test_peft_cannot_load_alone_what_it_trained_beside_another(trained_beside):
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(net(), trained_beside[0])


def test_what_peft_trained_beside_another_can_be_loaded_alone(trained_beside, tmp_path):
    directory, expected = trained_beside
    model = VeraModel.from_pretrained(net(), directory)
    assert relative(output(model), expected) < TOLERANCE
    model.save_pretrained(tmp_path / "native")
    assert torch.equal(output(VeraModel.from_pretrained(net(), tmp_path / "native")), output(model))


def test_what_peft_trained_beside_another_can_be_exported_for_peft(trained_beside, tmp_path):
    directory, expected = trained_beside
    VeraModel.from_pretrained(net(), directory).export_peft(tmp_path / "exported")
    assert relative(output(peft.PeftModel.from_pretrained(net(), tmp_path / "exported")), expected) < TOLERANCE


# (b) Stored projections that differ


@pytest.fixture
def two_stored(tmp_path):
    """Two PEFT checkpoints that hold different projections of the same shapes."""
    for name, seed in (("one", 1), ("two", 2)):
        peft_net(seed).save_pretrained(tmp_path / name)
        path = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(path)
        generator = torch.Generator().manual_seed(seed)
        for key in ("base_model.vera_A", "base_model.vera_B"):
            tensors[key] = torch.randn(tensors[key].shape, generator=generator) * 0.5
        save_file(tensors, path, {"format": "pt"})
    return tmp_path


def test_peft_overwrites_the_projections_of_the_adapter_before(two_stored):
    model = peft.PeftModel.from_pretrained(net(), two_stored / "one")
    before = output(model)
    model.load_adapter(two_stored / "two", "two")
    assert model.active_adapters == ["default"]
    assert relative(output(model), before) > CHANGE


def test_adapters_with_projections_of_their_own_stand_beside_each_other(two_stored):
    alone = {}
    for name in ("one", "two"):
        alone[name] = output(peft.PeftModel.from_pretrained(net(), two_stored / name))
    model = VeraModel.from_pretrained(net(), two_stored / "one", adapter_name="one")
    before = output(model)
    model.load_adapter(two_stored / "two", "two")
    one, two = outputs(model, "one", "two")
    assert torch.equal(one, before)
    assert relative(one, alone["one"]) < TOLERANCE
    assert relative(two, alone["two"]) < TOLERANCE


# (c) A second adapter of another rank, key, or width

SECOND = {
    "smaller-rank": {"r": 4},
    "larger-rank": {"r": 16},
    "wider": {"target_modules": ["wide", "last"]},
    "other-key": {"projection_prng_key": 1},
}


def peft_narrow_with_second(second: dict) -> peft.PeftModel:
    model = peft_net(target_modules=NARROW)
    model.add_adapter("second", peft_config(**{"target_modules": NARROW, **second}))
    model.set_adapter("second")
    return model


def test_peft_fails_in_forward_with_a_second_adapter_of_smaller_rank():
    model = peft_narrow_with_second(SECOND["smaller-rank"])
    with pytest.raises(RuntimeError, match="size of tensor"):
        output(model)


@pytest.mark.parametrize("case", ["larger-rank", "wider", "other-key"])
def test_peft_refuses_a_second_adapter(case):
    with pytest.raises(ValueError, match=r"or greater is required|must be the same for all adapters"):
        peft_narrow_with_second(SECOND[case])


@pytest.mark.parametrize("projection", ["per_dimension", "peft"])
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
def test_a_second_adapter_may_be_of_any_rank_key_and_width(second, projection):
    settings = {"target_modules": NARROW, "projection": projection}
    model = vera_net(1, **settings)
    before = output(model)
    add_random(model, "second", vera_config(**{**settings, **second}), seed=2)

    first, of_second = outputs(model, "default", "second")
    assert torch.equal(first, before)
    assert torch.equal(of_second, output(vera_net(2, **{**settings, **second})))
    model.delete_adapter("default")
    assert torch.equal(output(model), of_second)


def test_each_of_them_can_be_exported_for_peft(tmp_path):
    # One by one, as PEFT does not take them together.
    for name, second in SECOND.items():
        model = vera_net(2, **{"target_modules": NARROW, **second})
        model.export_peft(tmp_path / name)
        assert relative(output(model), output(net())) > CHANGE
        assert relative(output(peft.PeftModel.from_pretrained(net(), tmp_path / name)), output(model)) < TOLERANCE


# (d) Deleting all adapters


def test_peft_cannot_add_an_adapter_after_deleting_all():
    model = peft_net()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="buffers are empty"):
        model.add_adapter("new", peft_config())


@pytest.mark.parametrize("projection", ["per_dimension", "peft"])
def test_an_adapter_can_be_added_after_deleting_all(projection):
    model = vera_net(1, projection=projection)
    model.delete_adapter("default")
    assert torch.equal(output(model), output(net()))
    assert type(model.base_model.wide) is nn.Linear

    add_random(model, "new", vera_config(projection=projection), seed=2)
    assert torch.equal(outputs(model, "new")[0], output(vera_net(2, projection=projection)))


# (e) A base model in bfloat16


def test_peft_projections_depend_on_the_dtype_of_the_base():
    of_half, of_single = (
        peft_net(dtype=dtype).base_model.vera_A["default"] for dtype in (torch.bfloat16, torch.float32)
    )
    assert of_half.dtype == of_single.dtype == torch.float32
    assert not torch.equal(of_half, of_single)


@pytest.mark.parametrize("projection", ["per_dimension", "peft"])
def test_projections_do_not_depend_on_the_dtype_of_the_base(projection, tmp_path):
    half = vera_net(dtype=torch.bfloat16, projection=projection)
    single = vera_net(dtype=torch.float32, projection=projection)
    output(half, torch.bfloat16)  # makes what it computes with
    assert half.projection_scheme("default").fingerprint() == single.projection_scheme("default").fingerprint()
    cpu = torch.device("cpu")
    for name, layer in half.vera_layers().items():
        for side in range(2):
            drawn = layer.entries["default"].views[side].values(cpu, torch.float32)
            expected = single.vera_layers()[name].entries["default"].views[side].values(cpu, torch.float32)
            assert torch.equal(drawn, expected)
            assert not torch.equal(drawn, drawn.to(torch.bfloat16).float())

    # What was saved on one computes on the other as if it had always been there.
    half.save_pretrained(tmp_path)
    moved = VeraModel.from_pretrained(net(), tmp_path)
    assert torch.equal(output(moved), output(single))
    assert relative(output(single), output(net())) > CHANGE


# (f) An adapter named like a module

BERT_TARGETS = ["query", "value"]


def test_peft_loses_the_vectors_of_a_module_that_another_adapter_is_named_after(tmp_path):
    model = peft.get_peft_model(tiny_model("bert"), peft_config(target_modules=BERT_TARGETS, save_projection=False))
    model.save_pretrained(tmp_path / "alone")
    model.add_adapter("query", peft_config(target_modules=BERT_TARGETS, save_projection=False))
    model.save_pretrained(tmp_path / "beside", selected_adapters=["default"])
    whole = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    left = load_file(tmp_path / "beside" / "adapter_model.safetensors")
    assert left.keys() == {key for key in whole if ".query." not in key}
    assert len(left) == len(whole) // 2


@pytest.mark.parametrize("projection", ["per_dimension", "peft"])
@pytest.mark.parametrize("names", [("default", "query"), ("query", "value"), ("encoder", "layer"), ("bert", "0")])
def test_adapters_may_be_named_like_modules(names, projection, tmp_path):
    settings = {"target_modules": BERT_TARGETS, "projection": projection, "bias": "vera_only"}
    settings["modules_to_save"] = ["classifier"]
    model = get_peft_model(tiny_model("bert"), vera_config(**settings), names[0])
    randomise_trainable(model, 1)
    add_random(model, names[1], vera_config(**settings), seed=2)
    model.save_pretrained(tmp_path)

    for name in names:
        model.set_adapter(name)
        with torch.no_grad():
            expected, base = main_output(model, "bert"), main_output(tiny_model("bert"), "bert")
        assert relative(expected, base) > CHANGE
        subfolder = None if name == "default" else name
        model.export_peft(tmp_path / "peft" / name)
        model.export_lora(tmp_path / "lora" / name)
        loaded = VeraModel.from_pretrained(tiny_model("bert"), tmp_path, name, subfolder=subfolder)
        with torch.no_grad():
            assert torch.equal(main_output(loaded, "bert"), expected)
            for kind in ("peft", "lora"):
                in_peft = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / kind / name)
                assert relative(main_output(in_peft, "bert"), expected) < TOLERANCE


def test_an_adapter_may_be_named_like_the_layers_it_adapts(tmp_path):
    model = vera_net(1, adapter_name="first")
    add_random(model, "wide", vera_config(), seed=2)
    model.save_pretrained(tmp_path)
    expected = outputs(model, "first", "wide")
    for name, saved in zip(("first", "wide"), expected, strict=True):
        assert torch.equal(output(VeraModel.from_pretrained(net(), tmp_path / name)), saved)


# (g) The state dict


def test_peft_state_dict_holds_the_projections_once_per_layer(tmp_path):
    state = peft_net().state_dict()
    assert sum(".vera_A." in key or ".vera_B." in key for key in state) == 2 * (1 + len(WIDE))
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(state, tmp_path / "state.safetensors")


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("projection", ["per_dimension", "peft"])
def test_state_dict_holds_no_projection_and_can_be_saved(projection, save_projection, tmp_path):
    model = vera_net(projection=projection, save_projection=save_projection)
    expected = output(model)
    state = model.state_dict()
    shapes = {tuple(tensor.shape) for tensor in state.values()}
    base_shapes = {tuple(tensor.shape) for tensor in net().state_dict().values()}
    assert shapes - base_shapes <= {(RANK,)}
    assert len(state) == len(net().state_dict()) + 2 * len(WIDE)
    save_file(state, tmp_path / "state.safetensors")

    other = vera_net(seed=3, projection=projection, save_projection=save_projection)
    assert relative(output(other), expected) > CHANGE
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(output(other), expected)


# (h) Merging in bfloat16


def base_bits(model: nn.Module, layer_class: type) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
    assert len(layers) == len(WIDE)
    return [layer.base_layer.weight.detach().clone() for layer in layers]


def test_peft_does_not_restore_bfloat16_weights():
    model = peft_net(dtype=torch.bfloat16)
    before = base_bits(model, PeftVeraLayer)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not all(map(torch.equal, before, base_bits(model, PeftVeraLayer)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unmerging_restores_every_bit(dtype):
    model = vera_net(dtype=dtype)
    layer_class = type(model.vera_layers()["wide"])
    before, expected = base_bits(model, layer_class), output(model, dtype)
    model.merge_adapter()
    assert not any(map(torch.equal, before, base_bits(model, layer_class)))
    merged = output(model, dtype)
    assert relative(merged, output(net(dtype), dtype)) > CHANGE
    assert relative(merged, expected) < 16 * torch.finfo(dtype).eps  # the weights were rounded once more
    model.unmerge_adapter()
    assert all(map(torch.equal, before, base_bits(model, layer_class)))
    assert torch.equal(output(model, dtype), expected)


# (j) The caller's configuration


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_peft_changes_the_configuration_it_is_given():
    config = peft_config(target_modules="all-linear")
    peft.get_peft_model(net(), config)
    assert config.target_modules == set(WIDE)

    config = peft_config(target_modules=["c_attn"])
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):
        peft.get_peft_model(tiny_model("gpt2"), config)
    assert config.fan_in_fan_out is True
    assert isinstance(config.target_modules, set)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
        ("gpt2", {"target_modules": "all-linear"}),
        ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "bias": "all"}),
        ("bert", {"target_modules": None, "rank_pattern": {"query": 4}}),
    ],
)
def test_the_configuration_given_is_not_changed(kind, settings, tmp_path):
    config = vera_config(**settings)
    before = copy.deepcopy(dataclasses.asdict(config))
    model = get_peft_model(tiny_model(kind), config)
    model.add_adapter("second", config)
    model.save_pretrained(tmp_path / "native")
    model.export_peft(tmp_path / "peft")
    model.export_lora(tmp_path / "lora")
    model.set_adapter("second", inference_mode=True)
    assert dataclasses.asdict(config) == before
    assert all(own is not config for own in model.peft_config.values())


# (k) The scale of A


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(64, 32)
        self.wide = nn.Linear(4096, 2)


UNEVEN = {"r": 16, "target_modules": ["narrow", "wide"]}


def test_peft_scales_a_by_the_widest_layer():
    model = peft.get_peft_model(Uneven(), peft.VeraConfig(**UNEVEN))
    largest = model.base_model.vera_A["default"][:, :64].abs().max()
    assert 0.9 * math.sqrt(6 / 4096) < largest <= math.sqrt(6 / 4096)


def test_a_is_scaled_by_each_layers_own_width():
    model = get_peft_model(Uneven(), VeraConfig(**UNEVEN))
    for layer in model.vera_layers().values():
        drawn = layer.entries["default"].a.values(torch.device("cpu"), torch.float32)
        bound = math.sqrt(6 / layer.in_features)
        assert drawn.shape == (16, layer.in_features)
        assert 0.9 * bound < drawn.abs().max() <= bound
        # Of a uniform distribution on (-bound, bound); the standard error of 1024 draws is 2 %.
        assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)

    peft_scheme = get_peft_model(Uneven(), VeraConfig(**UNEVEN, projection="peft"))
    narrow = peft_scheme.vera_layers()["narrow"].entries["default"].a.values(torch.device("cpu"), torch.float32)
    theirs = peft.get_peft_model(Uneven(), peft.VeraConfig(**UNEVEN)).base_model.vera_A["default"]
    assert torch.equal(narrow, theirs[:, :64])  # PEFT's values where they are asked for
