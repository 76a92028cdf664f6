"""The adapters on one weight: their vectors, their views of the projections, and which of them are active."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veratune.layers.biases import check_biases
from veratune.layers.entries import AdapterEntry, ComputeSettings, InputGroup, Part, VectorInit
from veratune.layers.geometry import Geometry, slices
from veratune.layers.kind import LayerKind
from veratune.layers.offloading import ResidentParameters, execution_device
from veratune.layers.recomputation import State, StateLog, matters
from veratune.ops.costs import LayerShape
from veratune.ops.factors import Factors
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import Scheme
from veratune.utils.torch_private import parameter_of


def vector_device(base_layer: nn.Module, weight: Tensor) -> torch.device:
    """Return the device for a layer's vectors: the weight's, or the execution device if the weight is offloaded."""
    device = execution_device(base_layer) if weight.is_meta else None
    return weight.device if device is None else device


class AdapterHolder(LayerKind):
    """A weight and the VeRA adapters on it: h = W0 x + sum over active adapters of diag(b) B diag(d) A x.

    Attributes:
        base_layer: the module that holds the weight, unchanged.
        geometry: the dimensions of the weight, viewed as matrices.
        vera_lambda_b: adapter name to b, (out,); for a stack (count, out).
        vera_lambda_d: adapter name to d, (r,); for a stack (count, r), for a fused layer (parts, r).
        vera_dropout: adapter name to the dropout on that adapter's input, if it has any.
        entries: adapter name to its projections and settings; a plain attribute that is not in state dicts.
        active_adapters: the active adapters that this layer has, in order.
        merged_adapters: the adapters whose deltas are currently in the base layer's weight.
        added_adapters: the adapters whose deltas `forward` adds: the active ones that are not merged.
    """

    def __init__(self, base_layer: nn.Module, geometry: Geometry) -> None:
        super().__init__()
        self._hold(base_layer)
        self.geometry = geometry
        self.in_features = geometry.in_features
        self.out_features = geometry.out_features
        self.vera_lambda_b = ResidentParameters()
        self.vera_lambda_d = ResidentParameters()
        self.vera_dropout = nn.ModuleDict()
        self.entries: dict[str, AdapterEntry] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.added_adapters: list[str] = []
        self._log = StateLog()
        self.training = base_layer.training

    def _hold(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    @property
    def device(self) -> torch.device:
        """The device on which the layer computes."""
        return vector_device(self.base_layer, self.base_weight)

    @property
    def base_weight(self) -> Tensor:
        """The base layer's current weight: W0 or, while adapters are merged, the merged weight."""
        weight: Tensor | None = parameter_of(self.base_layer, self.weight_name)
        if not isinstance(weight, Tensor):  # stored in another form: use one of the layer's tensors
            weight = next(itertools.chain(self.base_layer.parameters(), self.base_layer.buffers()), None)
        if weight is None:
            raise ValueError(
                f"the {type(self.base_layer).__name__} of an adapted layer was converted to a form whose weight"
                " veratune cannot read (for example, by torch's quantize_dynamic): call merge_and_unload before"
                " converting the model"
            )
        return weight

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as matrices: (..., out, in), or (..., in, out) if `out_axis` is 1."""
        return weight

    def like_weight(self, matrix: Tensor) -> Tensor:
        """Undo `matrix`."""
        return matrix

    def _outputs_first(self, matrix: Tensor) -> Tensor:
        return matrix if self.out_axis == 0 else matrix.mT

    def vectors(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's vectors by name (`VECTORS`).

        These are its parameters, or the tensors that replace them within `torch.func.functional_call`.

        Raises:
            ValueError: the layer does not have the adapter.
        """
        b, d = self._pair(name)
        return {"b": b, "d": d}

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return (b, d) like `vectors`, bypassing ParameterDict, which would add microseconds to each layer call."""
        if name not in self.entries:
            raise ValueError(f"adapter {name!r} is not on {self._called()}, which has {list(self.entries)}")
        modules = self._modules
        b_vectors, d_vectors = modules["vera_lambda_b"], modules["vera_lambda_d"]
        assert b_vectors is not None and d_vectors is not None
        b, d = parameter_of(b_vectors, name), parameter_of(d_vectors, name)
        assert b is not None and d is not None
        return b, d

    def factors(
        self, name: str, device: torch.device, dtype: torch.dtype, pair: tuple[Tensor, Tensor] | None = None
    ) -> Factors:
        """Return an adapter's factors on a layer that is not fused, with the vectors (b, d) of `pair` if given."""
        b, d = self._pair(name) if pair is None else pair
        entry = self.entries[name]
        (b_view,), a_view = entry.b, entry.group.a
        d = a_view.structure.arrange(d)
        return Factors(a_view.matrix(device, dtype), b_view.matrix(device, dtype), b, d, entry.scale)

    def factors_by_part(self, name: str, device: torch.device, dtype: torch.dtype) -> list[Part]:
        """Return an adapter's factors for each part of the outputs: one, unless the layer is fused."""
        b, d = self._pair(name)
        entry = self.entries[name]
        if not entry.parts:
            return [Part(slice(None), self.factors(name, device, dtype, (b, d)))]
        d = entry.a.structure.arrange(d)
        A = entry.a.matrix(device, dtype)  # noqa: N806
        return [
            Part(outputs, Factors(A, view.matrix(device, dtype), b[outputs], d[part], entry.scale))
            for part, (outputs, view) in enumerate(zip(slices(entry.parts), entry.b, strict=True))
        ]

    # Adding, removing and activating adapters

    def add_adapter(
        self,
        name: str,
        layer_name: str,
        scheme: Scheme,
        init: VectorInit,
        settings: ComputeSettings,
        group: InputGroup,
        parts: tuple[int, ...] = (),
    ) -> None:
        """Add an adapter with new vectors; it is not yet active.

        Args:
            name: the adapter.
            layer_name: this layer's name in the model.
            scheme: the adapter's projections.
            init: the rank and the initial vectors.
            settings: how the adapter is computed.
            group: the data shared by layers that may read the same input.
            parts: the number of outputs of each part of a fused layer.

        Raises:
            ValueError: the layer already has the adapter, or a value is out of range; nothing is changed.
        """
        if name in self.entries:
            raise ValueError(f"adapter {name!r} is already on {self._called()}: delete it there first")
        init.check(layer_name)
        device, r = vector_device(self.base_layer, self.base_weight), init.r
        with torch.inference_mode(False):  # the vectors may be trained later, outside inference mode
            b = torch.zeros(self.geometry.b_shape, dtype=init.dtype, device=device)
            d = torch.full(self.geometry.d_shape(r, parts), init.d_initial, dtype=init.dtype, device=device)
            if not init.init_weights:
                b.fill_(1.0)
                d.normal_()
            self.vera_lambda_b[name] = nn.Parameter(b, requires_grad=False)
            self.vera_lambda_d[name] = nn.Parameter(d, requires_grad=False)
        if settings.vera_dropout > 0.0:
            self.vera_dropout[name] = nn.Dropout(settings.vera_dropout).train(self.training)
        views = tuple(projection_pool.view(scheme, "B", r, width) for width in parts or (self.out_features,))
        self.entries[name] = AdapterEntry(
            name=layer_name,
            group=group,
            b=views,
            scale=scheme.scale(r),
            settings=settings,
            shapes=tuple(
                LayerShape(self.in_features, view.features, r, 0, group.size, view.structure.density) for view in views
            ),
            parts=parts,
        )

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: the layer does not have the adapter, or the adapter is merged; nothing is changed.
        """
        self.vectors(name)
        if name in self.merged_adapters:
            raise ValueError(f"cannot delete adapter {name!r} of {self._called()} while it is merged: unmerge it first")
        del self.vera_lambda_b[name], self.vera_lambda_d[name], self.entries[name]
        if name in self.vera_dropout:
            del self.vera_dropout[name]
        self._log.forget(name)
        self.activate(self.active_adapters)

    def activate(self, names: Sequence[str]) -> None:
        """Activate the given adapters that are on this layer, and deactivate all others."""
        self.active_adapters = [name for name in names if name in self.entries]
        self._choose_added()

    def _computing(self) -> list[str]:
        """Return the adapters to compute with: the active ones, unless they are disabled."""
        return self.active_adapters

    def _choose_added(self) -> None:
        computing = [name for name in self._computing() if name in self.entries]
        self.added_adapters = [name for name in computing if name not in self.merged_adapters]
        self._log.record(State(tuple(self.added_adapters), tuple(self.merged_adapters)))

    def check_recomputation(self) -> None:
        """Raise RuntimeError if this recomputes a forward pass with different adapters or values."""
        if matters(self):
            b, d = self.vera_lambda_b._parameters, self.vera_lambda_d._parameters
            computing = [own.get(name) for name in self.added_adapters for own in (b, d)]
            computing.append(self.base_layer._parameters.get(self.weight_name))
            self._log.forward(self._called(), computing)
            check_biases(self.base_layer)

    def _called(self) -> str:
        """Return the layer's name in the model, for messages."""
        return next((entry.name for entry in self.entries.values()), "") or type(self.base_layer).__name__

    # Memory

    def release_projections(self) -> None:
        """Drop the references to drawn projections; the next use draws them again."""
        for entry in self.entries.values():
            for view in entry.views:
                view.release()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        dtype = self.base_weight.dtype
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.base_weight.device
        if self.base_weight.dtype != dtype:
            self.release_projections()
        for entry in self.entries.values():
            for view in entry.views:
                view.keep_only(device)
        return result

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={entry.r}" for name, entry in self.entries.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, adapters={{{adapters}}}"

    def __setattr__(self, name: str, value: Any) -> None:
        # Assignments to a linear layer's weight or bias (to tie weights, to replace a bias) go to the base layer.
        if name in ("weight", "bias"):
            if name == "weight" and self.merged_adapters:
                raise ValueError(
                    f"the weight cannot be set while the adapters {self.merged_adapters} are merged into it, because"
                    " unmerging would restore the old weight: call unmerge_adapter first"
                )
            setattr(self.base_layer, self.weight_name if name == "weight" else name, value)
        else:
            super().__setattr__(name, value)
