import pytest
import torch
from torch import nn

from veratune import VeraConfig, get_peft_model
from veratune.ops.planning import RouteChoice


def model(**settings):
    net = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384))
    return get_peft_model(net, VeraConfig(target_modules="all-linear", **settings))


def test_the_table_names_what_the_layers_do(monkeypatch):
    adapted = model(r=256)
    seen = []
    from veratune.layers import linear

    original = linear.adapted_linear

    def note(*args, **kwargs):
        seen.append(args[4])
        return original(*args, **kwargs)

    monkeypatch.setattr(linear, "adapted_linear", note)
    for tokens in (1, 100, 3000):
        seen.clear()
        adapted(torch.randn(tokens, 384))
        assert [routes.chosen.choice for routes in adapted.explain_routes(tokens)] == seen
        with torch.no_grad():
            seen.clear()
            adapted(torch.randn(tokens, 384))
            assert [routes.chosen.choice for routes in adapted.explain_routes(tokens, training=False)] == seen


def test_the_chosen_route_is_the_fastest_alternative():
    for routes in model(r=64).explain_routes(512):
        assert routes.alternatives[0].seconds == routes.chosen.seconds
        assert routes.shape.tokens == 512
        assert len({e.choice for e in routes.alternatives}) == len(routes.alternatives) > 3


def test_settings_limit_the_alternatives():
    assert {e.choice for e in model(r=64, route="dense").explain_routes(4096)[0].alternatives} == {
        RouteChoice("dense", keep=True)
    }
    assert all(not e.choice.reads_weight for e in model(r=64, vera_dropout=0.1).explain_routes(4096)[0].alternatives)
    assert not any(e.choice.keep for e in model(r=64, memory="low").explain_routes(4096)[0].alternatives)


def test_printing():
    lines = str(model(r=64).explain_routes(4096)).splitlines()
    assert lines[0].split() == ["layer", "in", "out", "r", "tokens", "route", "GFLOP", "saved", "MB", "est.", "ms"]
    assert lines[1].split()[:5] == ["0", "384", "1536", "64", "4096"]
    assert any(line.strip().startswith("or ") for line in lines)


def test_layers_that_differ_in_numbers_share_a_row():
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}) for _ in range(3))
    net = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(32, 4)})
    table = get_peft_model(net, VeraConfig(r=8, target_modules="all-linear", rank_pattern={"2.up": 4})).explain_routes(
        16
    )
    assert len(table) == 7
    named = [line.split("  ")[0] for line in str(table).splitlines()[1:] if not line.startswith(" ")]
    assert named == ["blocks.*.up (2)", "blocks.*.down (3)", "blocks.2.up", "head"]


def test_bad_calls():
    with pytest.raises(ValueError, match="nobody"):
        model(r=4).explain_routes(10, "nobody")
    with pytest.raises(ValueError, match="tokens=0"):
        model(r=4).explain_routes(0)


def test_layers_without_a_choice_are_left_out_and_quantized_ones_counted_in_numbers():
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    parts = get_peft_model(net, VeraConfig(r=2, target_modules=["0", "1"], fused_parts={"0": 3}))
    assert [routes.layer for routes in parts.explain_routes(16)] == ["1"]
    whole = get_peft_model(nn.Sequential(nn.Linear(256, 512)), VeraConfig(r=64, target_modules=["0"]))
    packed = get_peft_model(nn.Sequential(nn.Linear(256, 512)), VeraConfig(r=64, target_modules=["0"]))
    packed.base_model[0].base_layer.weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.uint8), requires_grad=False)
    expected = {str(e.choice): e.saved_bytes for e in whole.explain_routes(128)[0].alternatives}
    for found in packed.explain_routes(128)[0].alternatives:
        assert not found.choice.reads_weight and found.saved_bytes == expected[str(found.choice)]
