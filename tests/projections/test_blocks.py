"""The `blocks` scheme: its values, element by element as the rules state them, and its products."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dense import check_against_dense
from layer_kinds import Attention, Table, adapted, gpt_oss, logits, mixtral, seeded
from reference import block_projections, randomise
from veratune import AdapterBank, VeraConfig, VeraModel, get_peft_model
from veratune.layers import VeraLayer
from veratune.ops.delta import weighted_by_gradient
from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear, residual
from veratune.ops.planning import RouteChoice
from veratune.ops.routes import ROUTES
from veratune.projections.blocks import BlockProjections
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import scheme_from_json
from veratune.projections.structure import Matrix

CPU = torch.device("cpu")
# g, rank, in, out: all divide; ranks that g or g^2 does not divide; widths that g does not divide; one block.
SIZES = [(4, 16, 12, 8), (4, 32, 8, 20), (4, 12, 8, 12), (4, 21, 12, 6), (8, 24, 20, 12), (2, 5, 7, 9), (1, 3, 4, 5)]
CHOICES = [RouteChoice(name, keep) for name in ROUTES if name != "triton" for keep in (False, True)]
BLOCKS = {"projection": "blocks", "projection_blocks": 3}


def matrices(g: int, rank: int, n: int, m: int) -> tuple[Matrix, Matrix]:
    """A and B in float64, as layers compute with them."""
    scheme = BlockProjections(5, g)
    a, b = (projection_pool.view(scheme, side, rank, width) for side, width in (("A", n), ("B", m)))
    return a.matrix(CPU, torch.float64), b.matrix(CPU, torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


# Values


@pytest.mark.parametrize(("g", "rank", "n", "m"), SIZES)
def test_elements_are_those_that_the_rules_state(g: int, rank: int, n: int, m: int) -> None:
    scheme = BlockProjections(5, g)
    a, b = block_projections(5, g, rank, n, m)
    close(projection_pool.view(scheme, "A", rank, n).drawn().double(), a)
    close(projection_pool.view(scheme, "B", rank, m).drawn().double().t() * scheme.scale(rank), b)
    A, B = matrices(g, rank, n, m)  # noqa: N806
    close(A.structure.restore(A.dense(), 0), a)
    close(B.structure.restore(B.dense(), 0).t() * scheme.scale(rank), b)


def test_a_lower_rank_is_the_beginning_of_a_higher_one() -> None:
    scheme = BlockProjections(2**64 - 1, 4)
    for side in ("A", "B"):
        low, high = (projection_pool.view(scheme, side, rank, 12).drawn() for rank in (7, 40))
        assert torch.equal(low, high[:7])
        assert torch.equal(scheme.draw(side, range(7, 40), 12, CPU), scheme.draw(side, range(40), 12, CPU)[7:])


@pytest.mark.parametrize("g", [2, 8])
def test_each_side_keeps_the_variance(g: int) -> None:
    """Kaiming-uniform with each element's fan-in: a row of A x, and a row of B z, have variance 2 times that of x."""
    a, b = block_projections(0, g, 16 * g, 64, 64)
    assert float(a.square().sum(1).mean()) == pytest.approx(2, rel=0.1)
    assert float(b.square().sum(1).mean()) == pytest.approx(2, rel=0.1)
    drawn = projection_pool.view(BlockProjections(0, g), "A", 16 * g, 64).drawn()
    assert drawn.abs().max() <= math.sqrt(6 / (64 / g))


@pytest.mark.parametrize(("rank", "n", "m"), [(16, 12, 8), (19, 8, 12), (64, 12, 12)])
def test_every_input_block_reaches_every_output_block(rank: int, n: int, m: int) -> None:
    a, b = block_projections(3, 4, rank, n, m)
    assert bool(((b != 0).double() @ (a != 0).double() > 0).all())
    a, b = block_projections(3, 4, 4, n, m)  # with g ranks: all inputs are read and all outputs written
    assert bool((a != 0).any(0).all()) and bool((b != 0).any(1).all())


# A change here breaks every adapter that was ever trained: a new version is the way to change values.
GOLDEN = {(0, 8): "e46ce7b53b865568", (2**64 - 1, 16): "0dc3bebe7644aba1"}


@pytest.mark.parametrize(("key", "g"), GOLDEN)
def test_fingerprints_stay_and_descriptions_are_restored(key: int, g: int) -> None:
    scheme = BlockProjections(key, g)
    assert scheme.fingerprint() == GOLDEN[key, g]
    values = scheme.to_json()
    assert values == {"scheme": "blocks", "key": key, "g": g, "fingerprint": scheme.fingerprint()}
    assert scheme_from_json(values) == scheme
    assert BlockProjections(key, g // 2).fingerprint() != scheme.fingerprint()
    for wrong in ({"g": g // 2}, {"g": 0}, {"g": 1 << 40}, {"g": "8"}, {"key": key // 2 + 1}):
        with pytest.raises(ValueError, match="blocks"):
            scheme_from_json({**values, **wrong})


def test_only_the_nonzero_elements_are_stored() -> None:
    views = [projection_pool.view(BlockProjections(0, 8), side, 128, 96) for side in ("A", "B")]
    assert [view.values(CPU, torch.float32).shape for view in views] == [(128, 12), (128, 12)]
    restored = pickle.loads(pickle.dumps(copy.deepcopy(views[0])))
    assert restored.values(CPU, torch.float32) is not None
    assert torch.equal(restored.values(CPU, torch.float32), views[0].values(CPU, torch.float32))
    projection_pool.trim()
    assert views[0].values(CPU, torch.float32).shape == (128, 12)


# Products


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize(("g", "rank", "n", "m"), SIZES)
def test_products_equal_dense_ones(g: int, rank: int, n: int, m: int, tokens: int) -> None:
    torch.manual_seed(1)
    for M in matrices(g, rank, n, m):  # noqa: N806
        own, values = M.structure, M.values
        full = own.restore(M.dense(), 0)
        z, x, rows, columns = (
            torch.randn(tokens, rank, dtype=torch.float64),
            torch.randn(tokens, full.shape[1], dtype=torch.float64),
            torch.randn(3, rank, dtype=torch.float64),
            torch.randn(3, full.shape[1], dtype=torch.float64),
        )
        arranged = own.arrange(z)
        close(own.restore(arranged), z)
        close(M.matmul(arranged), z @ full)
        close(M.matmul(arranged[0]), z[0] @ full)
        close(own.restore(M.rmatmul(x)), x @ full.t())
        close(own.restore(M.rmatmul(x[0])), full @ x[0])
        start = torch.randn_like(x)
        close(own.plus_matmul(start, values, arranged, in_place=False), start + z @ full)
        written = start.clone()
        assert own.plus_matmul(written, values, arranged, in_place=True).data_ptr() == written.data_ptr()
        close(written, start + z @ full)
        outer = Matrix(own.outer(values, arranged, x, torch.float64), own)
        close(own.restore(outer.dense(), 0), full * (z.t() @ x))
        scaled = Matrix(own.scaled(values, own.arrange(rows), columns), own)
        expected = rows[:, :, None] * full * columns[:, None]
        close(own.restore(scaled.dense(), -2), expected)
        close(scaled.matmul(arranged), z @ expected)
        close(own.restore(scaled.rmatmul(x)), x @ expected.mT)
        one = Matrix(own.scaled(values, own.arrange(rows[0]), columns[0]), own)
        close(own.restore(one.dense(), 0), expected[0])


@pytest.mark.parametrize(("g", "rank", "n", "m"), SIZES)
def test_deltas_and_their_gradients_equal_dense_ones(g: int, rank: int, n: int, m: int) -> None:
    torch.manual_seed(2)
    A, B = matrices(g, rank, n, m)  # noqa: N806
    a, b_projection = A.structure.restore(A.dense(), 0), B.structure.restore(B.dense(), 0)
    for leading in ((), (3,)):
        b, d, gradient = (torch.randn(*leading, *size, dtype=torch.float64) for size in ((m,), (rank,), (m, n)))
        factors = Factors(A, B, b, B.structure.arrange(d), 0.7)
        delta = 0.7 * b[..., :, None] * (b_projection.t() * d[..., None, :]) @ a
        close(factors.folded().gram(A), delta)
        products = weighted_by_gradient(factors, gradient, torch.float64)
        close(B.structure.restore(products.dense(), -2), b_projection * (a @ gradient.mT))
        grad_b, grad_d = factors.vector_gradients(products, True, True)
        assert grad_b is not None and grad_d is not None
        full = b_projection * (a @ gradient.mT)
        close(grad_b, 0.7 * (full.mT @ d[..., None]).squeeze(-1))
        close(B.structure.restore(grad_d), 0.7 * (full @ b[..., None]).squeeze(-1))


# Layers


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(("g", "rank", "n", "m"), [(2, 8, 6, 4), (4, 6, 8, 6), (2, 4, 4, 5)])
def test_gradcheck_of_the_whole_layer(choice: RouteChoice, g: int, rank: int, n: int, m: int) -> None:
    torch.manual_seed(3)
    A, B = matrices(g, rank, n, m)  # noqa: N806
    inputs = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, n), (m, n), (m,), (m,))]
    inputs.append(torch.randn(rank, dtype=torch.float64, requires_grad=True))

    def layer(x: Tensor, w: Tensor, bias: Tensor, b: Tensor, d: Tensor) -> Tensor:
        return adapted_linear(x, w, bias, Factors(A, B, b, B.structure.arrange(d), 0.7), choice)

    assert torch.autograd.gradcheck(layer, tuple(inputs))
    if not choice.reads_weight:

        def added(start: Tensor, x: Tensor, b: Tensor, d: Tensor) -> Tensor:
            return residual(start, x, Factors(A, B, b, B.structure.arrange(d), 0.7), choice)

        x, _, _, b, d = inputs
        start = torch.randn(5, m, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(added, (start, x, b, d))


def doubled(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: seeded(make)().double()


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[Any], Tensor]]] = {
    "experts": (mixtral, {}, logits),
    "transposed experts": (gpt_oss, {}, logits),
    "attention": (doubled(Attention), {}, lambda m: m(numbers(1, 3, 8), numbers(1, 2, 8))),
    "convolution": (
        doubled(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))),
        {"target_modules": ["0"]},
        lambda m: m(numbers(1, 4, 5, 5)),
    ),
    "embedding": (seeded(Table), {"target_modules": ["table"]}, lambda m: m(torch.tensor([[3, 0, 29]]))),
    "parts": (
        doubled(lambda: nn.Sequential(nn.Linear(9, 12))),
        {"fused_parts": {"0": [6, 4, 2]}},
        lambda m: m(numbers(2, 9)),
    ),
    "linear layers": (
        doubled(lambda: nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 6))),
        {},
        lambda m: m(numbers(4, 9)),
    ),
}


@pytest.mark.parametrize("rank", [3, 9, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_computes_the_dense_result(kind: str, rank: int, tmp_path: Path) -> None:
    make, settings, call = KINDS[kind]
    model = adapted(make, **BLOCKS, r=rank, **settings)
    check_against_dense(make, model, call, tolerance=2e-5)
    expected = call(model).detach()
    model.save_pretrained(tmp_path)
    assert not any("projection" in name for name in _tensor_names(tmp_path))
    loaded = VeraModel.from_pretrained(make(), tmp_path)
    assert torch.equal(call(loaded), call(model))
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(call(model), expected)


def _tensor_names(directory: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_projections_may_be_saved_and_are_checked(tmp_path: Path) -> None:
    make, _, call = KINDS["linear layers"]
    model = adapted(make, **BLOCKS, r=10, save_projection=True)
    model.save_pretrained(tmp_path)
    assert {name for name in _tensor_names(tmp_path) if "projection" in name} == {
        "projection.A.9",
        "projection.A.12",
        "projection.B.12",
        "projection.B.6",
    }
    assert torch.equal(call(VeraModel.from_pretrained(make(), tmp_path)), call(model))


def test_a_lora_of_it_is_exact_and_pefts_vera_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make, _, call = KINDS["linear layers"]
    model = adapted(make, **BLOCKS, r=10)
    model.export_lora(tmp_path / "lora")
    there = peft.PeftModel.from_pretrained(make(), tmp_path / "lora")
    torch.testing.assert_close(call(there), call(model).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"PEFT's VeRA cannot hold projections of the scheme 'blocks'.*export_lora"):
        model.export_peft(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_bank_serves_it_beside_dense_ones_of_another_rank(tokens: int, tmp_path: Path) -> None:
    make, _, _ = KINDS["linear layers"]
    x = torch.randn(6, tokens, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = {None: make()(x)}
    for name, settings in (("low", {**BLOCKS, "r": 5}), ("high", {**BLOCKS, "r": 10}), ("dense", {"r": 7})):
        model = adapted(make, **settings)
        expected[name] = model(x).detach()
        model.save_pretrained(tmp_path / name)
    bank = AdapterBank(make(), VeraConfig(r=10, target_modules="all-linear"), capacity=4)
    for name in ("low", "high", "dense"):
        bank.load(name, tmp_path / name)
    rows = ["low", None, "high", "dense", "low", "high"]
    with torch.no_grad():
        served = bank.model(x, adapters=rows)
        uniform = bank.model(x, adapters=["high"] * 6)
    for i, name in enumerate(rows):
        torch.testing.assert_close(served[i], expected[name][i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(uniform, expected["high"], rtol=1e-4, atol=1e-5)


# Ways of training


def one_layer() -> VeraModel:
    torch.manual_seed(8)
    base = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False)
    model = get_peft_model(copy.deepcopy(base), VeraConfig(r=32, target_modules=["0"], projection="blocks"))
    randomise(model, scale=0.3)
    return model


@pytest.mark.parametrize("memory", ["low", "balanced", "fast"])
@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
@pytest.mark.parametrize("tokens", [2, 600])
def test_every_route_and_memory_setting(route: str, memory: str, tokens: int) -> None:
    def make() -> nn.Module:
        torch.manual_seed(9)
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).double()

    settings = {"route": route, "memory": memory, "projection": "blocks", "projection_blocks": 4}
    model = adapted(make, r=16, **settings)
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    check_against_dense(make, model, lambda m: m(x))


def test_autocast_and_bfloat16_are_close_to_float32() -> None:
    model = one_layer()
    x = torch.randn(300, 16)
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    exact = model(x)
    exact_grads = torch.autograd.grad(exact.square().sum(), vectors)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    assert rounded.dtype == torch.bfloat16
    for found, right in zip(
        [rounded.detach(), *torch.autograd.grad(rounded.float().square().sum(), vectors)],
        [exact.detach(), *exact_grads],
        strict=True,
    ):
        assert float((found.float() - right).norm() / right.norm()) < 0.03


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = one_layer()
    x = torch.randn(40, 16, requires_grad=True)
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    expected = torch.autograd.grad(model(x).square().sum(), vectors)
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    again.square().sum().backward()
    for vector, right in zip(vectors, expected, strict=True):
        assert torch.equal(vector.grad, right)


def test_a_compiled_model_computes_the_same() -> None:
    model = one_layer()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    for tokens in (3, 300):
        x = torch.randn(tokens, 16)
        expected, actual = model(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        for found, right in zip(
            torch.autograd.grad(actual.square().sum(), vectors),
            torch.autograd.grad(expected.square().sum(), vectors),
            strict=True,
        ):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_functional_transformations() -> None:
    model = one_layer()
    x = torch.randn(5, 16)
    per_row = torch.func.vmap(torch.func.jacrev(lambda row: model(row[None])[0]))(x)
    (layer,) = model.vera_layers().values()
    torch.testing.assert_close(per_row, _merged(layer).expand(5, -1, -1), rtol=1e-4, atol=1e-5)


def test_a_first_call_under_a_tracing_mode_leaves_nothing_behind() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 24)), VeraConfig(r=77, target_modules=["0"], projection="blocks")
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(3, 16)).shape == (3, 24)
    with torch.inference_mode():
        model(torch.randn(3, 16))
    output = model(torch.randn(3, 16))
    assert type(output.detach()) is Tensor
    output.sum().backward()


def _merged(layer: VeraLayer) -> Tensor:
    return layer.merged_weight(["default"])


def test_the_config_is_checked() -> None:
    assert get_peft_model(nn.Sequential(nn.Linear(8, 8)), VeraConfig(r=16, target_modules=["0"], projection="blocks"))
    with pytest.raises(ValueError, match=r"projection_blocks=16 has no effect with projection='per_dimension'"):
        VeraConfig(projection_blocks=16)
    with pytest.raises(ValueError, match=r"projection_blocks=16 needs a rank of at least this number, not 8"):
        VeraConfig(r=8, projection="blocks", projection_blocks=16)
    with pytest.raises(ValueError, match=r"projection_blocks=8 needs a rank of at least this number, not 4"):
        VeraConfig(r=64, rank_pattern={"out": 4}, projection="blocks")
    for wrong in (0, 65, 1 << 70):
        with pytest.raises(ValueError, match=r"projection_blocks=.*an integer from 1 to 64"):
            VeraConfig(projection="blocks", projection_blocks=wrong)
    with pytest.raises(TypeError, match="projection_blocks"):
        VeraConfig(projection="blocks", projection_blocks=8.0)


def test_explained_routes_know_the_density() -> None:
    model = one_layer()
    (routes,) = model.explain_routes(64)
    assert routes.shape.density == pytest.approx(1 / 4)  # r = 32 is stored as 64 rows of an eighth
