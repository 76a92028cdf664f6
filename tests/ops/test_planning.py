from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from veratune.ops.calibration import device_profile
from veratune.ops.costs import LayerShape
from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear
from veratune.ops.planning import (
    RouteChoice,
    choose_route,
    dense_pays,
    estimate,
    look_up,
    possible_choices,
    route_table,
)
from veratune.ops.routes import ROUTES
from veratune.projections.structure import Matrix

SHAPES = [(384, 384, 256, 4096), (384, 1536, 256, 8), (64, 32, 16, 100), (32, 64, 100, 20), (48, 48, 7, 1)]
PROFILE = device_profile(torch.device("cpu"), torch.float32)


def choices(training):
    names = [name for name in ROUTES if name != "triton" and (training or name != "mixed")]
    return [RouteChoice(name) for name in names] + [
        RouteChoice(name, keep=True) for name in names if training and name != "folded"
    ]


def _addmm_flops(_, first, second, **__):
    return 2 * first[0] * first[1] * second[1]  # torch's counter leaves the in-place form out


def counted_flops(in_features, out_features, rank, tokens, choice, *, training):
    """Operations that torch itself counts, less the frozen layer's."""
    # The products are counted as they run; the values do not matter.
    x = torch.empty(tokens, in_features, requires_grad=training)
    weight = torch.empty(out_features, in_features)
    a, bt = torch.empty(rank, in_features), torch.empty(rank, out_features)
    b = torch.empty(out_features, requires_grad=training)
    d = torch.empty(rank, requires_grad=training)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        y = adapted_linear(x, weight, None, Factors(Matrix(a), Matrix(bt), b, d, 1.0), choice)
        if training:
            y.backward(torch.empty_like(y))
    frozen = (2 if training else 1) * 2 * tokens * in_features * out_features
    return counter.get_total_flops() - frozen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("training", "choice"), [(t, choice) for t in (False, True) for choice in choices(t)], ids=str)
def test_the_estimate_counts_the_operations_that_torch_counts(shape, choice, training):
    estimated = estimate(choice, LayerShape(*shape), PROFILE, training=training)
    assert estimated.flops == counted_flops(*shape, choice, training=training)


@pytest.mark.parametrize("choice", choices(training=True), ids=str)
def test_the_estimate_knows_what_is_saved(choice):
    n, m, r, t = 24, 40, 8, 100
    x = torch.randn(t, n, requires_grad=True)
    weight, a, bt = torch.randn(m, n), torch.randn(r, n), torch.randn(r, m)
    b, d = torch.randn(m, requires_grad=True), torch.randn(r, requires_grad=True)
    inputs = {tensor.data_ptr() for tensor in (weight, a, bt, b, d)}
    saved = {}

    def note(tensor):
        if tensor.data_ptr() not in inputs:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        adapted_linear(x, weight, None, Factors(Matrix(a), Matrix(bt), b, d, 1.0), choice)
    assert sum(saved.values()) == estimate(choice, LayerShape(n, m, r, t), PROFILE, training=True).saved_bytes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_the_choice_has_the_smallest_estimate(shape, training):
    layer = LayerShape(*shape)
    chosen = choose_route("auto", "fast", layer, PROFILE, training=training)
    seconds = {choice: estimate(choice, layer, PROFILE, training=training).seconds for choice in choices(training)}
    assert seconds[chosen] == min(seconds.values())


def test_the_product_is_kept_where_it_is_small_beside_the_weight():
    def chosen(tokens, memory):
        return choose_route(
            memory=memory, route="auto", shape=LayerShape(2048, 5632, 1024, tokens), profile=PROFILE, training=True
        )

    assert chosen(16, "balanced") == RouteChoice("scaled", keep=True)
    assert chosen(256, "balanced").keep and not chosen(257, "balanced").keep
    assert not chosen(16, "low").keep
    assert chosen(257, "fast").keep


def test_few_tokens_scale_and_many_are_dense():
    few = choose_route("auto", "balanced", LayerShape(4096, 4096, 256, 1), PROFILE, training=False)
    many = choose_route("auto", "balanced", LayerShape(384, 384, 1024, 4096), PROFILE, training=True)
    assert few == RouteChoice("scaled")
    assert many == RouteChoice("dense", keep=True)


def test_orders_are_followed():
    shape = LayerShape(384, 384, 1024, 4096)

    def possible(route, memory="balanced", training=True, weight_readable=True):
        return possible_choices(route, memory, shape, training=training, weight_readable=weight_readable)

    def names(*arguments, **settings):
        return [choice.route for choice in possible(*arguments, **settings)]

    assert names("auto") == ["scaled", "folded", "dense", "mixed"]
    assert names("factored") == ["scaled", "folded"]
    assert possible("dense") == [RouteChoice("dense", keep=True)]
    assert possible("dense", weight_readable=False) == [RouteChoice("folded")]
    assert names("auto", weight_readable=False) == ["scaled", "folded"]
    assert names("auto", training=False) == ["scaled", "folded", "dense"]
    assert not any(choice.keep for choice in possible("auto", training=False))
    assert not any(choice.keep for choice in possible("auto", memory="low"))
    assert names("auto", memory="low") == ["dense"]  # x is smaller than x A^T
    assert {choice.route for choice in possible("auto", memory="fast") if choice.keep} == {"scaled", "dense", "mixed"}


@pytest.mark.parametrize("shape", [(384, 384, 256), (384, 1536, 1024), (4096, 11008, 64), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_tables_say_what_the_choice_says(shape, training):
    layer = LayerShape(*shape, 0, 2)
    table = route_table("auto", "balanced", layer, PROFILE, training, True)
    tokens = {1, 2, 3, 17, 100, 1000, 4096, 50000} | {limit + i for limit, _ in table[:-1] for i in (0, 1)}
    for count in tokens:
        expected = choose_route("auto", "balanced", replace(layer, tokens=count), PROFILE, training=training)
        assert look_up(table, count) == expected, count
    assert look_up(table, 0) == table[0][1]
    assert look_up(table, 1 << 40) == table[-1][1]


def test_a_frozen_adapter_between_trained_ones_is_planned_with_its_input_s_gradient():
    shape = LayerShape(384, 384, 1024, 4096)
    only_forward = choose_route("auto", "balanced", shape, PROFILE, training=False)
    through = choose_route("auto", "balanced", shape, PROFILE, training=False, backward=True)
    assert only_forward == RouteChoice("dense") and through == RouteChoice("dense", keep=True)


@pytest.mark.parametrize("rank", [64, 256])
def test_dense_pays_from_some_tokens_on(rank):
    """With more tokens it pays ever more, by the whole batch sooner than by a part that has to be moved."""
    counts = [2**k for k in range(14)]
    whole, part = (
        [dense_pays(LayerShape(384, 384, rank, tokens), PROFILE, moved=moved) for tokens in counts]
        for moved in (False, True)
    )
    assert whole == sorted(whole) and part == sorted(part)  # no, and from some number on yes
    assert not whole[0] and part[-1]
    assert whole.index(True) <= part.index(True)
