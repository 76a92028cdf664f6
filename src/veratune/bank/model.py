"""The model of a bank: a call names an adapter for each row."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veratune.layers.banked import serving

if TYPE_CHECKING:
    from veratune.bank.bank import AdapterBank

AdapterNames = Sequence[str | None]

# transformers' own would give the model's layers no adapters.
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class BankModel(nn.Module):
    """A base model whose rows are computed with adapters of their own.

    What this class does not have itself is looked up in the model.

    Attributes:
        base_model: the model, with the bank's layers in it.
    """

    def __init__(self, model: nn.Module, bank: "AdapterBank") -> None:
        super().__init__()
        self.base_model = model
        self.training = model.training
        self._bank = (bank,)  # in a tuple, so that copying and printing the model leave it alone

    def forward(
        self, *args: Any, adapters: AdapterNames, adapter_lengths: Sequence[int] | None = None, **kwargs: Any
    ) -> Any:
        """Call the model.

        Args:
            args, kwargs: the model's own arguments.
            adapters: a name for each row of the batch; None is the base model.
            adapter_lengths: for sequences packed one behind the other into one row: how many tokens each of them has.
                `adapters` then has a name for each sequence.

        Raises:
            BankError: an unknown name, or lengths that do not fit.
            RuntimeError: a layer whose input cannot be told apart by rows.
        """
        (bank,) = self._bank
        with bank.lease(adapters) as lease, serving(bank.call_of(lease, adapter_lengths)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapters: AdapterNames, **kwargs: Any) -> Any:
        """Call the model's `generate`. All of it is computed with the versions that the adapters have at its start.

        Beams and returned sequences (`num_beams`, `num_return_sequences`) have the adapter of their row.

        Args:
            args, kwargs: those of `generate`.
            adapters: a name for each row of the batch, not of the result; None is the base model.

        Raises:
            BankError: an unknown name.
        """
        (bank,) = self._bank
        base: Any = self.base_model
        with bank.lease(adapters) as lease, serving(bank.call_of(lease, None)):
            return base.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            if name in _BATCHING:
                raise AttributeError(
                    f"{name} knows nothing of a bank's adapters: use generate_batch or BankManager of"
                    " veratune.integrations.continuous_batching"
                ) from None
            return getattr(self.base_model, name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "BankModel":
        result: BankModel = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        (bank,) = self._bank
        bank.follow_model()
        return result
