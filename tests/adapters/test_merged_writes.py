"""Who may write while adapters are merged, and methods of models that replace layers."""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from reference import randomise
from tiny_models import tiny_model
from undoing import TOKENS as NET_TOKENS
from undoing import merged, seen, settings, tuned_merged, two
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.integrations.peft import VeratuneConfig, install

install()

TOKENS = torch.tensor([[1, 2, 3, 4]])


def llama(*, tied: bool) -> Any:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    return model


def adapted(*targets: str, tied: bool = False, saved: list[str] | None = None, plugin: bool = False) -> Any:
    torch.manual_seed(1)
    own = {"r": 3, "target_modules": list(targets), "modules_to_save": saved or []}
    make: Any = peft.get_peft_model if plugin else get_peft_model
    model = make(llama(tied=tied), (VeratuneConfig if plugin else VeraConfig)(**own))
    randomise(model, 0.3)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


def net_output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(NET_TOKENS)


# Loading and setting weights while merged


def _root(model: Any) -> Any:
    return model


def _base(model: Any) -> Any:
    return model.base_model


def _layer(model: Any) -> Any:
    return next(module for module in model.modules() if getattr(module, "merged_adapters", None))


def _base_layer(model: Any) -> Any:
    return model.get_submodule(
        "base_model.lin.base_layer" if isinstance(model, VeraModel) else "base_model.model.lin.base_layer"
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", [_root, _base, _layer, _base_layer])
@pytest.mark.parametrize("make", [merged, tuned_merged])
def test_loading_into_what_is_merged_is_refused(make: Callable[[], Any], part: Any, assign: bool) -> None:
    model = make()
    before, output = seen(model), net_output(model)
    target = part(model)
    state = {name: tensor + 1 for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match="unmerge_adapter"):
        target.load_state_dict(state, assign=assign)
    assert seen(model) == before and torch.equal(net_output(model), output)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        part(twin).load_state_dict(state)
    model.unmerge_adapter()
    target.load_state_dict({name: tensor + 1 for name, tensor in target.state_dict().items()}, assign=assign)
    assert not torch.equal(net_output(model), output)


def test_what_merging_does_not_read_may_be_loaded_while_merged() -> None:
    model = merged()
    table = {"head.original_module.weight": torch.ones(3, 6)}
    model.base_model.load_state_dict(table, strict=False)
    assert torch.equal(model.base_model.head.original_module.weight, torch.ones(3, 6))
    model.base_model.head.modules_to_save["one"].weight.data.zero_()  # the copy that computes
    model.base_model.head.modules_to_save["one"].bias.data.fill_(2.0)
    assert torch.equal(net_output(model), torch.full((1, 4, 3), 2.0))


def test_restoring_and_setting_a_weight_while_merged_are_refused(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    model = merged()
    before, output = seen(model), net_output(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.restore(tmp_path)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.base_model.lin.weight = nn.Parameter(torch.ones(6, 6))
    assert seen(model) == before and torch.equal(net_output(model), output)


def test_loading_an_adapter_in_place_in_peft_while_merged_is_refused(tmp_path: Path) -> None:
    other = peft.get_peft_model(two().unload(), VeratuneConfig(**settings()), adapter_name="default")
    randomise(other)
    other.save_pretrained(tmp_path)
    model = tuned_merged()
    before, output = seen(model), net_output(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "one")
    assert seen(model) == before and torch.equal(net_output(model), output)
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "one")
    torch.testing.assert_close(net_output(model), net_output(other))


def test_another_dtype_while_merged_is_that_of_the_weights_afterwards() -> None:
    model, other = merged(), two()
    model.double().float().unmerge_adapter()
    other.double().float()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


# Heads and biases of inactive adapters


@pytest.mark.parametrize("bias", ["none", "vera_only", "all"])
def test_merging_an_inactive_adapter_takes_its_head_and_biases_along(bias: str) -> None:
    def make() -> VeraModel:
        model = two()
        model.delete_adapter("one")
        model.add_adapter("one", VeraConfig(**settings(bias=bias)))
        torch.manual_seed(11)
        with torch.no_grad():
            for parameter in model.adapter_state("one").parameters():
                parameter.normal_(std=0.3)
        return model

    model = make()
    model.set_adapter("one")
    expected = net_output(model)
    model.set_adapter([])
    before, plain = seen(model), net_output(model)
    model.merge_adapter("one")
    torch.testing.assert_close(net_output(model), expected)
    with model.disable_adapter():
        assert torch.equal(net_output(model), plain)
    with model.only(["one"]):
        torch.testing.assert_close(net_output(model), expected)
    torch.testing.assert_close(net_output(model), expected)
    model.unmerge_adapter()
    assert seen(model) == before and torch.equal(net_output(model), plain)
    model.merge_adapter("one")
    torch.testing.assert_close(net_output(model.merge_and_unload(adapter_names=["one"])), expected)


def test_two_heads_are_not_merged_together() -> None:
    model = two()
    model.add_adapter("three", VeraConfig(**settings()))
    before = seen(model)
    with pytest.raises(ValueError, match="cannot be active together"):
        model.merge_adapter("three")
    assert seen(model) == before


def test_peft_refuses_to_merge_a_head_that_does_not_compute() -> None:
    model = tuned_merged()
    model.unmerge_adapter()
    expected = net_output(model)
    with pytest.raises(ValueError, match="set_adapter"):
        model.base_model.merge_and_unload(adapter_names=["two"])
    model.set_adapter("two")
    before = seen(model)
    for merge in (model.merge_adapter, lambda names: model.base_model.merge_and_unload(adapter_names=names)):
        with pytest.raises(ValueError, match="set_adapter"):
            merge(["one"])
        assert seen(model) == before
    model.set_adapter("one")
    torch.testing.assert_close(net_output(model.base_model.merge_and_unload()), expected)


def test_what_was_merged_in_peft_is_merged_after_disabling() -> None:
    model = tuned_merged()
    expected = net_output(model)
    with model.disable_adapter():
        plain = net_output(model)
    assert torch.equal(net_output(model), expected) and not torch.allclose(plain, expected)
    model.unmerge_adapter()
    assert not torch.allclose(net_output(model), expected)  # "two" was merged and is not active


def test_unloading_in_peft_takes_out_what_is_merged() -> None:
    model = tuned_merged()
    with model.disable_adapter():
        plain = net_output(model)
    assert torch.equal(net_output(model.base_model.unload()), plain)


# What is trainable, in PEFT


@pytest.mark.parametrize("trainable", [False, True])
def test_flags_survive_in_peft(trainable: bool, tmp_path: Path) -> None:
    adapted("q_proj", saved=["lm_head"], plugin=True).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(llama(tied=False), tmp_path, is_trainable=trainable)

    def flags() -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    before = flags()
    assert bool(before) == trainable
    with model.disable_adapter():
        assert not flags()
    assert flags() == before
    model.set_adapter("default")
    assert flags() == before
    model.merge_adapter()
    model.unmerge_adapter()
    assert flags() == before
    model.load_adapter(tmp_path, "other")
    assert flags() == before
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert flags() == before
    model.set_adapter("other")
    assert not flags()  # loaded for inference


def test_names_of_adapters_for_rows_are_refused_where_peft_ignores_them() -> None:
    model = adapted("q_proj", plugin=True)
    for call in (model, model.base_model):
        with pytest.raises(ValueError, match="adapter_names"):
            call(TOKENS, adapter_names=["default"])


# Resizing, tying, replacing


CASES: dict[str, dict[str, Any]] = {
    "head": {"targets": ["lm_head", "q_proj"]},
    "embeddings": {"targets": ["embed_tokens", "q_proj"]},
    "saved head": {"targets": ["q_proj"], "saved": ["lm_head"]},
    "saved embeddings": {"targets": ["q_proj"], "saved": ["embed_tokens"]},
}


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_resizing_what_adapters_are_made_for_is_refused(case: str, tied: bool, merge: bool, plugin: bool) -> None:
    options = dict(CASES[case])
    model = adapted(*options.pop("targets"), tied=tied, plugin=plugin, **options)
    if merge:
        model.merge_adapter()
    inner = model.get_base_model()
    before, output, vocabulary = seen(model), logits(model), inner.config.vocab_size
    for call in (model, inner):
        with pytest.raises(ValueError, match="unload"):
            call.resize_token_embeddings(60)
    replaced = "output" if "head" in case else "input"
    new: nn.Module = nn.Linear(16, 50, bias=False) if replaced == "output" else nn.Embedding(50, 16)
    with pytest.raises(ValueError, match="unload"):
        getattr(inner, f"set_{replaced}_embeddings")(new)
    same = getattr(inner, f"get_{replaced}_embeddings")()
    getattr(inner, f"set_{replaced}_embeddings")(same)
    assert inner.resize_token_embeddings(50) is inner.get_input_embeddings()
    assert seen(model) == before and torch.equal(logits(model), output) and inner.config.vocab_size == vocabulary
    plain = model.unload()
    assert "resize_token_embeddings" not in vars(plain)
    plain.resize_token_embeddings(60)
    assert logits(plain).shape[-1] == 60


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_what_no_adapter_is_on_works(tied: bool) -> None:
    model = adapted("q_proj", "down_proj", tied=tied)
    expected = logits(model)
    model.resize_token_embeddings(60)
    torch.testing.assert_close(logits(model)[..., :50], expected)
    assert model.base_model.config.vocab_size == 60
    pickle.loads(pickle.dumps(copy.deepcopy(model)))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_tying_ties_the_model_s_own_weights(case: str, merge: bool) -> None:
    options = dict(CASES[case])
    model = adapted(*options.pop("targets"), tied=True, **options)
    if merge:
        model.merge_adapter()
    before, output = seen(model), logits(model)
    model.tie_weights()
    assert seen(model) == before and torch.equal(logits(model), output)
    plain = model.unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_guarded_methods_look_as_before() -> None:
    model = adapted("q_proj")
    assert model.base_model.resize_token_embeddings.__name__ == "resize_token_embeddings"
    assert "new_num_tokens" in str(inspect.signature(model.resize_token_embeddings))


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda weight: weight.mul_(2.0),
    "by data": lambda weight: weight.data.mul_(2.0),
    "one element": lambda weight: weight[0].view(-1)[:1].add_(1.0),
    "exchanged rows": lambda weight: weight.copy_(weight.flip(0)),
}


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_what_is_written_to_merged_weights_is_not_lost(write: Callable[[nn.Parameter], Any], plugin: bool) -> None:
    model = adapted("q_proj", "down_proj", plugin=plugin)
    tuner = model.base_model if plugin else model
    tuner.merge_adapter()
    untouched = copy.deepcopy(model)
    layer = next(module for name, module in model.named_modules() if name.endswith("1.mlp.down_proj"))
    write(layer.base_layer.weight)
    expected = logits(model)
    refused = pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj was written to since")
    with refused:
        tuner.unmerge_adapter()
    with refused, model.disable_adapter():
        pass
    with refused:
        model.unload()
    model.double().float()
    with refused:
        tuner.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.merge_and_unload()), expected)
    tuner = untouched.base_model if plugin else untouched
    untouched.bfloat16().float()  # whose values are others, but not the user's
    tuner.unmerge_adapter()
    assert not getattr(tuner, "merged_adapters", [])
