"""What the state matrix compares with: a small model, float64 algebra of its adapters, and a snapshot of everything.

The reference knows nothing of veratune's classes: it is told the adapters' numbers once, keeps its own account of what
is active and merged, and computes the model in float64 with dense weights.
"""

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import veratune
from reference import projections
from veratune import AdapterState, VeraModel

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
    def of(cls, model: VeraModel, name: str, state: AdapterState | None = None) -> "Adapter":
        state, config = state or model.adapter_state(name), model.peft_config[name]
        return cls(
            key=config.projection_prng_key,
            vectors={layer: (number(own["b"]), number(own["d"])) for layer, own in state.vectors.items()},
            saved={m: {key: number(t) for key, t in own.state_dict().items()} for m, own in state.saved.items()},
            biases={bias: number(own) for bias, own in state.biases.items()},
            scheme=config.projection,
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
    """

    adapters: dict[str, Adapter]
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    trainable: frozenset[str] = frozenset()
    context: tuple[str, ...] | None = None
    waiting: tuple[str, ...] = ()

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
        )

    def left(self) -> "Truth":
        """Return the state after its context has been left."""
        if self.context is None:
            return self
        return replace(self, context=None, merged=self.waiting, waiting=())


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


@dataclass
class Env:
    """A model in some state, with what the reference knows of it."""

    family: str
    mode: str
    model: VeraModel
    reference: Reference
    truth: Truth
    library: Callable[[str], Path]
    path: Path = Path()
    tolerance: float = 2e-5
    traits: frozenset[str] = frozenset()
    last: dict[str, Any] = field(default_factory=dict)
    before: Truth = field(default_factory=lambda: Truth({}))
    original: dict[str, Any] = field(default_factory=dict)
    context: ExitStack = field(default_factory=ExitStack)

    def outputs(self) -> Tensor:
        with torch.no_grad():
            outputs = number(self.model(IDS))
        self.settle()
        return outputs

    @property
    def keeps_whole(self) -> bool:
        """Whether accelerate's hooks keep what is trained in full, of which they lose the gradients."""
        return "offloaded" in self.traits and any(adapter.whole for adapter in self.truth.adapters.values())

    def settle(self) -> None:
        """Let FSDP2 put the sharded parameters back, which it leaves to the next step."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def check(self) -> None:
        """Compare all that the model computes and says of itself with the account of its state."""
        model, truth = self.model, self.truth
        close("outputs", self.outputs(), self.reference.outputs(truth), self.tolerance)
        assert list(model.peft_config) == list(truth.adapters)
        assert model.active_adapters == list(truth.now)
        assert set(model.merged_adapters) == set(truth.merged)
        for name, told in truth.adapters.items():
            state, adapter = model.adapter_state(name), told
            if "offloaded" in self.traits:  # heads and biases are where their hooks keep them
                state = replace(state, saved={}, biases={})
                adapter = replace(adapter, saved={}, biases={})
            assert Adapter.of(model, name, state).same_values(adapter), f"the values of {name} are others"
            found = {parameter.requires_grad for parameter in state.parameters()}
            assert found == {name in truth.trainable}, f"{name} requires gradients: {found}"
        self._check_gradients()

    def _check_gradients(self) -> None:
        learning = [name for name in self.truth.now if name in self.truth.trainable and name not in self.truth.merged]
        if not learning:
            return
        try:
            weighted(_whole(self.model(IDS))).backward()
        except RuntimeError as error:
            if self.keeps_whole and is_ours(error):
                self.model.zero_grad()
                return
            raise
        for name in learning:
            expected = self.reference.gradients(self.truth, name)
            for layer, vectors in self.model.adapter_state(name).vectors.items():
                for vector, gradient in zip(vectors.values(), expected[layer], strict=True):
                    assert vector.grad is not None, f"{layer} of {name} got no gradient"
                    close(f"gradient of {layer}", vector.grad, gradient, 4 * self.tolerance)
        self.model.zero_grad()
        self.settle()

    def snapshot(self) -> dict[str, Any]:
        return {"outputs": self.outputs(), **snapshot(self.model)}

    def leave(self) -> None:
        """Leave the context that the state is in."""
        self.context.close()
        self.truth = self.truth.left()


def _whole(output: Any) -> Tensor:
    return output.full_tensor() if hasattr(output, "full_tensor") else output


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that a refused call must leave as it was: bits, flags, lists, and which module stands where."""
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    lists = ("active_adapters", "merged_adapters", "added_adapters", "disable_adapters")
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in modules],
        "lists": {(name, own): _copied(getattr(module, own, None)) for name, module in modules for own in lists},
        # Optimizers hold what is trained.
        "tensors": {
            name: (not tensor.is_meta and tensor.requires_grad and id(tensor), bits(tensor)) for name, tensor in tensors
        },
        "keys": list(model.state_dict()),
        "configs": {name: repr(config) for name, config in getattr(model, "peft_config", {}).items()},
    }


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}


def bits(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return "meta"
    here: Any = getattr(tensor.detach(), "to_local", tensor.detach)()
    # A copy, as torch never resizes again what numpy has seen, which FSDP2 does.
    own = here.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
    return (here.dtype, tuple(here.shape), own.numpy().tobytes())


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise AssertionError unless two snapshots are equal, naming what differs."""
    for part, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, after[part]), f"{part} are others"
        elif isinstance(value, dict):
            assert value.keys() == after[part].keys(), (part, value.keys() ^ after[part].keys())
            differing = [key for key, own in value.items() if own != after[part][key]]
            assert not differing, f"{part} differ: {differing[:4]}"
        else:
            assert value == after[part], f"{part} are others"


_SOURCES = str(Path(veratune.__file__).parent)


def is_ours(error: BaseException) -> bool:
    """Return whether an error was raised by a line of veratune, rather than of what it calls."""
    if not isinstance(error, ValueError | TypeError | RuntimeError | AttributeError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.filename.startswith(_SOURCES) and not isinstance(error, AttributeError | NotImplementedError)


def read_native(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of veratune's own, in float64, by their keys."""
    return {key: tensor.double() for key, tensor in load_file(directory / "adapter_model.safetensors").items()}


def native_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return what such a file has to hold of an adapter, projections aside."""

    def entries() -> Iterator[tuple[str, Tensor]]:
        for layer, (b, d) in adapter.vectors.items():
            yield f"vera_lambda_b.{layer}", b
            yield f"vera_lambda_d.{layer}", d
        for module, tensors in adapter.saved.items():
            for key, tensor in tensors.items():
                yield f"modules_to_save.{module}.{key}", tensor
        for name, bias in adapter.biases.items():
            yield f"bias.{name}", bias

    return dict(entries())


def check_native(directory: Path, adapter: Adapter) -> None:
    found, expected = read_native(directory), native_tensors(adapter)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
