"""What PEFT's users do with several adapters and with merging, on veratune's layers."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peft_suite import HEADS, KINDS, base, call, outputs, trainable, tuned, vectors_of
from reference import relative
from tiny_models import randomise_trainable

peft = pytest.importorskip("peft")

from veratune.integrations.peft import VeratuneConfig, install  # noqa: E402
from veratune.integrations.peft.layers import TunedLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
Make = Callable[..., Any]


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TunedLayer)]


def with_two(kind: str, make: Make, **second: Any) -> Any:
    """A model with the trained adapters "default" and "other", of which the first is active."""
    model = tuned(kind, make(kind))
    model.add_adapter("other", make(kind, **second))
    model.set_adapter("other")
    randomise_trainable(model, seed=8, std=0.3)
    model.set_adapter("default")
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # Merging rounds the weight once, and the product is another one.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_merging_and_unmerging(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind))
        expected = outputs(model, kind)
        weights = {name: p.clone() for name, p in model.state_dict().items() if "base_layer" in name}
        model.merge_adapter()
        close(outputs(model, kind), expected)
        assert peft.get_model_status(model).merged_adapters == ["default"]
        merged = {name: p.clone() for name, p in model.state_dict().items() if name in weights}
        assert any(not torch.equal(merged[name], weights[name]) for name in weights)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert all(torch.equal(model.state_dict()[name], merged[name]) for name in weights)  # once only
        model.unmerge_adapter()
        assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
        assert torch.equal(outputs(model, kind), expected)
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()

    @pytest.mark.parametrize("safe", [False, True])
    def test_merging_for_good(self, peft_config: Make, kind: str, safe: bool) -> None:
        model = tuned(kind, peft_config(kind))
        expected = outputs(model, kind)
        merged = model.merge_and_unload(safe_merge=safe)
        close(outputs(merged, kind), expected)
        assert type(merged) is type(base(kind)) and not layers(merged) and not hasattr(merged, "peft_config")
        assert merged.state_dict().keys() == base(kind).state_dict().keys()

    def test_merging_is_the_same_in_training_mode(self, peft_config: Make, kind: str) -> None:
        config = peft_config(kind, vera_dropout=0.5)
        expected = tuned(kind, config).eval().merge_and_unload().state_dict()
        found = tuned(kind, config).train().merge_and_unload().state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_half_precision_merges(self, peft_config: Make, kind: str) -> None:
        model = peft.get_peft_model(base(kind, torch.bfloat16), peft_config(kind))
        randomise_trainable(model, std=0.3)
        expected = outputs(model, kind).float()
        merged = model.merge_and_unload(safe_merge=True)
        assert all(p.dtype == torch.bfloat16 for p in merged.parameters())
        assert relative(outputs(merged, kind).float(), expected) < 0.1

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_safe_merge_finds_what_is_not_finite(self, peft_config: Make, kind: str, bad: float) -> None:
        model = tuned(kind, peft_config(kind))
        with torch.no_grad():
            list(vectors_of(model).values())[-1].fill_(bad)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        for merge in (lambda: model.merge_adapter(safe_merge=True), lambda: model.merge_and_unload(safe_merge=True)):
            with pytest.raises(ValueError, match="NaNs"):
                merge()
            after = model.state_dict()
            assert not any(layer.merged for layer in layers(model))
            assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
        with pytest.raises(ValueError, match="NaNs"):
            layers(model)[-1].merge(safe_merge=True)
        for key in [name for name in before if ".base_layer." not in name and "vera_lambda" in name]:
            assert torch.equal(model.state_dict()[key].nan_to_num(), before[key].nan_to_num())
        model.merge_and_unload(safe_merge=False)  # as asked

    def test_several_adapters_merge_to_their_sum(self, peft_config: Make, kind: str) -> None:
        model = with_two(kind, peft_config)
        model.base_model.set_adapter(["default", "other"])
        both = outputs(model, kind)
        model.merge_adapter(["default"])
        close(outputs(model, kind), both)
        model.merge_adapter(["other"])
        close(outputs(model, kind), both)
        one_by_one = {name: p.clone() for name, p in model.state_dict().items() if "base_layer" in name}
        model.unmerge_adapter()
        assert torch.equal(outputs(model, kind), both)
        model.merge_adapter(["default", "other"])
        assert all(torch.equal(model.state_dict()[name], one_by_one[name]) for name in one_by_one)
        model.unmerge_adapter()
        close(outputs(model.merge_and_unload(adapter_names=["default", "other"]), kind), both)

    def test_merging_an_adapter_that_is_not_active(self, peft_config: Make, kind: str) -> None:
        model = with_two(kind, peft_config)
        model.set_adapter("other")
        expected = outputs(model, kind)
        model.set_adapter("default")
        close(outputs(model.merge_and_unload(adapter_names=["other"]), kind), expected)

    def test_disabling_while_merged(self, peft_config: Make, kind: str) -> None:
        model, plain = tuned(kind, peft_config(kind)), outputs(base(kind), kind)
        expected = outputs(model, kind)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, kind), plain)
        assert torch.equal(outputs(model, kind), expected)

    def test_unloading(self, peft_config: Make, kind: str) -> None:
        model = with_two(kind, peft_config)
        unloaded = model.unload()
        assert torch.equal(outputs(unloaded, kind), outputs(base(kind), kind)) and not layers(unloaded)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            again = peft.get_peft_model(unloaded, peft_config(kind))  # without a word of adapters before
        assert torch.equal(outputs(again, kind), outputs(base(kind), kind))

    def test_deleting_an_active_adapter(self, peft_config: Make, kind: str) -> None:
        model = with_two(kind, peft_config)
        model.set_adapter("other")
        second = outputs(model, kind)
        model.set_adapter("default")
        with pytest.warns(UserWarning, match=r"default was active .* Setting active adapter to other"):
            model.delete_adapter("default")
        assert list(model.peft_config) == ["other"] and model.active_adapters == ["other"]
        assert all(list(layer.entries) == ["other"] and layer.active_adapters == ["other"] for layer in layers(model))
        assert torch.equal(outputs(model, kind), second) and not vectors_of(model)
        model.delete_adapter("other")
        # A PeftModel without adapters cannot be called in PEFT, what is in it can.
        assert torch.equal(outputs(model.base_model, kind), outputs(base(kind), kind)) and not model.peft_config

    def test_deleting_an_inactive_adapter(self, peft_config: Make, kind: str) -> None:
        model = with_two(kind, peft_config)
        expected = outputs(model, kind)
        model.delete_adapter("other")
        assert torch.equal(outputs(model, kind), expected) and model.active_adapters == ["default"]
        assert not vectors_of(model, "other")
        with pytest.raises(ValueError, match="other does not exist"):
            model.delete_adapter("other")
        model.add_adapter("other", peft_config(kind))  # the name is free again
        assert vectors_of(model, "other")

    def test_each_adapter_computes_what_it_does_alone(self, peft_config: Make, kind: str) -> None:
        model = with_two(kind, peft_config)
        alone = tuned(kind, peft_config(kind), "x")
        first = outputs(model, kind)
        assert torch.equal(first, outputs(alone, kind))
        model.set_adapter("other")
        assert relative(outputs(model, kind), first) > 0.01
        assert all(name.endswith(".other") for name in trainable(model))
        model.set_adapter("default")
        assert torch.equal(outputs(model, kind), first)
        assert all(name.endswith(".default") for name in trainable(model))


def test_adapters_of_other_ranks_layers_and_keys_stand_side_by_side(peft_config: Make) -> None:
    """PEFT refuses these: its adapters share the first one's projections."""
    model = tuned("mlp", peft_config(target_modules=["lin0"], r=3))
    first = outputs(model, "mlp")
    for name, settings in {
        "wide": {"r": 9},
        "elsewhere": {"target_modules": ["lin1"]},
        "key": {"projection_prng_key": 5},
    }.items():
        model.add_adapter(name, peft_config(**settings))
        model.set_adapter(name)
        randomise_trainable(model, seed=8, std=0.3)
        alone = tuned("mlp", peft_config(**settings), seed=8)
        assert torch.equal(outputs(model, "mlp"), outputs(alone, "mlp"))
    model.base_model.set_adapter(["default", "elsewhere", "wide"])
    both = outputs(model, "mlp")
    close(outputs(model.merge_and_unload(), "mlp"), both)
    assert relative(both, first) > 0.01


@pytest.mark.parametrize("second", [["lin0"], ["lin1"]])
def test_which_vectors_are_trained_after_a_choice(peft_config: Make, second: list[str]) -> None:
    model = peft.get_peft_model(base("mlp"), peft_config(target_modules=["lin0"]))
    model.add_adapter("other", peft_config(target_modules=second))

    def expected(*pairs: tuple[str, str]) -> set[str]:
        return {f"base_model.model.{layer}.vera_lambda_{side}.{name}" for layer, name in pairs for side in "bd"}

    assert trainable(model) == expected(("lin0", "default"))
    model.set_adapter("default")
    assert trainable(model) == expected(("lin0", "default"))
    model.set_adapter("other")
    assert trainable(model) == expected((second[0], "other"))
    model.base_model.set_adapter(["default", "other"])
    assert trainable(model) == expected(("lin0", "default"), (second[0], "other"))
    call(model.train(), "mlp").square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model) and model.active_adapters == ["default"]
    model.set_requires_grad("other")
    assert trainable(model) == expected((second[0], "other"))
    model.set_requires_grad("other", requires_grad=False)
    assert not trainable(model)


def test_a_configuration_for_inference_is_frozen(peft_config: Make) -> None:
    assert not trainable(peft.get_peft_model(base("mlp"), peft_config(inference_mode=True)))


def test_a_merged_adapter_is_not_deleted(peft_config: Make) -> None:
    model = with_two("mlp", peft_config)
    model.merge_adapter(["other"])
    before = outputs(model, "mlp")
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("other")
    assert "other" in model.peft_config and torch.equal(outputs(model, "mlp"), before)


@pytest.mark.parametrize("kind", list(HEADS))
class TestHeads:
    """modules_to_save: trained in full, one copy for each adapter."""

    def test_a_head_is_trained_with_its_adapter(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind, modules_to_save=[HEADS[kind]]))
        head = f"base_model.model.{HEADS[kind]}.modules_to_save.default."
        assert {name for name in trainable(model) if ".vera_lambda_" not in name} == {head + "weight", head + "bias"}
        expected = outputs(model, kind)
        with model.disable_adapter():
            assert torch.equal(outputs(model, kind), outputs(base(kind), kind))
        assert torch.equal(outputs(model, kind), expected)
        close(outputs(model.merge_and_unload(), kind), expected)

    def test_two_heads(self, peft_config: Make, kind: str) -> None:
        settings = {"modules_to_save": [HEADS[kind]]}
        model = tuned(kind, peft_config(kind, **settings))
        first = outputs(model, kind)
        model.add_adapter("other", peft_config(kind, **settings))
        model.set_adapter("other")
        assert torch.equal(outputs(model, kind), outputs(base(kind), kind))
        randomise_trainable(model, seed=9)
        second = outputs(model, kind)
        model.set_adapter("default")
        assert torch.equal(outputs(model, kind), first) and relative(second, first) > 0.01
        with pytest.raises(ValueError, match=r"modules_to_save|Only one adapter"):
            model.base_model.set_adapter(["default", "other"])
        model.set_adapter("default")
        model.delete_adapter("default")
        assert torch.equal(outputs(model, kind), second)

    def test_an_adapter_without_a_head_beside_one_with(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind))
        first = outputs(model, kind)
        model.add_adapter("other", peft_config(kind, modules_to_save=[HEADS[kind]]))
        assert torch.equal(outputs(model, kind), first)
        model.set_adapter("other")
        assert any("modules_to_save.other" in name for name in trainable(model))
        randomise_trainable(model, seed=9)
        assert relative(outputs(model, kind), first) > 0.01
        model.set_adapter("default")
        assert torch.equal(outputs(model, kind), first)


def test_unloading_keeps_the_active_adapters_head(peft_config: Make) -> None:
    model = tuned("bert", peft_config("bert", modules_to_save=["classifier"]))
    head = model.base_model.model.classifier.modules_to_save["default"]
    unloaded = model.unload()
    assert unloaded.classifier is head
    plain = base("bert")
    plain.classifier = head
    assert torch.equal(outputs(unloaded, "bert"), outputs(plain, "bert"))


def test_adding_an_adapter_leaves_the_others_flags(peft_config: Make) -> None:
    model = tuned("mlp", peft_config())
    for parameter in vectors_of(model).values():
        parameter.requires_grad = False
    model.add_adapter("other", peft_config())
    assert not trainable(model)
    assert not any(p.requires_grad for p in vectors_of(model, "other").values())


def test_conversion_to_a_lora_is_exact() -> None:
    install()
    model = tuned("mlp", VeratuneConfig(r=4, target_modules=["lin0", "lin1"]))
    expected = outputs(model, "mlp")
    config, state = peft.convert_to_lora(model, 4)
    lora = peft.get_peft_model(base("mlp"), config)
    peft.set_peft_model_state_dict(lora, state)
    close(outputs(lora, "mlp"), expected)
