"""Weights that a model reads without calling their layer: the adapted values, and never a place to write to."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from reference import randomise, relative
from small_net import FIRST_LAYER, dense_weight, small_adapted, small_inputs
from veratune import VeraConfig, get_peft_model
from veratune.layers.lazy_weight import AdaptedWeight

KINDS = ("linear", "table", "square", "conv")
ONES = torch.ones(6, 6)
TOKENS = torch.tensor([[1, 2, 3]])


class Net(nn.Module):
    """Calls its embedding, and reads all weights itself as well, as a model with tied embeddings does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.square = nn.Embedding(6, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.linear = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.conv1d((self.table(tokens) + self.square(tokens)).mT, self.conv.weight, self.conv.bias).mT
        return F.linear(F.linear(x @ self.linear.weight.T, self.square.weight), self.table.weight)


def adapted(plugin: bool) -> tuple[Any, Net]:
    torch.manual_seed(0)
    net = Net()
    settings: dict[str, Any] = {"r": 3, "target_modules": list(KINDS)}
    if plugin:
        peft = pytest.importorskip("peft")
        from veratune.integrations.peft import VeratuneConfig, install

        install()
        model: Any = peft.get_peft_model(net, VeratuneConfig(**settings))
    else:
        model = get_peft_model(net, VeraConfig(**settings))
    torch.manual_seed(1)
    randomise(model, 0.4)
    return model, net


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_the_weight_with_the_delta(kind: str, plugin: bool) -> None:
    layer: Any = getattr(adapted(plugin)[1], kind)
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer.weight * 1, expected)
    torch.testing.assert_close(F.linear(ONES, layer.weight.flatten(1)), ONES @ expected.flatten(1).T)
    b, _ = layer.vectors("default").values()
    (gradient,) = torch.autograd.grad((layer.weight * 2).sum(), b)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_round_what_is_read(kind: str) -> None:
    layer: Any = getattr(adapted(False)[1], kind)
    expected = layer.weight * 1
    with torch.autocast("cpu"):
        assert torch.equal(layer.weight * 1, expected)


class Product(torch.autograd.Function):
    """What fused kernels do: x W^T, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("read", [lambda weight: weight, lambda weight: weight.T.T], ids=["weight", "transposed"])
def test_an_autograd_function_that_is_given_the_weight_trains_the_vectors(plugin: bool, read: Any) -> None:
    layer: Any = adapted(plugin)[1].linear
    x = torch.randn(3, 6, requires_grad=True)
    wanted = [x, *layer.vectors("default").values()]
    expected = torch.autograd.grad(F.linear(x, layer.weight).square().sum(), wanted)
    output = Product.apply(x, read(layer.weight))  # type: ignore[no-untyped-call]
    for gradient, right in zip(torch.autograd.grad(output.square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(gradient, right)


def test_other_adapters_in_the_backward_pass_of_such_a_function_are_refused() -> None:
    model, net = adapted(False)
    weight: Any = net.linear.weight
    output = Product.apply(torch.randn(3, 6), weight)  # type: ignore[no-untyped-call]
    model.set_adapter([])
    with pytest.raises(RuntimeError, match="different adapters or vectors in the backward pass"):
        output.sum().backward()


def test_a_kernel_is_given_the_address_of_the_adapted_values() -> None:
    layer: Any = adapted(False)[1].linear
    weight = layer.weight
    address = weight.data_ptr()
    assert weight.stride() == (6, 1)
    _others = [torch.zeros(6, 6) for _ in range(20)]  # would reuse the memory, were it free
    values = torch.tensor(list((ctypes.c_float * 36).from_address(address))).view(6, 6)
    assert torch.equal(values, weight * 1)


@pytest.mark.parametrize("plugin", [False, True])
def test_a_model_that_reads_them_computes_as_when_merged(plugin: bool) -> None:
    model, _ = adapted(plugin)
    output = model(TOKENS)
    model.merge_adapter()
    torch.testing.assert_close(output, model(TOKENS))


def set_item(weight: Any) -> None:
    weight[0] = 3.0


def set_data(weight: Any) -> None:
    weight.data = ONES


def add_in_place(weight: Any) -> None:
    weight += 1


WRITES: dict[str, Callable[[Any], Any]] = {
    "item": set_item,
    "data": set_data,
    "in place": add_in_place,
    "through data": lambda weight: weight.data.copy_(torch.ones(weight.shape)),
    "limited": lambda weight: weight.data.clamp_(-1e-3, 1e-3),
    "a row": lambda weight: weight[1].zero_(),
    "a row of data": lambda weight: weight.data[1].zero_(),
    "detached": lambda weight: weight.detach().zero_(),
    "a view": lambda weight: weight.view(-1).zero_(),
    "a chunk": lambda weight: weight.chunk(2)[0].fill_(1.0),
    "transposed": lambda weight: weight.flatten(1).t().zero_(),
    "normal": init.normal_,
    "kaiming": lambda weight: init.kaiming_uniform_(weight.flatten(1)),
    "constant": lambda weight: init.constant_(weight, 1.0),
    "orthogonal": init.orthogonal_,
    "out": lambda weight: torch.add(torch.ones(weight.shape), 1, out=weight),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
    "flag": lambda weight: setattr(weight, "requires_grad", True),
}


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_writing_to_it_is_refused(write: str, plugin: bool) -> None:
    _, net = adapted(plugin)
    for kind in KINDS:
        layer: Any = getattr(net, kind)
        before = layer.weight * 1
        with pytest.raises(RuntimeError, match=f"would write to weight of {kind}, which has adapters"):
            WRITES[write](layer.weight)
        assert torch.equal(layer.weight * 1, before)


@pytest.mark.parametrize("plugin", [False, True])
def test_limits_that_the_values_keep_lose_nothing(plugin: bool) -> None:
    """As Gemma 3n limits the coefficients of each layer while it is trained."""
    _, net = adapted(plugin)
    for kind in KINDS:
        layer: Any = getattr(net, kind)
        before = layer.weight * 1
        layer.weight.data.clamp_(-1e6, max=1e6)
        assert torch.equal(layer.weight * 1, before)


@torch.no_grad()
def test_without_active_adapters_the_weight_itself_is_written() -> None:
    model, net = adapted(plugin=False)
    model.set_adapter([])
    for kind in KINDS:
        layer: Any = getattr(net, kind)
        init.constant_(layer.weight, 2.0)
        assert (layer.base_layer.weight == 2.0).all()


@pytest.mark.parametrize("kind", ["table", "conv"])
def test_an_export_misses_no_layer_whose_weight_a_function_reads(kind: str, tmp_path: Path) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(7, 6), nn.Conv1d(6, 6, 1)

        def forward(self, tokens: Tensor) -> Tensor:
            modules = dict(self.named_children())
            return F.embedding(tokens, modules["table"].weight) @ modules["conv"].weight.squeeze(-1)

    model = get_peft_model(Reading(), VeraConfig(r=2, target_modules=[kind]))
    layer: Any = model.get_submodule(f"base_model.{kind}")
    assert layer.weight.dtype == torch.float32 and layer.weight.shape[1] == 6
    assert not layer.weight_was_read
    model(TOKENS)
    with pytest.raises(ValueError, match=f"{kind}: the model computes with its weight"):
        model.export_lora(tmp_path)


def test_a_weight_that_is_read_has_the_deltas_and_gives_gradients():
    model = small_adapted()
    layer, x = model.base_model[0], small_inputs(3)
    called = layer(x)
    read = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(read, called)
    vectors = list(layer.vectors("default").values())
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
    layer = get_peft_model(base, VeraConfig(**FIRST_LAYER)).base_model[0]
    with torch.set_grad_enabled(grad):
        for x, output in zip(inputs, expected, strict=True):
            assert torch.equal(nn.functional.linear(x, layer.weight, layer.bias), output)


def test_questions_about_a_weight_add_nothing_up():
    layer = small_adapted().base_model[0]
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
    assert all(v.grad is not None for layer in model.vera_layers().values() for v in layer.vectors("default").values())
    model.merge_adapter()
    assert relative(model(**inputs)[0], output) < 1e-4
