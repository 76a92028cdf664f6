"""Reading an adapter in whichever format it is."""

from pathlib import Path

from torch import nn

from veratune.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, CheckpointError, read_json
from veratune.checkpoint.native import is_native, ready_native
from veratune.checkpoint.peft_format import PEFT_VERA, ready_peft
from veratune.checkpoint.plugin_format import PLUGIN_TYPE, ready_plugin
from veratune.checkpoint.transfer import ReadyAdapter
from veratune.config import PEFT_TYPE


def read_adapter(model: nn.Module, directory: Path) -> ReadyAdapter:
    """Read an adapter of any of the formats and check it against a model, which is not changed.

    Raises:
        CheckpointError: there is no adapter, it is damaged or of another kind, or for another model.
    """
    config_path = directory / CONFIG_NAME
    if not (directory / WEIGHTS_NAME).is_file():
        missing = f"{directory} holds no adapter: {WEIGHTS_NAME} does not exist there"
        raise CheckpointError(missing + _instead(directory))
    # veratune's own tensors file is whole without its JSON copy, PEFT's is not.
    if is_native(directory / WEIGHTS_NAME) or not config_path.exists():
        return ready_native(model, directory)
    peft_type = read_json(config_path).get("peft_type")
    if peft_type == PEFT_TYPE:
        return ready_native(model, directory)
    if peft_type == PEFT_VERA:
        return ready_peft(model, directory)
    if peft_type == PLUGIN_TYPE:
        return ready_plugin(model, directory)
    raise CheckpointError(
        f"{config_path} is of an adapter of the type {peft_type!r}; veratune loads {PEFT_TYPE!r} and PEFT's"
        f" {PEFT_VERA!r}"
    )


def _instead(directory: Path) -> str:
    """Return what a directory without an adapter has that explains the mistake."""
    whole = next((name for name in ("model.safetensors", "pytorch_model.bin") if (directory / name).exists()), None)
    if whole is not None:
        return f". It holds a whole model ({whole}); an adapter is what save_pretrained of a VeraModel writes"
    folders = sorted(path.parent.name for path in directory.glob(f"*/{WEIGHTS_NAME}"))
    return f", but in its folders {folders}: name one of them with subfolder=" if folders else ""
