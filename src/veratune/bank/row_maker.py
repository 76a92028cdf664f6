"""Create a bank's rows from adapter files, or from adapters in other models."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.bank.layout import AdapterRow, Layout, make_row
from veratune.checkpoint.base_model import layers_named, tell_apart
from veratune.checkpoint.formats import read_adapter
from veratune.checkpoint.hub import find_directory
from veratune.checkpoint.validate import LoadedAdapter, make_ready, targets_of
from veratune.config import VeraConfig


class RowMaker:
    """Creates the rows of one bank."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        config: VeraConfig,
        named: Iterable[str],
        layout: Layout,
        dtype: torch.dtype,
        base_saved: Tensor | None,
    ) -> None:
        """Store everything that rows depend on.

        Args:
            model: the base model, which contains the bank's layers by the time the first row is created.
            modules: the base model's original modules by name, so that the bank's layers are not mistaken for another
                adapter.
            config: the bank's configuration.
            named: the names of the layers that the configuration selects.
            layout, dtype, base_saved: as in `make_row`.
        """
        self._model = model
        self._modules = dict(modules)
        self._named = config, list(named)
        self._settings = dtype, base_saved
        self._layout = layout

    def saved(self, model_id: str | os.PathLike[str], location: dict[str, Any]) -> AdapterRow:
        """Return the row of a saved adapter."""
        ready = read_adapter(self._modules, find_directory(model_id, **location))
        # Consecutive adapters usually have equal configurations, which select the same layers.
        config, named = self._named
        if ready.plan.config != config:
            config, named = ready.plan.config, layers_named(self._model, ready.plan.config)
            self._named = config, named
        tell_apart(self._model, ready, named)
        return make_row(self._layout, ready, *self._settings)

    def active(self, model: AdaptedModel, adapter_name: str | None) -> AdapterRow:
        """Return the row of an adapter in another model; by default, of the active adapter."""
        name = model.active_adapter if adapter_name is None else adapter_name
        state = model.adapter_state(name).detached()
        loaded = LoadedAdapter(
            state.vectors, state.saved, state.biases, origin=f"adapter {name!r}", config=model.peft_config[name]
        )
        targets = targets_of(self._modules, loaded)
        ready = make_ready(self._modules, loaded, targets, model.projection_scheme(name))
        return make_row(self._layout, ready, *self._settings)
