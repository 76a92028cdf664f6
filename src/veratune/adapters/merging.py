"""Merging adapters into the weights of a model and taking them out again."""

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
from veratune.layers.pending import check_nothing_pending
from veratune.layers.quantized import leave_to_library
from veratune.projections.pool import projection_pool
from veratune.utils.sharding import describe_sharding
from veratune.utils.tensors import is_finite
from veratune.utils.text import notify


class MergingModel(AdapterSet):
    """Adapters that can be merged into the weights, for a while or for good, and left out for a while."""

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
            ValueError: as for `merge_adapter`, or the backward pass of a checkpointed block is still to come.
        """
        check_nothing_pending(self, "merge_and_unload")
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

        Raises:
            ValueError: the backward pass of a checkpointed block is still to come, in which nothing would notice that
                the adapters are missing.
        """
        check_nothing_pending(self, "unload")
        with self.undone_on_error():
            self.unmerge_adapter()
            self._activate([])
            return self._take_apart()

    def _take_apart(self) -> nn.Module:
        """Put what computes now in the place of each wrapper, forget all adapters, and return the model."""
        replacements: dict[int, nn.Module] = {}
        for module in self.modules():
            if isinstance(module, VeraLayer) and module.of_parameter:
                continue  # its VeraModule goes
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

    def _release_projections(self) -> None:
        for layer in self._layers():
            layer.release_projections()
