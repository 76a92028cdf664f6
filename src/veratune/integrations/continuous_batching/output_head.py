"""The output head (lm_head) of a model in continuous batching."""

from contextlib import ExitStack
from typing import Any

from veratune.bank.layer_call import BankCall, active_call, serving
from veratune.bank.layers import BankedLinear
from veratune.bank.saved_modules import BankedModule


class OutputHead:
    """The model's output head, which may receive different tokens than the layers before it.

    Attributes:
        in_bank: whether the head is one of the bank's layers or modules_to_save.
    """

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        self.in_bank = isinstance(head, BankedLinear | BankedModule)
        self._tokens: BankCall | None = None
        self._last: BankCall | None = None
        self._open = ExitStack()
        self._hooks: list[Any] = []
        if self.in_bank:
            self._hooks = [
                head.register_forward_pre_hook(self._enter),
                head.register_forward_hook(self._leave, always_call=True),
            ]

    def prepare(self, tokens: BankCall, last: BankCall) -> None:
        """Use the call `last` for the head when the other layers use `tokens`."""
        self._tokens, self._last = tokens, last

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    # Other threads may call the model at the same time, each with its own call.

    def _enter(self, *_: Any) -> None:
        if self._last is not None and active_call() is self._tokens:
            self._open.enter_context(serving(self._last))

    def _leave(self, *_: Any) -> None:
        if self._last is not None and active_call() is self._last:
            self._open.close()
