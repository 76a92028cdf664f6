"""The methods of adapted layers for the state matrix: each layer of a model in a state, called itself."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from state_matrix import Env, Method, bits, is_ours, never
from state_methods import at_hand
from state_truth import IDS, close, delta_of, number
from veratune.layers import ComputeSettings, VectorInit, VeraModule
from veratune.layers.base import VeraLayer


@dataclass(frozen=True)
class Case:
    """One layer of a model in some state.

    Attributes:
        env: the state.
        name: the layer's name in the model.
        layer: the layer.
    """

    env: Env
    name: str
    layer: Any

    @property
    def truth(self) -> Any:
        return self.env.truth

    @property
    def traits(self) -> frozenset[str]:
        return self.env.traits

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.env.family == "half" else torch.float32

    @property
    def weight_name(self) -> str:
        return self.name if self.layer.of_parameter else f"{self.name}.weight"

    @property
    def base(self) -> Tensor:
        """W0 in float64."""
        return self.env.reference.weights()[self.weight_name]

    def delta(self, adapter: str) -> Tensor:
        return delta_of(self.truth.adapters[adapter], self.name, self.base)

    def weight(self, added: Sequence[str] | None = None, merged: Sequence[str] | None = None) -> Tensor:
        """Return the weight with the merged and the added adapters, in float64; by default with those of the state."""
        merged = self.truth.merged if merged is None else merged
        weight = self.base
        for name in merged:
            weight = weight + self.delta(name)
        if merged and self.env.reference.rounding is not None:
            weight = self.env.reference.rounding(self.weight_name, weight)
        for name in self.truth.now if added is None else added:
            weight = weight if name in merged else weight + self.delta(name)
        return weight

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as (..., out, in)."""
        if self.layer.kind == "convolution":
            return weight.flatten(1)
        return weight.t() if self.name in ("embed", "transposed") else weight

    @property
    def bias(self) -> Tensor | None:
        if self.layer.of_parameter:
            return None
        return self.env.reference.with_adapters(self.truth, self.truth.computing).get(f"{self.name}.bias")

    def inputs(self) -> Tensor:
        """Return an input of the layer, in float64."""
        if self.name == "embed":
            return IDS
        shape = (2, 6, 5) if self.name == "conv" else (2, 5, self.layer.in_features)
        return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def rows(self) -> Tensor:
        """Return vectors of the layer's inputs, in float64; for a stack, one matrix of them for each of its own."""
        return torch.randn(2, 4, self.layer.in_features, generator=torch.Generator().manual_seed(8)).double()

    def expected(self, weight: Tensor) -> Tensor:
        """Return the outputs for `inputs` with a weight, in float64."""
        values = {"weight": weight} if self.bias is None else {"weight": weight, "bias": self.bias}
        outputs: Tensor = torch.func.functional_call(
            self.env.reference.model.get_submodule(self.name), values, (self.inputs(),)
        )
        return outputs.detach()

    def forward(self) -> Tensor:
        x = self.inputs()
        with torch.no_grad():
            return number(self.layer(x if x.dtype == torch.int64 else x.to(self.dtype)))

    def close(self, what: str, actual: Tensor, expected: Tensor) -> None:
        rounding = 3e-2 if torch.is_autocast_enabled("cpu") else 0.0
        close(f"{what} of {self.name}", actual, expected, max(self.env.tolerance, rounding))

    def computes(self, added: Sequence[str], merged: Sequence[str] = ()) -> None:
        """Check what the layer computes, called and read."""
        expected = self.weight(added, merged)
        with torch.no_grad():
            if not self.layer.of_parameter:
                self.close("outputs", self.forward(), self.expected(expected))
            self.close("weight", self.layer.adapted_weight(), expected)


def is_(expected: Any) -> Callable[[Case, Any], None]:
    def check(case: Case, result: Any) -> None:
        assert result == expected, f"{result} of {case.name}"

    return check


def is_close(what: str, expected: Callable[[Case], Tensor]) -> Callable[[Case, Any], None]:
    return lambda case, result: case.close(what, result, expected(case))


def of_class(call: Callable[[type[VeraLayer], nn.Module], Any]) -> Callable[[Case], Any]:
    """Return a call of a layer kind's class with a module of it, or None for a parameter, which has none."""

    def called(case: Case) -> Any:
        if case.layer.of_parameter:
            return None
        return call(type(case.layer), case.env.reference.model.get_submodule(case.name))

    return called


def has_size(case: Case, geometry: Any) -> None:
    outputs, inputs = case.matrix(case.base).shape[-2:]
    assert geometry is None or (geometry.in_features, geometry.out_features, geometry.count) == (inputs, outputs, None)


def as_matrix(case: Case) -> tuple[Tensor, Tensor]:
    matrix = case.layer.matrix(case.base)
    return matrix, case.layer.like_weight(matrix)


def is_matrix(case: Case, result: tuple[Tensor, Tensor]) -> None:
    expected = case.matrix(case.base)
    assert torch.equal(result[0], expected if case.layer.out_axis == 0 else expected.mT)
    assert torch.equal(result[1], case.base)


def as_told(case: Case, vectors: dict[str, Tensor]) -> None:
    told = case.truth.adapters["other"].vectors[case.name]
    assert all(torch.equal(number(own), other) for own, other in zip(vectors.values(), told, strict=True))


def delta_of_parts(case: Case) -> Tensor:
    """Return the delta, (..., out, in), that an adapter's blocks make by their definition."""
    deltas = [by_definition(b.factors) for b in case.layer.factors_by_part("other", torch.device("cpu"), torch.float32)]
    return torch.cat(deltas) if len(deltas) > 1 else deltas[0]


def delta_of_factors(case: Case) -> Tensor | None:
    """Return the delta that an adapter's factors make, by their definition, unless the layer is fused."""
    if case.layer.entries["other"].parts:
        return None
    return by_definition(case.layer.factors("other", torch.device("cpu"), torch.float32))


def by_definition(factors: Any) -> Tensor:
    a, b_projection, b, d = (number(t) for t in (factors.A.values, factors.B.values, factors.b, factors.d))
    delta: Tensor = factors.scale * b[..., None] * ((b_projection.t() * d[..., None, :]) @ a)
    return delta


def over(case: Case, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Call something with the base weight as the layer has it, loaded if it is offloaded."""
    with torch.no_grad():
        return number(call(case.layer.full_weight()) * 1)


def product(case: Case) -> Any:
    if not case.layer.added_adapters:
        return None
    base = case.layer.matrix(case.layer.full_weight().detach())
    with torch.no_grad():
        return case.layer.product(case.rows().to(base.dtype), base, None)


def is_product(case: Case, result: Any) -> None:
    if result is None or result is NotImplemented:  # which fused layers say
        assert result is None or case.name == "fused"
        return
    case.close("product", result, case.rows() @ case.matrix(case.weight()).mT)


def with_rows(case: Case) -> Tensor | None:
    if case.layer.geometry.count is None:
        return None
    rows = case.rows().flatten(0, 1).to(case.dtype)
    with torch.no_grad():
        start = torch.ones(8, case.layer.out_features, dtype=case.dtype)
        return number(case.layer.add_rows(start, rows, torch.tensor([0] * 4 + [1] * 4)))


def is_with_rows(case: Case, result: Tensor | None) -> None:
    if result is not None:
        added = case.weight() - case.weight(())
        case.close("rows", result, 1 + (case.rows() @ added.mT).flatten(0, 1))


def lora(case: Case) -> Tensor | None:
    if case.layer.why_not_lora() is not None:
        return None
    (a, b), name = case.layer.lora_factors("other"), case.name
    if case.layer.geometry.count is not None:
        # A matrix of each expert; PEFT swaps the two for modules without a flag.
        count = case.layer.geometry.count
        return torch.einsum("eri,ore->eoi", number(a).view(count, -1, a.shape[1]), number(b).view(len(b), -1, count))
    return (number(b).flatten(1) @ number(a).flatten(1)).reshape(case.matrix(case.base).shape) if name else None


def is_lora(case: Case, result: Tensor | None) -> None:
    if result is not None:
        case.close("LoRA", result, case.matrix(case.delta("other")))


def has_keys(case: Case, keys: tuple[str, str]) -> None:
    stem = case.name.rpartition(".")[0] if case.layer.of_parameter else case.name
    assert all(key.startswith(f"{stem}.") and "lora_" in key for key in keys)


def is_bias(case: Case, bias: Any) -> None:
    assert (bias is None) == (case.bias is None)
    if case.bias is not None and "offloaded" not in case.traits:
        case.close("bias", bias, case.bias)


def is_set(case: Case) -> None:
    """Set another weight, where the model would, and the former one again."""
    layer, weight = case.layer, case.layer.base_weight
    if not readable(case):
        return
    holders: list[Any] = [module for module in case.env.model.modules() if isinstance(module, VeraModule)]
    owner, name = next(
        ((own, layer.weight_name) for own in holders if layer in own.adapted.values()), (layer, "weight")
    )
    setattr(owner, name, nn.Parameter(-weight.detach(), requires_grad=weight.requires_grad))
    try:
        case.close("set weight", layer.base_weight, -case.base)
        with torch.no_grad():
            case.close("weight over it", layer.adapted_weight(), case.weight() - 2 * case.base)
    finally:
        setattr(owner, name, weight)


def activated(case: Case, *names: str) -> None:
    before = list(case.layer.active_adapters)
    case.layer.activate(names)
    try:
        case.computes([name for name in names if name in case.truth.adapters], case.truth.merged)
    finally:
        case.layer.activate(before)


def merged(case: Case, *names: str, again: bool = False) -> None:
    layer, before = case.layer, bits(case.layer.base_weight)
    (layer.merge_again if again else layer.merge)(list(names))
    try:
        assert layer.merged_adapters == list(names) and not layer.merged_weight_changed()
        case.computes(case.truth.now, names)
    finally:
        layer.unmerge()
    assert bits(layer.base_weight) == before


def unmerged_and_back(case: Case) -> None:
    layer, names = case.layer, list(case.layer.merged_adapters)
    layer.unmerge()
    try:
        assert not layer.merged_adapters
        case.computes(case.truth.now)
    finally:
        if names:
            layer.merge_again(names)


def added(case: Case, name: str) -> None:
    entry = case.layer.entries["other"]
    scheme, r = entry.a.projection.scheme, entry.r
    init = VectorInit(r, 0.1, False, torch.float32)
    case.layer.add_adapter(
        name, entry.name, scheme, init, ComputeSettings(0.0, "auto", "auto"), entry.group, entry.parts
    )
    b, d = (number(vector) for vector in case.layer.vectors(name).values())
    try:
        assert case.layer.active_adapters == list(case.truth.now)
        case.computes(case.truth.now, case.truth.merged)
        adapters = dict(case.truth.adapters)
        new = copy.copy(adapters["other"])
        object.__setattr__(new, "vectors", {case.name: (b, d)})
        expected = delta_of(new, case.name, case.base)
        case.close("delta of a new adapter", case.layer.get_delta_weight(name), expected)
    finally:
        case.layer.delete_adapter(name)


def written_to(case: Case) -> bool:
    """Write to the merged weight, ask, and undo it."""
    layer = case.layer
    if not layer.merged_adapters:
        return True
    weight = layer.base_weight
    with torch.no_grad():
        before = weight.detach().clone()
        weight.view(-1)[0] += 1
        found: bool = layer.merged_weight_changed()
        weight.copy_(before)
    return found


def drawn_again(case: Case) -> None:
    case.layer.release_projections()
    case.computes(case.truth.now, case.truth.merged)


def readable(case: Case) -> bool:
    """Whether the layer holds its weight as it is, rather than codes, or nothing until hooks bring it."""
    return not {"quantized", "offloaded"} & case.traits


def plain_or_added(case: Case) -> bool:
    """Whether the weight that is read is not the base layer's codes."""
    return "quantized" not in case.traits or bool(case.layer.added_adapters)


def mergeable(case: Case) -> bool:
    return at_hand(case.env)


def nothing_merged(case: Case) -> bool:
    return not case.truth.merged


def not_merged(name: str) -> Callable[[Case], bool]:
    return lambda case: name not in case.truth.merged


def methods() -> list[Method]:
    """Return all ways of calling the public methods of a layer; what they change they change back."""
    names = ["default", "other"]

    def weighing(name: str, call: Callable[[Case], Any], needs: tuple[Callable[[Case], bool], ...] = ()) -> Method:
        return Method(name, call, needs, check=is_close(name, Case.weight))

    def of_unknown(name: str) -> Method:
        return Method(name, lambda case: getattr(case.layer, name)("none"), (never,), variant="unknown")

    return [
        Method("adapts", of_class(lambda kind, module: kind.adapts(module)),
               check=lambda case, yes: is_(not case.layer.of_parameter)(case, bool(yes))),
        Method("why_not_adaptable", of_class(lambda kind, module: kind.why_not_adaptable(module)), check=is_(None)),
        Method("geometry_of", of_class(lambda kind, module: kind.geometry_of(module)), check=has_size),
        Method("supports_dropout", lambda case: type(case.layer).supports_dropout(case.layer.base_layer),
               check=lambda case, yes: is_(case.layer.kind in ("linear", "convolution"))(case, yes)),
        Method("device", lambda case: case.layer.device, check=is_(torch.device("cpu"))),
        Method("base_weight", lambda case: case.layer.base_weight, (readable,),
               check=is_close("base weight", lambda case: case.weight(()))),
        Method("full_weight", lambda case: case.layer.full_weight(),
               check=is_close("full weight", lambda case: case.weight(()))),
        Method("matrix", as_matrix, check=is_matrix),
        Method("like_weight", as_matrix, check=is_matrix),
        Method("vectors", lambda case: case.layer.vectors("other"), check=as_told),
        Method("factors_by_part", delta_of_parts,
               check=is_close("delta of blocks", lambda case: case.matrix(case.delta("other")))),
        Method("factors", delta_of_factors, check=lambda case, delta: delta is None or case.close(
            "delta of factors", delta, case.matrix(case.delta("other")))),
        Method("get_delta_weight", lambda case: case.layer.get_delta_weight("other"),
               check=is_close("delta", lambda case: case.delta("other"))),
        *map(of_unknown, ("vectors", "get_delta_weight", "lora_factors", "delete_adapter")),
        Method("forward", lambda case: None if case.layer.of_parameter else case.forward(),
               check=lambda case, out: out is None or case.close("outputs", out, case.expected(case.weight()))),
        Method("bias", lambda case: case.layer.bias, check=is_bias),
        weighing("weight", lambda case: number(case.layer.weight * 1), (plain_or_added,)),
        Method("weight", is_set, (nothing_merged, mergeable), variant="set"),
        weighing("weight_over", lambda case: over(case, case.layer.weight_over)),
        weighing("adapted_weight", lambda case: case.layer.adapted_weight()),
        weighing("added_up", lambda case: over(case, case.layer.added_up)),
        weighing("adapted_part", lambda case: over(case, lambda base: case.layer.like_weight(
            case.layer.adapted_part(case.layer.matrix(base), None)))),
        Method("product", product, check=is_product),
        Method("add_rows", with_rows, check=is_with_rows),
        Method("weight_readable", lambda case: case.layer.weight_readable("other"),
               check=lambda case, yes: yes is False or is_("linear")(case, case.layer.kind)),
        Method("lora_factors", lora, check=is_lora),
        Method("lora_keys", lambda case: case.layer.lora_keys(case.name, [case.layer.weight_name]), check=has_keys),
        Method("why_not_lora", lambda case: case.layer.why_not_lora(), check=is_(None)),
        Method("why_not_mergeable", lambda case: case.layer.why_not_mergeable(),
               check=lambda case, reason: is_("offloaded" in case.traits)(case, reason is not None)),
        Method("check_mergeable", lambda case: case.layer.check_mergeable(names, safe=True, called="it"),
               (lambda case: mergeable(case) or set(names) <= set(case.truth.merged),)),
        Method("loss_of_merging", lambda case: case.layer.loss_of_merging(),
               check=lambda case, loss: is_("quantized" in case.traits)(case, loss is not None)),
        Method("merged_weight", lambda case: case.layer.merged_weight(["other"]), (not_merged("other"),),
               check=lambda case, weight: case.close("merged weight", weight, case.weight(()) + case.delta("other"))),
        Method("merged_for_good", lambda case: case.layer.merged_for_good, check=is_(False)),
        Method("merged_weight_changed", lambda case: case.layer.merged_weight_changed(), check=is_(False)),
        Method("merged_weight_changed", written_to, (lambda case: "quantized" not in case.traits,), check=is_(True),
               variant="written to"),
        Method("check_unmergeable", lambda case: case.layer.check_unmergeable()),
        Method("check_recomputation", lambda case: case.layer.check_recomputation()),
        Method("extra_repr", lambda case: case.layer.extra_repr(),
               check=lambda case, text: is_(True)(case, "default: r=" in text and "other: r=" in text)),
        Method("release_projections", drawn_again),
        Method("activate", activated),
        Method("activate", lambda case: activated(case, "other", "default"), variant="both"),
        Method("activate", lambda case: activated(case, "other", "none"), variant="with another layer's"),
        Method("merge", lambda case: merged(case, "other"), (mergeable, nothing_merged)),
        Method("merge", lambda case: merged(case, "default", "other"), (mergeable, nothing_merged), variant="both"),
        Method("merge", lambda case: merged(case, "none"), (never,), variant="unknown"),
        Method("merge", merged, (never,), variant="none"),
        Method("merge_again", lambda case: merged(case, "other", again=True), (mergeable, nothing_merged)),
        Method("unmerge", unmerged_and_back),
        Method("add_adapter", lambda case: added(case, "new")),
        Method("add_adapter", lambda case: added(case, "other"), (never,), variant="taken"),
        Method("delete_adapter", lambda case: added(case, "new")),
        Method("delete_adapter", lambda case: case.layer.delete_adapter(case.truth.merged[0]), (never,),
               variant="merged"),
    ]  # fmt: skip


METHODS = methods()


def run_all(env: Env, method: Method) -> int:
    """Call a method of all layers, and return of how many: each is right, or refuses by an error of ours."""
    cases = [Case(env, name, layer) for name, layer in env.model.vera_layers().items()]
    for case in cases:
        unmet = [need.__name__ for need in method.needs if not need(case)]
        error: Exception | None = None
        try:
            result = method.call(case)
        except Exception as raised:
            error = raised
        if isinstance(error, AssertionError):
            raise error
        assert error is None or unmet, f"{case.name}: refused, though nothing speaks against it: {error}"
        assert error is None or is_ours(error), f"{case.name}: {type(error).__name__} that is none of ours: {error}"
        assert error is not None or "never" not in unmet, f"{case.name}: not refused"
        if not unmet:
            method.check(case, result)
    return len(cases)
