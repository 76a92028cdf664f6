"""Add a method to the `peft` package, which has no public API for third-party methods.

All code that changes PEFT's internal tables is here, with the versions of PEFT that it was tested with.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

# The minor versions that the plug-in supports. Since 0.21, a method's class selects the tensors that PEFT saves; older
# versions recognize only PEFT's own methods by name, and silently omit the trained biases of other methods.
OLDEST, NEWEST = (0, 21), (0, 21)


def peft_version() -> tuple[int, int]:
    """Return the major and minor version of the installed PEFT.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        installed = version("peft")
    except ImportError as error:
        raise ImportError("veratune.integrations.peft needs the peft package: pip install 'veratune[peft]'") from error
    major, minor = installed.split(".")[:2]
    return int(major), int(minor)


def check_version() -> None:
    """Raise ImportError unless the installed version of PEFT is supported."""
    installed = peft_version()
    if not OLDEST <= installed <= NEWEST:
        found, oldest, newest = (".".join(map(str, v)) for v in (installed, OLDEST, NEWEST))
        allowed = oldest if oldest == newest else f"{oldest} to {newest}"
        raise ImportError(
            f"veratune.integrations.peft works with peft {allowed}, but {found} is installed: pip install"
            " 'veratune[peft]' installs a supported version, and veratune.get_peft_model does not need peft"
        )


def has_method(name: str) -> bool:
    """Return whether a method of this name is registered with PEFT."""
    from peft.utils import PeftType

    return name in PeftType.__members__


def check_installed(name: str) -> None:
    """Raise RuntimeError unless a method of this name is registered with PEFT."""
    if not has_method(name):
        raise RuntimeError(
            "veratune's layers are not registered with PEFT: call veratune.integrations.peft.install() before creating"
            " or reading a VeratuneConfig"
        )


def add_method(name: str, config_class: type, tuner_class: Any) -> None:
    """Register a method with PEFT under an upper-case name, as in PEFT's enumeration."""
    from peft.utils import PeftType, register_peft_method

    # `register_peft_method` requires a member of the enumeration, but does not add one.
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=tuner_class, prefix=tuner_class.prefix)


def add_reader(reading: Any, placing: Any, refusing: Any) -> None:
    """Make PEFT read veratune's files.

    Args:
        reading, placing: wrap PEFT's functions that read weights and load them into a model, to support these files.
        refusing: wraps transformers' `load_adapter`, which reads files itself, to reject these files.
    """
    import peft
    from peft import peft_model, utils
    from peft.utils import save_and_load
    from transformers.integrations.peft import PeftAdapterMixin

    load, put = reading(save_and_load.load_peft_weights), placing(save_and_load.set_peft_model_state_dict)
    for module in (peft, peft_model, utils, save_and_load):
        for name, function in (("load_peft_weights", load), ("set_peft_model_state_dict", put)):
            if hasattr(module, name):
                setattr(module, name, function)
    mixin: Any = PeftAdapterMixin
    mixin.load_adapter = refusing(mixin.load_adapter)


def wrap_changes(undone: Callable[[Any], AbstractContextManager[None]], check_local: Callable[..., None]) -> None:
    """Make PEFT's methods that add adapters undo their changes on errors, and check files before reading them.

    Args:
        undone: returns a context manager that undoes changes to a model on errors.
        check_local: raises an error if files are invalid; takes the path and subfolder that PEFT's methods are given.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    for kind in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        for name in ("add_adapter", "load_adapter"):
            if name in vars(kind):
                checked = _checking(vars(kind)[name], check_local) if name == "load_adapter" else vars(kind)[name]
                setattr(kind, name, _within(checked, undone, of_first=False))
        if "__init__" in vars(kind):
            setattr(kind, "__init__", _within(vars(kind)["__init__"], undone, of_first=True))  # noqa: B010
    from_pretrained = _checking(vars(PeftModel)["from_pretrained"].__func__, check_local, position=1)
    setattr(PeftModel, "from_pretrained", classmethod(_within(from_pretrained, undone, of_first=True)))  # noqa: B010


def _checking(method: Callable[..., Any], check_local: Callable[..., None], position: int = 0) -> Callable[..., Any]:
    """Wrap a method to first check the files at the path in its argument at this position, or in `model_id`."""

    @wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        path_or_repo = args[position] if len(args) > position else kwargs.get("model_id")
        check_local(path_or_repo, subfolder=kwargs.get("subfolder"))
        return method(self, *args, **kwargs)

    return checked


def _within(method: Callable[..., Any], undone: Callable[[Any], Any], *, of_first: bool) -> Callable[..., Any]:
    """Wrap a method to undo its changes to `self`, or to the model that is its first argument, on errors."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self if not of_first else args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):
            return method(self, *args, **kwargs)
        with undone(model):
            return method(self, *args, **kwargs)

    return wrapped


def let_trainer_find_best(tuner_class: type) -> None:
    """Make transformers' `Trainer`, if it is imported, load the best values of adapters not named "default".

    The `Trainer` looks for files only directly in the checkpoint's directory, where PEFT writes only the adapter
    "default". For other adapters, it would keep the last values or load those of "default".

    Args:
        tuner_class: the tuner of the models that this applies to.
    """
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or getattr(trainer._load_best_model, "_finds_adapters", False):
        return
    load_default = trainer._load_best_model

    @wraps(load_default)
    def load_best_model(self: Any) -> None:
        model = self.model
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or not isinstance(getattr(model, "base_model", None), tuner_class):
            load_default(self)
            return
        best, names = Path(self.state.best_model_checkpoint), model.active_adapters
        missing = [name for name in names if name != "default" and not (best / name).is_dir()]
        if missing:
            raise ValueError(f"{best} has no files for the adapters {missing}, so their best values are lost")
        for name in names:
            model.load_adapter(str(best if name == "default" else best / name), name)

    load_best_model._finds_adapters = True  # type: ignore[attr-defined]
    trainer._load_best_model = load_best_model


def add_writer(saving: Any) -> None:
    """Wrap `PeftModel.save_pretrained` with `saving`."""
    from peft import PeftModel

    kind: Any = PeftModel
    kind.save_pretrained = saving(kind.save_pretrained)


def replace_vera(tuner_class: type) -> None:
    """Make PEFT's own `VeraConfig` use this tuner class."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] = tuner_class
