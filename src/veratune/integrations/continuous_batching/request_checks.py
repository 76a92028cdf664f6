"""Check requests and settings: an error during a batch would end all requests."""

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchProcessor,
)

from veratune.bank import AdapterBank, BankError
from veratune.bank.resident import Lease


def checked_prompt(bank: AdapterBank, input_ids: Sequence[int], sequences: int) -> list[int]:
    """Return a prompt's tokens, or raise BankError."""
    try:
        prompt = [operator.index(token) for token in input_ids]
    except TypeError:
        raise BankError(
            f"input_ids={reprlib.repr(input_ids)} is not allowed: a prompt is one list of token ids, such as"
            " tokenizer(text).input_ids"
        ) from None
    if not prompt:
        raise BankError("input_ids is empty: a prompt needs at least one token")
    embeddings: Any = bank.model.base_model.get_input_embeddings()  # type: ignore[operator]
    known = getattr(embeddings, "num_embeddings", None)
    wrong = [token for token in prompt if token < 0 or (known is not None and token >= known)]
    if wrong:
        raise BankError(f"input_ids: {wrong[0]} is not a token id of this model, which has {known} tokens")
    if len(prompt) == 1 and sequences > 1:
        # transformers forks a request before the prompt's last token, which may leave its batch empty.
        raise BankError(
            f"a prompt of one token cannot have num_return_sequences={sequences}: transformers cannot fork it. Add a"
            " first token (bos_token_id), or add the request several times"
        )
    return prompt


def checked_prompts(
    bank: AdapterBank, inputs: Sequence[Sequence[int]], lease: Lease, sequences: int
) -> list[list[int]]:
    if len(lease.versions) != len(inputs):
        raise BankError(
            f"{len(lease.versions)} adapters for {len(inputs)} inputs: pass one adapter, or None, for each input"
        )
    return [checked_prompt(bank, input_ids, sequences) for input_ids in inputs]


def check_room(processor: ContinuousBatchProcessor, prompt: Sequence[int], max_new_tokens: int | None) -> None:
    """Raise BankError for a request that could become longer than the cache."""
    room: int = processor.cache.max_tokens_read
    most = len(prompt) + max(max_new_tokens or 1, 1) - 1  # the last token needs no cache
    if most > room:
        raise BankError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} may need {most} tokens, but the"
            f" cache holds {room}: shorten them, or increase the manager's num_blocks"
        )


def check_generation(config: GenerationConfig) -> None:
    if (config.num_beams or 1) > 1:
        raise BankError(
            f"num_beams={config.num_beams}: continuous batching does not support beams; use bank.model.generate"
        )


def check_settings(config: ContinuousBatchingConfig, model: Any) -> None:
    graphs = config.use_cuda_graph
    if graphs is not None and any((graphs,) if isinstance(graphs, bool) else graphs):
        raise BankError(f"use_cuda_graph={graphs}: a graph would replay the adapters it was captured with")
    if config.use_async_batching:
        raise BankError("use_async_batching=True is not supported with a bank")
    compiled = (config.varlen_compile_config, config.decode_compile_config)
    if any(compiled) or config.default_compile_level or getattr(model.config, "compile_config", None) is not None:
        raise BankError("compiling is not supported with a bank: remove the compile config")
    if getattr(model, "_device_mesh", None) is not None:
        raise BankError("tensor parallelism is not supported with a bank")
