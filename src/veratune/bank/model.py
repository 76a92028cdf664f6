"""The model of a bank, called with an adapter name for each sequence."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from veratune.adapters.wrapper import ModelWrapper
from veratune.bank.layer_call import BankCall, serving
from veratune.bank.layout import BankError
from veratune.bank.registry import AdapterNames
from veratune.bank.resident import Lease

# Inputs that determine the batch size; the first one present is used.
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "inputs", "pixel_values", "input_values", "input_features")
# Prefixes of inputs that accompany text; a sequence may have any number of such inputs.
_ACCOMPANYING = ("pixel_values", "image_", "video_", "input_features", "audio_")

# transformers' own methods would not pass adapters to the model's layers.
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class LendsAdapters(Protocol):
    """The methods of a bank that its model calls."""

    def lease(self, names: AdapterNames) -> Lease: ...

    def lease_again(self, lease: Lease) -> Lease: ...

    def call_of(
        self,
        lease: Lease,
        lengths: Sequence[int] | None = None,
        *,
        copies: tuple[int, ...] = (1,),
        flattened: bool = True,
    ) -> BankCall: ...

    def follow_model(self) -> None: ...


class BankModel(ModelWrapper):
    """A base model that computes each sequence with its adapter.

    Attributes that this class does not define are read from the base model and set on it.

    Attributes:
        base_model: the model, with the bank's layers in it.
    """

    def __init__(self, model: nn.Module, bank: LendsAdapters) -> None:
        super().__init__()
        self._bank = bank
        self.training = model.training
        self.base_model = model

    def forward(
        self,
        *args: Any,
        adapters: AdapterNames | Lease | None = None,
        adapter_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model.

        Args:
            args, kwargs: the model's own arguments.
            adapters: the adapter name of each sequence in the batch, None for the base model; or a lease, for several
                calls that must use the same versions.
            adapter_lengths: for packed sequences, the number of tokens in each.

        Raises:
            BankError: there is not exactly one known name for each sequence, or the lengths are invalid.
            RuntimeError: a layer's input cannot be matched with the sequences.
        """
        adapters = _given(adapters)
        if adapter_lengths is None:
            _check_number(adapters, args, kwargs)
        call_of, flattened = self._bank.call_of, _is_text_alone(args, kwargs)
        with self._leased(adapters) as lease, serving(call_of(lease, adapter_lengths, flattened=flattened)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapters: AdapterNames | Lease | None = None, **kwargs: Any) -> Any:
        """Call the model's `generate`, with the versions that the adapters have when it starts.

        Beams and returned sequences (`num_beams`, `num_return_sequences`) use the adapter of their prompt.

        Args:
            args, kwargs: the arguments of `generate`.
            adapters: the adapter name of each prompt in the batch, None for the base model; or a lease.

        Raises:
            BankError: there is not exactly one known name for each prompt, or recordings are so long that Whisper
                transcribes them in chunks, with a shrinking batch.
        """
        adapters = _given(adapters)
        _check_number(adapters, args, kwargs)
        base: Any = self.base_model
        _check_length_of_sounds(base, args, kwargs)
        copies, flattened = _copies(base, args, kwargs), _is_text_alone(args, kwargs)
        call_of = self._bank.call_of
        with self._leased(adapters) as lease, serving(call_of(lease, copies=copies, flattened=flattened)):
            return base.generate(*args, **kwargs)

    @contextmanager
    def _leased(self, adapters: AdapterNames | Lease) -> Iterator[Lease]:
        lease = self._bank.lease_again(adapters) if isinstance(adapters, Lease) else self._bank.lease(adapters)
        with lease:
            yield lease

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Raise an error: the files would contain neither the adapters nor the base model's original layers.

        Raises:
            BankError: always.
        """
        raise BankError("a bank's model cannot be saved: call unload() and save the base model that it returns")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise BankError("a bank's model cannot be copied or pickled: create another, or open its file again")

    def __getattr__(self, name: str) -> Any:
        if name in _BATCHING:
            raise AttributeError(
                f"{name} does not support a bank's adapters: use generate_batch or BankManager from"
                " veratune.integrations.continuous_batching"
            )
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "BankModel":
        result: BankModel = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._bank.follow_model()
        return result


def _given(adapters: AdapterNames | Lease | None) -> AdapterNames | Lease:
    if adapters is None:
        raise BankError("adapters=None is not allowed: pass a list with a name, or None, for each sequence")
    return adapters


def _check_number(adapters: AdapterNames | Lease, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise BankError unless there are as many names as sequences in the main input or, without one, in any input."""
    if isinstance(adapters, str) or not isinstance(adapters, Sequence | Lease):
        return  # values of other types are rejected later
    named = [kwargs[name] for name in _MAIN_INPUTS if isinstance(kwargs.get(name), Tensor)]
    main = [value for value in (*args, *named) if isinstance(value, Tensor) and value.ndim][:1]
    inputs = main or [value for value in kwargs.values() if isinstance(value, Tensor) and value.ndim]
    count = len(adapters.rows) if isinstance(adapters, Lease) else len(adapters)
    if count and inputs and all(value.shape[0] != count for value in inputs):
        raise BankError(
            f"adapters has {count} names, but the batch has {inputs[0].shape[0]} sequences: pass a name, or None, for"
            " each"
        )


def _is_text_alone(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether no sequence has images or audio in addition to text; positional arguments count as text."""
    text = [*args, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs"))]
    accompanying = (name.startswith(_ACCOMPANYING) and value is not None for name, value in kwargs.items())
    return not (any(value is not None for value in text) and any(accompanying))


def _copies(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the possible numbers of consecutive copies of each sequence during generation.

    Where a generation config has no value (or, in some versions of transformers, 1), the model's value applies.
    """
    configs = (*args, kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def settings(name: str) -> set[int]:
        return {1, *((kwargs.get(name) or getattr(config, name, None) or 1) for config in configs)}

    return tuple(
        {beams * sequences for beams in settings("num_beams") for sequences in settings("num_return_sequences")}
    )


def _check_length_of_sounds(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "whisper":
        return
    features = kwargs.get("input_features", args[0] if args else None)
    if isinstance(features, Tensor) and features.shape[-1] > 2 * config.max_source_positions:
        raise BankError(
            f"a bank cannot serve recordings of more than {2 * config.max_source_positions} frames: Whisper drops"
            " finished recordings from the batch while it transcribes longer ones. Split them into shorter recordings"
        )
