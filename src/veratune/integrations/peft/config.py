"""`VeratuneConfig`, the PEFT configuration for veratune's layers."""

from dataclasses import InitVar, dataclass
from typing import Any, Self

import peft
from peft.utils import PeftType

from veratune.checkpoint.validate import LoadedAdapter
from veratune.config import PEFT_TYPE, VeraConfig, VeraFields, explains_unknown_fields
from veratune.config_fields import settings_of
from veratune.integrations.peft import files as peft_files
from veratune.integrations.peft import method as peft_method


@explains_unknown_fields
@dataclass
class VeratuneConfig(VeraFields, peft.PeftConfig):
    """A configuration for PEFT, with the fields of `veratune.VeraConfig` that PEFT does not handle itself.

    `fingerprint` identifies the projections; it is filled in automatically, and checked when an adapter is loaded.

    Raises:
        RuntimeError: `install()` was not called, so PEFT could not use the configuration.
    """

    fingerprint: str | None = None
    # Another key in adapter_config.json, which is unused here.
    base: InitVar[dict[str, Any] | None] = None

    def __post_init__(self, base: dict[str, Any] | None) -> None:
        peft_method.check_installed(PEFT_TYPE)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._file: LoadedAdapter | None = None
        self.peft_type = PeftType[PEFT_TYPE]
        self._expected = self.fingerprint  # the fingerprint in the file, if the configuration was read from one
        self.checked()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration of an adapter, together with the adapter."""
        peft_method.check_installed(PEFT_TYPE)
        return cls._of_file(peft_files.read_for_peft(pretrained_model_name_or_path, subfolder=subfolder, **kwargs))

    @classmethod
    def _of_file(cls, file: LoadedAdapter) -> Self:
        own = file.config
        # PEFT names tasks differently, and treats an empty list as an explicit choice.
        kept = {*settings_of(VeraFields), *VeraConfig.names_with(peft="any")} - {"modules_to_save", "task_type"}
        config = cls(
            **{name: getattr(own, name) for name in kept},
            task_type=peft_files.task_type_for_peft(file),
            modules_to_save=own.modules_to_save or None,
            fingerprint=file.header["fingerprint"],
        )
        config._file = file
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Raise an error: PEFT would write a configuration without an adapter file, or with one that cannot be read.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a VeratuneConfig can only be saved with its adapter, by calling save_pretrained on a peft.PeftModel:"
            " transformers' own save_pretrained cannot write veratune's file. Create the model with"
            " peft.get_peft_model, or call to_dict() for the settings alone"
        )

    def checked(self) -> VeraConfig:
        """Return the same settings as a `veratune.VeraConfig`, which rejects invalid ones."""
        # With target_parameters, an empty list means that no layer is adapted.
        wanted = None if self.target_parameters and not self.target_modules else self.target_modules
        return VeraConfig(
            **{name: getattr(self, name) for name in settings_of(VeraFields)} | {"target_modules": wanted}
        )

    def for_file(self, modules_to_save: list[str]) -> VeraConfig:
        """Return the configuration as it is stored in an adapter's file.

        Args:
            modules_to_save: the names of the modules that PEFT trains in full.
        """
        return self.checked().replace(
            modules_to_save=modules_to_save,
            task_type=self.task_type,
            base_model_name_or_path=self.base_model_name_or_path or None,
            revision=self.revision,
        )
