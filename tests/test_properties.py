"""Whatever the shapes, ranks, dtypes, dropout and numbers of adapters: equal to float64 dense algebra."""

import tempfile

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from reference import dense_delta
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.layers import VeraLayer

# Two to ten times the worst that was seen in some thousand examples, relative to the largest value. The activation is
# smooth: with a kink, a half-precision value near it would take the other branch and have quite another gradient.
# Losing one adapter of several changes the outputs by far more: see test_the_tolerances_would_notice_a_lost_adapter.
OUTPUT_TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GRADIENT_TOLERANCE = {torch.float64: 2e-14, torch.float32: 1e-5, torch.float16: 4e-2, torch.bfloat16: 2.5e-1}
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
        "conv1d": st.booleans(),
        "dtype": st.sampled_from(list(OUTPUT_TOLERANCE)),
        "leading": st.lists(st.integers(0, 4), min_size=1, max_size=3),
        "route": st.sampled_from(["auto", "factored", "dense"]),
        "adapters": st.lists(adapters, min_size=1, max_size=4),
        "seed": st.integers(0, 2**31),
    }
)
fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def build(problem):
    torch.manual_seed(problem["seed"])
    first, second, third = problem["widths"]
    last = Conv1D(third, second) if problem["conv1d"] else nn.Linear(second, third, problem["bias"])
    nn.init.normal_(last.weight, std=second**-0.5)
    net = nn.Sequential(nn.Linear(first, second, problem["bias"]), nn.SiLU(), last).to(problem["dtype"])
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
                parameter.normal_()
    model.set_adapter(list(model.peft_config))
    return model


def vectors_of(model):
    return {
        (layer_name, name): tuple(vector.detach().double() for vector in layer.vectors(name).values())
        for layer_name, layer in model.vera_layers().items()
        for name in layer.entries
    }


def reference(model, x, names, vectors, mask=lambda layer, name, x: x):
    """The model by dense algebra in float64; each adapter's delta is a matrix times its own (masked) input."""
    for module in model.base_model:
        if isinstance(module, nn.SiLU):
            x = module(x)
            continue
        base = module.base_layer if isinstance(module, VeraLayer) else module
        weight = base.weight.detach().double()
        weight = weight.t() if isinstance(base, Conv1D) else weight
        y = nn.functional.linear(x, weight, None if base.bias is None else base.bias.detach().double())
        for name in names if isinstance(module, VeraLayer) else []:
            if name not in module.entries:
                continue
            entry = module.entries[name]
            source = entry.a.projection.scheme
            a = source.draw("A", range(entry.r), entry.a.projection.width, CPU)[:, : module.in_features]
            b = source.draw("B", range(entry.r), entry.b[0].projection.width, CPU)[:, : module.out_features]
            delta = dense_delta(*vectors[entry.name, name], a, source.scale(entry.r) * b.double().t())
            y = y + mask(module, name, x) @ delta.t()
        x = y
    return x


def assert_close(actual, expected, tolerance, scale=None):
    assert actual.shape == expected.shape
    if actual.numel():
        scale = float(expected.detach().abs().max()) if scale is None else scale
        error = float((actual.detach().double() - expected.detach()).abs().max())
        assert error <= tolerance * scale, (error, tolerance * scale)


def input_of(problem):
    return torch.randn(*problem["leading"], problem["widths"][0]).to(problem["dtype"])


@fast
@given(problems)
def test_outputs_merging_and_files(problem):
    model = build(problem).eval()
    dtype, names, vectors = problem["dtype"], list(model.peft_config), vectors_of(model)
    x = input_of(problem)
    for active in (names, names[:1]):
        model.set_adapter(active)
        y, expected = model(x), reference(model, x.double(), active, vectors)
        assert y.dtype == dtype
        # Sums of unit-sized terms may cancel, which is no error of theirs.
        assert_close(y, expected, OUTPUT_TOLERANCE[dtype], max(1.0, float(expected.abs().max())) if x.numel() else 1.0)
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


def compare_gradients(problem, model, mask):
    """Compare the outputs and all gradients, of the input and of every vector, with those of dense algebra."""
    dtype, names = problem["dtype"], list(model.peft_config)
    x = input_of(problem).requires_grad_()
    keys = [(layer, name) for layer, name in vectors_of(model)]
    layers = model.vera_layers()
    own = [vector for layer, name in keys for vector in layers[layer].vectors(name).values()]
    twins = {key: tuple(v.clone().requires_grad_() for v in pair) for key, pair in vectors_of(model).items()}
    wide_x = x.detach().double().requires_grad_()

    torch.manual_seed(problem["seed"])
    y = model(x)
    torch.manual_seed(problem["seed"])
    expected = reference(model, wide_x, names, twins, mask)
    scale = max(1.0, float(expected.detach().abs().max())) if x.numel() else 1.0
    assert_close(y, expected, OUTPUT_TOLERANCE[dtype], scale)
    g = torch.randn(y.shape).to(dtype)
    ours = torch.autograd.grad(y, [x, *own], g)
    flat = [vector for key in keys for vector in twins[key]]
    theirs = torch.autograd.grad(expected, [wide_x, *flat], g.double())
    # What is small beside the other gradients is a sum of terms that cancel.
    largest = max((float(t.abs().max()) for t in theirs if t.numel()), default=0.0)
    for actual, wanted in zip(ours, theirs, strict=True):
        if wanted.numel():
            assert_close(actual, wanted, GRADIENT_TOLERANCE[dtype], max(float(wanted.abs().max()), 0.1 * largest))


@fast
@given(problems)
def test_gradients(problem):
    compare_gradients(problem, build(problem).eval(), lambda layer, name, x: x)


@fast
@given(problems)
def test_dropout_in_training(problem):
    """With the same seed, the same masks: dropout is on the adapter's input, and each adapter has its own."""
    model = build(problem).train()

    def mask(layer, name, x):
        if name not in layer.vera_dropout:
            return x
        ones = torch.ones(x.shape[:-1].numel(), x.shape[-1], dtype=problem["dtype"])
        return x * nn.functional.dropout(ones, layer.vera_dropout[name].p).double().view(x.shape)

    compare_gradients(problem, model, mask)


def test_the_tolerances_would_notice_a_lost_adapter():
    """On random problems, leaving out the last adapter moves outputs and gradients beyond what is allowed, mostly."""
    noticed = {dtype: [] for dtype in OUTPUT_TOLERANCE}
    for seed in range(40):
        for dtype, found in noticed.items():
            problem = {
                "widths": (12, 9, 7),
                "bias": True,
                "conv1d": seed % 2 == 0,
                "dtype": dtype,
                "leading": [5],
                "route": "auto",
                "seed": seed,
                "adapters": [
                    {
                        "r": 3 + i,
                        "projection": "per_dimension",
                        "projection_prng_key": i,
                        "vera_dropout": 0.0,
                        "d_initial": 0.1,
                        "targets": ["0", "2"],
                    }
                    for i in range(3)
                ],
            }
            model = build(problem).eval()
            names, vectors, x = list(model.peft_config), vectors_of(model), input_of(problem).double()
            whole, without = (reference(model, x, active, vectors) for active in (names, names[:-1]))
            moved = float((whole - without).abs().max())
            found.append(moved > OUTPUT_TOLERANCE[dtype] * max(1.0, float(whole.abs().max())))
    assert all(sum(found) >= 38 for found in noticed.values()), {d: sum(f) for d, f in noticed.items()}
