"""veratune's layers inside the real `peft`: what PEFT's users do with a `PeftModel`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from reference import dense_delta, projections, randomise
from tiny_models import TARGETS, main_output, randomise_trainable, tiny_inputs, tiny_model

peft = pytest.importorskip("peft")

from veratune import VeraConfig, get_peft_model  # noqa: E402
from veratune.integrations.peft import VeratuneConfig, install  # noqa: E402
from veratune.integrations.peft.layers import TunedLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
KINDS = ("bert", "gpt2", "llama", "t5", "vit")


@pytest.fixture(autouse=True)
def _installed() -> None:
    install()
    install()


def model_for(kind: str, **settings: Any) -> Any:
    config = VeratuneConfig(**{"r": 4, "target_modules": TARGETS[kind], **settings})
    return randomise_trainable(peft.get_peft_model(tiny_model(kind), config), std=0.3)


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model.eval(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_is_a_no_op_and_a_trained_one_the_dense_result(kind: str) -> None:
    base = tiny_model(kind)
    fresh = peft.get_peft_model(tiny_model(kind), VeratuneConfig(r=4, target_modules=TARGETS[kind]))
    assert isinstance(fresh, peft.PeftModel) and fresh.peft_type.value == "VERATUNE"
    assert torch.equal(logits(fresh, kind), logits(base, kind))
    model = model_for(kind)
    dense = tiny_model(kind)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, TunedLayer):
            b, d = (vector.detach() for vector in layer.vectors("default").values())
            delta = dense_delta(b, d, *projections(0, 4, layer.in_features, layer.out_features))
            weight = dense.get_submodule(name).weight
            with torch.no_grad():
                weight.add_(delta.to(weight.dtype) if layer.out_axis == 0 else delta.t().to(weight.dtype))
    torch.testing.assert_close(logits(model, kind), logits(dense, kind), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading(kind: str, tmp_path: Path) -> None:
    model = model_for(kind)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert names and all(name.startswith("vera_lambda_") for name in names)
    loaded = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    assert torch.equal(logits(loaded, kind), logits(model, kind))
    assert loaded.peft_config["default"].fingerprint == model.peft_config["default"].fingerprint
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded, kind), logits(model, kind))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_the_json_beside_the_file_is_a_copy(tmp_path: Path) -> None:
    model = model_for("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"projection_prng_key": 0', '"projection_prng_key": 5'))
    with pytest.warns(UserWarning, match="differs from the configuration inside"):
        loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    config = peft.PeftConfig.from_pretrained(tmp_path)  # from the JSON alone
    with pytest.raises(ValueError, match="trained with other projections"):
        peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path, config=config)


def test_the_peft_scheme_gives_the_outputs_of_pefts_own_vera() -> None:
    """Same key, same vectors, same outputs: on layers of several shapes."""
    theirs = peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(r=4, target_modules=TARGETS["bert"]))
    randomise_trainable(theirs, std=0.3)
    ours = model_for("bert", projection="peft")
    values = {n: p for n, p in theirs.named_parameters() if ".vera_lambda_" in n}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".vera_lambda_" in name:
                parameter.copy_(values[name])
    torch.testing.assert_close(logits(ours, "bert"), logits(theirs, "bert"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_unmerging_disabling_and_unloading(kind: str) -> None:
    model, base = model_for(kind), logits(tiny_model(kind), kind)
    expected = logits(model, kind)
    assert not torch.allclose(expected, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, kind), base)
    assert torch.equal(logits(model, kind), expected)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, kind), expected, rtol=1e-3, atol=1e-4)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model, kind), expected)
    assert torch.equal(logits(copy.deepcopy(model).unload(), kind), base)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, TunedLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-3, atol=1e-4)


def test_several_adapters_of_any_rank_and_key() -> None:
    model = model_for("bert")
    first = logits(model, "bert")
    model.add_adapter("wide", VeratuneConfig(r=9, target_modules="all-linear", projection_prng_key=7))
    assert torch.equal(logits(model, "bert"), first)
    model.set_adapter("wide")
    assert torch.equal(logits(model, "bert"), logits(tiny_model("bert"), "bert"))
    randomise_trainable(model, seed=9, std=0.3)
    second = logits(model, "bert")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".wide" in name for name in trainable)
    model.base_model.set_adapter(["default", "wide"])
    both = logits(model, "bert")
    assert not torch.allclose(both, first) and not torch.allclose(both, second)
    model.set_adapter("default")
    assert torch.equal(logits(model, "bert"), first)
    model.delete_adapter("wide")
    assert torch.equal(logits(model, "bert"), first)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("wide")


def test_training_learns_the_vectors_and_the_head_alone(tmp_path: Path) -> None:
    model = model_for("bert", modules_to_save=["classifier"], vera_dropout=0.1).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    main_output(model, "bert").square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {n for n in before if ".vera_lambda_" in n or "modules_to_save.default" in n}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = model_for("llama").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(main_output(model, "llama").square().sum(), parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    main_output(model, "llama").square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_bases(autocast: bool) -> None:
    base = tiny_model("llama").to(torch.bfloat16)
    config = VeratuneConfig(r=4, target_modules=TARGETS["llama"])
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for n, p in model.named_parameters() if ".vera_lambda_" in n}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    assert torch.isfinite(logits(model, "llama")).all()


def test_generation_and_other_kinds_of_layers() -> None:
    model = model_for("llama")
    tokens = model.generate(**tiny_inputs("llama"), max_new_tokens=4, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(**tiny_inputs("llama"), max_new_tokens=4, do_sample=False), tokens)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(5, 6, 1))
    base = copy.deepcopy(net)
    model = peft.get_peft_model(net, VeratuneConfig(r=3, target_modules=["0", "1"]))
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    assert torch.equal(model(ids), base(ids))
    randomise_trainable(model)
    assert not torch.allclose(model(ids), base(ids))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="r=0"):
        VeratuneConfig(r=0)
    with pytest.raises(ValueError, match="d_initial"):
        VeratuneConfig(d_initial=0.0)
    with pytest.raises(ValueError, match=r"0 cannot be adapted by VeRA, because .*ConvTranspose1d"):
        peft.get_peft_model(nn.Sequential(nn.ConvTranspose1d(2, 2, 1)), VeratuneConfig(r=2, target_modules=["0"]))
    model = model_for("bert")
    with pytest.raises(ValueError, match="do not support adapter_names"):
        model(**tiny_inputs("bert"), adapter_names=["default", "default"])


def test_transformers_trainer_saves_the_adapter_alone(tmp_path: Path) -> None:
    from transformers import Trainer

    from trainers import Rows, arguments

    trainer = Trainer(model_for("bert"), arguments(tmp_path, max_steps=4), train_dataset=Rows())
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


@pytest.fixture
def replaced() -> Any:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    own = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA]
    install(replace_vera=True)
    yield lambda: PEFT_TYPE_TO_TUNER_MAPPING.__setitem__(PeftType.VERA, own)
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] = own


@pytest.mark.parametrize("save_projection", [True, False])
def test_an_unchanged_script_runs_on_our_layers_and_keeps_pefts_files(
    replaced: Any, save_projection: bool, tmp_path: Path
) -> None:
    config = peft.VeraConfig(r=4, target_modules=TARGETS["bert"], save_projection=save_projection)
    ours = randomise_trainable(peft.get_peft_model(tiny_model("bert"), config), std=0.3)
    assert any(isinstance(module, TunedLayer) for module in ours.modules())
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "ours")
    assert torch.equal(logits(again, "bert"), logits(ours, "bert"))
    replaced()  # PEFT's own layers again
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "ours")
    assert not any(isinstance(module, TunedLayer) for module in theirs.modules())
    torch.testing.assert_close(logits(theirs, "bert"), logits(ours, "bert"), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours_file, theirs_file = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert ours_file.keys() == theirs_file.keys()
    assert all(torch.equal(ours_file[name], theirs_file[name]) for name in ours_file)


def test_projections_in_pefts_file_count(replaced: Any, tmp_path: Path) -> None:
    replaced()
    theirs = peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(r=4, target_modules=TARGETS["bert"]))
    randomise_trainable(theirs, std=0.3)
    with torch.no_grad():
        theirs.base_model.vera_A["default"].mul_(0.5)  # as another version of torch would have drawn others
    theirs.save_pretrained(tmp_path)
    install(replace_vera=True)
    ours = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    assert any(isinstance(module, TunedLayer) for module in ours.modules())
    torch.testing.assert_close(logits(ours, "bert"), logits(theirs, "bert"), rtol=1e-4, atol=1e-5)


def test_a_configuration_can_be_used_again() -> None:
    config = VeratuneConfig(r=4, target_modules=["0"], projection="peft")
    peft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), config)
    peft.get_peft_model(nn.Sequential(nn.Linear(5, 6)), config)


def test_a_safe_merge_that_fails_leaves_all_layers_as_they_were() -> None:
    model = model_for("bert")
    layers = [module for module in model.modules() if isinstance(module, TunedLayer)]
    with torch.no_grad():
        layers[-1].vectors("default")["b"].fill_(float("nan"))
    for merge in (lambda: model.merge_adapter(safe_merge=True), lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="not finite"):
            merge()
        assert not any(layer.merged for layer in layers)
        assert sum(isinstance(module, TunedLayer) for module in model.modules()) == len(layers)


def test_merging_a_second_adapter_into_eight_bits_adds_each_once() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from veratune.layers import quantized

    plain = nn.Sequential(nn.Linear(64, 64))
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(plain[0].state_dict())
    model = peft.get_peft_model(nn.Sequential(layer.to("cpu")), VeratuneConfig(r=4, target_modules=["0"]))
    model.add_adapter("other", VeratuneConfig(r=4, target_modules=["0"], projection_prng_key=5))
    tuned = model.base_model.model[0]
    x = torch.randn(3, 64)
    with torch.no_grad():
        for name in ("default", "other"):
            for vector in tuned.vectors(name).values():
                vector.normal_(std=0.3)
        model(x)
        before = quantized.dequantized(tuned.base_layer)
        expected = before + tuned.get_delta_weight("default") + tuned.get_delta_weight("other")
        for name in ("default", "other"):
            model.merge_adapter([name])
            model(x)
        scale = float(expected.abs().max())
        assert float((quantized.dequantized(tuned.base_layer) - expected).abs().max()) < 0.02 * scale
        model.unmerge_adapter()
        model(x)
        assert torch.equal(quantized.dequantized(tuned.base_layer), before)


def test_vera_a_and_b_are_pefts_and_for_reading() -> None:
    settings = {"r": 4, "target_modules": TARGETS["bert"], "projection_prng_key": 7}
    theirs = peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(**settings))
    model = model_for("bert", projection="peft", projection_prng_key=7)
    model.add_adapter("narrow", VeratuneConfig(r=4, target_modules=TARGETS["bert"]))
    layer = next(module for module in model.modules() if isinstance(module, TunedLayer))
    for which in ("vera_A", "vera_B"):
        expected = getattr(theirs.base_model, which)["default"]
        read = getattr(model, which)
        assert torch.equal(read["default"], expected) and getattr(layer, which)["default"] is read["default"]
        assert list(read) == ["default"]
        with pytest.raises(KeyError, match="'narrow' has separate projections for each width"):
            read["narrow"]
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            read["default"] += 1.0


class Twice(nn.Module):
    """One linear layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = self.second = nn.Linear(7, 7)
        self.other = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.other(self.first(x))))
        return out


def test_a_layer_in_several_places_computes_with_the_adapter_in_all(tmp_path: Path) -> None:
    native = get_peft_model(Twice(), VeraConfig(r=4, target_modules="all-linear", modules_to_save=[]))
    randomise(native, 0.4)
    x = torch.randn(3, 7)
    native.save_pretrained(tmp_path)
    model: Any = peft.PeftModel.from_pretrained(Twice(), tmp_path)
    torch.testing.assert_close(model(x), native(x))
    model.save_pretrained(tmp_path / "again")
    again: Any = peft.PeftModel.from_pretrained(Twice(), tmp_path / "again")
    torch.testing.assert_close(again.merge_and_unload()(x), native(x))
    assert torch.equal(model.unload()(x), Twice()(x))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["VeraModel", "its base model"])
def test_a_model_with_veratunes_own_adapters_is_refused_and_unchanged(inside: bool, tmp_path: Path) -> None:
    own = randomise_trainable(get_peft_model(tiny_model("bert"), VeraConfig(r=4, target_modules=["query"])), std=0.3)
    before = main_output(own.eval(), "bert").detach()
    with pytest.raises((TypeError, ValueError), match="VeraModel"):
        peft.get_peft_model(own.base_model if inside else own, VeratuneConfig(r=4, target_modules=["key", "query"]))
    assert torch.equal(main_output(own, "bert"), before)
    own.save_pretrained(tmp_path)


def test_an_adapter_for_each_row_is_refused() -> None:
    model = model_for("bert")
    for name in ("adapters", "adapter_names"):
        with pytest.raises(ValueError, match=f"do not support {name}"):
            model(input_ids=torch.ones(2, 3, dtype=torch.int64), **{name: ["default", "default"]})
