"""Merge adapters into the weights of a model, and unmerge them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from veratune.adapters.adapter_set import AdapterSet
from veratune.adapters.adapter_state import as_names
from veratune.adapters.names import base_parameters
from veratune.adapters.surgery import replace_modules, undone_on_error
from veratune.layers import SavedModule, VeraLayer, VeraModule
from veratune.layers.guards import guard_loading
from veratune.layers.pending import removal_noticed
from veratune.layers.quantized import leave_to_library
from veratune.projections.pool import projection_pool
from veratune.utils.sharding import describe_sharding
from veratune.utils.tensors import is_finite
from veratune.utils.text import notify


class MergingModel(AdapterSet):
    """Adapters that can be merged into the weights, temporarily or permanently, and disabled."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable all adapters within this context; merged ones are unmerged, and merged again on exit."""
        with self.only([]):
            yield

    @contextmanager
    def only(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Activate only these adapters within this context. The parameters' `requires_grad` does not change.

        Merged adapters are unmerged, and merged again on exit.

        Raises:
            ValueError: a name is unknown, or the adapters cannot be active together.
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

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add the deltas of adapters to the weights, so that the adapters cost nothing in the forward pass.

        A merged adapter is not trained: its vectors get no gradients until `unmerge_adapter`. The modules and biases
        that it trains in full are used while it is merged, even if it is not active.

        The original weights are kept in addition to the merged ones (this doubles the memory of the adapted layers),
        and `unmerge_adapter` restores them bit for bit. Modules that share a merged weight keep the original.

        A bitsandbytes weight is dequantized, the delta is added, and the sum is quantized again, which loses part of
        the adapter; a torchao weight becomes a plain tensor. Both cause a warning. Merging into other quantized layers
        is an error, because veratune does not support their formats.

        `state_dict` then has the merged weights under the original names: loading it into an unmerged model would add
        the deltas twice. `save_pretrained` writes the same adapter, merged or not.

        Args:
            adapter_names: the names of the adapters; defaults to the active ones.
            safe_merge: check that all merged weights are finite before any is changed.

        Raises:
            ValueError: a name is unknown, the adapters cannot be active together, a weight cannot be merged into, this
                is called within `disable_adapter` or `only`, or, with `safe_merge`, a result is not finite. The model
                is unchanged after this and any other error.
        """
        self._check_outside("merge_adapter")
        names = self._names_to_merge(adapter_names)
        self._check_together([*self._computing(), *names])
        self._check_mergeable(names, safe_merge)
        self._warn_of_losses(names)
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
        """Undo `merge_adapter`, bit for bit.

        Raises:
            ValueError: merged weights have been offloaded or written to since merging; nothing is changed.
                `merge_and_unload` keeps weights that were written to.
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
        """Merge adapters permanently and return the model, without any trace of veratune in it.

        The adapted layers get new weight parameters; tied layers are untied, and `tie_word_embeddings` in the model's
        configuration is then set to False.

        If merging is interrupted or runs out of memory, finished layers stay merged and the others keep their adapters:
        outputs stay correct, and the same call resumes. The model is unchanged after any other error.

        Args:
            progressbar: print a line for each percent of the layers.
            safe_merge: check that all merged weights are finite before any is changed.
            adapter_names: the names of the adapters; defaults to the active ones.

        Raises:
            ValueError: as for `merge_adapter`, or as for `unload`.
        """
        with removal_noticed(self.base_model, "merge_and_unload"):
            names = self._names_to_merge(adapter_names)
            self._check_together(names)
            layers = self._layers()
            for layer in layers:
                if layer.merged_for_good and layer.merged_adapters != [name for name in names if name in layer.entries]:
                    raise ValueError(
                        f"merge_and_unload was interrupted while merging {layer.merged_adapters}: call it again with"
                        " these adapter_names first"
                    )
            remaining = [layer for layer in layers if not layer.merged_for_good]
            with self.undone_on_error():
                for layer in remaining:
                    if layer.merged_adapters != [name for name in names if name in layer.entries]:
                        layer.unmerge()
                self._activate(names)
                guard_loading(self)
                self._check_mergeable(names, safe_merge)
                self._warn_of_losses(names)
            model_config: Any = getattr(self.base_model, "config", None)
            if self._tied_weights(names) and getattr(model_config, "tie_word_embeddings", False):
                model_config.tie_word_embeddings = False
            # Not undone on errors, because this would take memory for the original weights.
            for done, layer in enumerate(remaining, start=1):
                merged = [name for name in names if name in layer.entries]
                if merged:
                    if layer.merged_adapters != merged:
                        with undone_on_error(layer, layer.base_layer):
                            layer.merge(merged)
                    layer._unmerged.clear()
                if progressbar and done * 100 // len(remaining) > (done - 1) * 100 // len(remaining):
                    print(f"merged {done} of {len(remaining)} layers")
            with self.undone_on_error():
                self._forget_biases()  # the installed biases stay in the model
                return self._take_apart()

    def unload(self) -> nn.Module:
        """Remove all adapters and return the original model.

        If the backward pass of a checkpointed block is still pending, it raises RuntimeError.

        Raises:
            ValueError: such a backward pass is pending in a model that reads adapted weights without calling their
                layers, where nothing could detect that the adapters are missing.
        """
        with removal_noticed(self.base_model, "unload"), self.undone_on_error():
            self.unmerge_adapter()
            self._activate([])
            return self._take_apart()

    def _take_apart(self) -> nn.Module:
        """Replace each wrapper with the module it currently uses, remove all adapters, and return the model."""
        replacements: dict[int, nn.Module] = {}
        for module in self.modules():
            if isinstance(module, VeraLayer) and module.of_parameter:
                continue  # removed with its VeraModule
            if isinstance(module, VeraModule | VeraLayer):
                replacements[id(module)] = module.base_layer
            elif isinstance(module, SavedModule):
                replacements[id(module)] = module.current()
        replace_modules(self, replacements)
        leave_to_library(self.base_model)
        self.base_model.requires_grad_(False)
        for name, parameter in base_parameters(self.base_model):
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
                "no adapter is active, so there is nothing to merge: "
                + ("pass adapter_names, or call set_adapter first" if self.peft_config else "all adapters were removed")
            )
        return names

    def _check_mergeable(self, names: Sequence[str], safe_merge: bool) -> None:
        for name, layer in self.vera_layers().items():
            layer.check_mergeable(names, safe=safe_merge, called=name or "the model")

    def _warn_of_nonfinite(self, names: Sequence[str]) -> None:
        for name in names:
            values = (value for value in self.adapter_state(name).parameters() if describe_sharding(value) is None)
            if not all(map(is_finite, values)):
                notify(f"adapter {name!r} contains NaN or infinity, and so will any weights or files made from it")

    def _warn_of_losses(self, names: Sequence[str]) -> None:
        self._warn_of_nonfinite(names)
        layers = (layer for layer in self._layers() if any(name in layer.entries for name in names))
        for loss, count in Counter(layer.loss_of_merging() for layer in layers).items():
            if loss is not None:
                notify(
                    f"merging into {count} quantized layers {loss}, which changes the outputs. unmerge_adapter restores"
                    " the weights; unmerged adapters are exact"
                )

    def _tied_weights(self, names: Sequence[str]) -> bool:
        """Return whether any weight that will be merged or replaced is shared with another module."""
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

    def _release_projections(self) -> None:
        for layer in self._layers():
            layer.release_projections()
