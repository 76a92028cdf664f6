"""Register veratune's layers and files with the `peft` package."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from veratune.adapters.surgery import StructureBefore
from veratune.config import PEFT_TYPE
from veratune.integrations.peft import files as peft_files
from veratune.integrations.peft import method as peft_method
from veratune.integrations.peft.config import VeratuneConfig
from veratune.integrations.peft.layers import TunedLayer, TunedModule
from veratune.integrations.peft.saving import saving
from veratune.integrations.peft.tuner import VeratuneTuner
from veratune.integrations.peft.vera_tuner import PeftVeraTuner


def install(*, replace_vera: bool = False) -> None:
    """Register `VeratuneConfig` and veratune's files with PEFT. A second call has no further effect.

    Nothing else changes PEFT: neither importing this package nor creating a configuration. transformers'
    `load_adapter`, which reads files itself, will reject veratune's. If transformers' `Trainer` is imported when an
    adapter is saved, its `load_best_model_at_end` will also load adapters not named "default".

    Args:
        replace_vera: whether PEFT's own `VeraConfig` uses veratune's layers as well, so that existing PEFT scripts run
            on them. Files remain in PEFT's format, with the same outputs.

    Raises:
        ImportError: the installed version of PEFT is not supported.
    """
    peft_method.check_version()
    if not peft_method.has_method(PEFT_TYPE):
        peft_method.add_method(PEFT_TYPE, VeratuneConfig, VeratuneTuner)
        placing = partial(peft_files.placing, own_tuner=VeratuneTuner)
        peft_method.add_reader(peft_files.reading, placing, peft_files.refusing)
        peft_method.wrap_changes(_undone_if_adapted, peft_files.check_local)
        peft_method.add_writer(partial(saving, replaced_vera=PeftVeraTuner))
    if replace_vera:
        peft_method.replace_vera(PeftVeraTuner)


@contextmanager
def _undone_if_adapted(model: nn.Module) -> Iterator[None]:
    """Undo all changes if anything is raised, provided the model has veratune's layers before or after."""
    before = StructureBefore(model)
    adapted = _is_adapted(model)
    try:
        yield
    except BaseException:
        if adapted or _is_adapted(model):
            before.put_back()
        raise


def _is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, TunedLayer | TunedModule) for module in model.modules())
