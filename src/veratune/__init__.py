"""VeRA (Vector-based Random Matrix Adaptation) on all linear layers of a model, whatever their shapes."""

import veratune.startup  # noqa: F401  # before what takes long to import
from veratune.adapters import AdapterState
from veratune.bank import AdapterBank, BankError
from veratune.checkpoint.files import CheckpointError
from veratune.config import VeRAConfig, VeraConfig
from veratune.model import VeraModel, get_peft_model
from veratune.profiles import calibrate
from veratune.projection import ProjectionInfo, projection_pool
from veratune.supported import SupportTable, WeightInfo, supported
from veratune.targets import TargetError
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
