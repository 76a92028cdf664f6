"""PEFT's LoRA files, which can be inspected but not loaded: their matrices are trained, not drawn from a key."""

from collections.abc import Mapping

from torch import Tensor, nn

from veratune.checkpoint.base import AdapterContents, AdapterFiles
from veratune.checkpoint.files import CONFIG_NAME, CheckpointError
from veratune.checkpoint.peft import PeftFiles, named_class
from veratune.checkpoint.peft_rules import PEFT_VERA, PREFIX
from veratune.checkpoint.validate import ReadyAdapter
from veratune.config import PEFT_TYPE

PEFT_LORA = "LORA"
# Suffixes of the names of a layer's two matrices; the last two are an embedding's.
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


class LoraFormat(PeftFiles):
    """PEFT's LoRA format, which `export_lora` writes."""

    name = "lora"
    peft_type = PEFT_LORA
    about = (
        "a LoRA adapter, which veratune cannot read as VeRA: its matrices are trained, not drawn from a key. PEFT and"
        " engines that serve LoRA can load it"
    )

    def read(self, modules: Mapping[str, nn.Module], files: AdapterFiles) -> ReadyAdapter:
        raise CheckpointError(
            f"{files.directory / CONFIG_NAME} belongs to an adapter of type {PEFT_LORA!r}; veratune loads {PEFT_TYPE!r}"
            f" and PEFT's {PEFT_VERA!r}"
        )

    def contents(self, files: AdapterFiles) -> AdapterContents:
        config = files.config or {}
        matrices: dict[str, dict[str, Tensor]] = {}
        others: dict[str, Tensor] = {}
        for key, tensor in files.weights.tensors().items():
            name = key.removeprefix(PREFIX)
            end = next((end for end in _ENDS if name.endswith(end)), None)
            if end is None:
                others[name] = tensor
            else:
                matrices.setdefault(name.removesuffix(end), {})[end[1:].removesuffix(".weight")] = tensor
        return AdapterContents(files.weights.path, self.name, config, matrices, others, base=named_class(config))
