"""VeRA (Vector-based Random Matrix Adaptation) for all linear layers of a model, regardless of their shapes."""

import veratune.utils.startup  # noqa: F401  # before the imports that take long
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
