"""`veratune bench`, and the timing that it is made with."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import randomise_trainable, tiny_model
from veratune import VeraConfig, get_peft_model
from veratune.cli import main
from veratune.cli.steps import FROZEN, FULL, LORA, OURS, PEFT_VERA, VARIANTS, Step, make_variant, random_inputs
from veratune.utils import timing
from veratune.utils.timing import interleaved, median_ratio, peak_bytes

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


def test_all_are_called_in_every_round_and_each_begins_one() -> None:
    calls: list[str] = []
    rounds: list[int] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleaved(variants, 4, after_each=lambda: rounds.append(len(calls)))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert rounds == [6, 9, 12, 15]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_seconds_are_those_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def let_pass(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    with monkeypatch.context() as patched:
        patched.setattr(timing.time, "perf_counter", lambda: clock)
        variants = {"short": lambda: let_pass(0.5), "long": lambda: let_pass(2.0)}
        times = interleaved(variants, 3, after_each=lambda: let_pass(100.0))
        waited = interleaved({"asynchronous": lambda: None}, 2, wait=lambda: let_pass(0.25))
    assert times == {"short": [0.5] * 3, "long": [2.0] * 3} and median_ratio(times, "long", "short") == 4.0
    assert waited == {"asynchronous": [0.25] * 2}  # before a call it waits for what was there already
    assert median_ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 1.0, 8.0]}, "a", "b") == 2.0


def test_peak_bytes_counts_what_lives_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        second = torch.zeros(500)
        del first
        return torch.zeros(200) + second[:200]

    # 1000 and 500 live together, later 500, 200 and 200.
    assert peak_bytes(work) == 4 * 1500


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "vit"])
def test_variants_share_the_frozen_weights_and_train_what_they_say(kind: str) -> None:
    base: Any = tiny_model(kind).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    inputs = random_inputs(base, 2, 4, torch.device("cpu"))
    own = {id(parameter) for parameter in base.parameters()}
    vera = get_peft_model(tiny_model(kind), VeraConfig(r=4, target_modules="all-linear", modules_to_save=[]))
    lora = peft.get_peft_model(tiny_model(kind), peft.LoraConfig(r=8, target_modules="all-linear"))
    trained = {
        FROZEN: 0,
        FULL: base.num_parameters(),
        LORA: lora.get_nb_trainable_parameters()[0],
        **dict.fromkeys(OURS.values(), vera.get_nb_trainable_parameters()[0]),
    }
    for name in VARIANTS:
        model = make_variant(name, base, 4)
        shared = own & {id(parameter) for parameter in model.parameters()}
        assert shared == (set() if name == FULL else own), name
        step = Step(model, inputs)
        step()
        step()
        assert step.trainable == trained.get(name, step.trainable) and (name == FROZEN or step.trainable > 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_a_step_is_a_training_step() -> None:
    """As AdamW makes one from the gradients of the mean of the outputs."""
    base: Any = tiny_model("llama").requires_grad_(False)
    inputs = random_inputs(base, 2, 4, torch.device("cpu"))
    models = [randomise_trainable(make_variant(OURS["auto"], base, 4)) for _ in range(2)]
    Step(models[0], inputs)()
    optimizer = torch.optim.AdamW([p for p in models[1].parameters() if p.requires_grad], lr=1e-6)
    models[1](**inputs).logits.mean().backward()
    optimizer.step()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_the_command(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(base), "--r", "2", "--r", "4", "--batch-size", "2", "--length", "8", "--rounds", "3"]
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [case["rank"] for case in values["ranks"]] == [2, 4] and values["device"] and values["dtype"] == "float32"
    for case in values["ranks"]:
        assert set(case["steps"]) == set(VARIANTS) and case["left_out"] == {}
        for name, step in case["steps"].items():
            assert len(step["all_seconds"]) == 3 and sorted(step["all_seconds"])[1] == step["seconds"] > 0
            assert step["peak_bytes"] > 0
            assert (step["trained_parameters"] == 0) == (name == FROZEN)
        assert case["steps"][FROZEN]["relative_to_frozen"] == case["steps"]["veratune"]["relative_to_veratune"] == 1.0
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "r = 4" in out and "x frozen" in out and all(name in out for name in VARIANTS) and "\x1b" not in out


def test_what_is_not_possible_is_left_out_and_said(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("veratune.cli.steps._free_bytes", lambda device: 1000)
    arguments = ["bench", str(base), "--batch-size", "1", "--length", "4", "--rounds", "1", "--r", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"left out: {PEFT_VERA}: the peft package is not installed" in out
    assert f"left out: {FULL}: its weights" in out
