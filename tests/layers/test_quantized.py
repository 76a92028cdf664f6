"""Quantized base layers, by the real packages on the CPU: trained through, merged, unmerged, saved."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import dense_delta, projections, randomise
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.layers import quantized

bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao")
from torchao.quantization import (  # noqa: E402
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

IN, OUT = 64, 128
CONFIG = VeraConfig(r=4, target_modules="all-linear", modules_to_save=[])


def nets(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN)).to(dtype)


def four_bits(kind: str, double: bool) -> nn.Module:
    plain = nets(torch.float32)
    for index in (0, 2):
        layer = bitsandbytes.nn.Linear4bit(
            plain[index].in_features,
            plain[index].out_features,
            compute_dtype=torch.float32,
            quant_type=kind,
            compress_statistics=double,
        )
        layer.load_state_dict(plain[index].state_dict())
        plain[index] = layer.to("cpu")
    return plain


def eight_bits() -> nn.Module:
    plain = nets(torch.float32)
    for index in (0, 2):
        layer = bitsandbytes.nn.Linear8bitLt(
            plain[index].in_features, plain[index].out_features, has_fp16_weights=False, threshold=0.0
        )
        layer.load_state_dict(plain[index].state_dict())
        plain[index] = layer.to("cpu")
    return plain


def by_torchao(config: Any) -> nn.Module:
    plain = nets(torch.float32)
    quantize_(plain, config)
    return plain


class Opaque(nn.Module):
    """A layer that stores its weight in an unknown form, as GPTQ's and AWQ's do."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (plain.weight.detach() / scale).round().to(torch.int8).t().contiguous())
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales)


def opaque() -> nn.Module:
    plain = nets(torch.float32)
    return nn.Sequential(Opaque(plain[0]), plain[1], Opaque(plain[2]))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: four_bits("nf4", False),
    "nf4 doubly": lambda: four_bits("nf4", True),
    "fp4": lambda: four_bits("fp4", False),
    "int8": eight_bits,
    "torchao int8": lambda: by_torchao(Int8WeightOnlyConfig()),
    "torchao int4": lambda: by_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao fp8": lambda: by_torchao(Float8WeightOnlyConfig()),
    "opaque": opaque,
}


def x_of() -> Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(8))


def trained(make: Callable[[], nn.Module]) -> VeraModel:
    # bitsandbytes computes otherwise in evaluation on a CPU, so that training mode is what can be compared.
    model = get_peft_model(make().train(), copy.deepcopy(CONFIG))
    torch.manual_seed(1)
    randomise(model, scale=0.2)
    return model


def delta_of(layer: Any) -> Tensor:
    b, d = (vector.detach() for vector in layer.vectors("default").values())
    return dense_delta(b, d, *projections(0, 4, layer.in_features, layer.out_features))


@pytest.mark.parametrize("kind", MAKERS)
def test_the_adapter_is_added_to_what_the_layer_computes(kind: str) -> None:
    make = MAKERS[kind]
    model, base = trained(make), make()
    assert list(model.vera_layers()) == ["0", "2"]
    x = x_of()
    layer = model.vera_layers()["0"]
    with torch.no_grad():
        expected = base[0](x).double() + x.double() @ delta_of(layer).t()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "opaque"])
def test_a_weight_that_is_read_is_the_adapted_one(kind: str) -> None:
    model = trained(MAKERS[kind])
    layer = model.vera_layers()["0"]
    expected = quantized.dequantized(layer.base_layer).double() + delta_of(layer)
    weight = layer.weight
    torch.testing.assert_close((weight * 1).double(), expected, rtol=1e-4, atol=1e-4)
    (weight * torch.ones_like(weight)).sum().backward()
    assert all(bool((vector.grad != 0).all()) for vector in layer.vectors("default").values())


def test_a_weight_that_cannot_be_read_says_so() -> None:
    layer = trained(opaque).vera_layers()["0"]
    with pytest.raises(RuntimeError, match="the weight of 0 cannot be read while adapters are active: Opaque stores"):
        _ = layer.weight


@pytest.mark.parametrize("kind", MAKERS)
def test_training_reaches_every_vector_through_quantized_layers(kind: str) -> None:
    model = trained(MAKERS[kind])
    x = x_of().requires_grad_()
    model(x).square().mean().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    for layer in model.vera_layers().values():
        for vector in layer.vectors("default").values():
            assert vector.dtype == torch.float32 and vector.grad is not None and bool((vector.grad != 0).all())


@pytest.mark.parametrize("kind", MAKERS)
def test_saving_and_loading_over_a_quantized_base(kind: str, tmp_path: Path) -> None:
    model = trained(MAKERS[kind])
    model.save_pretrained(tmp_path)
    loaded = VeraModel.from_pretrained(MAKERS[kind](), tmp_path).train()
    with torch.no_grad():
        assert torch.equal(loaded(x_of()), model(x_of()))


def rounded(kind: str, full: Tensor) -> Tensor:
    """What a weight becomes by bitsandbytes' own rounding."""
    functional = bitsandbytes.functional
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(full.half())
        return codes.float() * (scales / 127.0)[:, None]
    if kind.startswith("torchao"):
        return full
    codes, state = functional.quantize_4bit(full, quant_type=kind[:3], compress_statistics=kind.endswith("doubly"))
    return functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "opaque"])
def test_merging_loses_what_rounding_loses_and_unmerging_gives_all_back(kind: str, training: bool) -> None:
    model = trained(MAKERS[kind]).train(training)
    randomise(model, scale=0.7)
    x = x_of()
    with torch.no_grad():
        expected = model(x)
        with model.disable_adapter():
            base = model(x)
        layer = model.vera_layers()["0"]
        full = quantized.dequantized(layer.base_layer).float() + delta_of(layer).float()
        with pytest.warns(UserWarning, match="merging into 2 quantized layers"):
            model.merge_adapter()
        torch.testing.assert_close(
            quantized.dequantized(layer.base_layer).float(), rounded(kind, full), rtol=1e-3, atol=1e-4
        )
        merged = model(x)
        assert float((merged - expected).square().mean()) < 0.1 * float((base - expected).square().mean())
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
        with model.disable_adapter():
            assert torch.equal(model(x), base)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "opaque"])
@pytest.mark.filterwarnings("ignore:veratune. merging into 2 quantized layers:UserWarning")
@torch.no_grad()
def test_what_is_written_to_a_merged_quantized_weight_is_not_lost(kind: str) -> None:
    model = trained(MAKERS[kind])
    randomise(model, scale=0.7)
    layer = model.vera_layers()["0"]
    for training in (True, False):  # evaluation packs the codes of 4 bits, and moves those of 8 bits
        model.merge_adapter()
        model.train(training)(x_of())
        assert not layer.merged_weight_changed()
        model.unmerge_adapter()
    model.train().merge_adapter()
    codes = quantized.quantized_codes(layer.base_layer)
    (layer.base_layer.weight.data if codes is None else codes).view(torch.uint8)[0] += 1
    with pytest.raises(ValueError, match="the merged weight of 0 was written to since"):
        model.unmerge_adapter()


def test_a_layer_whose_weight_cannot_be_read_is_not_merged() -> None:
    model = trained(opaque)
    message = "cannot merge into 0: Opaque stores its weight in a form that veratune cannot read"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter()
    assert model.merged_adapters == []


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def in_peft(base: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    from veratune.integrations.peft import VeratuneConfig, install

    install()
    model: nn.Module = peft.get_peft_model(base, VeratuneConfig(r=4, target_modules=["0", "2"]), adapter_name="one")
    randomise(model, scale=0.2)
    return model


def partly(base: nn.Module) -> nn.Module:
    """Adapt the first layer alone: its gradients come through one that is not adapted."""
    model = get_peft_model(base, VeraConfig(r=4, target_modules=["0"]))
    randomise(model, scale=0.2)
    return model


def natively(base: nn.Module) -> nn.Module:
    model = get_peft_model(base, copy.deepcopy(CONFIG))
    randomise(model, scale=0.2)
    return model


@pytest.mark.parametrize("adapt", [natively, partly, in_peft], ids=lambda adapt: adapt.__name__)
@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_after_an_evaluation_are_those_of_before(kind: str, adapt: Callable[[nn.Module], nn.Module]) -> None:
    model, x = adapt(MAKERS[kind]()).train(), x_of()
    before = gradients_of(model, x)
    pending = model(x).square().sum()
    model.eval()
    with torch.no_grad():
        model(x)
        model.train()
        model(x)
        model.eval()
    evaluated = gradients_of(model, x)  # as some do who want no dropout
    model.train()
    after = gradients_of(model, x)
    model.zero_grad(set_to_none=True)
    pending.backward()
    late = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(before) == (2 if adapt is partly else 4)
    for name, gradient in before.items():
        for other in (after, late):
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-4)
        # In evaluation on a CPU the 8-bit layers round their inputs too, to one in 127.
        tolerance = 2 / 127 if kind == "int8" else 1e-4
        assert float((evaluated[name] - gradient).norm() / gradient.norm()) < tolerance


@pytest.mark.parametrize("adapt", [natively, partly, in_peft], ids=lambda adapt: adapt.__name__)
@pytest.mark.parametrize("kind", ["nf4", "nf4 doubly", "fp4"])
def test_a_model_that_was_evaluated_before_it_was_adapted_learns_right(
    kind: str, adapt: Callable[[nn.Module], nn.Module]
) -> None:
    base, x = MAKERS[kind]().eval(), x_of()
    with torch.no_grad():
        base(x)
    fresh = MAKERS[kind]()
    torch.manual_seed(1)
    model = adapt(base).train()
    torch.manual_seed(1)
    expected = gradients_of(adapt(fresh).train(), x)
    for name, gradient in gradients_of(model, x).items():  # scales were rounded to bfloat16
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 0.01


@pytest.mark.parametrize("kind", ["nf4", "nf4 doubly", "fp4"])
def test_a_copy_that_was_made_after_an_evaluation_learns_right(kind: str) -> None:
    model, x = natively(MAKERS[kind]()), x_of()
    expected = gradients_of(model.train(), x)
    with torch.no_grad():
        model.eval()(x)
    for name, gradient in gradients_of(copy.deepcopy(model).train(), x).items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 0.01


def test_nothing_is_left_on_quantized_layers() -> None:
    for adapt in (natively, in_peft):
        model: Any = adapt(four_bits("nf4", False))
        base = model.unload()
        assert not any(module._forward_pre_hooks for module in base.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_layer_converted_after_adapting_says_so() -> None:
    model = get_peft_model(nets(torch.float32), CONFIG)
    converted: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="call merge_and_unload before converting"):
        converted(torch.ones(2, IN))
    randomise(model)
    expected = model(torch.ones(2, IN))
    plain: Any = torch.ao.quantization.quantize_dynamic(model.merge_and_unload(), {nn.Linear}, dtype=torch.qint8)
    assert ((plain(torch.ones(2, IN)) - expected).norm() / expected.norm()) < 0.1
