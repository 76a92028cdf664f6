"""Merging for PEFT's tuner: all layers are checked before any is changed."""

from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from veratune.adapters.names import adapted_layers
from veratune.adapters.surgery import prepare, undone_on_error
from veratune.integrations.peft.layers import TunedModule, put_in_place_of
from veratune.layers.guards import guard_loading
from veratune.layers.pending import removal_noticed
from veratune.layers.quantized import leave_to_library


class MergingTuner(BaseTuner):
    """PEFT's tuner with merging that either succeeds or changes nothing."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, after checking all layers."""
        self._check_mergeable(adapter_names, safe_merge)
        with undone_on_error(self):
            super().merge_adapter(adapter_names, safe_merge=False)
            guard_loading(self)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, bit for bit."""
        with undone_on_error(self):
            super().unmerge_adapter()  # type: ignore[no-untyped-call]
            guard_loading(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters permanently, after checking all layers."""
        self._check_mergeable(adapter_names, safe_merge, for_good=True)
        merged: nn.Module = super().merge_and_unload(progressbar, safe_merge=False, adapter_names=adapter_names)
        return merged

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT annotates None, but returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        with removal_noticed(self.model, "merge_and_unload" if merge else "unload"):
            if not merge:
                for layer in adapted_layers(self.model).values():
                    layer.check_unmergeable()
                for layer in adapted_layers(self.model).values():
                    if layer.merged_adapters:
                        layer.unmerge()
            else:
                self._enable_adapter_layers(True)  # disabled adapters would only be merged later
            # Remove wrappers that contain tuned layers first: PEFT would remove them together with those layers.
            for wrapper in [module for module in self.model.modules() if isinstance(module, TunedModule)]:
                if merge:
                    wrapper.merge(adapter_names)
                put_in_place_of(self.model, wrapper, wrapper.base_layer)
            unload: Any = super()._unload_and_optionally_merge
            model: nn.Module = unload(merge, progressbar, safe_merge, adapter_names)
            prepare(model)
            guard_loading(model)
            leave_to_library(model)
            return model

    def _check_known(self, adapter_names: Iterable[str]) -> None:
        """Raise ValueError for an unknown name, which PEFT would treat as an adapter without layers."""
        for name in adapter_names:
            if name not in self.peft_config:
                raise ValueError(
                    f"adapter {name!r} does not exist: this model has the adapters {list(self.peft_config)}"
                )

    def _check_mergeable(self, adapter_names: list[str] | None, safe: bool, *, for_good: bool = False) -> None:
        """Raise ValueError if adapters cannot be merged into one of the layers. Change nothing."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names={adapter_names!r} is not allowed: pass a list of names")
        self._check_known(adapter_names or ())
        names = self.active_adapters if adapter_names is None else adapter_names
        for called, wrapper in self.model.named_modules():
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                self._check_saved(called, wrapper, names, for_good)
        for called, layer in adapted_layers(self.model).items():
            new = [name for name in names if name not in layer.merged_adapters]
            layer.check_mergeable(new, safe=safe, called=called)

    def _check_saved(self, called: str, wrapper: Any, names: list[str], for_good: bool) -> None:
        """Raise ValueError if merging would combine an adapter's vectors with another adapter's copy of a module."""
        active = wrapper.active_adapters
        for name in names:
            if name in wrapper._get_available_adapters() and name not in active:
                raise ValueError(
                    f"cannot merge {name!r} while it is inactive, because it trains {called} in full, and merging"
                    f" would leave out its copy: call set_adapter({name!r}) first"
                )
        for name in active if for_good else []:
            if name not in names:
                raise ValueError(
                    f"cannot merge {names} permanently while {name!r} is active, because its copy of {called} would"
                    f" stay in the model: call set_adapter({names!r}) first"
                )
