"""Generate from a list of prompts with continuous batching."""

from collections.abc import Sequence

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import WorkloadHints

from veratune.bank import AdapterBank
from veratune.bank.registry import AdapterNames
from veratune.integrations.continuous_batching.manager import BankManager, children
from veratune.integrations.continuous_batching.request_checks import (
    checked_prompts,
)


def generate_batch(
    bank: AdapterBank,
    inputs: Sequence[Sequence[int]],
    *,
    adapters: AdapterNames,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    max_new_tokens: int | None = None,
    record_timestamps: bool = False,
) -> dict[str, GenerationOutput]:
    """Generate from any number of prompts, each with its adapter, and wait for all outputs.

    All prompts use the versions that the adapters have when this is called.

    Args:
        bank: as for `BankManager`.
        inputs: the prompts.
        adapters: the adapter name of each prompt; None for the base model.
        max_new_tokens: the maximum number of tokens to generate; by default, that of the generation config.
        generation_config: as for `BankManager`.
        continuous_batching_config: as for `BankManager`.
        record_timestamps: whether outputs contain the time of each token.

    Returns:
        the outputs by request id, in the order of `inputs`; with `num_return_sequences`, a request's children precede
        it, as in transformers. The output of a failed request has an `error`.

    Raises:
        BankError: an adapter is unknown, or as for `BankManager`. Nothing was generated.
        RuntimeError: generation failed for all requests.
    """
    generation_config = generation_config or bank.model.generation_config
    sequences = generation_config.num_return_sequences or 1
    with bank.lease(adapters) as lease:
        prompts = checked_prompts(bank, inputs, lease, sequences)
        if not prompts:
            return {}
        longest = generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        hints = WorkloadHints(
            max_prompt_length=max(map(len, prompts)),
            max_generated_length=longest or 0,
            num_requests=len(prompts) * sequences,
        )
        results: dict[str, GenerationOutput] = {}
        with BankManager(bank, generation_config, continuous_batching_config, hints) as manager:
            settings = {"max_new_tokens": max_new_tokens, "record_timestamps": record_timestamps}
            ids = manager._add_all(prompts, lease, settings)
            wanted = [one for request_id in ids for one in (*children(request_id, sequences - 1), request_id)]
            while len(results) < len(wanted):
                output = manager.get_result(timeout=1)
                if output is not None:
                    results[output.request_id] = output
                elif not manager.is_running():
                    break
        fatal = manager.background_thread_status.fatal_error
        if fatal is not None or len(results) < len(wanted):
            raise RuntimeError(
                f"continuous batching failed: {fatal or 'it stopped before all requests had finished'}"
            ) from fatal
    return {one: results[one] for one in wanted}
