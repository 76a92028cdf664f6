"""Check that a model keeps the sequences of a batch apart, as a bank requires: by its type, and by a trial."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veratune.bank.layer_call import BankCall, serving
from veratune.bank.layout import BankError

# Models whose layers get inputs with time as the first dimension, or with time and batch mixed.
_TIME_FIRST = {"fsmt", "xlnet", "transfo-xl", "longformer", "led"}
# Outputs of models that compare each text of the batch with each image: they do not belong to single sequences.
_CONTRASTIVE_OUTPUT = "logits_per_"


def check_batch_first(model: nn.Module) -> None:
    """Refuse models known to mix sequences, or whose layers' first dimension is not the batch.

    Raises:
        BankError: the model is one of them.
    """
    if any(_CONTRASTIVE_OUTPUT in name for name in _declared_outputs(model)):
        raise BankError(
            f"a bank cannot serve {type(model).__name__}: it compares each text with each image (or sound) of a batch"
        )
    for module in model.modules():  # a model may be part of another one
        config = getattr(module, "config", None)
        if getattr(config, "sparse_prediction", False) is True:
            raise BankError(
                "a bank cannot serve a model with sparse_prediction=True: its output head is given selected tokens only"
            )
        model_type = getattr(config, "model_type", None)
        if isinstance(model_type, str) and model_type in _TIME_FIRST:
            raise BankError(
                f"a bank cannot serve {model_type}: its layers get time, not the batch, as the first dimension, so that"
                " sequences cannot be matched with adapters there"
            )


def _declared_outputs(model: nn.Module) -> set[str]:
    """Return the names of the outputs that a model's `forward` is declared to have."""
    try:
        declared = typing.get_type_hints(inspect.unwrap(type(model).forward)).get("return")
    except (NameError, TypeError):  # annotations use names that do not exist at run time
        return set()
    return {name for cls in (declared, *typing.get_args(declared)) for name in getattr(cls, "__annotations__", ())}


def check_isolation(model: nn.Module, call_of: Callable[[Tensor], BankCall], inputs: Mapping[str, Any]) -> None:
    """Raise BankError unless an adapter of one sequence changes that sequence's outputs and no others, to the bit.

    Args:
        model: the model with the bank's layers.
        call_of: makes the call from int64 (sequences,): 1 for sequences with an adapter, 0 for the others.
        inputs: the model's arguments.
    """
    count = next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))
    if count < 2:
        raise BankError("check_isolation needs a batch of at least two sequences")

    def outputs(adapted: int | None) -> list[Tensor]:
        with torch.no_grad(), serving(call_of(torch.tensor([int(each == adapted) for each in range(count)]))):
            found = model(**inputs)
        leaves = torch.utils._pytree.tree_leaves(dict(found) if isinstance(found, Mapping) else found)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count]

    plain = outputs(None)
    if not plain:
        raise BankError(f"no output of the model has the {count} sequences of its inputs as its first dimension")
    for sequence in (0, count - 1):
        for before, after in zip(plain, outputs(sequence), strict=True):
            wrong = [i for i in range(count) if torch.equal(before[i], after[i]) == (i == sequence)]
            if wrong:
                raise BankError(
                    f"an adapter for sequence {sequence} of the batch changed the wrong sequences ({wrong}): this model"
                    " mixes sequences, which a bank does not support. Exclude layers (exclude_modules) to prevent this"
                )
