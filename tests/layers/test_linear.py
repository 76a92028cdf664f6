import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from reference import dense_delta, projections, randomise, relative
from small_net import dense_weight, small_adapted, small_inputs
from veratune import VeraConfig, get_peft_model
from veratune.layers import VeraConv1D, VeraLinear, plan
from veratune.projections import pool
from veratune.utils.torch_private import constant_while_compiling

ROUTES = ["auto", "factored", "dense"]
IN, OUT, RANK = 6, 5, 4


class Net(nn.Module):
    """Two layers of different shapes, one of either kind."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.first = nn.Linear(IN, OUT, bias=bias)
        self.second = Conv1D(IN, OUT)
        nn.init.normal_(self.second.weight)
        nn.init.normal_(self.second.bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype=torch.float64, bias=True, **settings):
    net = Net(bias).to(dtype)
    settings = {"r": RANK, "target_modules": ["first", "second"], **settings}
    model = get_peft_model(net, VeraConfig(**settings))
    randomise(model)
    return model


def weights(layer, adapters):
    """W0 plus the adapters' deltas by float64 dense algebra, as (out, in), and the bias."""
    w = layer.base_layer.weight.detach().double()
    w = w if isinstance(layer, VeraLinear) and not isinstance(layer, VeraConv1D) else w.t()
    for name, key in adapters.items():
        b, d = layer.vectors(name).values()
        a_projection, b_projection = projections(key, d.numel(), layer.in_features, layer.out_features)
        w = w + dense_delta(b.detach(), d.detach(), a_projection, b_projection)
    bias = layer.base_layer.bias
    return w, 0 if bias is None else bias.detach().double()


def reference(model, x, adapters=None):
    adapters = {"default": 0} if adapters is None else adapters
    (w1, b1), (w2, b2) = (weights(layer, adapters) for layer in model.vera_layers().values())
    return torch.tanh(x.double() @ w1.t() + b1) @ w2.t() + b2


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_float64_equals_dense_algebra(route, bias, shape):
    model = adapted(bias=bias, route=route)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    if x.ndim == 1:  # Conv1D's own forward takes no single vector before any adapter
        torch.testing.assert_close(
            model.first(x),
            x @ weights(model.first, {"default": 0})[0].t() + model.first.bias
            if bias
            else x @ weights(model.first, {"default": 0})[0].t(),
            rtol=1e-6,
            atol=1e-6,
        )
        return
    torch.testing.assert_close(model(x), reference(model, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_other_dtypes(route, dtype, tolerance):
    model = adapted(dtype=dtype, route=route)
    assert all(
        vector.dtype == torch.float32
        for layer in model.vera_layers().values()
        for vector in layer.vectors("default").values()
    )
    x = torch.randn(8, IN).to(dtype)
    y = model(x)
    assert y.dtype == dtype
    assert relative(y, reference(model, x)) < tolerance


def test_vectors_in_the_base_dtype_on_request():
    model = get_peft_model(Net().bfloat16(), VeraConfig(r=4, target_modules=["first"]), autocast_adapter_dtype=False)
    assert model.first.vectors("default")["b"].dtype == torch.bfloat16


@pytest.mark.parametrize("route", ROUTES)
def test_gradcheck_through_the_model(route):
    model = adapted(route=route)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]

    def run(x, *_):
        return model(x)

    assert torch.autograd.gradcheck(run, (x, *vectors))


@pytest.mark.parametrize("route", ROUTES)
def test_a_new_adapter_is_an_exact_no_op(route):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        net = Net().to(dtype)
        x = torch.randn(9, IN).to(dtype)
        before = net(x)
        assert torch.equal(get_peft_model(net, VeraConfig(r=4, target_modules="all-linear", route=route))(x), before)


@pytest.mark.parametrize("route", ROUTES)
def test_non_contiguous_input(route):
    model = adapted(route=route)
    x = torch.randn(IN, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(model(x), model(x.contiguous()))
    expanded = torch.randn(1, IN, dtype=torch.float64).expand(5, IN)
    torch.testing.assert_close(model(expanded), model(expanded.contiguous()))


def test_wrong_inputs_get_torchs_own_errors():
    model = adapted(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(2, IN + 1))
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, IN, dtype=torch.float64))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(route, weight_dtype):
    model = adapted(dtype=weight_dtype, route=route)
    x = torch.randn(16, IN).to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        again = model(x.bfloat16())
    assert y.dtype == again.dtype == torch.bfloat16
    expected = reference(model, x)
    assert relative(y, expected) < 4e-2
    y.float().square().sum().backward()
    b, d = model.first.vectors("default").values()
    assert b.grad.dtype == d.grad.dtype == torch.float32
    grads = b.grad.clone(), d.grad.clone()
    model.zero_grad()
    model(x.to(weight_dtype)).float().square().sum().backward()
    assert relative(grads[0], b.grad) < 6e-2
    assert relative(grads[1], d.grad) < 6e-2


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(route, reentrant):
    model = adapted(route=route)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    expected = torch.autograd.grad(model(x).square().sum(), [x, *vectors])
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for actual, wanted in zip([x, *vectors], expected, strict=True):
        assert torch.equal(actual.grad, wanted)


@pytest.mark.parametrize("route", ROUTES)
def test_compile_in_one_graph_without_recompiling(route):
    torch._dynamo.reset()
    model = adapted(dtype=torch.float32, route=route)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    x = torch.randn(4, IN, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):  # projections do not exist before the first call
            actual = torch.autograd.grad(compiled(x).square().sum(), [x, *vectors])
            expected = torch.autograd.grad(model(x).square().sum(), [x, *vectors])
            for ours, wanted in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, wanted)


def test_a_compiled_model_of_many_shapes_is_compiled_at_most_three_times():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    net = nn.Sequential(*(nn.Linear(4 + 3 * i, 7 + 3 * i) for i in range(6)))
    model = get_peft_model(net, VeraConfig(r=64, target_modules="all-linear"))
    randomise(model, scale=0.3)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (2, 3, 17, 32, 33, 64, 100, 257, 500, 1000, 1025, 2048, 5000):
        x = torch.randn(tokens, 4)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3


def test_a_compiled_model_follows_its_adapters():
    torch._dynamo.reset()
    model = adapted(dtype=torch.float32)
    model.add_adapter("other", VeraConfig(r=4, target_modules=["first", "second"], projection_prng_key=9))
    randomise(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, IN)
    for names in (["default"], ["other"], ["default", "other"], []):
        model.set_adapter(names)
        torch.testing.assert_close(compiled(x), model(x))
    model.set_adapter("default")
    model.delete_adapter("other")
    model.add_adapter("other", VeraConfig(r=4, target_modules=["first", "second"], projection_prng_key=10))
    randomise(model)
    model.set_adapter("other")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(model(x).double(), reference(model, x, {"other": 10}), rtol=1e-4, atol=1e-4)


def test_functions_that_a_compiler_calls_get_constants(monkeypatch):
    # torch 2.6 to 2.12 refuse other arguments, and any version those that it has replaced by a symbol.
    given = []

    def recording(function):
        @constant_while_compiling
        def recorded(*arguments):
            given.extend(arguments)
            return function(*arguments)

        return recorded

    torch._dynamo.reset()
    for module, name in ((plan, "table_for"), (pool, "_fill_while_tracing")):
        monkeypatch.setattr(module, name, recording(getattr(module, name)))
    model = get_peft_model(
        nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 9)), VeraConfig(r=4, target_modules="all-linear")
    )
    randomise(model)
    for layer in model.vera_layers().values():  # one code object with two sets of numbers
        x = torch.randn(3, layer.in_features)
        expected = layer(x)
        layer.release_projections()
        given.clear()
        layer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(layer(x), expected)
        kinds = {type(value) for value in given}
        assert {str, torch.device, torch.dtype} <= kinds <= {str, bool, torch.device, torch.dtype}


def test_compile_with_inductor():
    torch._dynamo.reset()
    model = adapted(dtype=torch.float32)
    x = torch.randn(4, IN)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_functional_call():
    model = adapted()
    x = torch.randn(3, IN, dtype=torch.float64)
    other = {name: torch.randn_like(p) for name, p in model.named_parameters() if "vera_lambda" in name}
    actual = torch.func.functional_call(model, other, (x,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in other:
                parameter.copy_(other[name])
    torch.testing.assert_close(actual, model(x))


def test_deepcopy_is_independent_and_shares_projections():
    model = adapted()
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    entries = model.first.entries["default"], twin.first.entries["default"]
    pointers = [entry.a.values(x.device, x.dtype).data_ptr() for entry in entries]
    assert pointers[0] == pointers[1]
    randomise(twin)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)


def test_pickle_holds_no_projection():
    model = adapted()
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = model(x)
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(x), expected)
    wide = get_peft_model(nn.Linear(3, 4000), VeraConfig(r=256, target_modules="all-linear"))
    wide(torch.randn(1, 3))
    projection_bytes = 256 * 4000 * 4
    assert len(pickle.dumps(wide)) < projection_bytes / 10


def test_hooks_and_forwards_of_the_base_layer_are_kept():
    model = adapted()
    x = torch.randn(3, IN, dtype=torch.float64)
    plain = model(x)
    seen = []
    handle = model.first.base_layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(model(x), plain)
    assert seen == [(3, OUT)]
    handle.remove()

    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    base = Shifted(IN, OUT).double()
    before = base(x)
    model = get_peft_model(nn.Sequential(base), VeraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(model(x), before)
    randomise(model)
    w, bias = weights(model.base_model[0], {"default": 0})
    torch.testing.assert_close(model(x), x @ w.t() + bias + 1.0, rtol=1e-6, atol=1e-6)


class Pooled(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean(0), "something else"


def test_a_class_with_a_forward_of_its_own_reads_the_adapted_weight():
    model = get_peft_model(nn.Sequential(Pooled(IN, OUT).double()), VeraConfig(r=4, target_modules="all-linear"))
    randomise(model)
    x = torch.randn(3, IN, dtype=torch.float64)
    w, bias = weights(model.base_model[0], {"default": 0})
    output, other = model(x)
    torch.testing.assert_close(output, (x @ w.t() + bias).mean(0), rtol=1e-6, atol=1e-6)
    assert other == "something else"


def test_dropout_is_refused_where_a_class_has_a_forward_of_its_own():
    config = VeraConfig(r=4, target_modules="all-linear", vera_dropout=0.1)
    with pytest.raises(ValueError, match=r"vera_dropout=0\.1 is not supported on 0"):
        get_peft_model(nn.Sequential(Pooled(IN, OUT)), config)


def test_dropout_is_exact_in_expectation_and_off_in_eval():
    torch.manual_seed(1)
    model = adapted(vera_dropout=0.5)
    layer = model.first
    x = torch.randn(1, IN, dtype=torch.float64)
    w, bias = weights(layer, {"default": 0})
    model.eval()
    torch.testing.assert_close(layer(x), x @ w.t() + bias, rtol=1e-6, atol=1e-6)
    model.train()
    n = 20000
    samples = layer(x.expand(n, IN)).detach()
    w0, delta = layer.base_layer.weight.detach(), w - layer.base_layer.weight.detach()
    mean = x @ w0.t() + bias + x @ delta.t()
    # Each input is kept with probability 1/2 and doubled: its variance is x^2.
    deviation = (x.square() @ delta.t().square()).sqrt()
    assert ((samples.mean(0) - mean).abs() < 5 * deviation / n**0.5 + 1e-9).all()
    torch.testing.assert_close(samples.std(0), deviation[0], rtol=0.05, atol=1e-6)


def test_dropout_gradients_equal_those_of_the_same_mask():
    model = adapted(vera_dropout=0.3).train()
    layer = model.first
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    actual = torch.autograd.grad(layer(x).square().sum(), [x, *layer.vectors("default").values()])
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones_like(x), 0.3)
    b, d = layer.vectors("default").values()
    a_projection, b_projection = projections(0, RANK, IN, OUT)
    delta = torch.diag(b) @ b_projection @ torch.diag(d) @ a_projection
    expected = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias) + (x * mask) @ delta.t()
    wanted = torch.autograd.grad(expected.square().sum(), [x, b, d])
    for ours, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_an_unfrozen_base_gets_its_gradients(route):
    model = adapted(route=route)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x = torch.randn(3, IN, dtype=torch.float64)
    model(x).square().sum().backward()
    ours = [layer.base_layer.weight.grad for layer in model.vera_layers().values()]
    bias_grads = [layer.base_layer.bias.grad for layer in model.vera_layers().values()]
    (w1, b1), (w2, b2) = (weights(layer, {"default": 0}) for layer in model.vera_layers().values())
    leaves = [t.clone().requires_grad_() for t in (w1, b1, w2, b2)]
    (torch.tanh(x @ leaves[0].t() + leaves[1]) @ leaves[2].t() + leaves[3]).square().sum().backward()
    torch.testing.assert_close(ours[0], leaves[0].grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], leaves[2].grad.t(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias_grads[0], leaves[1].grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias_grads[1], leaves[3].grad, rtol=1e-6, atol=1e-6)


def test_moving_a_model_lets_go_of_the_old_device():
    model = adapted(dtype=torch.float32)
    model(torch.randn(2, IN))
    places = list(model.first.entries["default"].a.tensors)
    assert [device.type for device, _ in places] == ["cpu"]
    model.to("meta")
    assert model.first.entries["default"].a.tensors == {}
    assert model(torch.randn(2, IN, device="meta")).is_meta
    assert all(p.is_meta for p in model.parameters())


def test_training_on_the_meta_device_runs():
    with torch.device("meta"):
        net = Net()
    model = get_peft_model(net, VeraConfig(r=4, target_modules="all-linear"))
    model(torch.randn(2, IN, device="meta")).sum().backward()
    assert model.first.vectors("default")["b"].grad.is_meta


def test_two_adapters_with_many_tokens_are_one_product(monkeypatch):
    """Where each alone would be added to the weight, so are both: nothing goes through the rank for every token."""
    from veratune.layers import products

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(48, 40)).double(), VeraConfig(r=64, target_modules="all-linear"))
    model.add_adapter("other", VeraConfig(r=64, target_modules="all-linear", projection_prng_key=3))
    model.set_adapter(["default", "other"])
    randomise(model)
    x = torch.randn(4096, 48, dtype=torch.float64, requires_grad=True)
    w, bias = weights(model.base_model[0], {"default": 0, "other": 3})
    monkeypatch.setattr(products, "residual", lambda *_, **__: pytest.fail("a product for every token"))
    output = model(x)
    torch.testing.assert_close(output, x @ w.t() + bias, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, w.sum(0).expand_as(x), rtol=1e-6, atol=1e-6)


def test_layers_of_one_input_drop_each_for_itself():
    """Sharing x A^T must not share a mask."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.q(x), self.k(x)

    model = get_peft_model(Two(), VeraConfig(r=8, target_modules="all-linear", vera_dropout=0.5))
    with torch.no_grad():
        model.k.base_layer.weight.copy_(model.q.base_layer.weight)
        for layer in (model.q, model.k):
            b, d = layer.vectors("default").values()
            b.fill_(1.0)
            d.fill_(1.0)
    x = torch.randn(5, 64)
    with torch.no_grad():
        q, k = model.eval()(x)
        torch.testing.assert_close(q, k)
        q, k = model.train()(x)
        assert not torch.allclose(q, k, atol=1e-2)


def test_gradients_of_half_precision_layers_are_summed_in_float32():
    """Ten thousand equal terms: half precision would stop counting at 256 of them (bfloat16)."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16(), VeraConfig(r=4, target_modules=["0"]))
    randomise(model)
    layer = model.base_model[0]
    x = torch.ones(10_000, 4, dtype=torch.bfloat16)
    for rows in (x, x[:100]):
        gradients = torch.autograd.grad(model(rows).float().sum(), list(layer.vectors("default").values()))
        one = torch.autograd.grad(model(rows[:1]).float().sum(), list(layer.vectors("default").values()))
        for many, single in zip(gradients, one, strict=True):
            torch.testing.assert_close(
                many, single * len(rows), rtol=2e-2, atol=2e-2 * len(rows) * float(single.abs().max())
            )


def test_arguments_by_name_and_a_bias_taken_away():
    model, x = small_adapted(), small_inputs(3)
    layer = model.base_model[0]
    assert torch.equal(layer(input=x), layer(x))
    bias, layer.bias = layer.bias, None
    assert layer.base_layer.bias is None
    torch.testing.assert_close(layer(x), x @ dense_weight(layer).t(), rtol=1e-6, atol=1e-6)
    layer.base_layer.bias = bias


# Weights computed from others


class Tripled(nn.Linear):
    """A linear layer with its own forward, which does not just add the product."""

    def forward(self, input):
        return 3 * super().forward(input)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("normalized", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_computed_weight_of_a_linear_layer_with_its_own_forward_is_refused(normalized):
    config = VeraConfig(r=RANK, target_modules=["0"])
    model = get_peft_model(nn.Sequential(Tripled(4, 4)), config)
    randomise(model)
    normalized(model.base_model[0].base_layer, "weight")
    with pytest.raises(RuntimeError, match=r"the weight of an adapted .*Tripled is computed from other parameters"):
        model(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"0: .*Tripled computes its weight from other parameters and has a custom"):
        get_peft_model(nn.Sequential(normalized(Tripled(4, 4))), config)


def test_a_computed_weight_of_a_conv1d_is_adapted():
    base, x = nn.utils.parametrizations.weight_norm(Conv1D(5, 4)), torch.randn(2, 4)
    model = get_peft_model(nn.Sequential(base), VeraConfig(r=RANK, target_modules=["0"]))
    randomise(model)
    w, bias = weights(model.vera_layers()["0"], {"default": 0})
    expected = x.double() @ w.T + bias
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
