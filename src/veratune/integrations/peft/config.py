"""`VeratuneConfig`, the configuration that PEFT takes for veratune's layers."""

from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Self

import peft
from peft.utils import PeftType

from veratune.checkpoint.files import CONFIG_NAME, CheckpointError
from veratune.checkpoint.peft_plugin import PLUGIN_TYPE
from veratune.checkpoint.validate import LoadedAdapter
from veratune.config import PEFT_TYPE, VeraConfig, VeraFields, explains_unknown_fields
from veratune.config_fields import settings_of
from veratune.integrations.peft import files as peft_native
from veratune.integrations.peft import method as peft_method


@explains_unknown_fields
@dataclass
class VeratuneConfig(VeraFields, peft.PeftConfig):
    """A configuration for PEFT, with the fields of `veratune.VeraConfig` that PEFT does not handle itself.

    `fingerprint` is of the projections; it is filled in, and compared when an adapter is loaded.

    Raises:
        RuntimeError: `install()` was not called, and PEFT could not use this.
    """

    fingerprint: str | None = None
    # Further keys of the JSON next to a native file, unused here.
    save_projection: InitVar[bool] = False
    base: InitVar[dict[str, Any] | None] = None

    def __post_init__(self, save_projection: bool, base: dict[str, Any] | None) -> None:
        peft_method.check_installed(PLUGIN_TYPE)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._native: LoadedAdapter | None = None
        self._of_native_json = self.peft_type == PEFT_TYPE
        self.peft_type = PeftType[PLUGIN_TYPE]
        if save_projection and not self._of_native_json:
            raise ValueError(
                "save_projection=True cannot be had in PEFT: a VeratuneConfig's files have no projections, only their"
                " fingerprint. Leave it out, or save with veratune.VeraModel, whose VeraConfig has save_projection"
            )
        self._expected = self.fingerprint  # what a file says, where this comes from one
        self.checked()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration of an adapter that PEFT wrote, or of veratune's own."""
        peft_method.check_installed(PLUGIN_TYPE)
        read: Any = super().from_pretrained
        try:
            config: Any = read(pretrained_model_name_or_path, subfolder, **kwargs)
        except (TypeError, ValueError) as error:
            file = Path(pretrained_model_name_or_path) / (subfolder or ".") / CONFIG_NAME
            if not file.exists():
                raise
            raise CheckpointError(f"{file} cannot be used: {error}") from error
        if not getattr(config, "_of_native_json", False):
            return config
        return cls._of_native(*peft_native.read_for_peft(pretrained_model_name_or_path, subfolder=subfolder, **kwargs))

    @classmethod
    def _of_native(cls, loaded: LoadedAdapter, fingerprint: str) -> Self:
        own = loaded.config
        # PEFT names tasks otherwise, and an empty list is a choice there.
        kept = {*settings_of(VeraFields), *VeraConfig.names_with(peft="any")} - {"modules_to_save", "task_type"}
        config = cls(
            **{name: getattr(own, name) for name in kept},
            task_type=peft_native.task_type_for_peft(loaded),
            modules_to_save=own.modules_to_save or None,
            fingerprint=fingerprint,
        )
        config._native = loaded
        return config

    def checked(self) -> VeraConfig:
        """Return the same as a `veratune.VeraConfig`, which refuses what cannot be."""
        # With target_parameters, an empty list means that no layer is adapted.
        wanted = None if self.target_parameters and not self.target_modules else self.target_modules
        return VeraConfig(
            **{name: getattr(self, name) for name in settings_of(VeraFields)} | {"target_modules": wanted}
        )
