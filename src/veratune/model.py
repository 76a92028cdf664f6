"""The public interface: `get_peft_model` and `VeraModel`, an adapted model that can be saved and loaded."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from veratune.adapters.adapted_model import ADDING, AdaptedModel
from veratune.adapters.adapter_state import as_names, check_adapter_name
from veratune.adapters.names import base_modules
from veratune.adapters.plan import plan_adapter
from veratune.adapters.surgery import kept_on_error, undone_on_error
from veratune.checkpoint.base_model import layers_named, name_classes, tell_apart
from veratune.checkpoint.card import write_card
from veratune.checkpoint.formats import FORMATS, read_adapter
from veratune.checkpoint.hub import find_directory, hub_name, upload_directory
from veratune.checkpoint.native import save_native
from veratune.checkpoint.peft_writing import export_peft
from veratune.checkpoint.validate import ReadyAdapter
from veratune.config import VeraConfig
from veratune.export.gguf import export_gguf
from veratune.export.lora import export_lora
from veratune.export.vllm import check_vllm
from veratune.layers import SavedModule, VeraLayer
from veratune.utils.sharding import describe_sharding
from veratune.utils.text import notify

DEFAULT_ADAPTER = "default"


class VeraModel(AdaptedModel):
    """A model with VeRA adapters, returned by `get_peft_model` and `VeraModel.from_pretrained`."""

    # Signals to transformers' Trainer that a quantized model has trainable parameters.
    _hf_peft_config_loaded = True

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        **location: Any,
    ) -> Self:
        """Load a saved adapter onto a base model.

        If a transformers model has no class names, this sets those that the adapter was trained with.

        Args:
            model: the base model; it is adapted in place.
            model_id: directory of the adapter, or its repository on the hub.
            adapter_name: the adapter's name in the model.
            is_trainable: whether to continue training it; otherwise it is frozen, and the model is put in eval mode.
            autocast_adapter_dtype: hold the vectors in float32 if the layer is in half precision.
            location: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            CheckpointError: the files are missing, damaged, or for another model. The model is unchanged.
        """
        check_adapter_name(adapter_name)
        check_is_model(model)
        directory = _find(model_id, location)
        with ADDING:
            check_bare(model)
            ready = _read(model, directory)
            with undone_on_error(model):
                adapted = cls(model, autocast_adapter_dtype=autocast_adapter_dtype)
                ready.put_on(adapted, adapter_name, frozen=not is_trainable)
                adapted.set_adapter(adapter_name)
                if not is_trainable:
                    adapted.eval()
        name_classes(model, ready)
        return adapted

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        **location: Any,
    ) -> None:
        """Load another saved adapter, inactive until `set_adapter` activates it.

        Args:
            model_id: directory of the adapter, or its repository on the hub.
            adapter_name: the adapter's name in the model.
            is_trainable: whether it may be trained; otherwise it stays frozen when it is active.
            location: as for `from_pretrained`.

        Raises:
            ValueError: the name is taken or not allowed.
            CheckpointError: as for `from_pretrained`.
        """
        self.check_new_name(adapter_name)
        directory = _find(model_id, location)
        with ADDING:
            self.check_new_name(adapter_name)
            ready = _read(self.base_model, directory)
            ready.put_on(self, adapter_name, frozen=not is_trainable)

    def restore(self, save_directory: str | os.PathLike[str]) -> None:
        """Load values written by `save_pretrained` into the existing adapters.

        Parameters keep their identity, so optimizers stay valid. Nothing is changed unless all values fit.

        Args:
            save_directory: the directory that was passed to `save_pretrained`.

        Raises:
            CheckpointError: an adapter is missing in the directory, or its layers or rank differ from the model's.
            ValueError: adapters are merged.
        """
        self._check_unmerged("restore")
        directories = self._directories(save_directory, None)
        ready = {name: _read(self.base_model, directory) for name, directory in directories.items()}
        for name, adapter in ready.items():
            adapter.check_equal_to(self, name)
            self.adapter_state(name).check_values(f"restore adapter {name!r}")
        with kept_on_error([tensor for name in ready for tensor in self.adapter_state(name).tensors()]):
            for name, adapter in ready.items():
                adapter.copy_into(self, name)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: str | Sequence[str] | None = None,
        *,
        is_main_process: bool = True,
    ) -> None:
        """Write adapters in veratune's format: the vectors, modules trained in full, and biases.

        The adapter called "default" is written into the directory itself, every other adapter into a subdirectory with
        its name. Each adapter's file is replaced atomically.

        Args:
            save_directory: the directory; created if necessary.
            safe_serialization: must be true: veratune only writes safetensors.
            selected_adapters: the names of the adapters; defaults to all of them.
            is_main_process: whether to write; false in all processes except one. All processes must call this if
                parameters are sharded (FSDP2).

        Raises:
            ValueError: an adapter is unknown, the model has no adapter, or `safe_serialization` is false.
        """
        if safe_serialization is not True:
            raise ValueError(
                f"safe_serialization={safe_serialization!r} is not allowed: veratune writes safetensors, never pickles"
            )
        directories = self._directories(save_directory, selected_adapters)
        for name in directories:
            self.adapter_state(name).check_values(f"save adapter {name!r}")
        for name, directory in directories.items():
            save_native(self, name, directory, write=is_main_process)
            if not is_main_process:
                continue
            state = self.adapter_state(name)
            numbers = sum(vector.numel() for vectors in state.vectors.values() for vector in vectors.values())
            others = sum(parameter.numel() for parameter in state.parameters()) - numbers
            write_card(directory, self.peft_config[name], self.base_model, len(state.vectors), numbers, others)

    def export(self, format: str, save_directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Write an adapter in one of the registered checkpoint formats (`veratune.checkpoint.formats.FORMATS`).

        Args:
            format: the format's name.
            save_directory: the directory; created if necessary.
            adapter_name: the adapter's name; defaults to the active adapter.

        Raises:
            ValueError: the format or adapter is unknown, or the format cannot be written or cannot hold the adapter.
        """
        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}: choose one of {list(FORMATS)}")
        FORMATS[format].write(self, self._to_export(adapter_name), Path(save_directory))

    def export_peft(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        save_projection: bool | None = None,
    ) -> None:
        """Write an adapter in PEFT's VeRA format, which `peft.PeftModel.from_pretrained` loads with the same outputs.

        Args:
            save_directory: the directory; created if necessary.
            adapter_name: the adapter's name; defaults to the active adapter.
            save_projection: whether to write A and B; None writes them if PEFT cannot draw them, which is always the
                case for projection="per_dimension".

        Raises:
            ValueError: the adapter is unknown, or save_projection=False even though PEFT needs A and B.
        """
        name = self._to_export(adapter_name)
        export_peft(self, name, Path(save_directory), save_projection=save_projection)

    def export_lora(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        rank: int | None = None,
        engine: Literal["vllm"] | None = None,
    ) -> None:
        """Write an adapter as a LoRA adapter of the same rank, exactly: lora_A = d * A, lora_B = b * B, lora_alpha = r.

        Args:
            save_directory: the directory; created if necessary.
            adapter_name: the adapter's name; defaults to the active adapter.
            dtype: dtype of the matrices written.
            rank: a different rank, for all layers. Matrices are padded with zeros to a larger rank; a smaller rank is
                allowed if it represents the deltas exactly.
            engine: "vllm" checks that vLLM can load the result; None is for PEFT.

        Raises:
            ValueError: the adapter is unknown, PEFT's LoRA or the engine does not support part of it, or `rank` cannot
                represent the deltas exactly.
        """
        name = self._to_export(adapter_name)
        if engine == "vllm":
            check_vllm(self, name, rank)
        elif engine is not None:
            raise ValueError(f"engine={engine!r} is not supported: it must be 'vllm' or None")
        export_lora(self, name, Path(save_directory), dtype=dtype, rank=rank)

    def export_gguf(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write an adapter as a GGUF file with a LoRA of the same rank, for llama.cpp (`--lora`).

        Args:
            save_directory: the directory; created if necessary.
            adapter_name: the adapter's name; defaults to the active adapter.
            dtype: dtype of the matrices written: float32, float16 or bfloat16.

        Returns:
            The file, `adapter_model.gguf` in the directory.

        Raises:
            ImportError: the package gguf is missing.
            ValueError: the adapter is unknown, or llama.cpp does not support this model or part of the adapter.
        """
        name = self._to_export(adapter_name)
        return export_gguf(self, name, Path(save_directory), dtype=dtype)

    def push_to_hub(self, repo_id: str, selected_adapters: str | Sequence[str] | None = None, **settings: Any) -> str:
        """Save adapters and upload them to the Hugging Face hub.

        If the base model was loaded from a directory, its path is uploaded with the configuration, with a warning.

        Args:
            repo_id: "owner/name"; created if necessary.
            selected_adapters: the names of the adapters; defaults to all of them.
            settings: `private`, `token`, `revision`, `commit_message`, `create_pr`.

        Returns:
            The URL of the commit.
        """
        for name in self.peft_config if selected_adapters is None else as_names(selected_adapters):
            self._check_known([name])
            base = self.peft_config[name].base_model_name_or_path
            if base and hub_name(base) is None:
                notify(
                    f"the base model of adapter {name!r} is a directory, and its path {base!r} is pushed with the"
                    f" configuration: set model.peft_config[{name!r}].base_model_name_or_path to the model's name on"
                    " the hub, or to None, to keep the path private"
                )
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, selected_adapters=selected_adapters)
            return upload_directory(Path(directory), repo_id, **settings)

    def _to_export(self, adapter_name: str | None) -> str:
        """Return the name of the adapter to export, after checking that it is not sharded."""
        name = self.active_adapter if adapter_name is None else adapter_name
        self.adapter_state(name).check_values(f"export adapter {name!r}")
        for parameter in self.adapter_state(name).parameters():
            sharding = describe_sharding(parameter)
            if sharding is not None:
                raise ValueError(
                    f"adapter {name!r} cannot be exported while it is sharded across processes ({sharding}): call"
                    " save_pretrained in all of them, then load the adapter in one process and export it there"
                )
        self._warn_of_nonfinite([name])
        return name

    def _directories(
        self, save_directory: str | os.PathLike[str], selected: str | Sequence[str] | None
    ) -> dict[str, Path]:
        names = list(self.peft_config) if selected is None else as_names(selected)
        self._check_known(names)
        if not names:
            raise ValueError("there is no adapter to save: add one with add_adapter, or select at least one")
        root = Path(save_directory)
        if root.is_file():
            raise ValueError(f"save_directory={str(root)!r} is a file: pass a directory")
        return {name: root if name == DEFAULT_ADAPTER else root / name for name in names}


def get_peft_model(
    model: nn.Module,
    peft_config: VeraConfig,
    adapter_name: str = DEFAULT_ADAPTER,
    autocast_adapter_dtype: bool = True,
) -> VeraModel:
    """Add a new VeRA adapter to a model and return the adapted model, ready for training.

    The model's parameters are frozen; the adapter's vectors and its `modules_to_save` are trainable. The adapter starts
    as an exact no-op.

    Args:
        model: any `torch.nn.Module`; it is adapted in place.
        peft_config: the configuration; it is not changed.
        adapter_name: the adapter's name.
        autocast_adapter_dtype: hold the vectors in float32 if the layer is in half precision.

    Raises:
        TargetError: the configuration does not match this model. The model is unchanged.
        ValueError: the model already has adapters, or the name is not allowed.
    """
    check_adapter_name(adapter_name)
    with ADDING:
        check_bare(model)
        plan = plan_adapter(model, peft_config)
        with undone_on_error(model):
            adapted = VeraModel(model, autocast_adapter_dtype=autocast_adapter_dtype)
            adapted.install_adapter(adapter_name, plan)
            adapted.set_adapter(adapter_name)
    return adapted


def check_is_model(model: object) -> None:
    """Raise TypeError unless this is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}")


def check_bare(model: nn.Module) -> None:
    """Raise TypeError or ValueError unless this is a model without adapters and without lazy layers."""
    check_is_model(model)
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("this model has lazy layers without shapes: call it once before adapting it")
    for module in model.modules():
        names = [(kind.__name__, kind.__module__.partition(".")[0]) for kind in type(module).__mro__]
        if ("BaseTunerLayer", "peft") in names:  # by name, because importing peft takes seconds
            raise ValueError(
                "this model has PEFT adapters, whose layers would be adapted: call merge_and_unload() or unload() of"
                " the PeftModel first"
            )
        if isinstance(module, AdaptedModel | VeraLayer | SavedModule):
            raise ValueError(
                "this model already has VeRA adapters: add another with add_adapter or load_adapter of the VeraModel,"
                " or remove them first with unload() of the VeraModel, or of the AdapterBank if a bank added them"
            )


_LOCATION = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


def _find(model_id: str | os.PathLike[str], location: dict[str, Any]) -> Path:
    unknown = [name for name in location if name not in _LOCATION]
    if unknown:
        raise TypeError(f"unknown arguments {unknown}: allowed keyword arguments are {list(_LOCATION)}")
    return find_directory(model_id, **location)


def _read(model: nn.Module, directory: Path) -> ReadyAdapter:
    ready = read_adapter(base_modules(model), directory)
    tell_apart(model, ready, layers_named(model, ready.plan.config))
    return ready
