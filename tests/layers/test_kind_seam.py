"""A layer kind is one class and one line in `LAYER_KINDS`: a toy does what ours do, or is refused with a message."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from reference import projections, randomise
from small_net import TwoLayers, all_adapted
from veratune import AdapterBank, TargetError, VeraConfig, VeraModel, get_peft_model, supported
from veratune.layers.base import VeraLayer
from veratune.layers.geometry import Geometry
from veratune.layers.kind import Export
from veratune.layers.registry import LAYER_KINDS


class Permuted(nn.Module):
    """A user's module: y = (x table)[:, order] + shift, that is, a linear map whose weight is stored otherwise."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(inputs, outputs))
        self.shift = nn.Parameter(torch.randn(outputs))
        self.register_buffer("order", torch.randperm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = (x @ self.table)[..., self.order] + self.shift
        return output


class VeraPermuted(VeraLayer):
    kind = "permuted"
    weight_name = "table"
    in_all_linear = True
    chooses_route = True

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, Permuted)

    @classmethod
    def geometry_of(cls, module: nn.Module) -> Geometry:
        return Geometry(*module.table.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()[self.base_layer.order]

    def like_weight(self, matrix: Tensor) -> Tensor:
        return matrix[torch.argsort(self.base_layer.order)].t()

    def weight_readable(self, name: str) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        self.check_recomputation()
        output: Tensor
        if self.added_adapters:
            output = self.product(x, self.matrix(self.base_weight), None, self.base_layer.shift)
        else:
            output = self.base_layer(x)
        return output


class VeraPermutedLora(VeraPermuted):
    """The same with a statement that LoRAs can hold it."""

    exports: ClassVar[frozenset[Export]] = frozenset(("lora", "vllm"))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    LAYER_KINDS.insert(0, VeraPermuted)
    yield
    del LAYER_KINDS[0]


def toy_net() -> TwoLayers:
    return TwoLayers(Permuted, (6, 8, 5)).double()


def adapted(**settings: Any) -> VeraModel:
    return all_adapted(toy_net(), r=3, **settings)


X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def reference(model: VeraModel, x: Tensor) -> Tensor:
    """Float64 dense algebra, with a weight (out, in) that is read off the toy's outputs for unit vectors."""
    base = toy_net()
    for name, layer in model.vera_layers().items():
        b, d = layer.vectors("default").values()
        plain = base.get_submodule(name)
        with torch.no_grad():
            bias = plain(torch.zeros(1, layer.in_features, dtype=torch.float64))
            weight = (plain(torch.eye(layer.in_features, dtype=torch.float64)) - bias).t()
        a, b_projection = projections(0, 3, layer.in_features, layer.out_features)
        x = x @ (weight + torch.diag(b) @ b_projection @ torch.diag(d) @ a).t() + bias
        x = torch.tanh(x) if name == "first" else x
    return x


@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
def test_it_is_trained_by_every_route(route: str) -> None:
    model = adapted(route=route)
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [tuple(vector.shape) for vector in vectors] == [(8,), (3,), (5,), (3,)]
    x = X.clone().requires_grad_()
    expected, actual = reference(model, x), model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    for found, right in zip(
        torch.autograd.grad(actual.square().sum(), [x, *vectors]),
        torch.autograd.grad(expected.square().sum(), [x, *vectors]),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(model, (x,))


def test_two_adapters_add_up() -> None:
    model = adapted()
    model.add_adapter("other", VeraConfig(r=2, target_modules=["second"], projection_prng_key=7))
    randomise(model)
    outputs = {}
    for names in ([], ["default"], ["other"], ["default", "other"]):
        model.set_adapter(names)
        with torch.no_grad():
            outputs[tuple(names)] = model.base_model.second(X.new_ones(2, 8))
    sums = [outputs["default",] + outputs["other",], outputs[()] + outputs["default", "other"]]
    torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(outputs["default",], outputs["default", "other"])


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = VeraModel.from_pretrained(toy_net(), tmp_path)
    assert torch.equal(loaded(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_it_is_merged_and_unmerged_to_the_bit() -> None:
    model = adapted()
    table = model.base_model.second.base_layer.table
    bits = table.detach().clone()
    expected = model(X).detach()
    model.merge_adapter()
    assert not torch.equal(model.base_model.second.base_layer.table, bits)
    torch.testing.assert_close(model(X), expected, rtol=1e-6, atol=1e-7)
    model.unmerge_adapter()
    assert model.base_model.second.base_layer.table is table and torch.equal(table, bits)
    assert torch.equal(model(X), expected)
    plain = model.merge_and_unload()
    assert type(plain.second) is Permuted
    torch.testing.assert_close(plain(X), expected, rtol=1e-6, atol=1e-7)


def test_its_weight_can_be_read_without_a_call() -> None:
    model = adapted()
    layer = model.base_model.second
    weight = layer.matrix(layer.weight + 0)
    x = X.new_ones(2, 8)
    torch.testing.assert_close(x @ weight.t() + layer.base_layer.shift, layer(x), rtol=1e-6, atol=1e-7)
    assert layer.weight_was_read


def test_it_is_listed() -> None:
    model = adapted()
    for table in (supported(toy_net()), supported(model.base_model)):
        assert [(info.name, info.kind, info.by) for info in table if info.kind != "vector"] == [
            ("first.weight", "linear", "all-linear"),
            ("second.table", "permuted", "all-linear"),
        ]
        assert table.coverage() == 1.0
    (_, routes) = model.explain_routes(64)
    assert (routes.layer, routes.shape.in_features, routes.shape.out_features) == ("second", 8, 5)


def test_it_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from veratune.cli import main

    adapted().save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) in (None, 0)
    shown = json.loads(capsys.readouterr().out)
    assert "second" in json.dumps(shown)


def test_what_it_does_not_state_is_refused(tmp_path: Path) -> None:
    model = adapted()
    for export, message in (
        (model.export_peft, r"PEFT's VeRA cannot hold the adapter on second \(permuted\)"),
        (model.export_lora, r"PEFT's LoRA cannot hold the adapter on second: .*\(permuted\)"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for settings, message in (
        ({"vera_dropout": 0.1}, "vera_dropout=0.1 is not supported on second"),
        ({"fused_parts": {"second": 5}}, "fused_parts: second"),
        ({"projection": "peft"}, "projection='peft' cannot adapt second"),
    ):
        net = toy_net()
        with pytest.raises(TargetError, match=message):
            get_peft_model(net, VeraConfig(r=3, target_modules="all-linear", **settings))
        assert type(net.second) is Permuted
    with pytest.raises(ValueError, match="second cannot be in a bank: second is adapted, but it is a Permuted"):
        AdapterBank(toy_net(), VeraConfig(r=3, target_modules="all-linear"), capacity=2)


def test_it_is_exported_as_a_lora_if_it_says_so(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    LAYER_KINDS[0] = VeraPermutedLora
    model = adapted()
    model.export_lora(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = model.base_model.second
    product = tensors["base_model.model.second.lora_B.weight"] @ tensors["base_model.model.second.lora_A.weight"]
    torch.testing.assert_close(
        layer.like_weight(product.double()), layer.get_delta_weight("default"), rtol=1e-5, atol=1e-5
    )


def test_the_plug_in_for_peft_trains_and_merges_it() -> None:
    peft = pytest.importorskip("peft")
    import pickle

    import veratune.integrations.peft as plugin

    plugin.install()
    config = plugin.VeratuneConfig(r=3, target_modules=["first", "second"])
    model = peft.get_peft_model(toy_net(), config)
    torch.manual_seed(4)
    randomise(model)
    assert type(model.base_model.model.second).__name__ == "TunedVeraPermuted"
    torch.testing.assert_close(model(X), adapted()(X), rtol=1e-6, atol=1e-6)
    assert torch.equal(
        pickle.loads(pickle.dumps(model.base_model.model.second))(X.new_ones(1, 8)),
        model.base_model.model.second(X.new_ones(1, 8)),
    )
    expected = model(X).detach()
    plain = model.merge_and_unload()
    assert type(plain.second) is Permuted
    torch.testing.assert_close(plain(X), expected, rtol=1e-6, atol=1e-6)
