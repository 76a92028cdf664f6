"""Check that a model does not mix the sequences of a batch, as a bank requires: by model type, and by a test run."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veratune.bank.layer_call import BankCall, serving
from veratune.bank.layout import BankError

# Model types whose layers receive time-first inputs, or inputs that mix time and batch.
_TIME_FIRST = {"fsmt", "xlnet", "transfo-xl", "longformer", "led"}
# Prefix of outputs that compare each text in the batch with each image, and so belong to no single sequence.
_CONTRASTIVE_OUTPUT = "logits_per_"


def check_batch_first(model: nn.Module) -> None:
    """Reject models that are known to mix sequences, or to have layers whose first dimension is not the batch.

    Raises:
        BankError: the model is one of these.
    """
    if any(_CONTRASTIVE_OUTPUT in name for name in _declared_outputs(model)):
        raise BankError(
            f"a bank cannot serve {type(model).__name__}: it compares each text in a batch with each image (or audio"
            " clip)"
        )
    for module in model.modules():  # models may be nested
        config = getattr(module, "config", None)
        if getattr(config, "sparse_prediction", False) is True:
            raise BankError(
                "a bank cannot serve a model with sparse_prediction=True: its output head receives only selected tokens"
            )
        model_type = getattr(config, "model_type", None)
        if isinstance(model_type, str) and model_type in _TIME_FIRST:
            raise BankError(
                f"a bank cannot serve {model_type}: the first dimension of its layers' inputs is time, not the batch,"
                " so sequences cannot be matched with adapters"
            )


def _declared_outputs(model: nn.Module) -> set[str]:
    """Return the output names in the return annotation of a model's `forward`."""
    try:
        declared = typing.get_type_hints(inspect.unwrap(type(model).forward)).get("return")
    except (NameError, TypeError):  # annotations use names that do not exist at run time
        return set()
    return {name for cls in (declared, *typing.get_args(declared)) for name in getattr(cls, "__annotations__", ())}


def check_isolation(model: nn.Module, call_of: Callable[[Tensor], BankCall], inputs: Mapping[str, Any]) -> None:
    """Raise BankError unless an adapter on one sequence changes its outputs and leaves all others bit-identical.

    Args:
        model: the model with the bank's layers.
        call_of: returns the call for int64 (sequences,): 1 for sequences with an adapter, 0 for the others.
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
        raise BankError(f"no output of the model has the batch of {count} sequences as its first dimension")
    for sequence in (0, count - 1):
        for before, after in zip(plain, outputs(sequence), strict=True):
            wrong = [i for i in range(count) if torch.equal(before[i], after[i]) == (i == sequence)]
            if wrong:
                raise BankError(
                    f"an adapter on sequence {sequence} of the batch changed the wrong sequences ({wrong}): this model"
                    " mixes sequences, which a bank does not support. Exclude the layers responsible (exclude_modules)"
                )
