"""transformers' continuous batching, with an adapter from a bank for each request.

    from veratune.integrations.continuous_batching import BankManager, generate_batch

    outputs = generate_batch(bank, prompts, adapters=["anna", None, "bert"], max_new_tokens=64)
    with BankManager(bank) as manager:
        manager.add_request(prompt, adapter="anna", streaming=True)

Requests may be added, and may finish, while others are running; each batch packs tokens of several requests.
"""

try:
    import transformers
    from transformers.generation.continuous_batching import continuous_api  # noqa: F401
except ImportError as error:
    raise ImportError(
        "veratune.integrations.continuous_batching needs transformers 5.23: pip install 'veratune[hf]'"
        f" 'transformers==5.23.*' ({error})"
    ) from error

# The classes used here are not a public interface of transformers, so untested versions are rejected.
if not transformers.__version__.startswith("5.23."):
    raise ImportError(
        f"veratune.integrations.continuous_batching needs transformers 5.23, not {transformers.__version__}:"
        " pip install 'veratune[hf]' 'transformers==5.23.*'"
    )

from veratune.integrations.continuous_batching.generation import generate_batch
from veratune.integrations.continuous_batching.manager import BankManager

__all__ = ["BankManager", "generate_batch"]
