"""What hostile use has broken once: each stays mended."""

import contextlib
import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reference import dense_delta, projections, randomise, relative
from veratune import CheckpointError, TargetError, VeraConfig, VeraModel, get_peft_model, parameter_groups
from veratune.adapters.coverage import supported
from veratune.layers.lazy_weight import AdaptedWeight

LAYER = {"r": 4, "target_modules": ["0"], "modules_to_save": []}


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def adapted(**settings):
    model = get_peft_model(net(), VeraConfig(**{**LAYER, **settings}))
    randomise(model, scale=0.5)
    return model


def x_of(*shape):
    return torch.randn(*shape, 8, dtype=torch.float64)


def dense_weight(layer):
    b, d = (vector.detach() for vector in layer.vectors("default"))
    a_projection, b_projection = projections(0, d.numel(), layer.in_features, layer.out_features)
    return layer.base_weight.detach().double() + dense_delta(b, d, a_projection, b_projection)


# Models that read a weight without calling its layer


def test_a_weight_that_is_read_has_the_deltas_and_gives_gradients():
    model = adapted()
    layer, x = model.base_model[0], x_of(3)
    called = layer(x)
    read = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(read, called)
    vectors = layer.vectors("default")
    ours = torch.autograd.grad(read.square().sum(), vectors)
    theirs = torch.autograd.grad(called.square().sum(), vectors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close((layer.weight @ x.t()).t() + layer.bias, called)
    torch.testing.assert_close(torch.cat([layer.weight, layer.weight])[8:], dense_weight(layer), rtol=1e-6, atol=1e-6)
    assert type(layer.weight @ x.t()) is torch.Tensor


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_read_weight_of_a_new_adapter_changes_no_bit(dtype, bias, grad):
    """A product and a bias in one call are rounded once."""
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(512, 16, bias=bias)).to(dtype)
    inputs = [torch.randn(*shape, 512, dtype=dtype) for shape in ((7,), (5, 7), ())]
    expected = [nn.functional.linear(x, base[0].weight, base[0].bias) for x in inputs]
    layer = get_peft_model(base, VeraConfig(**LAYER)).base_model[0]
    with torch.set_grad_enabled(grad):
        for x, output in zip(inputs, expected, strict=True):
            assert torch.equal(nn.functional.linear(x, layer.weight, layer.bias), output)


def test_questions_about_a_weight_add_nothing_up():
    layer = adapted().base_model[0]
    weight = layer.weight
    assert isinstance(weight, AdaptedWeight)
    weight._compute = lambda: pytest.fail("added up for a question")
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.float64, "cpu", (8, 8))
    assert (weight.ndim, weight.size(0), weight.numel(), len(weight)) == (2, 8, 64, 8)
    assert weight.is_floating_point()
    layer.activate([])
    assert layer.weight is layer.base_layer.weight


@pytest.mark.parametrize("kind", ["mamba", "wavlm"])
def test_real_models_that_read_weights(kind):
    import transformers

    if kind == "mamba":
        config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
        model, inputs = transformers.MambaModel(config).eval(), {"input_ids": torch.tensor([[1, 2, 3, 4]])}
        targets = ["in_proj", "dt_proj", "x_proj", "out_proj"]
    else:
        config = transformers.WavLMConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8,),
            conv_kernel=(3,),
            conv_stride=(2,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
        model, inputs = transformers.WavLMModel(config).eval(), {"input_values": torch.randn(1, 200)}
        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    model = get_peft_model(model, VeraConfig(r=4, target_modules=targets))
    base = model(**inputs)[0]
    randomise(model, scale=0.3)
    output = model(**inputs)[0]
    assert relative(output, base) > 1e-3
    output.square().sum().backward()
    assert all(v.grad is not None for layer in model.vera_layers().values() for v in layer.vectors("default"))
    model.merge_adapter()
    assert relative(model(**inputs)[0], output) < 1e-4


# Derivatives


@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
def test_second_derivatives_are_refused_not_zero(route):
    model, x = adapted(route=route), x_of(3).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (model(x).sum() + grad.square().sum()).backward()
    b, _ = model.base_model[0].vectors("default")
    (grad,) = torch.autograd.grad(model(x).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


def test_torch_func_of_any_order():
    model, x = adapted(), x_of(3)
    layer = model.base_model[0]
    b, d = (vector.detach() for vector in layer.vectors("default"))
    a_projection, b_projection = projections(0, 4, 8, 8)

    def ours(b):
        values = {"0.vera_lambda_b.default": b}
        return torch.func.functional_call(model.base_model, values, (x,)).square().sum()

    def dense(b):
        weight = layer.base_weight.detach() + torch.diag(b) @ b_projection @ torch.diag(d) @ a_projection
        y = torch.relu(nn.functional.linear(x, weight, layer.bias.detach()))
        return model.base_model[2](y).square().sum()

    for transform in (
        torch.func.grad,
        torch.func.hessian,
        lambda f: torch.func.grad(lambda v: torch.func.grad(f)(v).sum()),
    ):
        torch.testing.assert_close(transform(ours)(b), transform(dense)(b), rtol=1e-5, atol=1e-5)
    tangent = torch.randn_like(b)
    torch.testing.assert_close(torch.func.jvp(ours, (b,), (tangent,)), torch.func.jvp(dense, (b,), (tangent,)))
    batch = torch.stack([b, 2 * b, -b])
    torch.testing.assert_close(torch.func.vmap(ours)(batch), torch.stack([ours(v) for v in batch]))
    samples = torch.func.vmap(torch.func.grad(lambda v, s: ours(v) * s), in_dims=(None, 0))(b, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(samples[1], 2 * samples[0])


def test_one_vector_alone_can_be_trained():
    for kept in ("vera_lambda_b", "vera_lambda_d"):
        model, x = adapted(), x_of(300)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kept in name)
        model(x).square().sum().backward()
        reference = adapted()
        reference(x).square().sum().backward()
        grads = {name: p.grad for name, p in reference.named_parameters()}
        for name, parameter in model.named_parameters():
            if kept in name:
                torch.testing.assert_close(parameter.grad, grads[name])
            else:
                assert parameter.grad is None


# The pool


@pytest.mark.parametrize("shrink", [False, True])
def test_growing_or_trimming_in_inference_mode_harms_no_training(shrink):
    model = get_peft_model(nn.Sequential(nn.Linear(53, 53)), VeraConfig(**LAYER), adapter_name="small")
    x = torch.randn(2, 53)
    model(x).sum().backward()
    model.add_adapter("large", VeraConfig(**{**LAYER, "r": 16}))
    model.set_adapter(["small", "large"])
    with torch.inference_mode():
        model(x)
        if shrink:
            model.delete_adapter("large")
    model.set_adapter("small")
    model(x).sum().backward()


def test_a_first_use_inside_transformations_harms_nothing_later():
    model = get_peft_model(nn.Sequential(nn.Linear(59, 59)), VeraConfig(**LAYER))
    x, values = torch.randn(2, 59), {k: v.detach() for k, v in model.named_parameters()}

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    inner = torch.func.grad(loss)
    torch.func.grad(lambda v: inner(v)["base_model.0.vera_lambda_b.default"].sum())(values)
    torch.func.grad(loss)(values)
    model(x).sum().backward()


@pytest.mark.parametrize("warm", [False, True])
def test_export_leaves_the_model_as_it_was(warm):
    model = get_peft_model(nn.Sequential(nn.Linear(61, 67)), VeraConfig(**LAYER)).eval()
    randomise(model)
    x = torch.randn(4, 61)
    twin = copy.deepcopy(model)
    expected = model(x).detach() if warm else None
    exported = torch.export.export(twin, (x,), strict=False)
    expected = model(x).detach() if expected is None else expected
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(exported.module()(x), expected)
    assert not torch.equal(twin(x), twin.base_model[0].base_layer(x))


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)


def test_a_parameter_as_input_is_not_remembered():
    """Fused optimizers write to a parameter without torch's counting it."""
    model = get_peft_model(TwoReaders().double(), VeraConfig(r=4, target_modules=["q", "k"], route="factored"))
    randomise(model)
    prompt = nn.Parameter(x_of(3))
    optimizer = torch.optim.AdamW([prompt], lr=0.1, fused=True)
    model.q(prompt).sum().backward()
    optimizer.step()
    assert torch.equal(model.k(prompt), model.k(prompt.detach().clone()))


# Adapters beside each other


def test_an_adapter_cannot_train_in_full_what_another_adapts():
    model = adapted(target_modules=["0", "2"])
    state = list(model.adapter_state("default").vectors)
    with pytest.raises(TargetError, match="another adapter adapts 2"):
        model.add_adapter("b", VeraConfig(**{**LAYER, "modules_to_save": ["2"]}))
    assert list(model.adapter_state("default").vectors) == state
    other = adapted(modules_to_save=["2"])
    with pytest.raises(TargetError, match="another adapter trains 2 in full"):
        other.add_adapter("b", VeraConfig(**{**LAYER, "target_modules": ["2"]}))
    assert list(other.peft_config) == ["default"]
    other.add_adapter("c", VeraConfig(**{**LAYER, "target_modules": "all-linear"}))
    assert list(other.adapter_state("c").vectors) == ["0"]


def test_nor_can_a_loaded_one(tmp_path):
    adapted(modules_to_save=["2"]).save_pretrained(tmp_path)
    model = adapted(target_modules=["0", "2"])
    expected = model(x := x_of(3))
    with pytest.raises(CheckpointError, match="beside"):
        model.load_adapter(tmp_path, "b")
    assert torch.equal(model(x), expected)
    assert list(model.peft_config) == ["default"]


def test_a_new_adapter_is_a_no_op_while_another_has_trained_biases():
    base, x = net()(y := x_of(3)), y
    model = adapted(bias="all")
    with torch.no_grad():
        for bias in model.adapter_state("default").biases.values():
            bias.add_(1)
    model.add_adapter("c", VeraConfig(**{**LAYER, "bias": "all"}))
    model.add_adapter("d", VeraConfig(**{**LAYER, "modules_to_save": ["2"]}))
    for name in ("c", "d"):
        model.set_adapter(name)
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("name", ["_keys", "_parameters", "training", "_version"])
def test_names_that_containers_use(name):
    with pytest.raises(ValueError, match="uses the name itself"):
        get_peft_model(net(), VeraConfig(**LAYER), adapter_name=name)


def test_a_module_that_cannot_be_copied_leaves_the_model_unchanged():
    model = net()
    model[2].thing = (i for i in range(3))  # generators cannot be copied
    flags = [p.requires_grad for p in model.parameters()]
    types = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="generator"):
        get_peft_model(model, VeraConfig(**{**LAYER, "modules_to_save": ["2"]}))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(m) for m in model.modules()] == types
    host = get_peft_model(model, VeraConfig(**LAYER))
    with pytest.raises(TypeError, match="generator"):
        host.add_adapter("b", VeraConfig(**{**LAYER, "modules_to_save": ["2"]}))
    assert list(host.base_model[0].entries) == list(host.peft_config) == ["default"]


@pytest.mark.parametrize("container", ["list", "sequential", "state"])
def test_modules_to_save_of_odd_kinds(container):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            parts = [Extra(8, 8) if container == "state" else nn.Linear(8, 8)]
            self.many = nn.ModuleList(parts) if container == "list" else nn.Sequential(*parts)

        def forward(self, x):
            return self.many[0](self.first(x))

    config = VeraConfig(r=2, target_modules=["first"], modules_to_save=["many"])
    if container == "sequential":
        assert get_peft_model(Holder(), config)(torch.randn(2, 8)).shape == (2, 8)
    else:
        with pytest.raises(TargetError, match="many"):
            get_peft_model(Holder(), config)


# Layers


def test_layers_that_cannot_be_right_are_refused():
    with pytest.raises(TargetError, match="complex"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), VeraConfig(**LAYER))
    with pytest.raises(ValueError, match="lazy"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), VeraConfig(**LAYER))


def test_arguments_by_name_and_a_bias_taken_away():
    model, x = adapted(), x_of(3)
    layer = model.base_model[0]
    assert torch.equal(layer(input=x), layer(x))
    bias, layer.bias = layer.bias, None
    assert layer.base_layer.bias is None
    torch.testing.assert_close(layer(x), x @ dense_weight(layer).t(), rtol=1e-6, atol=1e-6)
    layer.base_layer.bias = bias


def test_a_failed_unmerge_keeps_the_weight():
    model = adapted()
    layer = model.base_model[0]
    original = layer.base_layer.weight
    model.merge_adapter()
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    with contextlib.suppress(KeyError, AttributeError, RuntimeError, ValueError):
        model.unmerge_adapter()
    nn.utils.parametrize.remove_parametrizations(layer.base_layer, "weight")
    if model.merged_adapters:
        model.unmerge_adapter()
    assert layer.base_layer.weight is original


# Files


def test_a_native_save_interrupted_over_a_peft_export(tmp_path):
    model, x = adapted(), x_of(3)
    model.export_peft(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(config)  # killed before the second file
    with pytest.warns(UserWarning, match="differs"):
        loaded = VeraModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    "text", ['{"r": ' + "9" * 5000 + "}", "[" * 100000, '{"format_version": 1, "sha256": ' + "9" * 5000 + "}"]
)
def test_absurd_json_is_a_checkpoint_error(text, tmp_path):
    adapted().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="JSON"):
        VeraModel.from_pretrained(net(), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {"veratune": text})
    with pytest.raises(CheckpointError, match="damaged"):
        VeraModel.from_pretrained(net(), tmp_path)


@pytest.mark.parametrize("pattern", ["a{99999999999999}", "(" * 5000 + ")" * 5000])
def test_absurd_patterns(pattern):
    with pytest.raises(ValueError, match=r"target_modules.*is not a regular expression"):
        VeraConfig(target_modules=pattern)
    with pytest.raises(ValueError, match="rank_pattern"):
        VeraConfig(rank_pattern={"(?i)0": 2})
    with pytest.raises(ValueError, match="layers_pattern"):
        VeraConfig(layers_pattern="h(", layers_to_transform=0)


def test_odd_base_model_names_can_be_saved(tmp_path):
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "\ud800 lone"
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "\ud800 lone"
    VeraModel.from_pretrained(net(), tmp_path)


def test_two_names_of_one_module(tmp_path):
    separate = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    get_peft_model(separate, VeraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path)
    layer = nn.Linear(8, 8)
    shared = nn.Sequential(layer, layer)
    with pytest.raises(CheckpointError, match="one and the same module"):
        VeraModel.from_pretrained(shared, tmp_path)
    assert shared[0] is shared[1] is layer
    assert layer.weight.requires_grad


def test_loading_onto_a_model_without_values(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="meta device"):
        VeraModel.from_pretrained(net().to("meta"), tmp_path)


# Configuration


def test_exclusions_and_indices_that_match_nothing():
    with pytest.warns(UserWarning, match="exclude_modules"):
        get_peft_model(net(), VeraConfig(**LAYER, exclude_modules=["zzz"]))
    stack = nn.Module()
    stack.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(TargetError, match=r"no layer 99.*\[0, 1\]"):
        get_peft_model(stack, VeraConfig(**LAYER, layers_to_transform=[0, 99], layers_pattern="layers"))


# What a sentence-by-sentence review found


def test_an_export_interrupted_between_its_files_is_refused_by_all(tmp_path, monkeypatch):
    import peft

    from veratune.checkpoint import files

    (tmp_path / "folder").mkdir()  # so that directories cannot be exchanged
    adapted(projection="peft").export_peft(tmp_path)
    original = files.Path.replace
    replaced = []

    def killed_before_the_second(self, target):
        if replaced:
            raise KeyboardInterrupt
        replaced.append(target)
        return original(self, target)

    monkeypatch.setattr(files.Path, "replace", killed_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        adapted(projection="peft", projection_prng_key=1, r=3).export_peft(tmp_path)
    monkeypatch.undo()
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError):
        VeraModel.from_pretrained(net(), tmp_path)
    with pytest.raises(Exception, match="adapter_config"):
        peft.PeftModel.from_pretrained(net(), str(tmp_path))


def test_an_export_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    adapted(projection="peft").export_peft(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    for export in ("export_peft", "export_lora"):
        with pytest.raises(OSError, match="No space left"):
            getattr(adapted(projection="peft", projection_prng_key=1), export)(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["2"], "bias": "all"}, {"inference_mode": True}], ids=str)
def test_a_merged_model_is_as_trainable_as_it_was(settings):
    model = net()
    model[0].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    merged = get_peft_model(model, VeraConfig(**{**LAYER, **settings})).merge_and_unload()
    assert {name: p.requires_grad for name, p in merged.named_parameters()} == flags


@pytest.mark.parametrize("pattern", ["layer|h", "(layers)", "x|(layers)"])
def test_layer_patterns_with_groups_and_alternatives(pattern):
    stack = nn.Module()
    stack.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    config = VeraConfig(**LAYER, layers_to_transform=[1], layers_pattern=pattern)
    if "layers" in pattern:
        assert list(get_peft_model(stack, config).vera_layers()) == ["layers.1.0"]
    else:
        with pytest.raises(TargetError, match=r"stacks are called \['layers'\]"):
            get_peft_model(stack, config)


def test_numbers_that_are_too_large():
    with pytest.raises(ValueError, match=r"d_initial.*must be a finite number"):
        VeraConfig(d_initial=10**400)
    from veratune import parameter_groups

    for settings in ({"lr": -1.0}, {"head_lr": float("nan")}, {"weight_decay": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            parameter_groups(adapted(), **settings)


def test_set_adapter_within_disable_adapter_is_refused():
    model = adapted()
    model.add_adapter("other", VeraConfig(**LAYER))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter(), pytest.raises(ValueError, match="within disable_adapter"):
        model.set_adapter("other")
    assert model.active_adapters == ["default"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model.set_adapter("other")


def test_a_string_is_one_name_and_pefts_arguments_are_known(tmp_path):
    model = adapted()
    model.merge_adapter("default")
    assert model.merged_adapters == ["default"]
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "a", safe_serialization=True, selected_adapters="default", is_main_process=True)
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="never pickles"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(TypeError, match=r"low_cpu_mem_usage.*subfolder"):
        VeraModel.from_pretrained(net(), tmp_path / "a", low_cpu_mem_usage=True)


def test_a_change_of_dtype_lets_the_old_projections_go():
    from veratune import projection_pool

    model = get_peft_model(nn.Sequential(nn.Linear(71, 71)), VeraConfig(**LAYER))
    model(torch.randn(1, 71))
    model.to(torch.bfloat16)
    model(torch.randn(1, 71).bfloat16())
    assert {info.dtype for info in projection_pool.summary() if info.width == 71} == {torch.bfloat16}


def test_deleting_and_merging_free_projections_by_themselves():
    from veratune import projection_pool

    model = get_peft_model(nn.Sequential(nn.Linear(73, 73)), VeraConfig(**LAYER))
    model.add_adapter("large", VeraConfig(**{**LAYER, "r": 64}))
    model.set_adapter(["default", "large"])
    model(torch.randn(1, 73))
    model.delete_adapter("large")
    assert {info.rank for info in projection_pool.summary() if info.width == 73} == {4}
    model.merge_adapter()
    assert not any(info.width == 73 for info in projection_pool.summary())


def test_an_adapted_tied_head_can_be_tied_again():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    base = transformers.LlamaForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="lm_head shares its weight"):
        model = get_peft_model(base, VeraConfig(r=4, target_modules=["lm_head"]))
    randomise(model)
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    base.tie_weights()
    assert base.lm_head.base_weight is base.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, expected)


PICKLED = """
import pickle, sys, torch
model, x, expected = pickle.load(open(sys.argv[1], "rb"))
assert torch.equal(model(x), expected)
print("equal")
"""


def test_a_pickle_draws_its_projections_in_another_process(tmp_path):
    import pickle
    import subprocess
    import sys

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), VeraConfig(**LAYER))
    randomise(model)
    x = torch.randn(3, 8)
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps((model, x, model(x).detach())))
    result = subprocess.run([sys.executable, "-c", PICKLED, str(path)], capture_output=True, text=True, check=False)
    assert result.stdout == "equal\n", result.stderr


# What a new user stumbled over


def test_a_frozen_adapter_is_loaded_in_eval_mode_and_says_how_to_train_it(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = net().train()
    loaded = VeraModel.from_pretrained(base, tmp_path)
    assert not loaded.training and not any(module.training for module in loaded.modules())
    with pytest.raises(ValueError, match="is_trainable=True"):
        parameter_groups(loaded)
    again = VeraModel.from_pretrained(net().train(), tmp_path, is_trainable=True)
    assert again.training and parameter_groups(again)
    with pytest.raises(TypeError, match="get_peft_model"):
        parameter_groups(net())


def test_no_single_active_adapter_says_what_to_do():
    model = adapted()
    model.add_adapter("other", VeraConfig(r=2, target_modules="all-linear"))
    model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="give adapter_name, or choose one with set_adapter"):
        model.explain_routes(tokens=4)


def test_loading_what_is_no_adapter_says_what_it_is(tmp_path):
    with pytest.raises(CheckpointError, match="holds no adapter"):
        VeraModel.from_pretrained(net(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds a whole model"):
        VeraModel.from_pretrained(net(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model = get_peft_model(net(), VeraConfig(r=2, target_modules="all-linear"), "one")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"in its folders \['one'\]: name one of them with subfolder="):
        VeraModel.from_pretrained(net(), tmp_path)


def test_an_adapter_of_a_shallower_model_is_loaded_with_a_warning(tmp_path):
    get_peft_model(nn.Sequential(nn.Linear(3, 3)), VeraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path
    )
    deeper = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="adapts 1 of the 2 layers .* and not 2: is it the model"):
        VeraModel.from_pretrained(deeper, tmp_path)


def test_a_name_in_place_of_a_list_is_told_from_a_regular_expression():
    model = nn.ModuleDict({"outer": nn.ModuleDict({"query": nn.Linear(3, 3)})})
    with pytest.raises(ValueError, match=r"A list names the ends of modules' names: \['query'\]"):
        get_peft_model(model, VeraConfig(r=2, target_modules="query"))
    with pytest.raises(ValueError, match='Did you mean "all-linear"'):
        get_peft_model(model, VeraConfig(r=2, target_modules="all_linear"))


@pytest.mark.parametrize("normalised", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_convolution_without_a_weight_of_its_own_is_refused_with_the_reason(normalised):
    base = nn.Sequential(normalised(nn.Conv1d(4, 4, 3)), nn.Linear(4, 4))
    assert "0" not in {info.name for info in supported(base) if info.by == "target_modules"}
    with pytest.raises(TargetError, match="0: its weight is computed from other parameters"):
        get_peft_model(base, VeraConfig(**LAYER))
    assert list(get_peft_model(base, VeraConfig(r=4, target_modules="all-linear")).vera_layers()) == ["1"]
