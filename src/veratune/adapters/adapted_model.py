"""Adapters on a model: adding, choosing, merging and removing them. Nothing here reads or writes files."""

import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veratune.adapters.routes_table import RouteTable, explain_routes
from veratune.adapters.surgery import replace_modules, undone_on_error
from veratune.adapters.targets import (
    Target,
    adapted_layers,
    base_modules,
    check_conflicts,
    check_not_sharded,
    find_targets,
    joined,
    resolve_config,
    unwrapped,
)
from veratune.adapters.wrapper import ForwardOfBase, ModelWrapper
from veratune.config import VeraConfig, check_config
from veratune.layers import ComputeSettings, InputGroup, SavedModule, VectorInit, VeraLayer, VeraModule, VeraParameter
from veratune.layers.biases import AdapterBiases, bias_owners
from veratune.layers.guards import guard_loading
from veratune.layers.input_cache import InputCache
from veratune.layers.offloading import check_at_hand
from veratune.layers.quantized import keep_differentiable, leave_to_library
from veratune.layers.recomputation import StateLog
from veratune.layers.registry import adapt, adapt_parameter
from veratune.ops.calibration import load_calibration
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import SCHEMES, Scheme
from veratune.utils.sharding import describe_sharding
from veratune.utils.tensors import is_finite
from veratune.utils.text import clipped

_Kind = TypeVar("_Kind", bound=nn.Module)
# Held from the look at a model to the end of its change: two threads must not take one name, or replace one layer. It
# is not a model's own, so that models can be copied.
ADDING = threading.RLock()
_NAME = re.compile(r"[\w\-]{1,128}")
# A file's name has 255 bytes at most, of which a name that is not final yet needs some.
_MOST_NAME_BYTES = 255 - 32


@dataclass(frozen=True)
class AdapterPlan:
    """All that is needed to add an adapter to a model, found without changing the model.

    Attributes:
        config: the configuration with everything that depends on the model filled in.
        targets: the layers it adapts.
        scheme: its projections.
        bias_owners: the biases it trains, by name, with the modules that hold them.
    """

    config: VeraConfig
    targets: list[Target]
    scheme: Scheme
    bias_owners: dict[str, list[nn.Module]]


@dataclass(frozen=True)
class AdapterState:
    """What one adapter has learned, by names in the model without adapters.

    Attributes:
        vectors: layer name to (b, d).
        saved: module name to the adapter's copy of that module.
        biases: parameter name to the adapter's own bias.
    """

    vectors: dict[str, tuple[Tensor, Tensor]]
    saved: dict[str, nn.Module]
    biases: dict[str, nn.Parameter]

    def check_values(self, operation: str) -> None:
        """Raise ValueError, saying what cannot be done, if any of this is offloaded or on the meta device."""
        named = {f"a vector of {name}": vector for name, pair in self.vectors.items() for vector in pair}
        for name, module in self.saved.items():
            named.update({f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()})
        check_at_hand({**named, **self.biases}, operation)

    def parameters(self) -> Iterator[Tensor]:
        for b, d in self.vectors.values():
            yield b
            yield d
        for module in self.saved.values():
            yield from module.parameters()
        yield from self.biases.values()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the parameters, and the buffers of what is trained in full."""
        yield from self.parameters()
        for module in self.saved.values():
            yield from module.buffers()


def notify(sentence: str) -> None:
    """Tell the user something that is no error but may surprise."""
    warnings.warn(clipped(f"veratune: {sentence}"), UserWarning, stacklevel=2)


def as_names(names: str | Sequence[str]) -> list[str]:
    """Return adapter names as a list; a string is one name."""
    return [names] if isinstance(names, str) else list(names)


def check_adapter_name(name: str) -> None:
    """Raise ValueError unless the name can stand in parameter names and as a folder's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"adapter_name={name!r} is not allowed: it must be 1 to 128 letters, digits, '_' or '-', as it becomes part"
            " of parameter names and the name of a folder"
        )
    if len(name.encode("utf-8", "surrogatepass")) > _MOST_NAME_BYTES:
        raise ValueError(
            f"adapter_name={name!r} is not allowed: it has {len(name.encode())} bytes in UTF-8, and a folder of that"
            f" name at most {_MOST_NAME_BYTES}"
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"adapter_name={name!r} is not allowed: torch.nn.Module uses the name itself; choose another")


def vector_dtype(weight_dtype: torch.dtype, *, autocast: bool) -> torch.dtype:
    """Return the dtype of vectors on a weight: the weight's own, float32 where that is quantized.

    With `autocast`, it is float32 on a half-precision weight as well.
    """
    half = weight_dtype in (torch.float16, torch.bfloat16)
    wide = not weight_dtype.is_floating_point or weight_dtype.itemsize < 2 or (half and autocast)
    return torch.float32 if wide else weight_dtype


def plan_adapter(model: nn.Module, config: VeraConfig, scheme: Scheme | None = None) -> AdapterPlan:
    """Find out all about adding an adapter to a model, and raise whatever is wrong with it, changing nothing.

    Args:
        model: the model without a wrapper; it may have adapters already.
        config: the configuration; not changed.
        scheme: projections that were read from a file, in place of those that the configuration describes.

    Raises:
        TargetError: the configuration matches nothing in this model.
    """
    check_config(config)
    resolved = resolve_config(model, config, notify)
    targets = find_targets(model, resolved, notify)
    modules = base_modules(model)
    check_conflicts(modules, resolved.modules_to_save or [], [target.name for target in targets])
    owners = bias_owners(modules_with_biases(modules, resolved, {target.name for target in targets}))
    return AdapterPlan(resolved, targets, scheme or make_scheme(resolved, targets), owners)


def make_scheme(config: VeraConfig, targets: Sequence[Target]) -> Scheme:
    """Return the projections that a configuration describes for these layers."""
    return SCHEMES[config.projection].for_layers(
        key=config.projection_prng_key,
        r=config.r,
        max_in=max(target.in_features for target in targets),
        max_out=max(target.out_features for target in targets),
    )


def modules_with_biases(
    modules: Mapping[str, nn.Module], config: VeraConfig, adapted: Collection[str]
) -> list[tuple[str, nn.Module]]:
    """Return the modules whose biases a configuration trains, by name.

    Args:
        modules: what `base_modules` returns for the model.
        config: the configuration.
        adapted: the names of the adapted layers.
    """
    saved = config.modules_to_save or []
    return [
        (name, module if isinstance(module, SavedModule) else unwrapped(module))
        for name, module in modules.items()
        if (config.bias == "all" or (config.bias == "vera_only" and name in adapted))
        and not any(name == top or name.startswith(f"{top}.") for top in saved)
    ]


def _checkpoints(model: nn.Module) -> bool:
    """Return whether a transformers model has gradient checkpointing on, under the newer or the older name."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False


class AdaptedModel(ModelWrapper):
    """A model whose linear layers have VeRA adapters. The adapters are put into the model itself, in place.

    What this class does not have itself is looked up in the model, so that it can stand wherever the model stood.

    Attributes:
        base_model: the model, with adapted layers in it.
        peft_config: adapter name to its configuration.
        autocast_adapter_dtype: whether vectors on a half-precision layer are float32 rather than of its dtype.
    """

    def __init__(self, model: nn.Module, *, autocast_adapter_dtype: bool = True) -> None:
        super().__init__()
        self.peft_config: dict[str, VeraConfig] = {}
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self._schemes: dict[str, Scheme] = {}
        self._biases: dict[str, AdapterBiases] = {}
        self._active: list[str] = []
        self._disabled = 0
        # By name: whatever shards, offloads or merges a model puts other parameters in the places of its own.
        self._trainable_before = {name for name, parameter in _own_parameters(model) if parameter.requires_grad}
        self.base_model = model
        self.training = model.training
        model.requires_grad_(False)
        self._inputs_require_grad = False
        if _checkpoints(model):
            self._let_inputs_require_grad()

    forward = ForwardOfBase()

    # Looking at adapters

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in the order in which they were chosen."""
        return list(self._active)

    @property
    def active_adapter(self) -> str:
        """The name of the one active adapter.

        Raises:
            ValueError: none is active, or several are.
        """
        if len(self._active) != 1:
            remedy = "give adapter_name, or choose one with set_adapter" if self.peft_config else "it has none any more"
            raise ValueError(f"there is no single active adapter: active_adapters is {self._active}: {remedy}")
        return self._active[0]

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are merged into the weights at the moment."""
        merged = {name for layer in self._layers() for name in layer.merged_adapters}
        return [name for name in self.peft_config if name in merged]

    def adapter_state(self, adapter_name: str) -> AdapterState:
        """Return the parameters of an adapter by their names in the model without adapters."""
        self._check_known([adapter_name])
        modules = base_modules(self.base_model)
        return AdapterState(
            vectors={
                name: layer.vectors(adapter_name)
                for name, layer in adapted_layers(self.base_model).items()
                if adapter_name in layer.entries
            },
            saved={
                name: module.modules_to_save[adapter_name]
                for name, module in _first_names(modules, SavedModule).items()
                if adapter_name in module.modules_to_save
            },
            biases=self._biases[adapter_name].parameters() if adapter_name in self._biases else {},
        )

    def vera_layers(self) -> dict[str, VeraLayer]:
        """Return the adapted layers by their names in the model without adapters."""
        return adapted_layers(self.base_model)

    def projection_scheme(self, adapter_name: str) -> Scheme:
        """Return the description of an adapter's projections."""
        self._check_known([adapter_name])
        return self._schemes[adapter_name]

    def get_base_model(self) -> nn.Module:
        """Return the model itself, with the adapted layers in it. `unload` takes them out."""
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (number of trainable parameters, number of all parameters). Projections are no parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers of `get_nb_trainable_parameters` and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def explain_routes(
        self,
        tokens: int,
        adapter_name: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        training: bool = True,
    ) -> RouteTable:
        """Return the route of each layer of an adapter, with operations, memory and time of all that it could take.

        Printing the result gives a table. The times are estimates by the device's profile (see `calibrate`).

        Left out are layers without a choice (convolutions, embeddings, packed attention) and those whose route follows
        from how their module computes (experts, fused layers in parts). A compiled model chooses as for 8, 256 or 4,096
        tokens, so that it is not compiled anew for each number.

        Args:
            tokens: the product of the input's leading dimensions (batch times sequence length).
            adapter_name: which adapter; the active one by default.
            dtype: the compute dtype; the layers' own by default.
            device: the device; the layers' own by default.
            training: whether the vectors' gradients are wanted.

        Raises:
            ValueError: an unknown adapter, or a number of tokens below one.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_known([name])
        if tokens < 1:
            raise ValueError(f"tokens={tokens} is not allowed: it must be at least 1")
        return explain_routes(self.vera_layers().items(), name, tokens, dtype=dtype, device=device, training=training)

    # Adding and choosing adapters

    def add_adapter(self, adapter_name: str, peft_config: VeraConfig) -> None:
        """Add another adapter, inactive until `set_adapter` chooses it. It starts as an exact no-op (b = 0).

        Raises:
            ValueError: the name is taken or not allowed.
            TargetError: the configuration matches nothing in this model.
        """
        with ADDING:
            self.check_new_name(adapter_name)
            self.install_adapter(adapter_name, plan_adapter(self.base_model, peft_config))

    def check_new_name(self, adapter_name: str) -> None:
        """Raise ValueError unless the name is allowed and free."""
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(
                f"adapter_name={adapter_name!r} is taken: this model has the adapters {list(self.peft_config)};"
                " delete_adapter removes one"
            )

    def install_adapter(self, adapter_name: str, plan: AdapterPlan) -> None:
        """Carry out a plan that `plan_adapter` made for this model as it is now, or leave the model unchanged."""
        check_not_sharded(plan.targets)
        with self.undone_on_error():
            self._install(adapter_name, plan)

    def _install(self, adapter_name: str, plan: AdapterPlan) -> None:
        replacements: dict[int, nn.Module] = {}
        self._swap_biases([])  # the new adapter starts from the model's own
        modules = base_modules(self.base_model)
        for name in plan.config.modules_to_save or []:
            original = modules[name]
            saved = original if isinstance(original, SavedModule) else SavedModule(original)
            saved.add_adapter(adapter_name)
            if saved is not original:
                replacements[id(original)] = saved
        biases = AdapterBiases.copies_of(plan.bias_owners)
        self._swap_biases(self._computing())
        if plan.bias_owners:
            self._biases[adapter_name] = biases
        groups = input_groups(plan.targets, plan.scheme)
        settings = ComputeSettings(plan.config.vera_dropout, plan.config.route, plan.config.memory)
        for target in plan.targets:
            layer = _layer_for(target, replacements)
            layer.add_adapter(
                adapter_name,
                target.name,
                plan.scheme,
                self._vector_init(plan.config, target.rank, layer.base_weight.dtype),
                settings,
                groups[target.name],
                target.parts,
            )
        replace_modules(self, replacements)
        for device in {layer.base_weight.device for layer in self._layers()}:
            load_calibration(device)
        self._schemes[adapter_name] = plan.scheme
        self.peft_config[adapter_name] = plan.config

    def undone_on_error(self) -> AbstractContextManager[None]:
        """Return a context whose changes to the model and its adapters are undone if anything is raised.

        Numbers that are written into tensors in place are not among them.
        """
        return undone_on_error(self, *self._biases.values())

    def _vector_init(self, config: VeraConfig, rank: int, weight_dtype: torch.dtype) -> VectorInit:
        dtype = vector_dtype(weight_dtype, autocast=self.autocast_adapter_dtype)
        return VectorInit(rank, config.d_initial, config.init_weights, dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the active adapter, or several whose deltas add. All others are frozen.

        The chosen ones become trainable, but for those that were loaded or configured for inference only.

        Args:
            adapter_name: a name or a list of names; an empty list leaves the base model alone.
            inference_mode: leave the chosen adapters frozen as well.

        Raises:
            ValueError: an unknown name, adapters that cannot be active together, while adapters are merged, or within
                `disable_adapter`.
        """
        names = as_names(adapter_name)
        self._check_known(names)
        self._check_outside("set_adapter")
        self._check_unmerged("set_adapter")
        self._check_together(names)
        with self.undone_on_error():
            self._activate(names)
            for name in self.peft_config:
                trainable = name in names and not inference_mode and not self.peft_config[name].inference_mode
                for parameter in self.adapter_state(name).parameters():
                    if parameter.is_floating_point():
                        parameter.requires_grad_(trainable)
                if trainable:
                    keep_differentiable(self.base_model)

    def _activate(self, names: Sequence[str]) -> None:
        for name, biases in self._biases.items():
            if biases.installed != (name in names):
                biases.check_swappable()
        self._active = list(dict.fromkeys(names))
        for layer in self._layers():
            layer.activate(self._active)
        self._choose_saved()

    def _computing(self) -> list[str]:
        """Return the adapters that compute: those merged into the weights, and the active ones."""
        return list(dict.fromkeys([*self.merged_adapters, *self._active]))

    def _choose_saved(self) -> None:
        """Let the saved modules and biases of the adapters compute whose vectors do."""
        names = self._computing()
        for module in self.modules():
            if isinstance(module, SavedModule):
                module.activate(names)
        self._swap_biases(names)

    def _swap_biases(self, names: Sequence[str]) -> None:
        # All out before one is in: two adapters may own the same bias.
        for biases in self._biases.values():
            biases.swap(install=False)
        for name in names:
            if name in self._biases:
                self._biases[name].swap(install=True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and what only it used. If it was active, no other adapter takes its place.

        Raises:
            ValueError: an unknown name, or adapters are merged.
        """
        self._check_known([adapter_name])
        self._check_unmerged("delete_adapter")
        with self.undone_on_error():
            self._delete(adapter_name)
        projection_pool.trim()

    def _delete(self, adapter_name: str) -> None:
        self._activate([name for name in self._active if name != adapter_name])
        replacements: dict[int, nn.Module] = {}
        logs = self._logs()
        for module in list(self.modules()):
            if isinstance(module, VeraLayer) and adapter_name in module.entries:
                module.delete_adapter(adapter_name)
                if not module.entries and not isinstance(module, VeraParameter):
                    replacements[id(module)] = module.base_layer
            elif isinstance(module, VeraModule):
                module.delete_adapter(adapter_name)
                if not module.adapted:
                    replacements[id(module)] = module.base_layer
            elif isinstance(module, SavedModule) and adapter_name in module.modules_to_save:
                module.delete_adapter(adapter_name)
                if not module.modules_to_save:
                    replacements[id(module)] = module.original_module
        replace_modules(self, replacements)
        if adapter_name in self._biases:
            self._biases.pop(adapter_name).release()
        left = self._logs()
        if any(log.has_computed() for log in logs if log not in left):
            # What is gone cannot notice that it is missing where a block is computed again.
            for log in left:
                log.void()
        del self.peft_config[adapter_name], self._schemes[adapter_name]

    def _logs(self) -> list[StateLog]:
        """Return what the layers, the saved modules and the biases know of the states they computed in."""
        owners = [*self.modules(), *self._biases.values()]
        return [log for owner in owners for log in vars(owner).values() if isinstance(log, StateLog)]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model is the base model exactly; merged adapters are taken out and put back."""
        with self.only([]):
            yield

    @contextmanager
    def only(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Let none but these adapters compute within this context, without a change to what is trainable.

        Merged adapters are taken out and put back.

        Raises:
            ValueError: an unknown name, or adapters that cannot be active together.
        """
        self._check_known(adapter_names)
        self._check_together(adapter_names)
        active, merged = self._active, self.merged_adapters
        with self.undone_on_error():
            if merged:
                self.unmerge_adapter()
            self._activate(adapter_names)
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1
            self._activate([name for name in active if name in self.peft_config])
            if merged:
                self.merge_adapter(adapter_names=[name for name in merged if name in self.peft_config])

    # Merging

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters' deltas to the weights, so that they cost nothing in the forward pass.

        A merged adapter does not learn: its vectors get no gradients until `unmerge_adapter`. What it trains in full,
        and its biases, compute while it is merged, whether it is active or not.

        The weights from before are kept beside the merged ones (this doubles the memory of the adapted layers), and
        `unmerge_adapter` puts the same bits back. What a weight is tied to is not changed.

        A quantized weight of bitsandbytes is read as numbers, added to and rounded to its few values anew, which loses
        a part of the adapter; torchao's become plain numbers. A warning says so. Other quantized layers keep their
        weights in forms of their own, and cannot be merged into.

        Args:
            adapter_names: which adapters; the active ones by default.
            safe_merge: check that all merged weights are finite before any is changed.

        Raises:
            ValueError: an unknown name, adapters that cannot be active together, a weight that cannot be merged into,
                within `disable_adapter` or `only`, or, with `safe_merge`, a result that is not finite; nothing is
                changed then, nor by any other error.
        """
        self._check_outside("merge_adapter")
        names = self._names_to_merge(adapter_names)
        self._check_together([*self._computing(), *names])
        self._check_mergeable(names, safe_merge)
        self._tell_of_losses(names)
        with self.undone_on_error():
            for layer in self._layers():
                merged = [*layer.merged_adapters, *(name for name in names if name not in layer.merged_adapters)]
                merged = [name for name in merged if name in layer.entries]
                if merged != layer.merged_adapters:
                    layer.unmerge()
                    layer.merge(merged)
            self._choose_saved()
            guard_loading(self)
        self._release_projections()

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, to the exact bits.

        Raises:
            ValueError: merged weights were offloaded since; nothing is changed then.
        """
        for layer in self._layers():
            layer.check_unmergeable()
        with self.undone_on_error():
            for layer in self._layers():
                layer.unmerge()
            self._choose_saved()
            guard_loading(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: str | Sequence[str] | None = None
    ) -> nn.Module:
        """Merge adapters for good and return the model, without any trace of veratune in it.

        The result has new weight parameters in the adapted layers; a layer that was tied to another is no longer, and
        a `tie_word_embeddings` of the model's configuration is then set to False.

        If this is interrupted, or runs out of memory, while it merges, the layers that are done stay merged and the
        others keep their adapters: the outputs are right, and the same call goes on from there. Whatever else fails
        changes nothing.

        Args:
            progressbar: print a line for each hundredth of the layers done.
            safe_merge: check that all merged weights are finite before any is changed.
            adapter_names: which adapters; the active ones by default.

        Raises:
            ValueError: as for `merge_adapter`.
        """
        names = self._names_to_merge(adapter_names)
        self._check_together(names)
        layers = self._layers()
        for layer in layers:
            if layer.merged_for_good and layer.merged_adapters != [name for name in names if name in layer.entries]:
                raise ValueError(
                    f"merge_and_unload was interrupted while it merged {layer.merged_adapters}: call it again with"
                    " adapter_names of these before anything else"
                )
        remaining = [layer for layer in layers if not layer.merged_for_good]
        with self.undone_on_error():
            for layer in remaining:
                layer.unmerge()
            self._activate(names)
            guard_loading(self)
            self._check_mergeable(names, safe_merge)
            self._tell_of_losses(names)
        model_config: Any = getattr(self.base_model, "config", None)
        if self._tied_weights(names) and getattr(model_config, "tie_word_embeddings", False):
            model_config.tie_word_embeddings = False
        # Not undone on errors, which would take the weights from before beside the merged ones.
        for done, layer in enumerate(remaining, start=1):
            merged = [name for name in names if name in layer.entries]
            if merged:
                with undone_on_error(layer, layer.base_layer):
                    layer.merge(merged)
                layer._unmerged.clear()
            if progressbar and done * 100 // len(remaining) > (done - 1) * 100 // len(remaining):
                print(f"merged {done} of {len(remaining)} layers")
        with self.undone_on_error():
            self._forget_biases()  # the installed ones stay
            return self._take_apart()

    def unload(self) -> nn.Module:
        """Remove all adapters and return the model as it was before them.

        Call `backward` before: nothing is left that could notice that a checkpointed block is computed again otherwise.
        """
        with self.undone_on_error():
            self.unmerge_adapter()
            self._activate([])
            return self._take_apart()

    def _take_apart(self) -> nn.Module:
        """Put what computes now in the place of each wrapper, forget all adapters, and return the model."""
        replacements: dict[int, nn.Module] = {}
        for module in self.modules():
            if isinstance(module, VeraParameter):
                continue  # its VeraModule goes
            if isinstance(module, VeraModule | VeraLayer):
                replacements[id(module)] = module.base_layer
            elif isinstance(module, SavedModule):
                replacements[id(module)] = module.current()
        replace_modules(self, replacements)
        leave_to_library(self.base_model)
        self.base_model.requires_grad_(False)
        for name, parameter in _own_parameters(self.base_model):
            if name in self._trainable_before:
                parameter.requires_grad_(True)
        if self._inputs_require_grad:
            model: Any = self.base_model
            model.disable_input_require_grads()
            self._inputs_require_grad = False
        self.peft_config.clear()
        self._schemes.clear()
        self._forget_biases()
        self._active = []
        projection_pool.trim()
        return self.base_model

    def _forget_biases(self) -> None:
        for biases in self._biases.values():
            biases.release()
        self._biases.clear()

    def _names_to_merge(self, adapter_names: str | Sequence[str] | None) -> list[str]:
        names = self._active if adapter_names is None else list(dict.fromkeys(as_names(adapter_names)))
        self._check_known(names)
        if not names and adapter_names is None:
            raise ValueError(
                "no adapter is active, so there is nothing to merge: give adapter_names, or set_adapter first"
            )
        return names

    def _check_mergeable(self, names: Sequence[str], safe_merge: bool) -> None:
        for name, layer in self.vera_layers().items():
            layer.check_mergeable(names, safe=safe_merge, called=name or "the model")

    def _tell_of_values(self, names: Sequence[str]) -> None:
        for name in names:
            values = (value for value in self.adapter_state(name).parameters() if describe_sharding(value) is None)
            if not all(map(is_finite, values)):
                notify(f"adapter {name!r} holds NaN or infinity, and so will what it is merged into or written to")

    def _tell_of_losses(self, names: Sequence[str]) -> None:
        self._tell_of_values(names)
        layers = (layer for layer in self._layers() if any(name in layer.entries for name in names))
        for loss, count in Counter(layer.loss_of_merging() for layer in layers).items():
            if loss is not None:
                notify(
                    f"merging into {count} quantized layers {loss}: outputs change by that. unmerge_adapter gives the"
                    " weights back; an adapter that is not merged loses nothing"
                )

    def _tied_weights(self, names: Sequence[str]) -> bool:
        """Return whether a weight that another module holds as well is about to be merged or replaced."""
        holders: dict[int, int] = {}
        changing: set[int] = set()
        for module in self.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders[id(parameter)] = holders.get(id(parameter), 0) + 1
            if isinstance(module, VeraLayer) and any(name in module.entries for name in names):
                changing.add(id(module.base_weight))
            elif isinstance(module, SavedModule) and any(name in module.modules_to_save for name in names):
                changing.update(id(parameter) for parameter in module.original_module.parameters())
        return any(holders.get(parameter, 0) > 1 for parameter in changing)

    # Training

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn gradient checkpointing on in the model, and let its inputs require gradients, as it needs then."""
        model: Any = self.base_model
        model.gradient_checkpointing_enable(*args, **kwargs)
        self._let_inputs_require_grad()

    def _let_inputs_require_grad(self) -> None:
        # Reentrant checkpointing gives no gradients to a block none of whose inputs requires one, and with frozen
        # embeddings none does.
        enable: Callable[[], None] | None = getattr(self.base_model, "enable_input_require_grads", None)
        if enable is not None and not self._inputs_require_grad:
            enable()
            self._inputs_require_grad = True

    # Helpers

    def _layers(self) -> list[VeraLayer]:
        return [module for module in self.modules() if isinstance(module, VeraLayer)]

    def _release_projections(self) -> None:
        for layer in self._layers():
            layer.release_projections()

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise ValueError(
                    f"adapter {name!r} does not exist: this model has the adapters {list(self.peft_config)}"
                )

    def _check_outside(self, operation: str) -> None:
        if self._disabled:
            raise ValueError(
                f"{operation} cannot work within disable_adapter() or only(), which put back what was active and merged"
                " before"
            )

    def _check_unmerged(self, operation: str) -> None:
        merged = self.merged_adapters
        if merged:
            raise ValueError(
                f"{operation} cannot work while the adapters {merged} are merged: call unmerge_adapter first"
            )

    def _check_together(self, names: Sequence[str]) -> None:
        with_biases = [name for name in dict.fromkeys(names) if name in self._biases]
        if len(with_biases) > 1:
            raise ValueError(f"the adapters {with_biases} have biases of their own and cannot be active together")
        for name, module in _first_names(base_modules(self.base_model), SavedModule).items():
            owners = [adapter for adapter in dict.fromkeys(names) if adapter in module.modules_to_save]
            if len(owners) > 1:
                raise ValueError(
                    f"the adapters {owners} have their own copies of {name!r} and cannot be active together:"
                    " an adapter made with modules_to_save=[] has none"
                )


def _layer_for(target: Target, replacements: dict[int, nn.Module]) -> VeraLayer:
    """Return the adapted layer that a target is, or becomes; what is made for it is noted in `replacements`."""
    module = target.module
    if target.parameter is None:
        if isinstance(module, VeraLayer):
            return module
        layer = adapt(module)
        replacements[id(module)] = layer
        return layer
    holder = module if isinstance(module, VeraModule) else replacements.get(id(module))
    if not isinstance(holder, VeraModule):
        holder = replacements[id(module)] = VeraModule(module)
    if target.parameter not in holder.adapted:
        holder.adapted[target.parameter] = adapt_parameter(holder.base_layer, target.parameter)
    return holder.parameter_layers()[target.parameter]


def input_groups(targets: Sequence[Target], scheme: Scheme) -> dict[str, InputGroup]:
    """Return for each target what it shares with those beside it of the same width and rank.

    Layers of one parent module often read the same input (query, key, value). That they do is not relied on: what they
    share only notices when it happens.
    """

    def key(target: Target) -> tuple[str, int, int]:
        return target.name.rpartition(".")[0], target.in_features, target.rank

    sizes = Counter(key(target) for target in targets)
    groups: dict[tuple[str, int, int], InputGroup] = {}
    for target in targets:
        if key(target) not in groups:
            view = projection_pool.view(scheme, "A", target.rank, target.in_features)
            groups[key(target)] = InputGroup(view, InputCache(), sizes[key(target)])
    return {target.name: groups[key(target)] for target in targets}


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a model's parameters by all of their names in the model without adapters."""
    for name, module in base_modules(model).items():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield joined(name, own), parameter


def _first_names(modules: dict[str, nn.Module], kind: type[_Kind]) -> dict[str, _Kind]:
    """Return the modules of a kind by name, each under its first name only."""
    found: dict[int, tuple[str, _Kind]] = {}
    for name, module in modules.items():
        if isinstance(module, kind):
            found.setdefault(id(module), (name, module))
    return dict(found.values())
