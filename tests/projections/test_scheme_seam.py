"""A projection scheme is one class and one line in `SCHEMES`: a toy with a product of its own does all that ours do."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import pytest
import torch
from torch import Tensor, nn

from small_net import TwoLayers, all_adapted
from veratune import AdapterBank, TargetError, VeraConfig, VeraModel, get_peft_model, supported
from veratune.projections.philox import symmetric_uniform
from veratune.projections.schemes import SCHEMES, Scheme, Side, scheme_from_json
from veratune.projections.structure import Matrix, Structure


class Halves(NamedTuple):
    """Even rows of M are zero in the second half of the columns, odd rows in the first. `values` is (r, n / 2)."""

    @property
    def density(self) -> float:
        return 0.5

    def arrange(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return tensor

    def restore(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return tensor

    def matmul(self, values: Tensor, z: Tensor) -> Tensor:
        _calls.append("matmul")
        return torch.cat([z[..., 0::2] @ values[..., 0::2, :], z[..., 1::2] @ values[..., 1::2, :]], dim=-1)

    def rmatmul(self, values: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        _calls.append("rmatmul")
        first, second = x.chunk(2, dim=-1)
        result = x.new_empty(*x.shape[:-1], values.shape[-2], dtype=dtype)
        result[..., 0::2] = first @ values[..., 0::2, :].mT
        result[..., 1::2] = second @ values[..., 1::2, :].mT
        return result

    def plus_matmul(self, target: Tensor, values: Tensor, z: Tensor, *, in_place: bool) -> Tensor:
        product = self.matmul(values, z)
        return target.add_(product) if in_place else target + product

    def _stored(self, dense: Tensor) -> Tensor:
        half = dense.shape[-1] // 2
        rows = torch.arange(dense.shape[-2], device=dense.device)
        return torch.where((rows % 2 == 0)[:, None], dense[..., :half], dense[..., half:])

    def scaled(self, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (self._stored(rows.unsqueeze(-1) * columns.unsqueeze(-2)) * values).to(values.dtype)

    def outer(self, values: Tensor, z: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._stored(z.mT @ x).to(dtype) * values

    def gram(self, values: Tensor, other: Matrix) -> Tensor:
        return self.dense(values).mT @ other.dense()

    def plus_gram(self, target: Tensor, values: Tensor, other: Matrix) -> Tensor:
        return target + self.gram(values, other)

    def pull_back(self, values: Tensor, other: Matrix, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return self.outer(values, other.dense().mT, gradient.mT, dtype)

    def dense(self, values: Tensor) -> Tensor:
        even = torch.arange(values.shape[-2], device=values.device) % 2 == 0
        zeros = torch.zeros_like(values)
        return torch.cat([torch.where(even[:, None], values, zeros), torch.where(even[:, None], zeros, values)], dim=-1)


_calls: list[str] = []


@dataclass(frozen=True)
class ToyHalves(Scheme):
    name: ClassVar[str] = "halves"

    key: int

    @classmethod
    def for_layers(cls, key: int, r: int, max_in: int, max_out: int) -> Self:
        return cls(key)

    def stored_columns(self, side: Side, features: int) -> int:
        return features // 2

    def structure(self, side: Side, rank: int, features: int) -> Structure:
        return Halves()

    def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
        unit = symmetric_uniform(self.key, ("AB".index(side), 77), rows, width, device)
        return unit.mul_(math.sqrt(3.0 / width)) if side == "A" else unit

    def scale(self, rank: int) -> float:
        return math.sqrt(12.0 / rank)

    def fingerprint(self) -> str:
        return f"{self.key % 2**64:016x}"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "halves", ToyHalves)
    _calls.clear()


def adapted(**settings: Any) -> VeraModel:
    return all_adapted(TwoLayers().double(), r=5, projection="halves", **settings)


def reference(model: VeraModel, x: Tensor) -> Tensor:
    """Float64 dense algebra with the matrices that the toy stands for, built here from its draws."""

    def matrix(side: Side, width: int) -> Tensor:
        stored = ToyHalves(0).draw(side, range(5), width // 2, torch.device("cpu")).double()
        full = torch.zeros(5, width, dtype=torch.float64)
        full[0::2, : width // 2], full[1::2, width // 2 :] = stored[0::2], stored[1::2]
        return full

    base = TwoLayers().double()
    for name, layer in model.vera_layers().items():
        b, d = layer.vectors("default").values()
        plain = base.get_submodule(name)
        delta = torch.diag(b) @ matrix("B", len(b)).t() @ torch.diag(d) @ matrix("A", layer.in_features)
        weight = plain.weight.detach() + ToyHalves(0).scale(5) * delta
        x = x @ weight.t() + plain.bias.detach()
        x = torch.tanh(x) if name == "first" else x
    return x


@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_it_is_trained_by_every_route(route: str, tokens: int) -> None:
    model = adapted(route=route)
    x = torch.randn(tokens, 12, dtype=torch.float64)
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected, actual = reference(model, x), model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    for found, right in zip(
        torch.autograd.grad(actual.square().sum(), vectors),
        torch.autograd.grad(expected.square().sum(), vectors),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    if route == "factored":
        assert {"matmul", "rmatmul"} <= set(_calls)  # its own products, not those with dense matrices


def test_it_is_saved_loaded_merged_and_kept_in_a_bank(tmp_path: Any) -> None:
    model, x = adapted(), torch.randn(9, 12, dtype=torch.float64)
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    loaded = VeraModel.from_pretrained(TwoLayers().double(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    bank = AdapterBank(TwoLayers().double(), loaded.peft_config["default"], capacity=4)
    bank.load("toy", tmp_path)
    with torch.no_grad():
        mixed = bank.model(x, adapters=["toy"] * 8 + [None])
    torch.testing.assert_close(mixed[:8], expected[:8], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[8], TwoLayers().double()(x)[8])
    bank.unload()
    kept = AdapterBank(TwoLayers().double(), loaded.peft_config["default"], capacity=4, file=tmp_path / "toy.bank")
    kept.load("toy", tmp_path)
    kept.unload()
    opened = AdapterBank.open(TwoLayers().double(), tmp_path / "toy.bank")
    with torch.no_grad():
        assert torch.equal(opened.model(x, adapters=["toy"] * 8 + [None]), mixed)
    opened.unload()
    before = model(x).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-7)


def test_it_is_exported_as_a_lora_and_refused_where_it_does_not_fit(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model, x = adapted(), torch.randn(9, 12, dtype=torch.float64)
    model.export_lora(tmp_path / "lora")
    there = peft.PeftModel.from_pretrained(TwoLayers().double(), tmp_path / "lora")
    torch.testing.assert_close(there(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"PEFT's VeRA cannot hold projections of the scheme 'halves'.*export_lora"):
        model.export_peft(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_it_is_refused_where_it_has_no_columns(tmp_path: Any) -> None:
    """A toy cannot draw single columns of A, which an embedding needs: said before anything changes."""
    config = VeraConfig(r=5, target_modules=["embed"], projection="halves")
    with pytest.raises(TargetError, match=r"projection='halves' cannot adapt embed \(embedding\)"):
        get_peft_model(nn.ModuleDict({"embed": nn.Embedding(10, 6)}), config)


def test_it_is_listed_and_described() -> None:
    model = adapted()
    table = model.explain_routes(64)
    assert [routes.shape.density for routes in table] == [0.5, 0.5]
    assert supported(model).coverage() == 1.0
    scheme = model.projection_scheme("default")
    assert scheme_from_json(scheme.to_json()) == scheme
    with pytest.raises(ValueError, match="fingerprint"):
        scheme_from_json({**scheme.to_json(), "fingerprint": "f" * 16})
    with pytest.raises(ValueError, match=r"projection='halfs'.*'halves'"):
        VeraConfig(projection="halfs")
