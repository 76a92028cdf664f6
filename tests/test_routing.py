import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from veratune.functional import vera_linear
from veratune.routing import Plan, choose_plan, gradient_flops, output_flops

SHAPES = [(384, 384, 256, 4096), (384, 1536, 256, 8), (64, 32, 16, 100), (32, 64, 100, 20), (48, 48, 7, 1)]


def _addmm_flops(_, first, second, **__):
    return 2 * first[0] * first[1] * second[1]  # torch's counter leaves the in-place form out


def counted_flops(in_features, out_features, rank, tokens, plan, *, training):
    """Operations that torch itself counts, less the frozen layer's."""
    # The products are counted as they run; the values do not matter.
    x = torch.empty(tokens, in_features, requires_grad=training)
    weight = torch.empty(out_features, in_features)
    a, bt = torch.empty(rank, in_features), torch.empty(rank, out_features)
    b = torch.empty(out_features, requires_grad=training)
    d = torch.empty(rank, requires_grad=training)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        y = vera_linear(x, weight, None, a, bt, b, d, 1.0, plan)
        if training:
            y.backward(torch.empty_like(y))
    frozen = (2 if training else 1) * 2 * tokens * in_features * out_features
    return counter.get_total_flops() - frozen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan", [Plan(*flags) for flags in itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("training", [False, True])
def test_the_cost_model_counts_what_torch_counts(shape, plan, training):
    modelled = output_flops(*shape, dense=plan.dense_output, steps=2 if training else 1)
    if training:
        modelled += gradient_flops(*shape, dense=plan.dense_gradients, kept=not plan.dense_output)
    assert counted_flops(*shape, plan, training=training) == modelled


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_the_choice_is_the_cheapest(shape, training):
    costs = {}
    for flags in itertools.product([False, True], repeat=2):
        costs[Plan(*flags)] = counted_flops(*shape, Plan(*flags), training=training)
    chosen = choose_plan("auto", *shape, training=training)
    assert costs[chosen] == min(costs.values())


def test_few_tokens_are_factored_and_many_dense():
    assert choose_plan("auto", 4096, 4096, 256, 1, training=False) == Plan(False, False)
    assert choose_plan("auto", 384, 384, 1024, 4096, training=True) == Plan(True, True)


def test_an_order_is_followed():
    shape = (384, 384, 1024, 4096)
    assert choose_plan("factored", *shape, training=True) == Plan(False, False)
    assert choose_plan("dense", *shape, training=True) == Plan(True, True)
    assert choose_plan("dense", *shape, training=True, weight_at_hand=False) == Plan(False, True)
    assert not choose_plan("auto", *shape, training=True, weight_at_hand=False).dense_output
