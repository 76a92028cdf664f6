"""Whatever the shapes, ranks, dtypes, dropout and numbers of adapters: equal to float64 dense algebra."""

import tempfile

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from reference import dense_delta
from veratune import VeraConfig, VeraModel, get_peft_model

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}
CPU = torch.device("cpu")

sizes = st.integers(1, 24)
adapters = st.fixed_dictionaries(
    {
        "r": st.integers(1, 40),
        "projection": st.sampled_from(["per_dimension", "peft"]),
        "projection_prng_key": st.integers(-(2**63), 2**64 - 1),
        "vera_dropout": st.sampled_from([0.0, 0.3]),
        "d_initial": st.floats(0.01, 2.0),
        "targets": st.sampled_from([["0"], ["2"], ["0", "2"]]),
    }
)
problems = st.fixed_dictionaries(
    {
        "widths": st.tuples(sizes, sizes, sizes),
        "bias": st.booleans(),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "leading": st.lists(st.integers(0, 4), max_size=3),
        "route": st.sampled_from(["auto", "factored", "dense"]),
        "adapters": st.lists(adapters, min_size=1, max_size=4),
        "seed": st.integers(0, 2**31),
    }
)
fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def build(problem):
    torch.manual_seed(problem["seed"])
    first, second, third = problem["widths"]
    net = nn.Sequential(nn.Linear(first, second, problem["bias"]), nn.Tanh(), nn.Linear(second, third, problem["bias"]))
    net.to(problem["dtype"])
    model = None
    for i, adapter in enumerate(problem["adapters"]):
        route = "auto" if adapter["vera_dropout"] else problem["route"]
        config = VeraConfig(
            target_modules=adapter["targets"], route=route, **{k: v for k, v in adapter.items() if k != "targets"}
        )
        if model is None:
            model = get_peft_model(net, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_(std=0.5)
    return model


def effective(layer, names):
    weight = layer.base_layer.weight.detach().double()
    for name in names:
        if name in layer.slots:
            slot = layer.slots[name]
            source = slot.a.projection.source
            a = source.draw("A", range(slot.rank), slot.a.projection.width, CPU)[:, : layer.in_features]
            b = source.draw("B", range(slot.rank), slot.b.projection.width, CPU)[:, : layer.out_features]
            vectors = [vector.detach() for vector in layer.vectors(name)]
            weight = weight + dense_delta(*vectors, a, source.gain(slot.rank) * b.double().t())
    return weight


def reference(model, x, names):
    net = model.base_model
    for module in net:
        if isinstance(module, nn.Tanh):
            x = torch.tanh(x)
            continue
        layer = module if hasattr(module, "slots") else None
        base = layer.base_layer if layer is not None else module
        weight = effective(layer, names) if layer is not None else base.weight.detach().double()
        x = nn.functional.linear(x, weight, None if base.bias is None else base.bias.detach().double())
    return x


@fast
@given(problems)
def test_outputs_merging_and_files(problem):
    model = build(problem).eval()
    dtype, names = problem["dtype"], list(model.peft_config)
    x = torch.randn(*problem["leading"], problem["widths"][0]).to(dtype)
    for active in (names, names[:1]):
        model.set_adapter(active)
        y, expected = model(x).detach(), reference(model, x.double(), active)
        assert y.shape == expected.shape
        assert y.dtype == dtype
        if y.numel():
            # Relative to what is added up, so that outputs which cancel do not count as errors.
            scale = max(1.0, float(expected.abs().max()))
            assert float((y.double() - expected).abs().max()) < TOLERANCE[dtype] * scale * len(names) * 3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter(names)
    model.unmerge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        y = model(x)
        bare = model.unload()
        loaded = VeraModel.from_pretrained(bare, directory, adapter_name="again", subfolder=names[0], is_trainable=True)
        loaded.eval()  # trainable as it was, since the route may be another where no gradients are wanted
        assert torch.equal(loaded(x), y)


@fast
@given(problems.filter(lambda p: p["dtype"] in (torch.float64, torch.float32)))
def test_gradients(problem):
    model = build(problem).eval()
    names = list(model.peft_config)
    model.set_adapter(names)
    x = torch.randn(*problem["leading"], problem["widths"][0], dtype=problem["dtype"], requires_grad=True)
    vectors = [
        v
        for layer in model.vera_layers().values()
        for name in names
        if name in layer.slots
        for v in layer.vectors(name)
    ]
    ours = torch.autograd.grad(model(x).square().sum(), [x, *vectors])

    twin = [v.detach().double().requires_grad_() for v in vectors]
    wide_x = x.detach().double().requires_grad_()
    pairs = iter(zip(twin[::2], twin[1::2], strict=True))
    y = wide_x
    for module in model.base_model:
        if isinstance(module, nn.Tanh):
            y = torch.tanh(y)
            continue
        adapted = hasattr(module, "slots")
        base = module.base_layer if adapted else module
        weight = base.weight.detach().double()
        for name in names if adapted else []:
            if name not in module.slots:
                continue
            slot = module.slots[name]
            source = slot.a.projection.source
            a = source.draw("A", range(slot.rank), slot.a.projection.width, CPU)[:, : module.in_features].double()
            b = source.draw("B", range(slot.rank), slot.b.projection.width, CPU)[:, : module.out_features].double()
            vector_b, vector_d = next(pairs)
            weight = weight + (vector_b * (source.gain(slot.rank) * b)).t() @ (vector_d[:, None] * a)
        y = nn.functional.linear(y, weight, None if base.bias is None else base.bias.detach().double())
    expected = torch.autograd.grad(y.square().sum(), [wide_x, *twin])
    for actual, wanted in zip(ours, expected, strict=True):
        assert actual.shape == wanted.shape
        if actual.numel():
            floor = max(float(g.abs().max()) for g in expected if g.numel()) * 1e-3
            error = float((actual.double() - wanted).abs().max())
            assert error <= 10 * TOLERANCE[problem["dtype"]] * max(float(wanted.abs().max()), floor)
