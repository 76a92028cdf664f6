import copy
import gc

import pytest
import torch
from torch import nn

from reference import dense_delta, projections, randomise, relative
from veratune import VeraConfig, get_peft_model, parameter_groups, projection_pool
from veratune.layers import SavedModule, VeraLayer

IN, HIDDEN, OUT = 6, 5, 3


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.a = nn.Linear(IN, HIDDEN)
        self.b = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, OUT)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.b(torch.tanh(self.a(x))))))


def config(**settings):
    return VeraConfig(**{"r": 4, "target_modules": ["a", "b"], "modules_to_save": [], **settings})


def several():
    """A model with adapters that differ in rank, targets, key and scheme."""
    model = get_peft_model(Net(), config(), adapter_name="one")
    model.add_adapter("two", config(r=2, target_modules=["b"], projection_prng_key=5))
    model.add_adapter("three", config(r=7, target_modules=["a", "b", "head"]))
    model.add_adapter("four", config(r=3, target_modules=["a"], projection="peft"))
    randomise(model)
    return model


def effective(layer, names, keys):
    w = layer.base_layer.weight.detach().double()
    for name in names:
        if name not in layer.entries:
            continue
        b, d = layer.vectors(name).values()
        if name == "four":
            scheme = layer.entries[name].a.projection.scheme
            a_projection = scheme.draw("A", range(3), IN, torch.device("cpu"))
            b_projection = scheme.draw("B", range(3), HIDDEN, torch.device("cpu")).t()
        else:
            a_projection, b_projection = projections(keys[name], d.numel(), layer.in_features, layer.out_features)
        w = w + dense_delta(b.detach(), d.detach(), a_projection, b_projection)
    return w


def reference(model, x, names):
    keys = {"one": 0, "two": 5, "three": 0}
    layers = model.vera_layers()

    def linear(name, x):
        layer = layers[name]
        return nn.functional.linear(x, effective(layer, names, keys), layer.base_layer.bias.double())

    return linear("head", model.norm(torch.tanh(linear("b", torch.tanh(linear("a", x))))))


def x_of(model):
    return torch.randn(4, IN, dtype=next(model.parameters()).dtype)


def state_bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Several adapters


@pytest.mark.parametrize(
    "names",
    [["one"], ["two"], ["three"], ["four"], ["one", "two"], ["three", "one"], ["one", "two", "three", "four"], []],
)
def test_deltas_of_active_adapters_add(names):
    model = several()
    model.set_adapter(names)
    assert model.active_adapters == names
    x = x_of(model)
    torch.testing.assert_close(model(x), reference(model, x, names), rtol=1e-6, atol=1e-6)


def test_gradients_of_several_active_adapters():
    model = several()
    model.set_adapter(["one", "two", "three"])
    x = x_of(model)
    vectors = [
        v
        for layer in model.vera_layers().values()
        for name in layer.added_adapters
        for v in layer.vectors(name).values()
    ]
    assert len(vectors) == 2 * (2 + 1 + 3)
    assert torch.autograd.gradcheck(lambda *_: model(x), vectors)


def test_only_active_adapters_are_trainable():
    model = several()
    model.set_adapter(["two"])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["base_model.b.vera_lambda_b.two", "base_model.b.vera_lambda_d.two"]
    model.set_adapter("two", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_another_adapter_changes_no_value_of_the_first():
    model = get_peft_model(Net(), config(), adapter_name="one")
    randomise(model)
    x = x_of(model)
    before = model(x)
    model.add_adapter("larger", config(r=300, target_modules=["a", "b", "head"]))
    assert torch.equal(model(x), before)
    model.set_adapter("larger")
    assert torch.equal(model(x), model.unload()(x))  # and starts as a no-op itself


def test_new_adapters_are_no_ops_and_init_weights_false_is_not():
    net = Net()
    x = torch.randn(4, IN, dtype=torch.float64)
    base = net(x)
    model = get_peft_model(net, config())
    assert torch.equal(model(x), base)
    b, d = model.a.vectors("default").values()
    assert (b == 0).all()
    assert (d == 0.1).all()
    model.add_adapter("random", config(init_weights=False))
    model.set_adapter("random")
    assert (model.a.vectors("random")["b"] == 1).all()
    assert not torch.equal(model(x), base)


def test_one_projection_for_each_width_however_many_layers_and_adapters():
    before = {(info.side, info.width) for info in projection_pool.summary()}
    net = nn.Sequential(nn.Linear(41, 43), nn.Linear(43, 41), nn.Linear(41, 43), nn.Linear(43, 43)).double()
    model = get_peft_model(net, VeraConfig(r=4, target_modules="all-linear"))
    for i in range(5):
        model.add_adapter(f"more{i}", VeraConfig(r=4, target_modules="all-linear"))
        model.set_adapter(f"more{i}")
        model(torch.randn(2, 41, dtype=torch.float64))
    made = [info for info in projection_pool.summary() if (info.side, info.width) not in before]
    assert sorted((info.side, info.width, info.rank) for info in made) == [
        ("A", 41, 4),
        ("A", 43, 4),
        ("B", 41, 4),
        ("B", 43, 4),
    ]
    twin = get_peft_model(copy.deepcopy(model.unload()), VeraConfig(r=4, target_modules="all-linear"))
    del model, net
    twin(torch.randn(2, 41, dtype=torch.float64))
    del twin
    gc.collect()
    assert not any(info.width in (41, 43) for info in projection_pool.summary())


def test_state_dict_holds_no_projections():
    model = several()
    model.set_adapter(["one", "two", "three", "four"])
    model(x_of(model))
    ours = {name for name in model.state_dict() if "base_layer" not in name and "norm" not in name}
    assert all("vera_lambda_b" in name or "vera_lambda_d" in name for name in ours)
    assert len(ours) == 2 * (2 + 1 + 3 + 1)
    assert not any(isinstance(buffer, torch.Tensor) for buffer in model.buffers())
    twin = several()
    twin.load_state_dict(model.state_dict())
    assert same_bits(model.state_dict(), twin.state_dict())


# Names are data


@pytest.mark.parametrize(
    "name", ["", "a.b", "a/b", "..", "a\\b", "x" * 129, "a b", None, 3, "train", "keys", "_modules"]
)
def test_adapter_names_that_are_not_allowed(name):
    model = get_peft_model(Net(), config())
    before = state_bits(model)
    with pytest.raises(ValueError, match="adapter_name"):
        model.add_adapter(name, config())
    with pytest.raises(ValueError, match="adapter_name"):
        get_peft_model(Net(), config(), adapter_name=name)
    assert same_bits(state_bits(model), before)


@pytest.mark.parametrize("name", ["a", "b", "base_layer", "vera_lambda_b", "default", "weight", "größe-7", "0"])
def test_adapters_may_be_called_like_modules(name):
    model = get_peft_model(Net(), config(), adapter_name="first")
    model.add_adapter(name, config(r=2))
    randomise(model)
    state = model.adapter_state(name)
    assert list(state.vectors) == ["a", "b"]
    x = x_of(model)
    model.set_adapter([])
    base = model(x)
    model.set_adapter(name)
    own = model(x)
    assert not torch.allclose(own, base)
    model.delete_adapter("first")
    assert list(model.adapter_state(name).vectors) == ["a", "b"]
    assert torch.equal(model(x), own)


def test_a_taken_name_and_unknown_names():
    model = get_peft_model(Net(), config())
    with pytest.raises(ValueError, match="taken"):
        model.add_adapter("default", config())
    for call in (
        lambda: model.set_adapter("nobody"),
        lambda: model.set_adapter(["default", "nobody"]),
        lambda: model.delete_adapter("nobody"),
        lambda: model.merge_adapter(["nobody"]),
        lambda: model.merge_and_unload(adapter_names=["nobody"]),
        lambda: model.adapter_state("nobody"),
    ):
        with pytest.raises(ValueError, match=r"'nobody' does not exist.*default"):
            call()
    assert model.active_adapters == ["default"]


def test_a_model_that_has_adapters_is_not_adapted_twice():
    net = Net()
    model = get_peft_model(net, config())
    for again in (net, model):
        with pytest.raises(ValueError, match="already"):
            get_peft_model(again, config())
    with pytest.raises(TypeError, match="VeraConfig"):
        model.add_adapter("x", {"r": 4})
    with pytest.raises(TypeError, match=r"nn\.Module"):
        get_peft_model("model", config())


def test_active_adapter():
    model = several()
    assert model.active_adapter == "one"
    model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="no single"):
        _ = model.active_adapter


# Deleting and disabling


def test_deleting_all_and_adding_one():
    net = Net()
    x = torch.randn(4, IN, dtype=torch.float64)
    base, types = net(x), [type(m) for m in net.modules()]
    model = get_peft_model(net, config(modules_to_save=["head"]))
    randomise(model)
    model.delete_adapter("default")
    assert [type(m) for m in net.modules()] == types
    assert torch.equal(model(x), base)
    assert model.active_adapters == []
    model.add_adapter("again", config(r=9, projection_prng_key=3))
    model.set_adapter("again")
    randomise(model)
    assert not torch.equal(model(x), base)


def test_deleting_one_leaves_the_others():
    model = several()
    model.set_adapter(["one", "three"])
    x = x_of(model)
    model.delete_adapter("one")
    assert model.active_adapters == ["three"]
    torch.testing.assert_close(model(x), reference(model, x, ["three"]), rtol=1e-6, atol=1e-6)
    model.delete_adapter("three")
    assert not isinstance(model.base_model.head, VeraLayer)
    assert list(model.peft_config) == ["two", "four"]


def test_deleting_frees_projections():
    net = nn.Sequential(nn.Linear(47, 47)).double()
    model = get_peft_model(net, VeraConfig(r=2, target_modules="all-linear"))
    model.add_adapter("large", VeraConfig(r=64, target_modules="all-linear"))
    model.set_adapter(["default", "large"])
    model(torch.randn(1, 47, dtype=torch.float64))
    ranks = [info.rank for info in projection_pool.summary() if info.width == 47]
    assert ranks == [64, 64]
    model.delete_adapter("large")
    gc.collect()
    projection_pool.trim()
    assert [info.rank for info in projection_pool.summary() if info.width == 47] == [2, 2]


def test_disable_adapter_is_the_base_model_exactly():
    net = Net()
    x = torch.randn(4, IN, dtype=torch.float64)
    base = net(x)
    model = get_peft_model(net, config(modules_to_save=["head"], bias="all"))
    randomise(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    trained = model(x)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter():
        assert torch.equal(model(x), base)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), trained)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(model(x), trained)


def test_disable_adapter_on_a_merged_model():
    net = Net(torch.bfloat16)
    x = torch.randn(4, IN).bfloat16()
    base = net(x)
    model = get_peft_model(net, config())
    randomise(model)
    model.merge_adapter()
    merged = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert model.merged_adapters == ["default"]
    assert torch.equal(model(x), merged)


# Merging


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]])
def test_merge_and_unmerge_restore_the_bits(dtype, names):
    model = several().to(dtype)
    model.set_adapter(names)
    x = torch.randn(4, IN).to(dtype)
    before, output = state_bits(model), model(x)
    exact = {
        name: effective(layer, names, {"one": 0, "two": 5, "three": 0}) for name, layer in model.vera_layers().items()
    }
    model.merge_adapter()
    assert model.merged_adapters == names
    for name, layer in model.vera_layers().items():
        if any(adapter in layer.entries for adapter in names):
            # Rounded once: half a unit in the last place of each element, and what float32 loses in the sum before.
            half_a_unit = exact[name].abs() * torch.finfo(dtype).eps / 2
            error = (layer.base_weight.double() - exact[name]).abs()
            assert (error <= half_a_unit + 2e-6 * exact[name].abs().max()).all()
    # By layers in the dtype: the output passes three of them.
    assert relative(model(x), output) < 8 * torch.finfo(dtype).eps + 1e-5
    model.merge_adapter()  # again: nothing more
    model.unmerge_adapter()
    assert same_bits(state_bits(model), before)
    assert torch.equal(model(x), output)
    model.unmerge_adapter()
    assert same_bits(state_bits(model), before)


def test_merging_one_keeps_adding_the_other_active_one():
    model = several()
    model.set_adapter(["one", "three"])
    x = x_of(model)
    expected = model(x)
    model.merge_adapter(["one"])
    assert model.merged_adapters == ["one"]
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(["three"])
    assert model.merged_adapters == ["one", "three"]
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)


def test_unmerging_after_a_change_of_dtype():
    model = several()
    plain = copy.deepcopy(model).float()
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    assert same_bits(state_bits(model), state_bits(plain))


def test_what_cannot_be_done_while_merged():
    model = several()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.set_adapter("two")
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.delete_adapter("one")
    assert model.active_adapters == ["one"]


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unload(safe):
    net = Net()
    types = [type(m) for m in net.modules()]
    model = get_peft_model(net, config(modules_to_save=["head"], bias="vera_only"))
    randomise(model)
    with torch.no_grad():
        model.base_model.head.modules_to_save["default"].weight.add_(1)
        model.base_model.a.base_layer.bias.add_(1)
    x = torch.randn(4, IN, dtype=torch.float64)
    expected = model(x)
    merged = model.merge_and_unload(safe_merge=safe)
    assert merged is net
    assert [type(m) for m in net.modules()] == types
    torch.testing.assert_close(net(x), expected)


def test_merge_and_unload_of_chosen_adapters():
    model = several()
    x = x_of(model)
    expected = reference(model, x, ["two", "three"])
    torch.testing.assert_close(
        model.merge_and_unload(adapter_names=["two", "three"])(x), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("operation", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_and_changes_nothing(bad, operation):
    model = several()
    model.set_adapter(["one", "three"])
    with torch.no_grad():
        model.head.vectors("three")["b"][0] = bad
    before = state_bits(model)
    with pytest.raises(ValueError, match=r"head.*not finite"):
        getattr(model, operation)(safe_merge=True)
    after = state_bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assert model.merged_adapters == []
    assert model.active_adapters == ["one", "three"]


def test_weights_that_cannot_be_merged():
    net = Net()
    nn.utils.parametrizations.spectral_norm(net.b)
    model = get_peft_model(net, config())
    randomise(model)
    x = x_of(model)
    before = model(x)
    with pytest.raises(ValueError, match="cannot merge into b"):
        model.merge_adapter()
    assert model.merged_adapters == []
    assert before.isfinite().all()
    meta = get_peft_model(Net().to("meta"), config())
    with pytest.raises(ValueError, match="meta"):
        meta.merge_and_unload()


def test_unload_gives_the_model_back():
    net = Net()
    net.a.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    before, parameters = state_bits(net), [id(p) for p in net.parameters()]
    model = get_peft_model(net, config(modules_to_save=["head"], bias="all"))
    randomise(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    model.merge_adapter()
    assert model.unload() is net
    assert same_bits(state_bits(net), before)
    assert [id(p) for p in net.parameters()] == parameters
    assert [p.requires_grad for p in net.parameters()] == flags


class TiedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.body(self.embed(ids)))


def test_tied_weights_stay_as_they_are():
    net = TiedNet()
    embedding = net.embed.weight.detach().clone()
    with pytest.warns(UserWarning, match="out shares its weight with embed.weight"):
        model = get_peft_model(net, VeraConfig(r=3, target_modules=["body", "out"]))
    randomise(model)
    ids = torch.randint(0, 11, (4,))
    expected = model(ids)
    model.merge_adapter()
    assert torch.equal(net.embed.weight, embedding)
    torch.testing.assert_close(model(ids), expected)
    model.unmerge_adapter()
    assert net.out.base_weight is net.embed.weight
    merged = model.merge_and_unload()
    assert torch.equal(merged.embed.weight, embedding)
    torch.testing.assert_close(merged(ids), expected)


# Saved modules and biases


def test_each_adapter_has_its_own_head():
    model = get_peft_model(Net(), config(modules_to_save=["head"]), adapter_name="one")
    model.add_adapter("two", config(modules_to_save=["head"]))
    model.add_adapter("none", config())
    x = x_of(model)
    base = model(x)
    with torch.no_grad():
        model.adapter_state("one").saved["head"]["weight"].add_(1)
        model.adapter_state("two").saved["head"]["weight"].sub_(1)
    outputs = {}
    for name in ("one", "two", "none"):
        model.set_adapter(name)
        outputs[name] = model(x)
    assert torch.equal(outputs["none"], base)
    assert not torch.equal(outputs["one"], outputs["two"])
    with pytest.raises(ValueError, match="each have a trained copy of 'head'"):
        model.set_adapter(["one", "two"])
    model.set_adapter(["one", "none"])
    assert torch.equal(model(x), outputs["one"])
    assert model.base_model.head.in_features == HIDDEN  # read through to the copy that computes


@pytest.mark.parametrize(("bias", "count"), [("all", 4), ("vera_only", 2)])
def test_biases_are_the_adapters_own(bias, count):
    net = Net()
    original = [p.detach().clone() for p in net.parameters()]
    model = get_peft_model(net, config(bias=bias), adapter_name="one")
    model.add_adapter("two", config(bias=bias))
    x = x_of(model)
    base = model(x)
    state = model.adapter_state("one")
    assert len(state.biases) == count
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 4 + count
    torch.optim.SGD(trainable, lr=0.1).step(lambda: model(x).square().sum().backward())
    trained = model(x)
    assert not torch.equal(trained, base)
    model.set_adapter("two")
    assert torch.equal(model(x), base)
    model.set_adapter("one")
    assert torch.equal(model(x), trained)
    with pytest.raises(ValueError, match="train biases"):
        model.set_adapter(["one", "two"])
    model.to(torch.float32)
    model.set_adapter("two")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model.to(torch.float64)
    model.unload()
    for parameter, before in zip(net.parameters(), original, strict=True):
        torch.testing.assert_close(parameter, before, rtol=1e-6, atol=1e-6)


def test_a_second_adapter_starts_from_the_models_own_biases():
    net = Net()
    x = torch.randn(4, IN, dtype=torch.float64)
    base = net(x)
    model = get_peft_model(net, config(bias="all"), adapter_name="one")
    with torch.no_grad():
        for bias in model.adapter_state("one").biases.values():
            bias.add_(1)
    trained = model(x)
    model.add_adapter("two", config(bias="all"))
    assert torch.equal(model(x), trained)
    model.set_adapter("two")
    assert torch.equal(model(x), base)


def test_a_copy_of_a_model_has_biases_of_its_own():
    model = get_peft_model(Net(), config(bias="all"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.adapter_state("default").biases["a.bias"].add_(1)
    x = x_of(model)
    assert not torch.equal(model(x), twin(x))
    with twin.disable_adapter(), model.disable_adapter():
        assert torch.equal(model(x), twin(x))


# The rest


def test_counting_parameters(capsys):
    model = get_peft_model(Net(), config())
    vectors = (HIDDEN + 4) + (HIDDEN + 4)
    base = sum(p.numel() for p in Net().parameters())
    assert model.get_nb_trainable_parameters() == (vectors, base + vectors)
    model.print_trainable_parameters()
    percent = 100 * vectors / (base + vectors)
    expected = f"trainable params: {vectors} || all params: {base + vectors} || trainable%: {percent:.4f}\n"
    assert capsys.readouterr().out == expected


def test_attributes_fall_through_to_the_model():
    net = Net()
    net.answer = 42
    net.layers = nn.ModuleList([nn.Identity()])
    model = get_peft_model(net, config())
    assert model.answer == 42
    assert model.norm is net.norm
    assert model.layers is net.layers
    assert model.get_base_model() is net
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = model.nothing_here


def test_inference_mode_freezes():
    model = get_peft_model(Net(), config(inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())


def test_parameter_groups():
    model = get_peft_model(Net(), config(modules_to_save=["head"]))
    vectors, rest = parameter_groups(model, lr=0.0625, head_lr=0.25, weight_decay=0.125)
    assert (vectors["lr"], rest["lr"]) == (0.0625, 0.25)
    assert vectors["weight_decay"] == rest["weight_decay"] == 0.125
    assert {id(p) for p in vectors["params"]} == {
        id(v) for layer in model.vera_layers().values() for v in layer.vectors("default").values()
    }
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.adapter_state("default").saved["head"].values()}
    assert len(parameter_groups(get_peft_model(Net(), config()))) == 1
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(get_peft_model(Net(), config(inference_mode=True)))


def test_saved_modules_are_wrapped_once():
    model = get_peft_model(Net(), config(modules_to_save=["head"]))
    model.add_adapter("two", config(modules_to_save=["head"]))
    assert sum(isinstance(m, SavedModule) for m in model.modules()) == 1


def test_only_lets_others_compute_and_leaves_what_is_trainable_alone():
    model = several()
    x = torch.randn(8, IN, dtype=torch.float64)
    model.set_adapter("one")
    expected = model(x)
    model.set_adapter(["two", "four"])
    own = model(x)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    loss = model(x).square().sum()
    with model.only(["one"]):
        torch.testing.assert_close(model(x), expected)
        assert relative(model(x), own) > 1e-3
        with pytest.raises(ValueError, match=r"set_adapter cannot be used within disable_adapter\(\) or only\(\)"):
            model.set_adapter("three")
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert model.active_adapters == ["two", "four"] and torch.equal(model(x), own)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.merge_adapter()
    with model.only(["one"]):
        torch.testing.assert_close(model(x), expected)
    assert model.merged_adapters == ["two", "four"]
    with pytest.raises(ValueError, match="'nobody' does not exist"), model.only(["nobody"]):
        pass


def test_merging_within_disable_adapter_is_refused() -> None:
    model = get_peft_model(Net(), config())
    for context in (model.disable_adapter(), model.only(["default"])):
        with context, pytest.raises(ValueError, match="merge_adapter cannot be used within"):
            model.merge_adapter("default")
    assert model.active_adapters == ["default"] and not model.merged_adapters


def test_flags_come_back_where_other_parameters_stand_in_the_places_of_the_models_own() -> None:
    base = Net()
    next(base.parameters()).requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    model = get_peft_model(base, config())
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert {name: parameter.requires_grad for name, parameter in model.unload().named_parameters()} == before
