"""TRL's trainers for a `VeraModel`: supervised fine-tuning, and DPO without a second model.

Checkpoints hold only the adapters, and training resumes from them, as with `VeraTrainer`. With TRL's own trainers, use
`peft_config=VeratuneConfig(...)` from `veratune.integrations.peft`.
"""

from typing import Any

try:
    from trl import DPOTrainer, SFTTrainer  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(f"veratune.integrations.trl needs TRL: pip install 'veratune[trl]' ({error})") from error

import torch
from torch import nn

from veratune.adapters.plan import plan_adapter
from veratune.integrations.trainer import VeraTrainerMixin
from veratune.model import VeraModel

REFERENCE_ADAPTER = "ref"


class _VeraTrlTrainer(VeraTrainerMixin):
    """Passes the model inside a `VeraModel` to TRL.

    TRL replaces the `forward` of the model that it trains, which must be the language model itself. That model contains
    the adapters.
    """

    def __init__(self, model: VeraModel, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, VeraModel):
            raise TypeError(
                f"{type(self).__name__} trains a VeraModel, not a {type(model).__name__}: create one with"
                " get_peft_model"
            )
        self._adapted = model
        base: Any = model.get_base_model()
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        base._hf_peft_config_loaded = True  # makes TRL accept a quantized model, which has trainable parameters
        try:
            super().__init__(base, *args, **kwargs)
        finally:
            del base._hf_peft_config_loaded
            for parameter, values in trained:
                if parameter.dtype != values.dtype:  # TRL casts trainable parameters of a quantized model to bfloat16
                    parameter.data = values.to(parameter.device)
        if self.args.gradient_checkpointing:
            model._let_inputs_require_grad()

    def _vera_model(self) -> VeraModel:
        return self._adapted


class VeraSFTTrainer(_VeraTrlTrainer, SFTTrainer):
    """`trl.SFTTrainer` for a `VeraModel`; all other arguments are the same."""


class VeraDPOTrainer(_VeraTrlTrainer, DPOTrainer):
    """`trl.DPOTrainer` for a `VeraModel`; all other arguments are the same.

    Without a `ref_model`, the reference is the model at the time when the trainer is created: without its adapter if
    the adapter is new, otherwise with a frozen copy of the adapter, named "ref". No second model is loaded.

    Raises:
        TypeError: the model is not a `VeraModel`.
        ValueError: a copy is needed, but several adapters are active, or an adapter is already named "ref".
    """

    def __init__(self, model: VeraModel, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        if ref_model is None and isinstance(model, VeraModel):
            ref_model = _Reference(model)
        super().__init__(model, ref_model, *args, **kwargs)


class _Reference(nn.Module):
    """DPO's reference model: the trained model with other active adapters. It adds no parameters."""

    def __init__(self, model: VeraModel) -> None:
        super().__init__()
        # In a tuple, so that the model is not a submodule: nothing may train, move or wrap it twice.
        self._model = (model,)
        self._adapters = [] if _is_new(model) else [_frozen_copy(model)]

    @property
    def config(self) -> Any:
        return self._model[0].config

    @property
    def base_model(self) -> Any:
        """The part before the head, which TRL calls separately."""
        return self._model[0].base_model.base_model

    def get_output_embeddings(self) -> Any:
        return self._model[0].get_output_embeddings()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's state dict, from which TRL detects whether it has used this reference before."""
        return self._model[0].state_dict(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._model[0].base_model(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not in `forward`, because TRL replaces it.
        with self._model[0].only(self._adapters):
            return super().__call__(*args, **kwargs)


def _is_new(model: VeraModel) -> bool:
    """Return whether the active adapters have no effect yet, and train no modules or biases."""
    states = [model.adapter_state(name) for name in model.active_adapters]
    return not any(
        state.saved or state.biases or any(bool(vectors["b"].any()) for vectors in state.vectors.values())
        for state in states
    )


def _frozen_copy(model: VeraModel) -> str:
    """Add a frozen copy of the active adapter and return its name."""
    name = model.active_adapter
    model.check_new_name(REFERENCE_ADAPTER)
    plan = plan_adapter(model.base_model, model.peft_config[name], model.projection_scheme(name))
    model.install_adapter(REFERENCE_ADAPTER, plan)
    own, copied = model.adapter_state(name), model.adapter_state(REFERENCE_ADAPTER)
    with torch.no_grad():
        for source, copy in zip(own.parameters(), copied.parameters(), strict=True):
            copy.copy_(source)
            copy.requires_grad_(False)
    return REFERENCE_ADAPTER
