"""Weights that are no linear layer of their own: experts, packed attention, convolutions, embeddings, fused layers."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dense import check_against_dense, dense_parameters
from layer_kinds import (
    _MOE,
    IDS,
    Attention,
    Table,
    adapted,
    gpt_oss,
    llama4,
    logits,
    mixtral,
    qwen_moe,
    seeded,
    wide_mixtral,
)
from reference import randomise
from veratune import TargetError, VeraConfig, VeraModel, get_peft_model
from veratune.layers import VeraConv, VeraEmbedding, VeraModule, VeraParameter
from veratune.layers.lazy_weight import AdaptedWeight, View

# Experts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("make", [mixtral, qwen_moe, gpt_oss, llama4], ids=lambda make: "")
def test_experts_compute_the_dense_result(make: Callable[[], nn.Module], implementation: str) -> None:
    def with_implementation(name: str) -> nn.Module:
        model = make()
        model.config._experts_implementation = name
        return model

    model = adapted(lambda: with_implementation(implementation))
    names = [name for name, layer in model.vera_layers().items() if isinstance(layer, VeraParameter)]
    assert sorted(name.rpartition(".")[2] for name in names) == ["down_proj", "gate_up_proj"]
    check_against_dense(lambda: with_implementation("eager"), model, logits)


def test_each_expert_has_vectors_of_its_own_and_all_share_the_projections() -> None:
    model = adapted(mixtral, target_modules=None, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    layers = {name.rpartition(".")[2]: layer for name, layer in model.vera_layers().items()}
    assert set(layers) == {"gate_up_proj", "down_proj"}
    b, d = layers["gate_up_proj"].vectors("default").values()
    assert b.shape == (4, 16) and d.shape == (4, 3)
    b, d = layers["down_proj"].vectors("default").values()
    assert b.shape == (4, 12) and d.shape == (4, 3)
    assert model.get_nb_trainable_parameters()[0] == 4 * (16 + 3 + 12 + 3)


@pytest.mark.parametrize(("make", "transposed"), [(mixtral, False), (gpt_oss, True), (llama4, True)])
def test_the_layout_of_expert_tensors_is_recognised(make: Callable[[], nn.Module], transposed: bool) -> None:
    layers = [layer for layer in adapted(make).vera_layers().values() if isinstance(layer, VeraParameter)]
    hidden = {layer.weight_name: (layer.in_features, layer.out_features) for layer in layers}
    assert hidden["gate_up_proj"] == (12, 16) and hidden["down_proj"] == (8, 12)
    assert all((layer.out_axis == 1) is transposed for layer in layers)


def test_experts_are_not_added_up_where_they_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(mixtral)
    monkeypatch.setattr(View, "added_up", lambda _: pytest.fail("a whole stack was added up"))
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.config._experts_implementation = implementation
        logits(model).sum().backward()


def test_adapted_experts_work_compiled() -> None:
    make = mixtral
    model = adapted(make)
    model.config._experts_implementation = "batched_mm"
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


def test_experts_in_several_threads_and_copies() -> None:
    model = adapted(mixtral)
    with torch.no_grad():
        expected = logits(model)
        results: list[Tensor] = []

        def work() -> None:
            with torch.no_grad():
                results.extend(logits(model) for _ in range(5))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 20 and all(torch.equal(result, expected) for result in results)
        copied = copy.deepcopy(model)
        randomise(model)
        assert torch.equal(logits(copied), expected)
        assert torch.equal(logits(pickle.loads(pickle.dumps(copied))), expected)
        assert set(copied.state_dict()) == set(model.state_dict())


# torch.nn.MultiheadAttention


def attention_call(memory_size: int, same: bool) -> Callable[[Any], Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 4, memory_size, generator=generator, dtype=torch.float64)

    def call(model: Any) -> Tensor:
        dtype = torch.float32 if isinstance(model, VeraModel) else torch.float64
        x = query.to(dtype)
        output: Tensor = model(x, x if same else memory.to(dtype))
        return output

    return call


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("wanted", ["all-linear", ["attn"]])
def test_packed_attention_computes_the_dense_result(wanted: Any, same: bool) -> None:
    make = seeded(Attention)
    model = adapted(make, target_modules=wanted)
    layers = model.vera_layers()
    assert list(layers) == ["attn.in_proj_weight", "attn.out_proj"]
    b, d = layers["attn.in_proj_weight"].vectors("default").values()
    assert b.shape == (3, 8) and d.shape == (3, 3)
    check_against_dense(make, model, attention_call(8, same))


def test_attention_with_other_widths_for_key_and_value() -> None:
    make = seeded(lambda: Attention(kdim=6, vdim=6))
    model = adapted(make)
    assert list(model.vera_layers()) == [
        "attn.q_proj_weight",
        "attn.k_proj_weight",
        "attn.v_proj_weight",
        "attn.out_proj",
    ]
    check_against_dense(make, model, attention_call(6, False))


def test_the_fused_encoder_does_not_skip_packed_attention() -> None:
    make = seeded(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2))
    x = torch.randn(2, 5, 8)

    def call(model: Any) -> Tensor:
        output: Tensor = model(x if isinstance(model, VeraModel) else x.double())
        return output

    model = adapted(make)
    assert len(model.vera_layers()) == 8
    check_against_dense(make, model, call)
    with torch.no_grad():
        merged = call(model)
        model.merge_adapter()
        torch.testing.assert_close(call(model), merged, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(call(model), merged, rtol=1e-6, atol=1e-6)


# Convolutions


_CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2), (2, 4, 9, 8)),
    "2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"), (2, 4, 7, 7)),
    "2d dilated": (lambda: nn.Conv2d(4, 6, 2, dilation=2, bias=False), (2, 4, 7, 7)),
    "2d of one image": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 4)),
}


@pytest.mark.parametrize("kind", _CONVOLUTIONS)
def test_convolutions_compute_the_dense_result(kind: str) -> None:
    layer, shape = _CONVOLUTIONS[kind]
    make = seeded(lambda: nn.Sequential(layer()))
    x = torch.randn(shape)

    def call(model: Any) -> Tensor:
        output: Tensor = model(x if isinstance(model, VeraModel) else x.double())
        return output

    model = adapted(make, target_modules=["0"])
    assert isinstance(model.base_model[0], VeraConv)
    check_against_dense(make, model, call)


def test_dropout_on_a_convolution_drops_the_adapters_input_alone() -> None:
    make = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3)))
    model = adapted(make, target_modules=["0"], vera_dropout=0.5)
    x = torch.randn(2, 4, 7, 7)
    model.train()
    torch.manual_seed(11)
    output = model(x)
    torch.manual_seed(11)
    dropped = nn.functional.dropout(x, 0.5).double()
    weights, _ = dense_parameters(model)
    base = make()[0].double()
    delta = weights["0.weight"] - base.weight
    expected = base(x.double()) + nn.functional.conv2d(dropped, delta)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    model.eval()
    torch.testing.assert_close(
        model(x).double(), base(x.double()) + nn.functional.conv2d(x.double(), delta), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["convolution", "attention"])
def test_a_weight_that_is_computed_from_others_since_it_was_adapted_is_refused(kind: str) -> None:
    if kind == "attention":
        model = adapted(seeded(lambda: nn.MultiheadAttention(8, 2)), target_modules="all-linear")
        inner, name, args = model.base_model.base_layer, "in_proj_weight", [torch.randn(3, 2, 8)] * 3
    else:
        model = adapted(seeded(lambda: nn.Sequential(nn.Conv1d(4, 4, 3))), target_modules=["0"])
        inner, name, args = model.base_model[0].base_layer, "weight", [torch.randn(2, 4, 9)]
    expected = model(*args)
    refused = f"the {name} of an adapted .* is computed from other parameters"
    nn.utils.weight_norm(inner, name)
    with pytest.raises(RuntimeError, match=refused):
        model(*args)
    nn.utils.remove_weight_norm(inner, name)
    torch.testing.assert_close(model(*args), expected)
    nn.utils.parametrizations.weight_norm(inner, name)
    with pytest.raises(RuntimeError, match=refused):
        model(*args)


# Embeddings


def test_an_embedding_computes_the_dense_result() -> None:
    make = seeded(Table)
    model = adapted(make, target_modules=["table"])
    assert isinstance(model.base_model.table, VeraEmbedding)
    check_against_dense(make, model, lambda m: m(torch.tensor([[3, 0, 3], [29, 7, 1]])))
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 5)


@pytest.mark.parametrize("settings", [{"padding_idx": 3}, {"scale_grad_by_freq": True}])
def test_settings_of_an_embedding_apply_to_the_vectors_gradients(settings: dict[str, Any]) -> None:
    make = seeded(lambda: nn.Sequential(nn.Embedding(12, 5, **settings)))
    model = adapted(make, target_modules=["0"])
    check_against_dense(make, model, lambda m: m(torch.tensor([[3, 0, 3], [3, 7, 7]])))


def test_a_large_table_is_never_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Table(200_000), VeraConfig(r=64, target_modules=["table"]))
    drawn: list[int] = []
    from veratune.projections import schemes

    draw = schemes.symmetric_uniform_columns

    def counted(*args: Any) -> Tensor:
        columns = draw(*args)
        drawn.append(columns.numel())
        return columns

    monkeypatch.setattr(schemes, "symmetric_uniform_columns", counted)
    monkeypatch.setattr(schemes.PerDimension, "draw", _only_narrow(schemes.PerDimension.draw))
    model(torch.tensor([[5, 5, 199_999, 7]])).sum().backward()
    assert drawn == [3 * 64]


def _only_narrow(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(self: Any, side: str, rows: range, width: int, device: torch.device) -> Tensor:
        assert width < 1000
        return draw(self, side, rows, width, device)

    return checked


def test_a_scaled_embedding_keeps_its_scale() -> None:
    config = transformers.Gemma3TextConfig(
        **{**_MOE, "intermediate_size": 16, "head_dim": 6, "tie_word_embeddings": False}
    )
    make = seeded(lambda: transformers.Gemma3ForCausalLM(config))
    model = adapted(make, target_modules=["embed_tokens"], modules_to_save=[])
    weights, _ = dense_parameters(model)
    base = make().double()
    embedded = torch.func.functional_call(
        base.model.embed_tokens, {"weight": weights["model.embed_tokens.weight"]}, (IDS,)
    )
    torch.testing.assert_close(model.model.embed_tokens(IDS).double(), embedded, rtol=1e-4, atol=1e-5)


def test_a_tied_embedding_is_adapted_knowingly() -> None:
    config = transformers.LlamaConfig(**{**_MOE, "intermediate_size": 16, "tie_word_embeddings": True})
    make = seeded(lambda: transformers.LlamaForCausalLM(config))
    with pytest.warns(
        UserWarning, match=r"shares its weight with lm_head.weight: the adapter affects only model.embed"
    ):
        model = get_peft_model(make(), VeraConfig(r=3, target_modules=["embed_tokens"]))
    randomise(model)
    assert model.lm_head.weight is model.base_model.model.embed_tokens.base_layer.weight
    with torch.no_grad():
        expected = logits(model)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(make(), VeraConfig(r=3, target_modules="all-linear"))


# Fused linear layers in parts


@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
@pytest.mark.parametrize("parts", [3, [6, 4, 2]])
def test_a_fused_layer_in_parts_computes_the_dense_result(parts: Any, route: str) -> None:
    make = seeded(lambda: nn.Sequential(nn.Linear(7, 12)))
    model = adapted(make, target_modules=["0"], fused_parts={"0": parts}, route=route)
    b, d = model.vera_layers()["0"].vectors("default").values()
    assert b.shape == (12,) and d.shape == (3, 3)
    x = torch.randn(2, 5, 7)
    check_against_dense(make, model, lambda m: m(x if isinstance(m, VeraModel) else x.double()))


def test_parts_are_as_separate_layers_would_be() -> None:
    separate = nn.ModuleList([nn.Linear(7, width) for width in (6, 4, 2)])
    fused = nn.Sequential(nn.Linear(7, 12))
    with torch.no_grad():
        fused[0].weight.copy_(torch.cat([layer.weight for layer in separate]))
        fused[0].bias.copy_(torch.cat([layer.bias for layer in separate]))
    one = get_peft_model(fused, VeraConfig(r=3, target_modules=["0"], fused_parts={"0": [6, 4, 2]}))
    three = get_peft_model(separate, VeraConfig(r=3, target_modules=["0", "1", "2"]))
    randomise(one)
    b, d = one.vera_layers()["0"].vectors("default").values()
    with torch.no_grad():
        for part, (layer, rows) in enumerate(zip(three.vera_layers().values(), b.split([6, 4, 2]), strict=True)):
            own_b, own_d = layer.vectors("default").values()
            own_b.copy_(rows)
            own_d.copy_(d[part])
    x = torch.randn(4, 7)
    torch.testing.assert_close(one(x), torch.cat([layer(x) for layer in three.base_model], dim=-1))


def test_the_fused_projection_of_gpt2_in_parts() -> None:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=12, n_layer=1, n_head=2, n_positions=16, initializer_range=0.3
    )
    make = seeded(lambda: transformers.GPT2LMHeadModel(config))
    model = adapted(make, target_modules=["c_attn", "c_proj"], fused_parts={"c_attn": 3})

    def transposed_reference(m: Any) -> Tensor:
        return logits(m)

    weights, _ = dense_parameters(model)
    with torch.no_grad():
        expected = torch.func.functional_call(
            make().double(), weights, (), {"input_ids": IDS, "use_cache": False}
        ).logits
        torch.testing.assert_close(transposed_reference(model).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"0": 5}, "which has 12 outputs"),
        ({"0": [6, 5]}, "sizes that add up to it"),
        ({"other": 3}, "no adapted layer's name ends in 'other'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(7, 12))
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, VeraConfig(r=3, target_modules=["0"], fused_parts=parts))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("make", "attributes"),
    [
        (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), nn.Conv2d.__constants__),
        (lambda: nn.Embedding(9, 4, padding_idx=3), nn.Embedding.__constants__),
    ],
)
def test_models_read_the_attributes_of_a_layer(make: Callable[[], nn.Module], attributes: list[str]) -> None:
    """Whisper, MobileNet and Wav2Vec2-BERT compute lengths and padding with those of their convolutions."""
    base = nn.Sequential(make())
    layer = get_peft_model(nn.Sequential(make()), VeraConfig(r=3, target_modules=["0"])).base_model[0]
    there = [name for name in attributes if hasattr(base[0], name)]
    assert len(there) >= 7
    for name in there:
        assert getattr(layer, name) == getattr(base[0], name)
    assert not hasattr(layer, "nothing") and not hasattr(layer, "_hf_hook")
    pickle.loads(pickle.dumps(copy.deepcopy(layer)))


# All kinds: merging, files, other adapters


_KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[Any], Tensor]]] = {
    "experts": (mixtral, {}, logits),
    "transposed experts": (gpt_oss, {}, logits),
    "attention": (seeded(Attention), {}, lambda m: m(torch.ones(1, 3, 8), torch.ones(1, 2, 8) / 3)),
    "convolution": (
        seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))),
        {"target_modules": ["0"]},
        lambda m: m(torch.linspace(-1, 1, 4 * 25).view(1, 4, 5, 5)),
    ),
    "embedding": (seeded(Table), {"target_modules": ["table"]}, lambda m: m(torch.tensor([[3, 0, 29]]))),
    "parts": (
        seeded(lambda: nn.Sequential(nn.Linear(7, 12))),
        {"fused_parts": {"0": [6, 4, 2]}},
        lambda m: m(torch.linspace(-1, 1, 14).view(2, 7)),
    ),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_merging_and_unmerging_every_kind(kind: str) -> None:
    make, settings, call = _KINDS[kind]
    model = adapted(make, **settings)
    with torch.no_grad():
        expected, base = call(model), call(make())
        assert not torch.allclose(expected, base)
        originals = {name: layer.base_weight.clone() for name, layer in model.vera_layers().items()}
        weights, _ = dense_parameters(model)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
        for name, layer in model.vera_layers().items():
            full = name if isinstance(layer, VeraParameter) else f"{name}.weight"
            torch.testing.assert_close(layer.base_weight.double(), weights[full], rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        for name, layer in model.vera_layers().items():
            assert torch.equal(layer.base_weight, originals[name])
        with model.disable_adapter():
            assert torch.equal(call(model), base)
        merged = model.merge_and_unload()
        torch.testing.assert_close(call(merged), expected, rtol=1e-4, atol=1e-5)
    assert not any("vera" in type(module).__name__.lower() for module in merged.modules())


@pytest.mark.parametrize("kind", _KINDS)
def test_every_kind_is_a_no_op_at_first_and_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    make, settings, call = _KINDS[kind]
    fresh = get_peft_model(make(), VeraConfig(**{"r": 3, "target_modules": "all-linear", **settings}))
    with torch.no_grad():
        assert torch.equal(call(fresh), call(make()))
        model = adapted(make, **settings)
        model.save_pretrained(tmp_path)
        loaded = VeraModel.from_pretrained(make(), tmp_path)
        assert torch.equal(call(loaded), call(model))
        assert loaded.peft_config["default"].fused_parts == model.peft_config["default"].fused_parts


@pytest.mark.parametrize("kind", _KINDS)
def test_a_second_adapter_on_every_kind_adds_up_and_goes_again(kind: str) -> None:
    make, settings, call = _KINDS[kind]
    model = adapted(make, **settings)
    other = {"r": 5, "target_modules": "all-linear", **settings, "projection_prng_key": 9}
    with torch.no_grad():
        first = call(model)
        model.add_adapter("other", VeraConfig(**other))
        assert torch.equal(call(model), first)
        model.set_adapter("other")
        torch.manual_seed(4)
        randomise(model, scale=0.3)
        model.set_adapter(["default", "other"])
        both = call(model)
        total = {
            name: weight + dense_parameters(model, "other")[0][name] - _base_weight(make(), name)
            for name, weight in dense_parameters(model)[0].items()
        }
        dense = make()
        for name, weight in total.items():
            dense.get_parameter(name).copy_(weight)
        torch.testing.assert_close(call(dense), both, rtol=1e-3, atol=1e-4)
        model.delete_adapter("other")
        model.set_adapter("default")
        model.delete_adapter("default")
        assert torch.equal(call(model), call(make()))
    assert not any(isinstance(module, VeraModule) for module in model.modules())


def _base_weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name).detach().double()


def test_dropout_is_refused_where_there_is_no_input_to_drop_from() -> None:
    for make, settings in ((mixtral, {}), (seeded(Attention), {}), (seeded(Table), {"target_modules": ["table"]})):
        with pytest.raises(TargetError, match=r"vera_dropout=0.1 is not supported on .*exclude_modules"):
            adapted(make, vera_dropout=0.1, **settings)
    adapted(mixtral, vera_dropout=0.1, exclude_modules=["experts"])


def test_parameters_are_named_excluded_and_refused_with_reasons() -> None:
    model = adapted(mixtral, exclude_modules=["down_proj"])
    assert not any(name.endswith("down_proj") for name in model.vera_layers())
    model = adapted(mixtral, target_modules=["q_proj"], target_parameters=["gate.weight"])
    kinds = {name.rpartition("layers.0.")[2]: layer for name, layer in model.vera_layers().items()}
    assert set(kinds) == {"self_attn.q_proj", "mlp.gate.weight"}
    check_against_dense(mixtral, model, logits)
    for name, message in (
        ("norm.weight", "neither a matrix nor a stack"),
        ("q_proj.weight", "name the module in target_modules"),
        ("gate_up", "no parameter is called 'gate_up'.*closest names.*gate_up_proj"),
    ):
        with pytest.raises(TargetError, match=message):
            adapted(mixtral, target_modules=None, target_parameters=[name])


def test_a_stand_in_answers_other_operations_with_the_whole_weight() -> None:
    layer = adapted(mixtral).vera_layers()["model.layers.0.mlp.experts.down_proj"]
    weight = layer.weight
    assert isinstance(weight, AdaptedWeight) and weight.shape == (4, 12, 8)
    whole = layer.adapted_weight()
    one = weight[2]
    assert isinstance(one, AdaptedWeight) and one.shape == (12, 8)
    torch.testing.assert_close(one + 0, whole[2])
    torch.testing.assert_close(one.t() * 1, whole[2].t())
    torch.testing.assert_close(weight.transpose(1, 2) * 1, whole.transpose(1, 2))
    torch.testing.assert_close(weight[1:3] * 1, whole[1:3])
    torch.testing.assert_close(weight[torch.tensor([3, 0, 3])] * 1, whole[[3, 0, 3]])
    x = torch.randn(6, 8)
    torch.testing.assert_close(x @ one.T, x @ whole[2].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one @ x.t(), whole[2] @ x.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x[0] @ one.t(), x[0] @ whole[2].t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one @ x[0], whole[2] @ x[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x @ weight.mT, x @ whole.mT, rtol=1e-4, atol=1e-5)
    y = torch.randn(6, 12)
    torch.testing.assert_close(y @ one, y @ whole[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nn.functional.linear(x, one, torch.ones(12)), x @ whole[2].T + 1, rtol=1e-4, atol=1e-5)


# Experts as they are used


@pytest.mark.parametrize("reentrant", [False, True])
def test_experts_under_gradient_checkpointing(reentrant: bool) -> None:
    model = adapted(mixtral)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(logits(model).square().sum(), parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    logits(model).square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_in_half_precision(implementation: str) -> None:
    """The layer's own difference between half and single precision is what is allowed."""
    single, half = adapted(wide_mixtral), adapted(wide_mixtral).to(torch.bfloat16)
    experts, exact = (m.base_model.model.layers[0].mlp.experts for m in (half, single))
    for name, layer in experts.parameter_layers().items():
        for which, theirs in exact.adapted[name].vectors("default").items():
            layer.vectors("default")[
                which
            ].data = theirs.detach().clone()  # as a new adapter on a half-precision layer has them
    half.config._experts_implementation = implementation
    x = torch.randn(6, 16)
    choice, share = torch.tensor([[0, 1], [3, 2], [1, 3], [0, 2], [2, 1], [3, 0]]), torch.full((6, 2), 0.5)
    with torch.no_grad():
        expected = exact(x, choice, share)
        output = experts(x.bfloat16(), choice, share.bfloat16())
    assert output.dtype == torch.bfloat16
    assert float((output.float() - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_experts_under_autocast() -> None:
    model = adapted(mixtral)
    expected = logits(model).detach()
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.config._experts_implementation = implementation
        with torch.autocast("cpu", torch.bfloat16):
            output = logits(model)
        assert float((output.detach().float() - expected).abs().max()) < 0.05 * float(expected.abs().max())
        output.sum().backward()


def test_what_transformers_records_of_an_adapted_router_and_experts_is_recorded() -> None:
    model = adapted(mixtral, target_parameters=["gate.weight"])
    output = model(input_ids=IDS, use_cache=False, output_router_logits=True)
    weights, _ = dense_parameters(model)
    expected = torch.func.functional_call(
        mixtral().double(), weights, (), {"input_ids": IDS, "use_cache": False, "output_router_logits": True}
    )
    assert len(output.router_logits) == len(expected.router_logits) == 1
    torch.testing.assert_close(output.router_logits[0].double(), expected.router_logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits.double(), expected.logits, rtol=1e-4, atol=1e-4)


def test_generation_with_adapted_experts_is_that_of_the_merged_model() -> None:
    model = adapted(mixtral)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(input_ids=IDS, **settings)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=IDS, **settings), tokens)


def test_moving_and_casting_carries_parameters_along() -> None:
    model = adapted(mixtral).double()
    layer = model.vera_layers()["model.layers.0.mlp.experts.gate_up_proj"]
    assert layer.base_weight.dtype == torch.float64 and layer.vectors("default")["b"].dtype == torch.float64
    with torch.no_grad():
        assert torch.isfinite(logits(model)).all()
    meta = get_peft_model(mixtral().to("meta"), VeraConfig(r=3, target_modules="all-linear"))
    assert all(vector.is_meta for layer in meta.vera_layers().values() for vector in layer.vectors("default").values())


# What a review found


def test_what_experts_keep_for_the_backward_pass_is_the_product_with_a() -> None:
    layer = adapted(wide_mixtral).vera_layers()["model.layers.0.mlp.experts.gate_up_proj"]
    x = torch.randn(40, 16, requires_grad=True)
    offsets = torch.tensor([10, 10, 25, 40], dtype=torch.int32)
    base = layer.base_weight.detach().mT

    def saved(weight: Tensor) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            torch._grouped_mm(x, weight, offs=offsets)
        return sum(sizes.values())

    entry = layer.entries["default"]
    constants = sum(t.nbytes for t in layer.vectors("default").values())
    constants += sum(c.values(x.device, x.dtype).nbytes for c in entry.views)
    assert saved(layer.weight.transpose(1, 2)) - saved(base) <= constants + 40 * (
        3 * 4 + 8 + 1
    )  # x A^T, the groups, a mask


class NamedExperts(nn.Module):
    def __init__(self, up: str, down: str, turned: bool, width: int) -> None:
        super().__init__()
        shapes = {up: (4, width, 16), down: (4, 16, 8)}
        for name, shape in shapes.items():
            own = (shape[0], shape[2], shape[1]) if turned else shape
            self.register_parameter(name, nn.Parameter(torch.randn(own)))
        if width == 8:  # up and down alone could be either; gate and up together could not
            self.hidden_size = 16


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("up", "down", "width"), [("w1", "w2", 8), ("wi", "wo", 8), ("gate_up_proj", "down_proj", 16)])
def test_layouts_are_recognised_under_other_names(up: str, down: str, width: int, turned: bool) -> None:
    module = nn.ModuleDict({"experts": NamedExperts(up, down, turned, width)})
    layers = get_peft_model(module, VeraConfig(r=2, target_modules="all-linear")).vera_layers()
    assert {n.rpartition(".")[2]: (layer.in_features, layer.out_features) for n, layer in layers.items()} == {
        up: (16, width),
        down: (8, 16),
    }


def test_an_embedding_compiles() -> None:
    model = adapted(seeded(Table), target_modules=["table"])
    ids = torch.tensor([[3, 0, 3], [29, 7, 1]])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-6)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_what_a_module_notes_about_itself_is_kept() -> None:
    model = adapted(lambda: nn.Sequential(Counting(3, 4)), target_modules=["0"])
    model(torch.ones(1, 3))
    model(torch.ones(1, 3))
    assert model.base_model[0].base_layer.calls == 2


def test_what_is_no_matrix_is_refused_and_what_is_left_out_is_told() -> None:
    for module in (nn.ConvTranspose1d(4, 4, 3), nn.EmbeddingBag(5, 4), nn.LayerNorm((3, 6))):
        with pytest.raises(TargetError, match="does not use it as a matrix"):
            adapted(lambda module=module: nn.Sequential(module), target_modules=None, target_parameters=["weight"])
    with pytest.raises(TargetError, match="its max_norm rescales rows"):
        adapted(lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), target_modules=["0"])
    odd = nn.ModuleDict({"x": nn.Linear(3, 3), "fc": nn.LSTM(3, 3)})
    with pytest.warns(UserWarning, match="skipping fc: LSTM"):
        get_peft_model(odd, VeraConfig(r=2, target_modules="x|fc"))


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(4, 3))

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.proj.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def test_other_methods_see_adapted_parameters_and_writing_to_them_is_refused() -> None:
    model = adapted(lambda: nn.Sequential(Encoding()), target_modules=None, target_parameters=["proj"])
    x = torch.randn(2, 3)
    assert torch.equal(model(x), model.base_model[0].encode(x))
    weight = model.vera_layers()["0.proj"].weight
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"mul_ would write to .*, which has adapters"):
        weight.mul_(2)
    assert weight.div_(1) is weight


def test_hooks_of_a_convolution_with_dropout_run_once() -> None:
    model = adapted(seeded(lambda: nn.Sequential(nn.Conv1d(2, 2, 1))), target_modules=["0"], vera_dropout=0.5).train()
    seen: list[int] = []
    model.base_model[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(1, 2, 4))
    assert seen == [1]
