"""Inputs computed again from what autograd holds: the right values, only where that is certain."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference import dense_delta, projections, randomise
from veratune import VeraConfig, get_peft_model
from veratune.ops.graph_inputs import source_of

WIDTH = 8


def leaf() -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)


def attention(x: Tensor) -> Tensor:
    heads = x.view(4, 5, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(-2, -3).reshape(4, 5, WIDTH)


def norm(dtype: torch.dtype = torch.float32) -> nn.LayerNorm:
    made = nn.LayerNorm(WIDTH, dtype=dtype)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made.requires_grad_(False)


HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": norm(),
    "layer norm without weights": lambda x: F.layer_norm(x, (WIDTH,)),
    "RMS norm": nn.RMSNorm(WIDTH).requires_grad_(False),
    "GELU": F.gelu,
    "GELU by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "SiLU": F.silu,
    "ReLU": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gate": lambda x: F.silu(x) * x.sin(),
    "attention": attention,
    "dropout": lambda x: F.dropout(norm()(x), 0.3, training=True),
}


@pytest.mark.parametrize("name", HELD)
def test_values_are_computed_again(name: str) -> None:
    x = HELD[name](leaf())
    flat = x.reshape(-1, WIDTH)
    again = source_of(flat)
    assert again is not None
    value = again()
    assert value.shape == flat.shape and not value.requires_grad
    torch.testing.assert_close(value, flat.detach(), rtol=1e-6, atol=1e-6)


def test_half_precision_differs_by_a_rounding() -> None:
    x = norm(torch.bfloat16)(leaf().bfloat16())
    again = source_of(x)
    assert again is not None and again().dtype == torch.bfloat16
    torch.testing.assert_close(again(), x.detach(), rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)


NOT_HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, torch.eye(WIDTH)),
    "sum": lambda x: x + 1,
    "part of a tensor": lambda x: norm()(x)[:, :3],
    "repeated": lambda x: norm()(x).repeat(2, 1, 1),
    "other dtype": lambda x: norm()(x).double(),
    "no graph": lambda x: norm()(x.detach()),
    "written to": lambda x: norm()(x).mul_(2),
}


def written_without_a_graph(x: Tensor) -> Tensor:
    x = norm()(x)
    with torch.no_grad():
        x.mul_(2)
    return x


NOT_HELD["written to in no_grad"] = written_without_a_graph


@pytest.mark.parametrize("name", NOT_HELD)
def test_anything_else_is_saved(name: str) -> None:
    assert source_of(NOT_HELD[name](leaf())) is None


def test_nothing_is_taken_from_tensors_that_hooks_change() -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert source_of(F.gelu(leaf())) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.up = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(self.norm(self.first(x)))))
        return output


@pytest.mark.parametrize("route", ["auto", "dense", "factored"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_low_memory_has_the_gradients_of_dense_algebra_and_saves_no_input(route: str, checkpointed: bool) -> None:
    config = VeraConfig(r=6, target_modules="all-linear", memory="low", route=route)
    model = get_peft_model(Block().double().requires_grad_(False), config)
    randomise(model)
    x, weighting = torch.randn(30, WIDTH, dtype=torch.float64), torch.randn(30, WIDTH, dtype=torch.float64)
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    if not checkpointed:
        saved = [tensor for node in _nodes(output) for tensor in node.saved_tensors if tensor is not None]
        # Only the first layer's input is not computed from anything that autograd holds.
        assert len([tensor for tensor in saved if tensor.shape[0] == len(x)]) == 1
    (output * weighting).sum().backward()

    dense = Block().double().requires_grad_(False)
    weights, vectors = {}, {}
    for name, layer in model.vera_layers().items():
        b, d = (vector.detach().clone().requires_grad_() for vector in layer.vectors("default").values())
        delta = dense_delta(b, d, *projections(0, 6, layer.in_features, layer.out_features))
        weights[f"{name}.weight"] = dense.get_submodule(name).weight + delta
        vectors[name] = {"b": b, "d": d}
    (torch.func.functional_call(dense, weights, (x,)) * weighting).sum().backward()
    for name, layer in model.vera_layers().items():
        for which, vector in layer.vectors("default").items():
            # As exact as B's scale, which the reference multiplies B by in float32.
            torch.testing.assert_close(vector.grad, vectors[name][which].grad, rtol=1e-5, atol=1e-6)


def _nodes(output: Tensor) -> list[torch.autograd.graph.Node]:
    """Return the autograd nodes of adapted layers."""
    found, waiting = {}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = "AdaptedLinear" in node.name()
            waiting += [before for before, _ in node.next_functions]
    return [node for node, is_ours in found.items() if is_ours]
