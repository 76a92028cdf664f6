"""PEFT's `save_pretrained` for veratune's layers: if the process is killed, the old files or the new ones remain."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor

from veratune.adapters.names import adapted_layers, base_modules, module_names
from veratune.checkpoint.files import CARD_NAME, CONFIG_NAME, write_text
from veratune.checkpoint.native import write_native
from veratune.config import PEFT_TYPE
from veratune.integrations.peft.state import base_model_of, file_keys, saved_wrappers
from veratune.layers.offloading import check_at_hand
from veratune.utils.exchange import replace_together


def saving(save: Callable[..., Any], replaced_vera: type) -> Callable[..., Any]:
    """Wrap PEFT's `save_pretrained` to write veratune's files, or, for `replaced_vera`, all of PEFT's at once.

    Args:
        save: PEFT's method, which overwrites an adapter's weights, and then its configuration.
        replaced_vera: the tuner class that combines veratune's layers with PEFT's files.
    """

    @wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        types = {config.peft_type for config in self.peft_config.values()}
        if types == {PEFT_TYPE}:
            return _save(self, Path(save_directory), *args, **kwargs)
        tuners = {PEFT_TYPE_TO_TUNER_MAPPING.get(kind) for kind in types}
        root = Path(save_directory)
        if replaced_vera not in tuners or root.is_file() or kwargs.get("is_main_process") is False:
            return save(self, save_directory, *args, **kwargs)
        return _exchanged(self, root, lambda place: save(self, place, *args, **kwargs))

    return save_pretrained


def _save(
    peft_model: Any,
    directory: Path,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    **kwargs: Any,
) -> None:
    """Write adapters in veratune's format, with PEFT's arguments and PEFT's card.

    Raises:
        ValueError: an adapter is unknown, or PEFT would save tensors that these files cannot hold. Nothing is written.
    """
    if directory.is_file():
        raise ValueError(f"{directory} is a file: pass a directory to save adapters in")
    if not safe_serialization or path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "safe_serialization=False and path_initial_model_for_weight_conversion are not allowed here: veratune"
            " writes safetensors, never pickles, and VeRA has no initial weights to subtract. Omit these arguments"
        )
    names = list(peft_model.peft_config) if selected_adapters is None else list(selected_adapters)
    unknown = [name for name in names if name not in peft_model.peft_config]
    if unknown:
        raise ValueError(f"invalid `selected_adapters`: {unknown} are not among {list(peft_model.peft_config)}")
    base = base_model_of(peft_model)
    modules = base_modules(base)
    for name in names:
        config = peft_model.peft_config[name]
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.__dict__.get("name_or_path")
    # All processes take part in gathering; all adapters are checked before the first is written.
    tensors = {name: _tensors(peft_model, name, kwargs.get("state_dict"), save_embedding_layers) for name in names}
    settings = {name: peft_model.peft_config[name].for_file(list(saved_wrappers(modules, name))) for name in names}
    if not is_main_process:
        return
    _write_card(peft_model, directory)
    for name in names:
        layers = {key: layer for key, layer in adapted_layers(base).items() if name in layer.entries}
        scheme = next(iter(layers.values())).entries[name].a.projection.scheme
        folder = directory if name == "default" else directory / name
        write_native(folder, name, base, settings[name], scheme, layers, tensors[name])


def _tensors(
    peft_model: Any, adapter_name: str, state: dict[str, Tensor] | None, save_embedding_layers: Any
) -> dict[str, Tensor]:
    """Return an adapter's tensors by their keys in its file, gathered if they are sharded."""
    with _embeddings_unnamed(peft_model.peft_config[adapter_name]):
        found = get_peft_model_state_dict(
            peft_model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=save_embedding_layers
        )
    keys = file_keys(peft_model, adapter_name)
    # For a module trained in full, the file has the adapter's copy, but not the base model's weights.
    names = module_names(peft_model)
    wrappers = saved_wrappers(dict(peft_model.named_modules()), adapter_name)
    trained = tuple(f"{names[name].public}." for name in wrappers)
    lost = [key for key in found if key not in keys and not key.startswith(trained)]
    if lost:
        raise ValueError(
            f"adapter {adapter_name!r} cannot be saved: {lost[0]} would be lost, because a file contains only what the"
            " adapter trains. PEFT also saves resized embeddings, and all embeddings if save_embedding_layers=True. Add"
            " the embedding to modules_to_save to train and keep it, or save the resized base model with its own"
            " save_pretrained, load it from there before adding the adapter, and omit save_embedding_layers"
        )
    tensors = {keys[key]: tensor for key, tensor in found.items() if key in keys}
    check_at_hand(tensors, f"save adapter {adapter_name!r}")
    return tensors


@contextmanager
def _embeddings_unnamed(config: Any) -> Iterator[None]:
    """Make PEFT save the weight of an adapted embedding only if it was resized, as for any other embedding."""
    targets, config.target_modules = config.target_modules, None
    try:
        yield
    finally:
        config.target_modules = targets


def _write_card(peft_model: Any, directory: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        card, updated = directory / CARD_NAME, Path(temporary) / CARD_NAME
        if card.is_file():
            shutil.copyfile(card, updated)
        peft_model.create_or_update_model_card(temporary)
        write_text(card, updated.read_text(encoding="utf-8"))


def _exchanged(peft_model: Any, root: Path, save: Callable[..., Any]) -> Any:
    """Save PEFT's files to another directory, and replace the old files when all are complete."""
    with tempfile.TemporaryDirectory() as temporary:
        for card in root.glob(f"**/{CARD_NAME}") if root.is_dir() else ():  # which PEFT updates
            if card.is_file() and (card.parent == root or card.parent.name in peft_model.peft_config):
                copy = Path(temporary) / card.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(card, copy)
        result = save(temporary)
        for folder in sorted({path.parent for path in Path(temporary).glob("**/*") if path.is_file()}):
            paths = sorted(folder.iterdir(), key=lambda path: (path.name == CONFIG_NAME, path.name))
            files = {path.name: path.read_bytes() for path in paths if path.is_file()}
            replace_together(root / folder.relative_to(temporary), files)
    return result
