"""Check that vLLM can load an exported LoRA adapter."""

from veratune.adapters.adapted_model import AdaptedModel
from veratune.export.lora import check_vectors_only
from veratune.export.lora_rank import exact_rank

# The values that vLLM accepts for max_lora_rank; adapters may have any rank up to it.
_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_vllm(host: AdaptedModel, adapter_name: str, rank: int | None) -> None:
    """Raise ValueError if vLLM could not load an adapter that is exported as a LoRA.

    Args:
        host: the model.
        adapter_name: the adapter's name.
        rank: the rank of the exported LoRA; None for the adapter's rank.
    """
    check_vectors_only(host, adapter_name, "vLLM's LoRA", "serve the model")
    layers = {name: layer for name, layer in host.vera_layers().items() if adapter_name in layer.entries}
    for name, layer in layers.items():
        if "vllm" not in layer.exports:
            raise ValueError(
                f"vLLM's LoRA only supports linear layers, and {name} is not linear ({layer.kind}). Merge the adapter"
                " (merge_and_unload) and serve the model"
            )
    largest = rank or max(layer.entries[adapter_name].r for layer in layers.values())
    if largest <= _MAX_RANKS[-1]:
        return
    needed = max(exact_rank(*layer.lora_factors(adapter_name), 1) for layer in layers.values())
    if needed <= _MAX_RANKS[-1]:
        size = max_lora_rank(needed)
        hint = f"rank={size} (--r {size}) holds this adapter exactly: export it with that rank"
    else:
        hint = "no smaller rank holds this adapter exactly. Merge it (merge_and_unload) and serve the model"
    raise ValueError(f"vLLM supports ranks up to {_MAX_RANKS[-1]}, not {largest}; {hint}")


def max_lora_rank(rank: int) -> int:
    """Return the smallest max_lora_rank of vLLM that fits adapters of this rank (at most 512)."""
    return next(allowed for allowed in _MAX_RANKS if allowed >= rank)
