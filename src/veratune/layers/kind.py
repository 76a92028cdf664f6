"""The interface that describes a layer kind, so that other packages do not depend on its class."""

from collections.abc import Collection
from typing import ClassVar, Literal

from torch import Tensor, nn

from veratune.layers.geometry import Geometry

# PEFT's VeRA, PEFT's LoRA, and the LoRAs of vLLM and llama.cpp.
Export = Literal["peft", "lora", "vllm", "gguf"]


class LayerKind(nn.Module):
    """The class attributes and class methods that describe a layer kind.

    The defaults are restrictive: a kind that overrides nothing can be trained, saved, loaded and merged, and everything
    else raises an error that names the kind.

    Attributes:
        kind: its name in tables and messages.
        weight_name: the name of the weight in the base layer.
        out_axis: the axis of the output features in the result of `matrix`: 0 for (..., out, in), 1 for (..., in, out).
        of_parameter: whether it adapts a parameter that its module reads directly, instead of replacing the module.
        one_hot: whether its inputs are indices that select columns of A, in which case A is never drawn completely.
        in_all_linear: whether target_modules="all-linear" includes it.
        chooses_route: whether it computes with the route that the cost model chooses, for `explain_routes`.
        supports_parts: whether its outputs may be split by `fused_parts`.
        supports_one_rank_schemes: whether projection schemes with `one_rank_linear_only` can adapt it.
        exports: the formats, other than veratune's, that can hold an adapter on it.
        multiplies_lazily: whether products with the adapted weight can be computed without computing W0 + delta W.
    """

    kind: ClassVar[str]
    weight_name: str = "weight"
    out_axis: Literal[0, 1] = 0
    of_parameter: ClassVar[bool] = False
    one_hot: ClassVar[bool] = False
    in_all_linear: ClassVar[bool] = False
    chooses_route: ClassVar[bool] = False
    supports_parts: ClassVar[bool] = False
    supports_one_rank_schemes: ClassVar[bool] = False
    exports: ClassVar[frozenset[Export]] = frozenset()
    multiplies_lazily: ClassVar[bool] = True

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Return whether a module is of this kind, even if the module cannot be adapted in its current state."""
        return False

    @classmethod
    def why_not_adaptable(cls, module: nn.Module) -> str | None:
        """Return None if a module of this kind can be adapted, otherwise the reason, phrased to follow "because"."""
        size = cls.geometry_of(module)
        if not (size.in_features and size.out_features):
            return f"it has {size.in_features} inputs and {size.out_features} outputs"
        weight = module._parameters.get(cls.weight_name)
        if weight is not None and weight.is_complex():
            return "its weight is complex"
        return None

    @classmethod
    def geometry_of(cls, module: nn.Module) -> Geometry:
        """Return the dimensions of a module of this kind."""
        raise NotImplementedError

    @classmethod
    def supports_dropout(cls, module: nn.Module) -> bool:
        """Return whether the adapter's input can differ from the base layer's, as `vera_dropout` requires."""
        return False

    # Export as a LoRA

    def why_not_lora(self) -> str | None:
        """Return None if PEFT's LoRA can hold an adapter on this layer, otherwise the reason ("it" is PEFT's LoRA)."""
        return None if "lora" in self.exports else f"it does not support this kind of layer ({self.kind})"

    def lora_keys(self, name: str, beside: Collection[str]) -> tuple[str, str]:
        """Return the names of lora_A and lora_B in PEFT's file, without the prefix.

        Args:
            name: the layer's name in the model.
            beside: the weight names of all exported layers of the same base layer.
        """
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return (lora_A, lora_B) of an adapter, float32, on the CPU, whose product is the delta, in PEFT's layouts."""
        raise NotImplementedError
