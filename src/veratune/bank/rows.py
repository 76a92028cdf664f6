"""Check that a model keeps the rows of a batch apart, as a bank requires: by its type, and by a trial."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veratune.bank.layer_call import BankCall, serving
from veratune.bank.layout import BankError

# Models whose layers get inputs with time as the first dimension, or with time and rows mixed.
_TIME_FIRST = {"fsmt", "xlnet", "transfo-xl", "longformer", "led"}
# Outputs of models that compare each row's text with each other row's image: outputs do not belong to single rows.
_EACH_WITH_EACH = "logits_per_"


def check_order(model: nn.Module) -> None:
    """Refuse models known to mix rows, or whose layers' first dimension is not the batch.

    Raises:
        BankError: the model is one of them.
    """
    if any(_EACH_WITH_EACH in name for name in _declared_outputs(model)):
        raise BankError(
            f"a bank cannot serve {type(model).__name__}: it compares each text with each image (or sound) of a batch"
        )
    for module in model.modules():  # a model may be part of another one
        config = getattr(module, "config", None)
        if getattr(config, "sparse_prediction", False) is True:
            raise BankError(
                "a bank cannot serve a model with sparse_prediction=True: its head is given chosen tokens only"
            )
        model_type = getattr(config, "model_type", None)
        if isinstance(model_type, str) and model_type in _TIME_FIRST:
            raise BankError(
                f"a bank cannot serve {model_type}: its layers are given time before rows, so that the rows of a batch"
                " cannot be told apart there"
            )


def _declared_outputs(model: nn.Module) -> set[str]:
    """Return the names of the outputs that a model's `forward` is declared to have."""
    try:
        declared = typing.get_type_hints(inspect.unwrap(type(model).forward)).get("return")
    except (NameError, TypeError):  # annotations use names that do not exist at run time
        return set()
    return {name for kind in (declared, *typing.get_args(declared)) for name in getattr(kind, "__annotations__", ())}


def check_kept_apart(model: nn.Module, call_of: Callable[[Tensor], BankCall], inputs: Mapping[str, Any]) -> None:
    """Raise BankError unless an adapter of one row changes that row's outputs and no others, to the bit.

    Args:
        model: the model with the bank's layers.
        call_of: makes the call from int64 (rows,): 1 for rows with an adapter, 0 for the others.
        inputs: the model's arguments.
    """
    rows = next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))
    if rows < 2:
        raise BankError("check_rows needs a batch of at least two rows")

    def outputs(adapted: int | None) -> list[Tensor]:
        with torch.no_grad(), serving(call_of(torch.tensor([int(row == adapted) for row in range(rows)]))):
            found = model(**inputs)
        leaves = torch.utils._pytree.tree_leaves(dict(found) if isinstance(found, Mapping) else found)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == rows]

    plain = outputs(None)
    if not plain:
        raise BankError(f"none of the model's outputs has the {rows} rows of its inputs")
    for row in (0, rows - 1):
        for before, after in zip(plain, outputs(row), strict=True):
            wrong = [i for i in range(rows) if torch.equal(before[i], after[i]) == (i == row)]
            if wrong:
                raise BankError(
                    f"an adapter for row {row} of the batch changed the wrong rows ({wrong}): this model does not"
                    " keep rows apart as a bank needs it. Leave out layers (exclude_modules) until it does"
                )
