"""What the state matrices compare with: a small model, and float64 algebra of its adapters.

The reference knows nothing of veratune's classes: it is told the adapters' numbers once, keeps its own account of what
is active and merged, and computes the model in float64 with dense weights.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from reference import projections
from veratune import AdapterState

IDS = torch.tensor([[3, 7, 1, 9, 4], [0, 2, 8, 7, 10]])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 8, 7) / 3)
        self.down_proj = nn.Parameter(torch.randn(2, 7, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("nti,eoi->ento", x, self.up_proj))
        return torch.einsum("enti,eoi->nto", hidden, self.down_proj)


class Tiny(nn.Module):
    """An embedding, a block of two linear layers, one layer of each other kind if wanted, and a head."""

    is_gradient_checkpointing = False

    def __init__(self, *, kinds: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = Block()
        self.kinds = kinds
        if kinds:
            self.conv = nn.Conv1d(6, 5, 3, padding=1)
            self.transposed = Conv1D(7, 5)
            self.fused = nn.Linear(7, 14)
            self.experts = Experts()
        self.head = nn.Linear(7 if kinds else 6, 11 if tied else 4, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def generate(self, ids: Tensor) -> Tensor:
        """Return the numbers with a further one, the largest output's, behind each row."""
        return torch.cat([ids, self(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)

    def gradient_checkpointing_enable(self) -> None:
        self.is_gradient_checkpointing = True

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.is_gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        if self.kinds:
            x = torch.tanh(self.conv(x.mT).mT).contiguous()
            gate, value = self.fused(torch.tanh(self.transposed(x))).chunk(2, dim=-1)
            x = self.experts(torch.sigmoid(gate) * value)
        return self.head(x)


# The outputs of each part of a layer that stands for several.
PARTS = {"fused": (7, 7)}


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter has learned, in float64, as it was told to the reference."""

    key: int
    vectors: dict[str, tuple[Tensor, Tensor]]
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    scheme: str = "per_dimension"
    frozen: bool = False

    @classmethod
    def of(cls, config: Any, state: AdapterState, scheme: str | None = None) -> "Adapter":
        return cls(
            key=config.projection_prng_key,
            vectors={layer: (number(own["b"]), number(own["d"])) for layer, own in state.vectors.items()},
            saved={m: {key: number(t) for key, t in own.items()} for m, own in state.saved.items()},
            biases={bias: number(own) for bias, own in state.biases.items()},
            scheme=scheme or config.projection,
            frozen=config.inference_mode,
        )

    @property
    def whole(self) -> bool:
        """Whether it trains something in full, of which only one can be in the model at a time."""
        return bool(self.saved or self.biases)

    def same_values(self, other: "Adapter") -> bool:
        return all(
            mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
            for mine, theirs in zip(self.flat(), other.flat(), strict=True)
        )

    def flat(self) -> tuple[dict[str, Tensor], ...]:
        return (
            {name: torch.cat([b.flatten(), d.flatten()]) for name, (b, d) in self.vectors.items()},
            {f"{m}.{key}": tensor for m, own in self.saved.items() for key, tensor in own.items()},
            self.biases,
        )


def number(tensor: Tensor) -> Tensor:
    """Return a parameter's numbers in float64, a copy, wherever it is kept."""
    whole: Any = getattr(tensor.detach(), "full_tensor", tensor.detach)()
    return whole.to("cpu", torch.float64, copy=True)


@cache
def drawn(scheme: str, key: int, rank: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    if scheme == "per_dimension":
        return projections(key, rank, n, m)
    # As PEFT 0.21 draws them for layers of at most 10 inputs and outputs, A first.
    generator = torch.Generator().manual_seed(key)
    a, b = (
        torch.empty(shape).uniform_(-1, 1, generator=generator) * math.sqrt(3) * math.sqrt(2.0) / math.sqrt(shape[1])
        for shape in ((rank, 10), (10, rank))
    )
    return a[:, :n].double(), b[:m].double()


def delta_of(adapter: Adapter, name: str, weight: Tensor) -> Tensor:
    """Return an adapter's delta of a weight, in the weight's own layout."""
    b, d = adapter.vectors[name]

    def dense(b: Tensor, d: Tensor, n: int, scale: float = 1.0) -> Tensor:
        a_projection, b_projection = drawn(adapter.scheme, adapter.key, d.shape[-1], n, len(b))
        return torch.diag(b) @ b_projection @ torch.diag(d) @ (a_projection * scale)

    if name == "embed":
        return dense(b, d, len(weight), math.sqrt(len(weight))).t()
    if name == "transposed":
        return dense(b, d, len(weight)).t()
    if b.ndim == 2:
        return torch.stack([dense(b[e], d[e], weight.shape[-1]) for e in range(len(b))])
    n = weight[0].numel()
    if name in PARTS:
        return torch.cat([dense(own, d[i], n) for i, own in enumerate(b.split(PARTS[name]))])
    return dense(b, d, n).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Truth:
    """The account of a model's state, of which all that it computes follows.

    Attributes:
        adapters: name to adapter, in order.
        active: the active adapters, in order.
        merged: the merged ones.
        trainable: the adapters whose parameters require gradients.
        context: within `only` or `disable_adapter`, the adapters that compute; otherwise None.
        waiting: what was merged before that context.
        resting: what is trainable again after it, in PEFT, which freezes what it disables.
    """

    adapters: dict[str, Adapter]
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    trainable: frozenset[str] = frozenset()
    context: tuple[str, ...] | None = None
    waiting: tuple[str, ...] = ()
    resting: frozenset[str] = frozenset()

    @property
    def now(self) -> tuple[str, ...]:
        """The active adapters at the moment."""
        return self.active if self.context is None else self.context

    @property
    def computing(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.now, *self.merged)))

    def changed(self, **values: Any) -> "Truth":
        return replace(self, **values)

    def without(self, name: str) -> "Truth":
        def left(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(own for own in names if own != name)

        return Truth(
            adapters={own: adapter for own, adapter in self.adapters.items() if own != name},
            active=left(self.active),
            merged=left(self.merged),
            trainable=self.trainable - {name},
            context=None if self.context is None else left(self.context),
            waiting=left(self.waiting),
            resting=self.resting - {name},
        )

    def left(self) -> "Truth":
        """Return the state after its context has been left."""
        if self.context is None:
            return self
        trainable = self.trainable | self.resting
        return replace(self, context=None, merged=self.waiting, waiting=(), trainable=trainable, resting=frozenset())


@dataclass(frozen=True)
class Reference:
    """The base model in float64.

    Attributes:
        model: of the same structure, never adapted.
        rounding: what merging makes of a weight beyond the rounding to its dtype (4-bit codes).
    """

    model: nn.Module
    rounding: Callable[[str, Tensor], Tensor] | None = None

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.named_parameters(remove_duplicate=False)}

    def with_adapters(self, truth: Truth, computing: Iterable[str]) -> dict[str, Tensor]:
        """Return all parameters of the model in which these adapters compute, the merged ones in its weights."""
        base, weights = self.weights(), self.weights()
        merged = [name for name in truth.merged if name in computing]
        for name in dict.fromkeys((*merged, *computing)):
            adapter = truth.adapters[name]
            for layer in adapter.vectors:
                own = layer if layer in base else f"{layer}.weight"
                weights[own] = weights[own] + delta_of(adapter, layer, base[own])
            for module, tensors in adapter.saved.items():
                weights |= {f"{module}.{key}": tensor for key, tensor in tensors.items()}
            weights |= adapter.biases
            if self.rounding is not None and name == (merged or [None])[-1]:
                weights = {own: self.rounding(own, weight) for own, weight in weights.items()}
        return weights

    def outputs(self, truth: Truth, computing: Iterable[str] | None = None) -> Tensor:
        weights = self.with_adapters(truth, truth.computing if computing is None else computing)
        return self.call(weights)

    def call(self, weights: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(self.model, dict(weights), (IDS,), tie_weights=False)
        return output

    def gradients(self, truth: Truth, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the gradients of `weighted(outputs)` to an adapter's vectors on each layer."""
        own = truth.adapters[name]
        leaves = {layer: tuple(v.clone().requires_grad_() for v in pair) for layer, pair in own.vectors.items()}
        adapters = {**truth.adapters, name: replace(own, vectors=leaves)}
        weighted(self.outputs(truth.changed(adapters=adapters))).backward()
        return {layer: (b.grad, d.grad) for layer, (b, d) in leaves.items()}  # type: ignore[misc]


def weighted(outputs: Tensor) -> Tensor:
    factors = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape)
    return (outputs.double() * factors).sum()


def close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = float(expected.abs().max())
    difference = float((number(actual) - expected.detach()).abs().max())
    assert difference <= tolerance * largest, f"{what}: off by {difference:.3e} of {largest:.3e}"
