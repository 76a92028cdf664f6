"""The modules_to_save of a model that serves many adapters at once."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from veratune.bank.layer_call import BankCall, active_call, by_sequence, current_call, is_by_sequence
from veratune.layers.base_call import only_computes
from veratune.layers.modules_to_save import SavedModule
from veratune.layers.offloading import is_hooked


class BankedModule(SavedModule):
    """A module in modules_to_save, such as a classifier, that computes each sequence with its adapter's copy.

    Attributes:
        owner: identifies this bank's calls.
        name: the module's name in the model.
        columns: parameter name to (first column in `BankCall.saved`, shape).
    """

    def __init__(
        self, original_module: nn.Module, owner: object, name: str, columns: dict[str, tuple[int, tuple[int, ...]]]
    ) -> None:
        super().__init__(original_module)
        self.owner = owner
        self.name = name
        self.columns = columns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current_call(self.owner)
        if call.plain:
            return self.original_module(*args, **kwargs)
        if any(is_hooked(module) for module in self.original_module.modules()):
            raise RuntimeError(
                f"accelerate added hooks to {self.name} after the bank was created, and these hooks would replace each"
                " adapter's values with the base model's: call accelerate.hooks.remove_hook_from_submodules on the"
                " module, or do not offload it"
            )
        output = self._adapted(call, args, kwargs)
        if not call.has_base:
            return output
        # Use the base model's current values, not those from when the bank was created.
        base = call.rows == 0

        def choose(adapted: Any, plain: Any) -> Any:
            if not isinstance(adapted, Tensor):
                return adapted
            mask = base.repeat_interleave(adapted.shape[0] // len(base)) if not call.packed else base
            shape = adapted.shape[: 1 if not call.packed else adapted.ndim - 1]
            mask = mask.view(*shape, *[1] * (adapted.ndim - len(shape)))
            return torch.where(mask, plain, adapted)

        return torch.utils._pytree.tree_map(choose, output, self.original_module(*args, **kwargs))

    def _adapted(self, call: BankCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute each sequence with its adapter's copy."""
        assert call.saved is not None
        parameters = {
            name: call.saved[:, start : start + math.prod(shape)]
            .index_select(0, call.rows)
            .view(call.sequences, *shape)
            for name, (start, shape) in self.columns.items()
        }
        module = self.original_module
        if type(module) is nn.Linear and only_computes(module) and len(args) == 1 and not kwargs:
            return self._linear(args[0], call, parameters)
        return self._mapped(call, parameters, args, kwargs)

    def _linear(self, x: Tensor, call: BankCall, parameters: dict[str, Tensor]) -> Tensor:
        grouped = by_sequence(x, call, self.name)
        weight, bias = parameters["weight"].mT.to(x.dtype), parameters.get("bias")
        product = torch.bmm(grouped, weight)
        if bias is not None:
            product = product + bias.to(x.dtype).unsqueeze(1)
        return product.reshape(*x.shape[:-1], weight.shape[-1])

    def _mapped(
        self, call: BankCall, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Map the module over the sequences with `torch.vmap`."""
        if call.packed:
            raise RuntimeError(
                f"each adapter has a copy of {self.name}, a {type(self.original_module).__name__}, which cannot be"
                " computed for packed sequences: pass a batch with one sequence per row"
            )
        count = call.sequences

        def split(value: Tensor) -> Tensor:
            if value.ndim < 2 or not value.shape[0] or not is_by_sequence(value, call):
                raise RuntimeError(
                    f"{self.name} received a tensor of shape {tuple(value.shape)}, whose first dimension is not the"
                    f" {count} sequences of this batch: remove the module from modules_to_save"
                )
            return value.reshape(count, value.shape[0] // count, *value.shape[1:])

        def compute(values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            dtypes = {name: parameter.dtype for name, parameter in self.original_module.named_parameters()}
            values = {name: value.to(dtypes[name]) for name, value in values.items()}
            return torch.func.functional_call(self.original_module, values, args, kwargs)

        tree = torch.utils._pytree
        args, kwargs = tree.tree_map_only(Tensor, split, (args, kwargs))
        in_dims = tree.tree_map(lambda value: 0 if isinstance(value, Tensor) else None, (args, kwargs))
        output = torch.vmap(compute, in_dims=(0, *in_dims))(parameters, args, kwargs)
        return tree.tree_map_only(Tensor, lambda value: value.flatten(0, 1), output)

    def __getattr__(self, name: str) -> Any:
        call = active_call()
        if call is not None and not call.plain and name in self.__dict__.get("columns", {}):
            raise RuntimeError(
                f"the model reads {name} of {self.name} itself instead of calling the module, so sequences cannot use"
                " different copies of it: remove the module from modules_to_save"
            )
        return super().__getattr__(name)
