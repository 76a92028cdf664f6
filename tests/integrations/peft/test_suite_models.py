"""What PEFT's users expect of a model with veratune's layers: attributes, training, dtypes, calls, targets."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peft_suite import BIASED, KINDS, TARGETS, base, call, outputs, rows, trainable, tuned, vectors_of
from reference import relative
from tiny_models import randomise_trainable, tiny_inputs

peft = pytest.importorskip("peft")

from veratune.integrations.peft.layers import TunedLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
Make = Callable[..., Any]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_attributes(self, peft_config: Make, kind: str) -> None:
        model = peft.get_peft_model(base(kind), peft_config(kind))
        for name in ("save_pretrained", "from_pretrained", "push_to_hub", "merge_and_unload"):
            assert callable(getattr(model, name))
        assert isinstance(model, peft.PeftModel) and not isinstance(model.get_base_model(), peft.PeftModel)
        assert model.active_adapters == ["default"] and model.active_adapter == "default"
        assert list(model.peft_config) == ["default"] and model.active_peft_config is model.peft_config["default"]

    def test_a_new_adapter_changes_nothing_and_says_what_it_trains(self, peft_config: Make, kind: str) -> None:
        model = peft.get_peft_model(base(kind), peft_config(kind))
        assert torch.equal(outputs(model, kind), outputs(base(kind), kind))
        assert trainable(model) == set(vectors_of(model))
        numbers = sum(parameter.numel() for parameter in vectors_of(model).values())
        assert model.get_nb_trainable_parameters()[0] == numbers > 0
        status = peft.get_model_status(model)
        assert status.trainable_params == numbers and status.enabled is True and status.merged_adapters == []
        assert status.active_adapters == status.available_adapters == ["default"]
        assert status.num_adapter_layers == sum(isinstance(module, TunedLayer) for module in model.modules())
        assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}

    def test_adapters_may_have_any_name(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind), "another-name")
        assert model.active_adapters == ["another-name"] and "another-name" in model.peft_config
        model.add_adapter("third", peft_config(kind))
        assert model.active_adapters == ["another-name"]
        with pytest.raises(ValueError, match=r"already exists|is already in use|exists"):
            model.add_adapter("third", peft_config(kind))

    def test_training_moves_the_vectors_and_nothing_else(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind)).train()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        call(model, kind).square().sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(vectors_of(model))
        assert all(p.grad is None for name, p in model.named_parameters() if name not in moved)

    def test_a_start_that_is_no_no_op(self, peft_config: Make, kind: str) -> None:
        model = peft.get_peft_model(base(kind), peft_config(kind, init_weights=False))
        assert relative(outputs(model, kind), outputs(base(kind), kind)) > 0.01

    def test_disabling_gives_the_base_model_and_back(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind))
        expected, plain, flags = outputs(model, kind), outputs(base(kind), kind), trainable(model)
        with model.disable_adapter():
            assert torch.equal(outputs(model, kind), plain)
            with model.disable_adapter():
                assert torch.equal(outputs(model, kind), plain)
            assert torch.equal(outputs(model, kind), plain)
        assert torch.equal(outputs(model, kind), expected) and trainable(model) == flags
        model.base_model.disable_adapter_layers()
        assert torch.equal(outputs(model, kind), plain) and not trainable(model)
        with model.disable_adapter():
            pass
        assert torch.equal(outputs(model, kind), plain)  # as it was before the context
        model.base_model.enable_adapter_layers()
        assert torch.equal(outputs(model, kind), expected) and trainable(model) == flags

    def test_copies_and_pickles_compute_the_same(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind))
        expected = outputs(model, kind)
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copied, pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert torch.equal(outputs(other, kind), expected)
            randomise_trainable(other, seed=5)
            assert relative(outputs(other, kind), expected) > 0.01
        assert torch.equal(outputs(model, kind), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("autocast", [True, False])
    def test_half_precision(self, peft_config: Make, kind: str, dtype: torch.dtype, autocast: bool) -> None:
        model = peft.get_peft_model(base(kind, dtype), peft_config(kind), autocast_adapter_dtype=autocast)
        randomise_trainable(model, std=0.3)
        assert {p.dtype for p in vectors_of(model).values()} == {torch.float32 if autocast else dtype}
        model.add_adapter("other", peft_config(kind), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in vectors_of(model, "other").values()} == {torch.float32 if autocast else dtype}
        full = tuned(kind, peft_config(kind))
        result = outputs(model, kind)
        assert result.dtype == dtype and relative(result.float(), outputs(full, kind)) < 0.1
        call(model.train(), kind).float().square().sum().backward()
        gradients = [p.grad for p in vectors_of(model).values()]
        assert all(
            g is not None and torch.isfinite(g).all() and g.dtype == p.dtype
            for g, p in zip(gradients, vectors_of(model).values(), strict=True)
        )

    def test_under_autocast(self, peft_config: Make, kind: str) -> None:
        model = tuned(kind, peft_config(kind))
        expected = outputs(model, kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative(outputs(model, kind).float(), expected) < 0.1
            call(model.train(), kind).float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in vectors_of(model).values())

    def test_layers_say_what_they_are(self, peft_config: Make, kind: str) -> None:
        model, plain = tuned(kind, peft_config(kind)), dict(base(kind).named_modules())
        statuses = {status.name: status for status in peft.get_layer_status(model)}
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, TunedLayer):
                original = plain[name]
                size = tuple(original.weight.shape)
                assert (layer.in_features, layer.out_features) in (size, size[::-1])
                assert layer.weight.shape == original.weight.shape and layer.weight.dtype == original.weight.dtype
                assert (layer.bias is None) == (original.bias is None)
                assert "default: r=4" in repr(layer) and type(layer).__name__ in repr(model)
                status = statuses[f"model.{name}"]
                assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
                assert status.requires_grad == {"default": True} and status.available_adapters == ["default"]
        assert len(statuses) == len(model.base_model.targeted_module_names)

    def test_the_state_of_the_base_model_can_be_had_without_adapters(self, peft_config: Make, kind: str) -> None:
        model, expected = tuned(kind, peft_config(kind)), base(kind).state_dict()
        found = peft.get_base_model_state_dict(model)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        before = outputs(model, kind)
        peft.set_base_model_state_dict(model, {name: value * 0.5 for name, value in expected.items()})
        assert relative(outputs(model, kind), before) > 0.01
        peft.set_base_model_state_dict(model, expected)
        assert torch.equal(outputs(model, kind), before)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(peft_config: Make, kind: str, reentrant: bool) -> None:
    expected_model = tuned(kind, peft_config(kind)).train()
    call(expected_model, kind).square().sum().backward()
    prepared = base(kind)
    prepared.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = randomise_trainable(peft.get_peft_model(prepared, peft_config(kind)), 7, std=0.3).train()
    call(model, kind).square().sum().backward()
    expected = vectors_of(expected_model)
    for name, parameter in vectors_of(model).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_inputs_require_gradients_where_checkpointing_asks_for_it(peft_config: Make, kind: str) -> None:
    model = base(kind)
    model.gradient_checkpointing_enable()
    model = peft.get_peft_model(model, peft_config(kind))
    ids = tiny_inputs(kind)["input_ids"]
    embeddings = model.get_base_model().get_input_embeddings()
    assert embeddings(ids).requires_grad
    assert not any(".embed" in name or "wte" in name or "shared" in name for name in trainable(model))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation(peft_config: Make, kind: str) -> None:
    task = {"task_type": "CAUSAL_LM"}
    model = tuned(kind, peft_config(kind, **task)).eval()
    assert type(model) is peft.PeftModelForCausalLM
    inputs = tiny_inputs(kind)
    settings = {"max_new_tokens": 5, "pad_token_id": 2}
    greedy = model.generate(**inputs, **settings, do_sample=False)
    assert torch.equal(model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings), greedy)
    torch.manual_seed(3)
    sampled = model.generate(**inputs, **settings, do_sample=True)
    beams = model.generate(**inputs, **settings, num_beams=3, do_sample=False)
    with model.disable_adapter():
        plain = model.generate(**inputs, **settings, do_sample=False)
    assert torch.equal(plain, base(kind).generate(**inputs, **settings, do_sample=False))
    assert not torch.equal(plain, greedy)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, **settings, do_sample=False), greedy)
    assert torch.equal(merged.generate(**inputs, **settings, num_beams=3, do_sample=False), beams)
    torch.manual_seed(3)
    assert torch.equal(merged.generate(**inputs, **settings, do_sample=True), sampled)


def test_generation_of_an_encoder_and_decoder(peft_config: Make) -> None:
    try:
        peft.get_peft_model(base("t5"), peft.LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    except AttributeError as error:
        pytest.skip(f"PEFT {peft.__version__} itself cannot make such a model with this transformers: {error}")
    model = tuned("t5", peft_config("t5", task_type="SEQ_2_SEQ_LM")).eval()
    assert type(model) is peft.PeftModelForSeq2SeqLM
    ids = tiny_inputs("t5")["input_ids"]
    settings = {"max_new_tokens": 4, "decoder_start_token_id": 2, "do_sample": False}
    tokens = model.generate(input_ids=ids, **settings)
    with pytest.raises(TypeError, match="positional"):  # PEFT's own, for this kind of model
        model.generate(ids, **settings)
    assert torch.equal(model.merge_and_unload().generate(ids, **settings), tokens)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_embeddings_instead_of_tokens(peft_config: Make, kind: str) -> None:
    task = {"bert": "FEATURE_EXTRACTION"}.get(kind, "CAUSAL_LM")
    model = tuned(kind, peft_config(kind, task_type=task)).eval()
    ids = tiny_inputs(kind)["input_ids"]
    with torch.no_grad():
        embedded = model.get_base_model().get_input_embeddings()(ids)
        found = model.base_model(inputs_embeds=embedded).logits
        torch.testing.assert_close(found, model.base_model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
        assert relative(model(inputs_embeds=embedded).logits, found) < 1e-6


@pytest.mark.parametrize(
    ("task", "head"), [("SEQ_CLS", "classifier"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")]
)
def test_tasks_train_their_heads(peft_config: Make, task: str, head: str) -> None:
    import transformers

    names = {"SEQ_CLS": "BertForSequenceClassification", "TOKEN_CLS": "BertForTokenClassification"}
    torch.manual_seed(0)
    config = base("bert").config
    config.num_labels = 2
    plain = getattr(transformers, names.get(task, "BertForQuestionAnswering"))(config)
    model = peft.get_peft_model(plain, peft_config("bert", target_modules=["query", "value"], task_type=task))
    assert any(f"{head}.modules_to_save.default.weight" in name for name in trainable(model))
    model(**tiny_inputs("bert"))
    assert {name for name in trainable(model) if ".vera_lambda_" not in name} == {
        f"base_model.model.{head}.modules_to_save.default.{own}" for own in ("weight", "bias")
    }


def test_an_unknown_argument_of_a_call_reaches_the_model(peft_config: Make) -> None:
    model = tuned("bert", peft_config("bert")).eval()
    with torch.no_grad():
        assert len(model(**tiny_inputs("bert"), output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("kind", list(BIASED))
@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_biases(peft_config: Make, kind: str, bias: str) -> None:
    model = peft.get_peft_model(base(kind), peft_config(kind, target_modules=[BIASED[kind]], bias=bias))
    biases = {name for name in trainable(model) if ".vera_lambda_" not in name}
    assert biases and all(name.endswith(".bias") for name in biases)
    if bias == "vera_only":
        assert all(f"{BIASED[kind]}.base_layer.bias" in name for name in biases)
    randomise_trainable(model)
    with pytest.warns(UserWarning, match="disabling adapter layers with bias"), model.disable_adapter():
        assert relative(outputs(model, kind), outputs(base(kind), kind)) > 1e-3
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("other", peft_config(kind, bias="all"))
    assert "other" not in {name for layer in model.modules() if isinstance(layer, TunedLayer) for name in layer.entries}


# Which layers


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["q_proj"], ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        (["model.layers.1.self_attn.v_proj"], ["layers.1.self_attn.v_proj"]),
        (r".*\.0\..*(q|v)_proj", ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]),
        (None, [f"layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]),
        (
            "all-linear",
            [
                f"layers.{i}.{part}"
                for i in (0, 1)
                for part in (
                    "self_attn.q_proj",
                    "self_attn.k_proj",
                    "self_attn.v_proj",
                    "self_attn.o_proj",
                    "mlp.gate_proj",
                    "mlp.up_proj",
                    "mlp.down_proj",
                )
            ],
        ),
    ],
)
def test_target_modules(peft_config: Make, wanted: Any, expected: list[str]) -> None:
    model = peft.get_peft_model(base("llama"), peft_config(target_modules=wanted))
    assert model.base_model.targeted_module_names == [f"model.{name}" for name in expected]
    model.add_adapter("other", peft_config(target_modules=wanted))
    assert all(set(m.entries) == {"default", "other"} for m in model.modules() if isinstance(m, TunedLayer))
    assert torch.equal(outputs(model, "llama"), outputs(base("llama"), "llama"))


@pytest.mark.parametrize("indices", [1, [1], [0, 1]])
@pytest.mark.parametrize("pattern", [None, "layers", ["layers"]])
def test_layer_indices(peft_config: Make, indices: Any, pattern: Any) -> None:
    settings = {"target_modules": ["q_proj"], "layers_to_transform": indices, "layers_pattern": pattern}
    model = peft.get_peft_model(base("llama"), peft_config(**settings))
    wanted = [indices] if isinstance(indices, int) else indices
    assert model.base_model.targeted_module_names == [f"model.layers.{i}.self_attn.q_proj" for i in wanted]


def test_exclusions_and_what_matches_nothing(peft_config: Make) -> None:
    if hasattr(peft_config(), "exclude_modules"):
        settings = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}
        model = peft.get_peft_model(base("llama"), peft_config(**settings))
        assert all(name.endswith("q_proj") for name in model.base_model.targeted_module_names)
        with pytest.raises(ValueError, match=r"excluded|No modules were targeted"):
            peft.get_peft_model(base("mlp"), peft_config(exclude_modules=TARGETS["mlp"]))
        with pytest.warns(UserWarning, match="no modules were excluded"):
            peft.get_peft_model(base("mlp"), peft_config(exclude_modules=["foobar"]))
    with pytest.raises(ValueError, match=r"Target modules .* not found"):
        peft.get_peft_model(base("mlp"), peft_config(target_modules=["foobar"]))
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(base("mlp"), peft_config(target_modules=None))


def test_what_cannot_be_adapted_is_refused_before_any_change(peft_config: Make) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {name: type(module) for name, module in net.named_modules()}
    with pytest.raises(ValueError, match=r"1 cannot be adapted by VeRA, because LayerNorm"):
        peft.get_peft_model(net, peft_config(target_modules=["0", "1"]))
    assert {name: type(module) for name, module in net.named_modules()} == before
    model = tuned("mlp", peft_config())
    expected = outputs(model, "mlp")
    with pytest.raises((ValueError, TypeError)):
        model.add_adapter("bad", peft_config(r=0))
    assert torch.equal(outputs(model, "mlp"), expected) and list(model.peft_config) == ["default"]


def test_pefts_own_configuration_adapts_linear_layers_alone(peft_config: Make) -> None:
    if type(peft_config()) is not peft.VeraConfig:
        pytest.skip("VeratuneConfig adapts others too")
    for layer in (nn.Conv1d(3, 4, 1), nn.Embedding(5, 4)):
        with pytest.raises((ValueError, TypeError), match=r"cannot be (adapted|had)"):
            peft.get_peft_model(nn.Sequential(layer), peft_config(target_modules=["0"]))


def test_mixed_models_and_adapters_for_rows_are_refused(peft_config: Make) -> None:
    with pytest.raises(ValueError, match=r"mixed|not compatible|supported"):
        peft.get_peft_model(base("mlp"), peft_config(), mixed=True)
    model = tuned("bert", peft_config("bert"))
    with pytest.raises(ValueError, match="adapter_names"):
        model(**tiny_inputs("bert"), adapter_names=["default", "default"])


def without_a_wrapper(config: Any) -> bool:
    """Return whether PEFT puts layers of this configuration into a model alone; with shared projections it refuses."""
    if type(config) is not peft.VeraConfig:
        return True
    with pytest.raises(ValueError, match="shared state"):
        peft.inject_adapter_in_model(config, base("mlp"))
    return False


def test_layers_without_a_wrapper(peft_config: Make) -> None:
    if not without_a_wrapper(peft_config()):
        return
    plain = base("mlp")
    injected = peft.inject_adapter_in_model(peft_config(), plain)
    assert injected is plain and isinstance(plain.lin0, TunedLayer)
    for parameter in plain.parameters():
        assert parameter.requires_grad == any(parameter is p for p in vectors_of(plain).values())
    randomise_trainable(plain, std=0.3)
    state = peft.get_peft_model_state_dict(plain)
    assert {key for key in state if ".vera_lambda_" in key} == {
        f"{layer}.vera_lambda_{side}" for layer in ("lin0", "lin1") for side in "bd"
    }
    other = peft.inject_adapter_in_model(peft_config(), base("mlp"))
    result = peft.set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys and torch.equal(outputs(other, "mlp"), outputs(plain, "mlp"))


def test_layers_chosen_by_a_state(peft_config: Make) -> None:
    if not without_a_wrapper(peft_config()):
        return
    state = dict(tuned("mlp", peft_config(target_modules=["lin1"])).state_dict())
    state = {key.removeprefix("base_model.model."): value for key, value in state.items() if "vera_lambda" in key}
    state = {key.removesuffix(".default"): value for key, value in state.items()}
    with pytest.warns(RuntimeWarning, match="lin0"):
        model = peft.inject_adapter_in_model(peft_config(), base("mlp"), state_dict=state)
    assert isinstance(model.lin1, TunedLayer) and not isinstance(model.lin0, TunedLayer)


def test_a_call_without_rows(peft_config: Make) -> None:
    assert tuned("mlp", peft_config())(rows()[:0]).shape == (0, 3)
