"""Gradients of float32 vectors with half-precision layers, against float64, where the chooser makes them exact."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reference import dense_delta, relative
from veratune import VeraConfig, get_peft_model
from veratune.ops import exact, planning
from veratune.ops.calibration import device_profile
from veratune.ops.costs import DeviceProfile, LayerShape
from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear, project, residual
from veratune.ops.planning import RouteChoice, choose_route, estimate, exact_rows_pay
from veratune.ops.routes import ROUTES
from veratune.ops.rows import stack_residual
from veratune.projections import blocks, structure
from veratune.projections.blocks import BlockProjections
from veratune.projections.pool import projection_pool
from veratune.projections.structure import Matrix
from veratune.utils import tensors

CPU_ROUTES = [name for name in ROUTES if name != "triton"]

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)
IN, OUT, RANK, SCALE = 24, 40, 16, 0.7
EPS32 = torch.finfo(torch.float32).eps


def limit(tokens: int) -> float:
    """The relative error that summing float32 products of this many tokens may have."""
    return 2 * EPS32 * math.sqrt(tokens)


def projections(scheme: str, dtype: torch.dtype) -> tuple[Matrix, Matrix]:
    if scheme == "dense":
        return Matrix(torch.randn(RANK, IN).to(dtype)), Matrix(torch.randn(RANK, OUT).to(dtype))
    drawn = BlockProjections(5, 4)
    views = (projection_pool.view(drawn, side, RANK, width) for side, width in (("A", IN), ("B", OUT)))
    a, b = (view.matrix(CPU, dtype) for view in views)
    return a, b


class Problem:
    """A half-precision layer with float32 vectors, and the exact gradients of just these values."""

    def __init__(self, scheme: str, dtype: torch.dtype, tokens: int) -> None:
        torch.manual_seed(0)
        self.A, self.B = projections(scheme, dtype)
        self.x, self.g = torch.randn(tokens, IN).to(dtype), torch.randn(tokens, OUT).to(dtype)
        self.weight = torch.randn(OUT, IN).to(dtype)
        self.b, self.d = torch.randn(OUT), torch.randn(RANK)

    def exact(self) -> dict[str, Tensor]:
        b, d = (vector.double().requires_grad_() for vector in (self.b, self.d))
        delta = dense_delta(b, d, self.A.dense(), SCALE * self.B.dense().double().t())
        (self.x.double() @ delta.t()).backward(self.g.double())
        return {"b": b.grad, "d": d.grad}

    def found(self, choice: RouteChoice, *, xa: Tensor | None = None, added: bool = False) -> dict[str, Tensor]:
        b, d = (vector.clone().requires_grad_() for vector in (self.b, self.d))
        factors = Factors(self.A, self.B, b, d, SCALE)
        if added:
            y = residual(self.x @ self.weight.t(), self.x, factors, choice, xa=xa)
        else:
            y = adapted_linear(self.x, self.weight, None, factors, choice, xa=xa)
        assert y.dtype == self.x.dtype
        y.backward(self.g)
        return {"b": b.grad, "d": d.grad}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scheme", ["dense", "blocks"])
@pytest.mark.parametrize("route", CPU_ROUTES)
@pytest.mark.parametrize("tokens", [16, 1024])
def test_exact_gradients_have_float32_errors(dtype: torch.dtype, scheme: str, route: str, tokens: int) -> None:
    problem = Problem(scheme, dtype, tokens)
    expected = problem.exact()
    found, rounded = problem.found(RouteChoice(route, exact=True)), problem.found(RouteChoice(route))
    for name in "bd":
        assert relative(found[name], expected[name]) < limit(tokens)
        assert relative(rounded[name], expected[name]) > 100 * limit(16)
    if not ROUTES[route].reads_weight:
        found = problem.found(RouteChoice(route, exact=True), added=True)
        assert all(relative(found[name], expected[name]) < limit(tokens) for name in "bd")


@pytest.mark.parametrize("route", ["scaled", "folded", "mixed"])
def test_a_product_from_before_in_either_dtype(route: str) -> None:
    """A layer with the same input may have computed x A^T for gradients that are not exact, or that are."""
    problem = Problem("dense", torch.bfloat16, 64)
    wide, narrow = (project(problem.x, problem.A, exactly=exactly) for exactly in (True, False))
    assert wide.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    for choice in (RouteChoice(route, exact=True), RouteChoice(route)):
        expected = problem.found(choice)
        for xa in (wide, narrow):
            found = problem.found(choice, xa=xa)
            assert all(torch.equal(found[name], expected[name]) for name in "bd")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_outputs_and_the_gradients_of_inputs_and_weights_stay_the_same(dtype: torch.dtype) -> None:
    problem = Problem("dense", dtype, 64)
    for route in CPU_ROUTES:
        results = []
        for exactly in (False, True):
            x, weight = problem.x.clone().requires_grad_(), problem.weight.clone().requires_grad_()
            b = problem.b.clone().requires_grad_()
            factors = Factors(problem.A, problem.B, b, problem.d, SCALE)
            y = adapted_linear(x, weight, None, factors, RouteChoice(route, exact=exactly))
            y.backward(problem.g)
            results.append((y, x.grad, weight.grad))
        for plain, own in zip(*results, strict=True):
            assert own.dtype == dtype
            # x A^T and G may be rounded from sums in another order.
            assert relative(own, plain.double()) < 2 * torch.finfo(dtype).eps


def test_under_autocast_nothing_is_narrowed() -> None:
    problem = Problem("dense", torch.bfloat16, 64)
    for route in CPU_ROUTES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = problem.found(RouteChoice(route, exact=True))
        expected = problem.exact()
        assert all(relative(found[name], expected[name]) < limit(64) for name in "bd")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scheme", ["dense", "blocks"])
@pytest.mark.parametrize("route", CPU_ROUTES)
def test_where_products_return_their_sums(
    dtype: torch.dtype, scheme: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the sums of half-precision operands come in float32, and float32 operands are split in two."""

    bmm = torch.bmm

    def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        if out_dtype is None:
            return bmm(a, b, out=out)
        assert a.dtype == b.dtype == dtype
        return torch.matmul(a.to(out_dtype), b.to(out_dtype))

    returns = lambda tensor, wide: tensor.dtype == wide or tensor.dtype.itemsize == 2  # noqa: E731
    monkeypatch.setattr(tensors, "sums_unrounded", returns)
    monkeypatch.setattr(exact, "sums_unrounded", returns)
    problem = Problem(scheme, dtype, 256)
    expected = problem.exact()
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "bmm", mm)
    assert structure.product is blocks.product is tensors.product
    found = problem.found(RouteChoice(route, exact=True))
    # Two numbers of 8 or 11 bits instead of 24.
    for name in "bd":
        assert relative(found[name], expected[name]) < torch.finfo(dtype).eps ** 2 / 2 + limit(256)


def test_the_parts_of_a_split_tensor() -> None:
    tensor = torch.randn(1000)
    for dtype, most in ((torch.bfloat16, 2.0**-16), (torch.float16, 2.0**-22)):
        high, low = exact.split(tensor, dtype)
        assert high.dtype == low.dtype == dtype
        # float16 has an absolute limit too: its smallest number.
        assert ((high.double() + low.double() - tensor).abs() <= most * tensor.abs() + 2.0**-25).all()


def test_exact_gradients_of_a_stack() -> None:
    torch.manual_seed(0)
    count, tokens = 3, 300
    a, up = projections("dense", torch.bfloat16)
    x, g = torch.randn(tokens, IN).bfloat16(), torch.randn(tokens, OUT).bfloat16()
    groups = torch.randint(count, (tokens,))
    vectors = {"b": torch.randn(count, OUT), "d": torch.randn(count, RANK)}
    reference = {name: vector.double().requires_grad_() for name, vector in vectors.items()}
    z = (x.double() @ a.dense().double().t()) * reference["d"][groups] * SCALE
    ((z @ up.dense().double()) * reference["b"][groups]).backward(g.double())
    errors = {}
    for exactly in (True, False):
        own = {name: vector.clone().requires_grad_() for name, vector in vectors.items()}
        x.requires_grad_()
        y = stack_residual(torch.zeros_like(g), x, Factors(a, up, own["b"], own["d"], SCALE), groups, exactly=exactly)
        y.backward(g)
        errors[exactly] = [relative(own[name].grad, reference[name].grad) for name in "bd"]
    assert max(errors[True]) < limit(tokens) < min(errors[False]) / 100


# The choice


def profile(dtype: torch.dtype) -> DeviceProfile:
    return device_profile(CPU, dtype)


def test_they_are_chosen_where_they_cost_at_most_three_percent() -> None:
    shapes = [LayerShape(n, n, r, 2048) for n in (384, 4096) for r in (16, 64, 256, 1024)]
    own = profile(torch.bfloat16)
    for shape in shapes:
        plain = choose_route("auto", "balanced", shape, own, training=True)
        chosen = choose_route("auto", "balanced", shape, own, training=True, wide_vectors=True)
        step = 2 * 2 * 2048 * shape.in_features**2 / own.flops
        seconds = [estimate(each, shape, own, training=True).seconds for each in (plain, chosen)]
        assert seconds[1] - seconds[0] <= 0.03 * 1.1 * (step + seconds[0])
        assert chosen.exact or chosen == plain
    exactly = [choose_route("auto", "balanced", shape, own, training=True, wide_vectors=True).exact for shape in shapes]
    assert exactly == [False, False, False, False, True, True, False, False]


def test_they_are_chosen_where_float32_is_faster() -> None:
    """As for float16 on CPUs that compute it in float32 anyway."""
    own = replace(profile(torch.float16), flops=5e10, wide_flops=15e10)
    shape = LayerShape(768, 768, 256, 2048)
    assert choose_route("auto", "balanced", shape, own, training=True, wide_vectors=True).exact
    assert exact_rows_pay(shape, own)
    assert not exact_rows_pay(LayerShape(768, 768, 256, 2048), profile(torch.bfloat16))


def test_they_are_not_chosen_without_need() -> None:
    shape, own = LayerShape(4096, 4096, 16, 2048), profile(torch.bfloat16)
    assert not choose_route("auto", "balanced", shape, own, training=False, wide_vectors=True).exact
    assert not choose_route("auto", "balanced", shape, own, training=True, wide_vectors=False).exact
    assert "exact" in str(choose_route("auto", "balanced", shape, own, training=True, wide_vectors=True))


def test_less_memory_excludes_what_they_save() -> None:
    shape, own = LayerShape(4096, 4096, 16, 2048), profile(torch.bfloat16)
    assert not choose_route("auto", "low", shape, own, training=True, wide_vectors=True).exact


# Layers


class Attention(nn.Module):
    """Layers that share x A^T, of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x)], dim=-1)


@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
def test_layers_with_the_same_input(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "EXACT_SHARE", math.inf)
    monkeypatch.setattr(planning, "route_table", planning.route_table.__wrapped__)
    torch.manual_seed(0)
    model = get_peft_model(Attention().bfloat16(), VeraConfig(r=8, target_modules="all-linear", route=route))
    expected, found = {}, {}
    x, g = torch.randn(4, 32, 16).bfloat16(), torch.randn(4, 32, 40).bfloat16()
    for name, layer in model.vera_layers().items():
        b, d = layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]
        assert b.dtype == d.dtype == torch.float32
        with torch.no_grad():
            b.normal_()
        found[name] = (b, d)
        entry = layer.entries["default"]
        a, up = (view.values(CPU, torch.bfloat16).double() for view in (entry.a, entry.b[0]))
        own = [vector.detach().double().requires_grad_() for vector in (b, d)]
        part = g[..., :16] if name == "q" else g[..., 16:]
        (x.double() @ dense_delta(own[0], own[1], a, entry.scale * up.t()).t()).backward(part.double())
        expected[name] = [vector.grad for vector in own]
    model(x).backward(g)
    for name, vectors in found.items():
        for vector, reference in zip(vectors, expected[name], strict=True):
            assert relative(vector.grad, reference) < limit(128)


def test_an_embedding_sums_in_float32() -> None:
    """Sums in bfloat16 would stop growing after 256 equal terms."""
    model = get_peft_model(nn.Sequential(nn.Embedding(5, 8)).bfloat16(), VeraConfig(r=4, target_modules=["0"]))
    layer = model.vera_layers()["0"]
    tokens = torch.zeros(2000, dtype=torch.int64)
    model(tokens).backward(torch.ones(2000, 8).bfloat16())
    entry = layer.entries["default"]
    column = entry.a.projection.scheme.one_hot_columns(4, tokens[:1]).double()[:, 0]
    up = entry.b[0].values(CPU, torch.float32).double() * entry.scale
    expected = 2000 * (layer.vera_lambda_d["default"].double() * column) @ up
    assert relative(layer.vera_lambda_b["default"].grad, expected) < limit(2000)
