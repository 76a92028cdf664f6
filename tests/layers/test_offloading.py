"""accelerate's offloading, before and after adapting: the right values, or a refusal before anything is computed."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tiny_models import TARGETS, main_output, randomise_trainable, tiny_model
from veratune import AdapterBank, VeraConfig, VeraModel, get_peft_model
from veratune.checkpoint.native import read_native
from veratune.layers import VeraConv, VeraEmbedding, VeraParameter

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_submodules  # noqa: E402

CPU = torch.device("cpu")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(2, *x.shape[-2:]), self.up_proj.mT).sum(0)


class Kinds(nn.Module):
    """A layer of each kind, one with a bias, one whose weight is read without a call, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 1)
        self.experts = Experts()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.embed(ids))
        x = self.conv(x.t().unsqueeze(0)).squeeze(0).t()
        head: Tensor = self.head(self.norm(self.experts(x)))
        return head


class Reads(Kinds):
    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids) @ self.read.weight.t()
        return x


IDS = torch.tensor([1, 5, 2, 5])
ALL = VeraConfig(
    r=3, target_modules=["embed", "linear", "conv"], target_parameters=["experts.up_proj"], modules_to_save=[]
)


def kinds(kind: type[Kinds] = Kinds) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def cpu_offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def disk_offload(model: nn.Module) -> None:
    accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=CPU)


def dispatch(model: nn.Module) -> None:
    names = [name for name, _ in model.named_children()]
    device_map = {name: "disk" if index % 2 == 0 else "cpu" for index, name in enumerate(names)}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tempfile.mkdtemp())


WAYS = pytest.mark.parametrize("offload", [cpu_offload, disk_offload, dispatch], ids=lambda way: way.__name__)


def fill(model: nn.Module) -> VeraModel:
    randomise_trainable(model, seed=1, std=0.4)
    assert isinstance(model, VeraModel)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(actual: VeraModel, expected: VeraModel, call: Callable[[Any], Tensor]) -> None:
    """Compare outputs and gradients of a model whose weights are offloaded with those of one whose weights are not."""
    with torch.no_grad():
        torch.testing.assert_close(call(actual), call(expected), rtol=1e-4, atol=1e-5)
        with actual.disable_adapter(), expected.disable_adapter():
            torch.testing.assert_close(call(actual), call(expected), rtol=1e-4, atol=1e-5)
    for model in (actual, expected):
        call(model).square().sum().backward()
    got, wanted = gradients(actual), gradients(expected)
    assert got.keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4)


@WAYS
@pytest.mark.parametrize("first", ["adapt", "offload"])
@pytest.mark.parametrize("kind", [Kinds, Reads])
def test_layers_of_each_kind_compute_and_learn_the_same(offload: Any, first: str, kind: type[Kinds]) -> None:
    config = ALL if kind is Kinds else ALL.replace(target_modules=["read", "embed"], target_parameters=None)
    expected = fill(get_peft_model(kinds(kind), config))
    base = kinds(kind)
    if first == "offload":
        offload(base)
        model = fill(get_peft_model(base, config))
    else:
        model = fill(get_peft_model(base, config))
        offload(model.base_model)
    layers = model.vera_layers().values()
    if kind is Kinds:
        assert {VeraConv, VeraEmbedding, VeraParameter} <= {type(layer) for layer in layers}
    assert any(layer.base_weight.is_meta for layer in layers)
    assert not any(vector.is_meta for layer in layers for vector in layer.vectors("default").values())
    compare(model, expected, lambda model: model(IDS))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules="all-linear", modules_to_save=[])
    expected, model = (fill(get_peft_model(tiny_model(kind), config)) for _ in range(2))
    assert kind not in TARGETS or model.vera_layers()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    cpu_offload(model)
    compare(model, expected, lambda model: main_output(model, kind))
    # Optimizers made before keep their hold, and what is saved is what was learned.
    optimizer.step()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    model.save_pretrained(tmp_path / "here")
    for parameter in (p for model in (model, expected) for p in model.parameters()):
        parameter.grad = None
    for loaded in (VeraModel.from_pretrained(tiny_model(kind), tmp_path / "here"), model):
        with torch.no_grad():
            torch.testing.assert_close(main_output(loaded, kind), main_output(expected, kind), rtol=1e-3, atol=1e-4)
    remove_hook_from_submodules(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(main_output(model, kind), main_output(expected, kind), rtol=1e-3, atol=1e-4)
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(main_output(model, kind), main_output(expected, kind), rtol=1e-3, atol=1e-4)


def test_an_export_and_the_deltas_are_right(tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=["linear", "conv"], modules_to_save=[])
    expected, model = (fill(get_peft_model(kinds(), config)) for _ in range(2))
    cpu_offload(model)
    for name, layer in expected.vera_layers().items():
        assert torch.equal(model.vera_layers()[name].get_delta_weight("default"), layer.get_delta_weight("default"))
        torch.testing.assert_close(model.vera_layers()[name].adapted_weight(), layer.adapted_weight())
    narrow = config.replace(target_modules=["linear"])
    here, there = (fill(get_peft_model(kinds(), narrow)) for _ in range(2))
    cpu_offload(here)
    for export in ("export_lora", "export_peft"):
        written = []
        for one in (here, there):
            directory = tmp_path / f"{export} {one is here}"
            getattr(one, export)(directory)
            written.append(load_file(directory / "adapter_model.safetensors"))
        assert written[0].keys() == written[1].keys()
        assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


# Merging


def test_merging_into_offloaded_weights_is_refused() -> None:
    model = fill(get_peft_model(kinds(), ALL))
    cpu_offload(model.base_model)
    with pytest.raises(ValueError, match=r"is offloaded by accelerate: call accelerate.hooks.remove_hook_from_submod"):
        model.merge_adapter()
    assert model.merged_adapters == []


@pytest.mark.parametrize("offload", [cpu_offload, dispatch], ids=lambda way: way.__name__)
def test_unmerging_what_was_offloaded_merged_is_refused(offload: Any) -> None:
    expected, model = (fill(get_peft_model(kinds(), ALL)) for _ in range(2))
    model.merge_adapter()
    offload(model.base_model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-4)
        for undo in (model.unmerge_adapter, model.unload, model.disable_adapter().__enter__):
            with pytest.raises(ValueError, match=r"cannot unmerge \['default'\]: its \w+ is offloaded"):
                undo()
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-4)
        remove_hook_from_submodules(model)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS), expected(IDS))
        assert torch.equal(model.unload()(IDS), kinds()(IDS))


# Heads and biases

HEAD = VeraConfig(r=3, target_modules=["linear"], modules_to_save=["head"])
BIASES = VeraConfig(r=3, target_modules=["linear"], modules_to_save=[], bias="all")


@WAYS
def test_a_head_of_a_model_that_was_offloaded_before_is_trained_and_saved(offload: Any, tmp_path: Path) -> None:
    expected = fill(get_peft_model(kinds(), HEAD))
    base = kinds()
    offload(base)
    model = fill(get_peft_model(base, HEAD))
    assert not any(p.is_meta for p in model.adapter_state("default").parameters())
    compare(model, expected, lambda model: model(IDS))
    model.save_pretrained(tmp_path)
    fresh = kinds()
    offload(fresh)
    for loaded in (VeraModel.from_pretrained(kinds(), tmp_path), VeraModel.from_pretrained(fresh, tmp_path)):
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS), expected(IDS), rtol=1e-4, atol=1e-5)


@WAYS
def test_a_head_that_is_offloaded_itself_computes_but_is_not_trained_or_saved(offload: Any, tmp_path: Path) -> None:
    expected, model = (fill(get_peft_model(kinds(), HEAD)) for _ in range(2))
    expected.save_pretrained(tmp_path / "before")
    offload(model.base_model)
    if not any(p.is_meta for p in model.adapter_state("default").parameters()):
        pytest.skip("this device map leaves the head where it is")
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="a module of modules_to_save is offloaded by accelerate"):
        model(IDS).sum().backward()
    with pytest.raises(ValueError, match=r"cannot save adapter 'default': head.* is on the meta device"):
        model.save_pretrained(tmp_path / "after")
    with pytest.raises(ValueError, match=r"cannot export adapter 'default': head.* is on the meta device"):
        model.export_peft(tmp_path / "after")
    assert not (tmp_path / "after").exists()
    with pytest.raises(ValueError, match=r"cannot restore adapter 'default': head.* is on the meta device"):
        model.restore(tmp_path / "before")
    remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path / "after")
    compare(model, expected, lambda model: model(IDS))


def test_biases_that_are_offloaded_compute_but_are_not_trained_or_exchanged(tmp_path: Path) -> None:
    expected, model = (fill(get_peft_model(kinds(), BIASES)) for _ in range(2))
    for each in (expected, model):
        each.add_adapter("other", BIASES.replace(bias="none"))
    cpu_offload(model.base_model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"\w+.bias cannot be trained: its bias is offloaded"):
        model(IDS)
    for exchange in (lambda: model.set_adapter("other"), model.disable_adapter().__enter__, model.unload):
        with pytest.raises(ValueError, match=r"\w+.bias cannot be replaced by another bias: its bias is offloaded"):
            exchange()
    assert model.active_adapters == ["default"]
    with pytest.raises(ValueError, match=r"cannot save adapter 'default': .*bias is on the meta device"):
        model.save_pretrained(tmp_path / "after")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-5)
    remove_hook_from_submodules(model)
    compare(model, expected, lambda model: model(IDS))


def test_adapters_with_biases_are_refused_on_an_offloaded_model(tmp_path: Path) -> None:
    fill(get_peft_model(kinds(), BIASES)).save_pretrained(tmp_path)
    base = kinds()
    cpu_offload(base)
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=r"linear.bias cannot be trained: its bias is offloaded.*bias='none'"):
        get_peft_model(base, BIASES)
    with pytest.raises(ValueError, match=r"linear.bias cannot be trained: its bias is offloaded"):
        VeraModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == before
    assert torch.equal(base(IDS), kinds()(IDS))


# What does not go through hooks of a layer itself


def test_vectors_that_a_hook_further_up_empties_are_refused() -> None:
    model = fill(get_peft_model(kinds(), ALL.replace(target_parameters=None, target_modules=["linear"])))
    accelerate.cpu_offload(model.base_model, execution_device=CPU, preload_module_classes=["VeraLinear"])
    layer = model.vera_layers()["linear"]
    assert layer.vectors("default")["b"].is_meta
    for write in (model.save_pretrained, model.export_lora, model.export_peft):
        with pytest.raises(ValueError, match="adapter 'default': vector b of linear is on the meta device"):
            write(tempfile.mkdtemp())


@pytest.mark.parametrize("kind", ["linear", "conv", "embed", "up_proj"])
def test_no_operation_sees_a_vector_without_values(kind: str) -> None:
    model = fill(get_peft_model(kinds(), ALL))
    layer = next(layer for name, layer in model.vera_layers().items() if name.endswith(kind))
    layer.vera_lambda_b._parameters["default"] = nn.Parameter(layer.vera_lambda_b["default"].detach().to("meta"))
    with pytest.raises(RuntimeError, match="on the meta device, without values"):
        model(IDS)


def test_a_copy_of_a_head_does_not_copy_the_values_of_the_model() -> None:
    base = kinds()
    cpu_offload(base)
    weights = base.head._hf_hook.weights_map
    model = get_peft_model(base, HEAD)
    copied = model.base_model.head.modules_to_save["default"]
    assert base.head.original_module._hf_hook.weights_map is weights
    assert not hasattr(copied, "_hf_hook") and "forward" not in copied.__dict__
    assert torch.equal(copied.weight, kinds().head.weight)


# In a bank, and in PEFT


def test_a_bank_whose_model_is_offloaded_afterwards() -> None:
    config = VeraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=[])
    adapter = fill(get_peft_model(tiny_model("llama"), config))
    ids = torch.tensor([[3, 9, 4], [7, 8, 2]])
    bank = AdapterBank(tiny_model("llama"), config)
    bank.add("one", adapter)
    with torch.no_grad():
        expected = bank.model(input_ids=ids, adapters=["one", None]).logits
        cpu_offload(bank.model)
        actual = bank.model(input_ids=ids, adapters=["one", None]).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_bank_with_heads_is_refused_then() -> None:
    config = VeraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    adapter = fill(get_peft_model(tiny_model("bert"), config))
    ids = torch.tensor([[3, 9, 4], [7, 8, 2]])
    bank = AdapterBank(tiny_model("bert"), config)
    bank.add("one", adapter)
    cpu_offload(bank.model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"accelerate added hooks to .* after the bank was created"):
        bank.model(input_ids=ids, adapters=["one", None])


@pytest.mark.parametrize("first", ["adapt", "offload"])
@WAYS
def test_in_peft(offload: Any, first: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from veratune.integrations.peft import VeratuneConfig, install

    install()
    config = VeratuneConfig(r=3, target_modules=["embed", "linear", "conv"], target_parameters=["experts.up_proj"])

    def adapted(base: nn.Module) -> Any:
        model = peft.get_peft_model(base, copy.deepcopy(config), adapter_name="one")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
        return model

    expected, base = adapted(kinds()), kinds()
    if first == "offload":
        offload(base)
        model = adapted(base)
    else:
        model = adapted(base)
        offload(base)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-5)
    for each in (model, expected):
        each(IDS).square().sum().backward()
        each.save_pretrained(tmp_path / str(each is model))
    got, wanted = gradients(model), gradients(expected)
    assert got.keys() == wanted.keys() and len(wanted) == 8
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4)
    # The order of entries in a file's metadata varies; the header has a digest of the tensors.
    headers = [read_native(tmp_path / str(own) / "one").header for own in (True, False)]
    assert headers[0] == headers[1]
    tensors = [load_file(tmp_path / str(own) / "one" / "adapter_model.safetensors") for own in (True, False)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
