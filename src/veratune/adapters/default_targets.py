"""Defaults that depend on the model: target modules, and the new head to train in full."""

import re
from collections.abc import Callable

from torch import nn

from veratune.adapters.names import base_modules, ends_in, unwrapped, without_wrappers
from veratune.adapters.target import TargetError
from veratune.adapters.target_errors import closest_in_model
from veratune.config import VeraConfig
from veratune.config_fields import heads_of
from veratune.layers import VeraLayer

# Query and value projections of attention, as in the paper's experiments, by their names in transformers.
_QUERY_AND_VALUE = {
    ("query", "value"): "bert camembert data2vec-text deit electra ernie layoutlm longformer roberta vit xlm-roberta",
    ("q_proj", "v_proj"): (
        "bart blenderbot clip codegen cohere dinov2 gemma gemma2 gemma3 gemma3_text gpt_neo gptj granite llama llama4"
        " m2m_100 marian mbart mistral mixtral olmo olmo2 opt pegasus phi qwen2 qwen2_moe qwen3 qwen3_moe siglip"
        " smollm3 stablelm starcoder2 vit whisper"
    ),
    ("c_attn",): "gpt2 gpt_bigcode",
    ("query_key_value",): "bloom falcon gpt_neox",
    ("qkv_proj",): "phi3",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("q", "v"): "mt5 t5 umt5",
    ("q_lin", "v_lin"): "distilbert xlm flaubert",
    ("Wqkv",): "mpt modernbert",
}
_NEW_HEAD_CLASS = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering)$")
_USUAL_HEADS = ("classifier", "score", "qa_outputs")


def resolve_config(model: nn.Module, config: VeraConfig, notify: Callable[[str], None]) -> VeraConfig:
    """Return the configuration with defaults filled in: targets, modules to save, and the base model's name.

    Args:
        model: the model without a wrapper.
        config: the user's configuration; not changed.
        notify: called with a message if a choice may be surprising.
    """
    changes: dict[str, object] = {}
    model = without_wrappers(model)
    model_config = getattr(model, "config", None)
    if config.target_modules is None and config.target_parameters is None:
        model_type = getattr(model_config, "model_type", None)
        chosen = _query_and_value(model, str(model_type))
        if chosen is None:
            notify(
                f"target_modules is None and there is no built-in choice for model_type={model_type!r}: adapting all"
                " linear layers (target_modules='all-linear')"
            )
        changes["target_modules"] = "all-linear" if chosen is None else list(chosen)
    changes["modules_to_save"] = _modules_to_save(model, config)
    if config.base_model_name_or_path is None:
        changes["base_model_name_or_path"] = getattr(model_config, "_name_or_path", None) or None
    return config.replace(**changes)


def _query_and_value(model: nn.Module, model_type: str) -> tuple[str, ...] | None:
    modules = base_modules(model)
    for names, model_types in _QUERY_AND_VALUE.items():
        # Names within an architecture differ between versions of transformers, so they are checked in the model.
        if model_type in model_types.split() and all(any(ends_in(name, end) for name in modules) for end in names):
            return names
    return None


def _modules_to_save(model: nn.Module, config: VeraConfig) -> list[str]:
    """Return the full names of the modules to save: those in the configuration, or the model's new head."""
    modules = base_modules(model)
    if config.modules_to_save is None:
        return _new_head(model, config)
    found: list[str] = []
    for suffix in config.modules_to_save:
        names = [name for name in modules if name and ends_in(name, suffix)]
        if not names:
            raise TargetError(
                f"modules_to_save={config.modules_to_save!r}: no module is called {suffix!r}."
                + closest_in_model([suffix], {name: type(module).__name__ for name, module in modules.items() if name})
            )
        found += names
    # A module inside another saved one is not saved again, and a module with two names is saved once.
    outermost = [name for name in dict.fromkeys(found) if not any(name.startswith(f"{other}.") for other in found)]
    return list({id(modules[name]): name for name in reversed(outermost)}.values())[::-1]


def _new_head(model: nn.Module, config: VeraConfig) -> list[str]:
    """Return the names of a classification model's head, which is randomly initialized and must be trained."""
    prefix = getattr(model, "base_model_prefix", None)
    children = {name: child for name, child in model.named_children() if next(child.parameters(), None) is not None}
    by_class = _NEW_HEAD_CLASS.search(type(model).__name__) is not None
    if prefix in children and (by_class or heads_of(config.task_type)):
        return [name for name in children if name != prefix]
    if heads_of(config.task_type):
        return [name for name in _USUAL_HEADS if name in children]
    return []


def output_layers(model: nn.Module) -> set[int]:
    """Return the ids of the layers that "all-linear" skips: the output head, and layers tied to embeddings."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None
    if callable(getter):
        try:
            head = getter()
        except (AttributeError, NotImplementedError):
            head = None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tied = {
        id(module)
        for module in model.modules()
        if not isinstance(module, nn.Embedding | VeraLayer) and id(module._parameters.get("weight")) in embeddings
    }
    return tied | ({id(unwrapped(head))} if isinstance(head, nn.Module) else set())
