import pytest
import torch

from reference import dense_delta, relative
from veratune.ops.delta import delta_weight
from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear, residual
from veratune.ops.planning import RouteChoice
from veratune.ops.routes import ROUTES
from veratune.projections.structure import Matrix

CHOICES = [RouteChoice(name, keep) for name in ROUTES if name != "triton" for keep in (False, True)]
ADDING = [choice for choice in CHOICES if not choice.reads_weight]
TOKENS, IN, OUT, RANK, SCALE = 7, 5, 6, 4, 0.7


def problem(dtype=torch.float64, tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": draw(tokens, IN),
        "weight": draw(OUT, IN),
        "bias": draw(OUT),
        "a": draw(RANK, IN),
        "bt": draw(RANK, OUT),
        "b": draw(OUT),
        "d": draw(RANK),
    }


def dense(p, weight=True):
    """The reference: float64 dense algebra under ordinary autograd."""
    p = {name: value.double() for name, value in p.items()}
    delta = torch.diag(p["b"]) @ (SCALE * p["bt"].t()) @ torch.diag(p["d"]) @ p["a"]
    return p["x"] @ (p["weight"] + delta if weight else delta).t() + (p["bias"] if weight else 0)


def factors_of(p, b=None, d=None):
    return Factors(Matrix(p["a"]), Matrix(p["bt"]), p["b"] if b is None else b, p["d"] if d is None else d, SCALE)


def fused(p, choice):
    return adapted_linear(p["x"], p["weight"], p["bias"], factors_of(p), choice)


def added(start, p, choice):
    return residual(start, p["x"], factors_of(p), choice)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_outputs_and_gradients_equal_dense_algebra(choice, tokens):
    p = problem(tokens=tokens)
    names = ["x", "weight", "bias", "b", "d"]
    reference = {name: value.clone().requires_grad_(name in names) for name, value in p.items()}
    ours = {name: value.clone().requires_grad_(name in names) for name, value in p.items()}
    g = torch.randn(tokens, OUT, dtype=torch.float64)
    expected, actual = dense(reference), fused(ours, choice)
    torch.testing.assert_close(actual, expected)
    expected.backward(g)
    actual.backward(g)
    for name in names:
        torch.testing.assert_close(ours[name].grad, reference[name].grad)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_gradcheck_of_the_whole_layer(choice):
    p = problem()
    for name in ("x", "weight", "bias", "b", "d"):
        p[name].requires_grad_()
    inputs = (p["x"], p["weight"], p["bias"], p["b"], p["d"])
    assert torch.autograd.gradcheck(
        lambda x, w, bias, b, d: adapted_linear(x, w, bias, factors_of(p, b, d), choice), inputs
    )


@pytest.mark.parametrize("choice", ADDING, ids=str)
def test_gradcheck_of_an_added_delta(choice):
    p = problem()
    start = torch.randn(TOKENS, OUT, dtype=torch.float64, requires_grad=True)
    for name in ("x", "b", "d"):
        p[name].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, x, b, d: residual(s, x, factors_of(p, b, d), choice), (start, p["x"], p["b"], p["d"])
    )
    torch.testing.assert_close(added(start, p, choice), start + dense(p, weight=False))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("wanted", [{"x"}, {"b"}, {"d"}, {"x", "b"}, {"weight"}, {"bias"}, {"b", "weight", "x"}])
def test_any_subset_of_gradients(choice, wanted):
    p = problem()
    reference = {name: value.clone().requires_grad_(name in wanted) for name, value in p.items()}
    ours = {name: value.clone().requires_grad_(name in wanted) for name, value in p.items()}
    dense(reference).square().sum().backward()
    fused(ours, choice).square().sum().backward()
    for name in p:
        if name in wanted:
            torch.testing.assert_close(ours[name].grad, reference[name].grad)
        else:
            assert ours[name].grad is None


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_zero_vectors_have_exact_gradients(choice):
    """A gradient that divided by d or b would fail here: both start at, or may reach, zero."""
    p = problem()
    p["b"].zero_()
    p["d"][1] = 0.0
    reference = {name: value.clone().requires_grad_(name in "bd") for name, value in p.items()}
    ours = {name: value.clone().requires_grad_(name in "bd") for name, value in p.items()}
    dense(reference).square().sum().backward()
    fused(ours, choice).square().sum().backward()
    torch.testing.assert_close(ours["b"].grad, reference["b"].grad)
    torch.testing.assert_close(ours["d"].grad, reference["d"].grad)
    assert ours["b"].grad.abs().max() > 0


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_inputs_are_not_written(choice):
    p = problem()
    before = {name: value.clone() for name, value in p.items()}
    for name in ("x", "b", "d"):
        p[name].requires_grad_()
    fused(p, choice).sum().backward()
    for name, value in p.items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_second_derivative_is_refused(choice):
    p = problem()
    p["x"].requires_grad_()
    p["b"].requires_grad_()
    (grad,) = torch.autograd.grad(fused(p, choice).square().sum(), p["b"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_stays_close_to_float64(choice, dtype, tolerance):
    """The vectors are float32; tolerances are some units in the last place of the compute dtype."""
    p = problem(dtype=dtype, tokens=64)
    p["b"], p["d"] = p["b"].float(), p["d"].float()
    reference = {name: value.double().requires_grad_(name in ("x", "b", "d")) for name, value in p.items()}
    ours = {name: value.clone().requires_grad_(name in ("x", "b", "d")) for name, value in p.items()}
    g = torch.randn(64, OUT).to(dtype)
    expected, actual = dense(reference), fused(ours, choice)
    expected.backward(g.double())
    actual.backward(g)
    assert actual.dtype == dtype
    assert ours["x"].grad.dtype == dtype
    assert ours["b"].grad.dtype == ours["d"].grad.dtype == torch.float32
    assert relative(actual, expected) < tolerance
    for name in ("x", "b", "d"):
        assert relative(ours[name].grad, reference[name].grad) < tolerance


def test_half_precision_vectors_get_gradients_of_their_dtype():
    p = problem(dtype=torch.bfloat16)
    p["b"].requires_grad_()
    fused(p, RouteChoice("folded")).sum().backward()
    assert p["b"].grad.dtype == torch.bfloat16


def test_folding_rounds_once():
    p = problem(dtype=torch.bfloat16)
    b, d = p["b"].float() * 1.001, p["d"].float() * 0.999
    folded = factors_of(p, b, d).folded().dense()
    exact = SCALE * d.double()[:, None] * b.double() * p["bt"].double()
    assert folded.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16, and what float32 adds to it.
    assert ((folded.double() - exact).abs() <= exact.abs() * (2**-8 / 2 + 1e-6) * 2).all()
    assert torch.equal(folded, exact.to(torch.bfloat16))


def test_delta_weight_equals_dense_algebra():
    p = problem()
    delta = delta_weight(factors_of(p))
    torch.testing.assert_close(delta, dense_delta(p["b"], p["d"], p["a"], SCALE * p["bt"].t()))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_backward_under_autocast_keeps_float32_gradients(choice):
    p = problem(dtype=torch.float32, tokens=64)
    ours = {name: value.clone().requires_grad_(name in ("b", "d")) for name, value in p.items()}
    plain = {name: value.clone().requires_grad_(name in ("b", "d")) for name, value in p.items()}
    fused(plain, choice).sum().backward()
    output = fused(ours, choice)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output.sum().backward()
    assert torch.equal(ours["b"].grad, plain["b"].grad)
    assert torch.equal(ours["d"].grad, plain["d"].grad)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_function_transforms(choice):
    p = problem()

    def loss(b, d):
        return adapted_linear(p["x"], p["weight"], p["bias"], factors_of(p, b, d), choice).square().sum()

    actual = torch.func.grad(loss, argnums=(0, 1))(p["b"], p["d"])
    reference = {name: value.clone().requires_grad_(name in "bd") for name, value in p.items()}
    expected = torch.autograd.grad(dense(reference).square().sum(), (reference["b"], reference["d"]))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_product_from_before_is_used():
    p = problem()
    choice = RouteChoice("folded")
    xa = p["x"] @ p["a"].t()
    given = adapted_linear(p["x"], p["weight"], p["bias"], factors_of(p), choice, xa=2 * xa)
    torch.testing.assert_close(given - fused(p, choice), fused(p, choice) - p["x"] @ p["weight"].t() - p["bias"])


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_transposed_weight(choice):
    p = problem()
    stored = p["weight"].t().contiguous()
    ours = {name: value.clone().requires_grad_(name in "xbd") for name, value in p.items()}
    stored.requires_grad_()
    y = adapted_linear(ours["x"], stored, p["bias"], factors_of(ours), choice, transposed=True)
    reference = {name: value.clone().requires_grad_(name in ("x", "b", "d", "weight")) for name, value in p.items()}
    torch.testing.assert_close(y, dense(reference))
    y.square().sum().backward()
    dense(reference).square().sum().backward()
    for name in "xbd":
        torch.testing.assert_close(ours[name].grad, reference[name].grad)
    torch.testing.assert_close(stored.grad, reference["weight"].grad.t())
