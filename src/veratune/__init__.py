"""VeRA (Vector-based Random Matrix Adaptation) for all linear layers of a model, regardless of their shapes."""

import importlib
from typing import TYPE_CHECKING, Any

import veratune.utils.startup  # noqa: F401  # before the imports that take long

if TYPE_CHECKING:
    from veratune.adapters.adapter_state import AdapterState
    from veratune.adapters.coverage import SupportTable, WeightInfo, supported
    from veratune.adapters.target import TargetError
    from veratune.bank import AdapterBank, BankError
    from veratune.checkpoint.files import CheckpointError
    from veratune.config import VeRAConfig, VeraConfig
    from veratune.model import VeraModel, get_peft_model
    from veratune.ops.calibration import calibrate
    from veratune.projections.pool import ProjectionInfo, projection_pool
    from veratune.training import parameter_groups

__version__ = "0.1.0"

# Imported when they are first used: `veratune --help` needs none of them, and torch takes seconds to import.
_MODULES = {
    "AdapterBank": "bank",
    "AdapterState": "adapters.adapter_state",
    "BankError": "bank",
    "CheckpointError": "checkpoint.files",
    "ProjectionInfo": "projections.pool",
    "SupportTable": "adapters.coverage",
    "TargetError": "adapters.target",
    "VeRAConfig": "config",
    "VeraConfig": "config",
    "VeraModel": "model",
    "WeightInfo": "adapters.coverage",
    "calibrate": "ops.calibration",
    "get_peft_model": "model",
    "parameter_groups": "training",
    "projection_pool": "projections.pool",
    "supported": "adapters.coverage",
}

__all__ = [
    "AdapterBank",
    "AdapterState",
    "BankError",
    "CheckpointError",
    "ProjectionInfo",
    "SupportTable",
    "TargetError",
    "VeRAConfig",
    "VeraConfig",
    "VeraModel",
    "WeightInfo",
    "calibrate",
    "get_peft_model",
    "parameter_groups",
    "projection_pool",
    "supported",
]


# `veratune.bank` works without importing it first, as in torch.
_PACKAGES = frozenset(
    ("adapters", "bank", "checkpoint", "config", "export", "layers", "model", "ops", "projections", "training")
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"veratune.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'veratune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"veratune.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
