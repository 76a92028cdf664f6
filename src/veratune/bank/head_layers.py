"""The modules_to_save of a model that serves many adapters at once."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from veratune.bank.layer_call import BankCall, active_call, by_rows, current_call, is_by_rows
from veratune.layers.base_call import only_computes
from veratune.layers.modules_to_save import SavedModule
from veratune.layers.offloading import is_hooked


class BankedHead(SavedModule):
    """A module of modules_to_save, such as a classification head: each row computes with its adapter's copy.

    Attributes:
        owner: identifies this bank's calls.
        name: the module's name in the model.
        places: parameter name to (first column in `BankCall.heads`, shape).
    """

    def __init__(
        self, original_module: nn.Module, owner: object, name: str, places: dict[str, tuple[int, tuple[int, ...]]]
    ) -> None:
        super().__init__(original_module)
        self.owner = owner
        self.name = name
        self.places = places

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current_call(self.owner)
        if call.plain:
            return self.original_module(*args, **kwargs)
        if any(is_hooked(module) for module in self.original_module.modules()):
            raise RuntimeError(
                f"{self.name} was given hooks by accelerate after the bank was made, which would put the base model's"
                " values in the place of each adapter's: call accelerate.hooks.remove_hook_from_submodules on it, or"
                " offload the model without it"
            )
        output = self._own(call, args, kwargs)
        if not call.has_base:
            return output
        # Use the base model's current values, not those from when the bank was made.
        base = call.rows == 0

        def choose(own: Any, plain: Any) -> Any:
            if not isinstance(own, Tensor):
                return own
            mask = base.repeat_interleave(own.shape[0] // len(base)) if not call.packed else base
            shape = own.shape[: 1 if not call.packed else own.ndim - 1]
            mask = mask.view(*shape, *[1] * (own.ndim - len(shape)))
            return torch.where(mask, plain, own)

        return torch.utils._pytree.tree_map(choose, output, self.original_module(*args, **kwargs))

    def _own(self, call: BankCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute each row with its adapter's copy."""
        assert call.heads is not None
        parameters = {
            name: call.heads[:, start : start + math.prod(shape)]
            .index_select(0, call.rows)
            .view(call.rows.shape[0], *shape)
            for name, (start, shape) in self.places.items()
        }
        module = self.original_module
        if type(module) is nn.Linear and only_computes(module) and len(args) == 1 and not kwargs:
            return self._linear(args[0], call, parameters)
        return self._each(call, parameters, args, kwargs)

    def _linear(self, x: Tensor, call: BankCall, parameters: dict[str, Tensor]) -> Tensor:
        grouped = by_rows(x, call, self.name)
        weight, bias = parameters["weight"].mT.to(x.dtype), parameters.get("bias")
        product = torch.bmm(grouped, weight)
        if bias is not None:
            product = product + bias.to(x.dtype).unsqueeze(1)
        return product.reshape(*x.shape[:-1], weight.shape[-1])

    def _each(
        self, call: BankCall, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if call.packed:
            raise RuntimeError(
                f"{self.name} is a {type(self.original_module).__name__} of each adapter's own, which cannot be served"
                " to packed sequences: give a batch with a row for each sequence"
            )
        rows = call.rows.shape[0]

        def split(value: Tensor) -> Tensor:
            if value.ndim < 2 or not value.shape[0] or not is_by_rows(value, call):
                raise RuntimeError(
                    f"{self.name} was given a tensor of shape {tuple(value.shape)}, whose first dimension does not"
                    f" stand for the {rows} rows of this batch: leave it out of modules_to_save"
                )
            return value.reshape(rows, value.shape[0] // rows, *value.shape[1:])

        def one(own: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            dtypes = {name: parameter.dtype for name, parameter in self.original_module.named_parameters()}
            own = {name: value.to(dtypes[name]) for name, value in own.items()}
            return torch.func.functional_call(self.original_module, own, args, kwargs)

        tree = torch.utils._pytree
        args, kwargs = tree.tree_map_only(Tensor, split, (args, kwargs))
        places = tree.tree_map(lambda value: 0 if isinstance(value, Tensor) else None, (args, kwargs))
        output = torch.vmap(one, in_dims=(0, *places))(parameters, args, kwargs)
        return tree.tree_map_only(Tensor, lambda value: value.flatten(0, 1), output)

    def __getattr__(self, name: str) -> Any:
        call = active_call()
        if call is not None and not call.plain and name in self.__dict__.get("places", {}):
            raise RuntimeError(
                f"the model reads {name} of {self.name} itself instead of calling the module, so that rows cannot use"
                " different copies of it: leave it out of modules_to_save"
            )
        return super().__getattr__(name)
