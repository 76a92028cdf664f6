"""Names in files, and what an export may promise: wrappers, names that PEFT takes otherwise, weights read uncalled."""

import contextlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

from reference import randomise, relative
from sweep_check import adapted as adapted_architecture
from sweep_models import ARCHITECTURES, call
from tiny_models import randomise_trainable
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.integrations.peft import VeratuneConfig, install
from veratune.utils import exchange

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def plug_in() -> None:
    install()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(x))
        return out


def compile_a_layer(model: nn.Module) -> nn.Module:
    model.block[0] = torch.compile(model.block[0], backend="eager")
    return model


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    model.block[1] = checkpoint_wrapper(model.block[1])
    model.block = checkpoint_wrapper(model.block)
    return model


def parallel(model: nn.Module) -> nn.Module:
    model.block = nn.DataParallel(model.block)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpoint_wrapper": checkpoint_blocks,
    "compiled layer": compile_a_layer,
    "DataParallel inside": parallel,
    "both": lambda model: checkpoint_blocks(compile_a_layer(model)),
}
AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    **WRAPPERS,
    "compiled model": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
}
SETTINGS = {"r": 4, "target_modules": r"block\.0|block\.1\.0", "modules_to_save": ["head"]}
NAMES = {"block.0", "block.1.0"}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_put_on_later_show_in_no_file(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = get_peft_model(Net(), VeraConfig(**SETTINGS))
    randomise(model, scale=0.5)
    expected = model(X)
    wrap(model.base_model)
    assert set(model.vera_layers()) == NAMES
    assert torch.equal(model(X), expected)
    model.save_pretrained(tmp_path / "native")
    assert torch.equal(VeraModel.from_pretrained(Net(), tmp_path / "native")(X), expected)
    for export in (model.export_lora, model.export_peft):
        export(tmp_path / export.__name__)
        read = peft.PeftModel.from_pretrained(Net(), str(tmp_path / export.__name__))
        assert relative(read(X), expected) < 1e-5
    with torch.no_grad():
        for parameter in model.adapter_state("default").parameters():
            parameter.zero_()
    model.restore(tmp_path / "native")
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND)
def test_a_wrapped_model_has_the_names_of_the_model(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Targets, exclusions and files mean the same with wrappers and without."""
    plain = get_peft_model(Net(), VeraConfig(**SETTINGS))
    randomise(plain, scale=0.5)
    plain.save_pretrained(tmp_path)
    loaded = VeraModel.from_pretrained(wrap(Net()), tmp_path)
    assert torch.equal(loaded(X), plain(X))
    loaded.save_pretrained(tmp_path / "again")
    kept, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert kept.keys() == again.keys() and all(torch.equal(kept[key], again[key]) for key in kept)
    model = get_peft_model(
        wrap(Net()), VeraConfig(r=4, target_modules="all-linear", exclude_modules=["block.0"], modules_to_save=[])
    )
    assert set(model.vera_layers()) == {"block.1.0", "head"}
    randomise(model)
    expected = model(X)
    assert relative(model.merge_and_unload()(X), expected) < 1e-5


class DeepHead(nn.Module):
    """A net whose head has layers of its own, one of which is wrapped."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        if wrap is not None:
            self.head[0] = wrap(self.head[0])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.block(x)))
        return out


ONE_LAYER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpoint_wrapper": checkpoint_wrapper,
    "compiled": lambda layer: torch.compile(layer, backend="eager"),  # type: ignore[dict-item,return-value]
    "DataParallel": nn.DataParallel,
}


@torch.no_grad()
@pytest.mark.parametrize("wrap", ONE_LAYER.values(), ids=ONE_LAYER)
def test_wrappers_inside_saved_modules_show_in_no_file(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["block"], "modules_to_save": ["head"]}
    model = get_peft_model(DeepHead(wrap), VeraConfig(**settings))
    randomise(model, scale=0.5)
    expected = model(X)
    model.save_pretrained(tmp_path / "native")
    model.export_peft(tmp_path / "peft")
    heads = {f"head.{index}.{own}" for index in (0, 1) for own in ("weight", "bias")}
    keys = {key.partition("head.")[2] for key in load_file(tmp_path / "native" / "adapter_model.safetensors")} - {""}
    assert {f"head.{key}" for key in keys} == heads
    for place in ("native", "peft"):
        for other in (None, wrap):
            assert relative(VeraModel.from_pretrained(DeepHead(other), tmp_path / place)(X), expected) < 1e-5
    assert relative(peft.PeftModel.from_pretrained(DeepHead(), str(tmp_path / "peft"))(X), expected) < 1e-5
    with torch.no_grad():
        for parameter in model.adapter_state("default").parameters():
            parameter.zero_()
    model.restore(tmp_path / "native")
    assert torch.equal(model(X), expected)
    install()
    plugin = peft.get_peft_model(DeepHead(wrap), VeratuneConfig(**settings))
    expected = randomise_trainable(plugin)(X)
    plugin.save_pretrained(tmp_path / "plugin")
    keys = set(load_file(tmp_path / "plugin" / "adapter_model.safetensors"))
    assert {key.removeprefix("modules_to_save.") for key in keys if "head" in key} == heads
    for other in (None, wrap):
        assert torch.equal(peft.PeftModel.from_pretrained(DeepHead(other), str(tmp_path / "plugin"))(X), expected)
        assert torch.equal(VeraModel.from_pretrained(DeepHead(other), tmp_path / "plugin")(X), expected)


class Named(nn.Module):
    """A model that has modules of the names that torch's wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._orig_mod = nn.Linear(8, 8)
        self._checkpoint_wrapped_module = nn.Linear(8, 8)
        self.module = nn.Linear(8, 8)
        self.x_checkpoint_wrapped_module = nn.ModuleDict({"module": nn.Linear(8, 8)})
        self._fsdp_wrapped_module = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self._orig_mod, self._checkpoint_wrapped_module, self.module):
            x = torch.tanh(layer(x))
        out: Tensor = self._fsdp_wrapped_module(self.x_checkpoint_wrapped_module["module"](x))
        return out


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_that_are_called_like_wrappers_keep_their_names(compiled: bool, tmp_path: Path) -> None:
    names = {"_orig_mod", "_checkpoint_wrapped_module", "module", "x_checkpoint_wrapped_module.module"}

    def base() -> Any:
        return torch.compile(Named(), backend="eager") if compiled else Named()

    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["_fsdp_wrapped_module"]}
    model = get_peft_model(base(), VeraConfig(**settings))
    assert set(model.vera_layers()) == names
    randomise(model, scale=0.5)
    expected = model(X)
    model.save_pretrained(tmp_path / "native")
    keys = set(load_file(tmp_path / "native" / "adapter_model.safetensors"))
    assert keys == {f"vera_lambda_{which}.{name}" for name in names for which in "bd"} | {
        f"modules_to_save._fsdp_wrapped_module.{own}" for own in ("weight", "bias")
    }
    assert torch.equal(VeraModel.from_pretrained(base(), tmp_path / "native")(X), expected)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    for name, tensor in state.items():  # each is refused by its right name
        if name.endswith("base_layer.weight"):
            with pytest.raises(ValueError, match="while the adapters"):
                model.load_state_dict({name: tensor}, strict=False)
    model.unmerge_adapter()
    plugin = peft.get_peft_model(base(), VeratuneConfig(**{**settings, "target_modules": sorted(names)}))
    expected = randomise_trainable(plugin)(X)
    plugin.save_pretrained(tmp_path / "plugin")
    assert torch.equal(peft.PeftModel.from_pretrained(base(), str(tmp_path / "plugin"))(X), expected)
    assert torch.equal(VeraModel.from_pretrained(base(), tmp_path / "plugin")(X), expected)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_wrappers_show_in_no_file_of_the_plugin(
    wrap: Callable[[nn.Module], nn.Module], when: str, tmp_path: Path
) -> None:
    config = VeratuneConfig(**SETTINGS, bias="vera_only")
    model = peft.get_peft_model(wrap(Net()) if when == "before" else Net(), config)
    if when == "after":
        wrap(model.base_model.model)
    expected = randomise_trainable(model)(X)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {f"vera_lambda_{which}.{name}" for name in NAMES for which in "bd"} | {
        f"bias.{name}.bias" for name in NAMES
    } | {f"modules_to_save.head.{own}" for own in ("weight", "bias")}
    assert torch.equal(peft.PeftModel.from_pretrained(Net(), str(tmp_path))(X), expected)
    assert torch.equal(peft.PeftModel.from_pretrained(wrap(Net()), str(tmp_path))(X), expected)
    assert torch.equal(VeraModel.from_pretrained(wrap(Net()), tmp_path)(X), expected)


@pytest.mark.parametrize(
    "other",
    [
        "vera_lambda_b",
        "vera_lambda_d",
        "base_layer",
        "modules_to_save",
        "default",
        "weight",
        "bias",
        "block",
        "0",
        "original_module",
        "adapted",
        "head",
        "base_model",
        "vera_dropout",
        "entries",
    ],
)
def test_adapter_names_are_data(other: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(Net(), VeratuneConfig(**SETTINGS), adapter_name="first")
    model.add_adapter(other, VeratuneConfig(**SETTINGS, projection_prng_key=1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for own in ("vera_lambda_b", "vera_lambda_d", "modules_to_save"):
                inside = module._modules.get(own)
                for parameter in () if inside is None else inside.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(tmp_path))
    for name in ("first", other):
        model.set_adapter(name)
        expected, folder = model(X), tmp_path if name == "default" else tmp_path / name
        assert len(load_file(folder / "adapter_model.safetensors")) == 6
        for called in ("default", other):
            read = peft.PeftModel.from_pretrained(Net(), str(folder), adapter_name=called)
            assert torch.equal(read(X), expected)
        assert torch.equal(VeraModel.from_pretrained(Net(), folder)(X), expected)


@pytest.mark.parametrize("name", ["a.b", "keys"])
def test_an_impossible_adapter_name_is_refused_at_once(name: str) -> None:
    base = Net()
    before = list(base.named_modules())
    with pytest.raises(ValueError, match="adapter_name"):
        peft.get_peft_model(base, VeratuneConfig(**SETTINGS), adapter_name=name)
    assert [own for own, _ in base.named_modules()] == [own for own, _ in before]


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_next", "ernie4_5_moe"])
def test_a_lora_of_a_mixture_of_experts_is_read_as_it_is_written(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = adapted_architecture(architecture), architecture.inputs()
    assert any(layer.endswith(("gate_proj", "up_proj", "down_proj")) for layer in model.vera_layers())
    model.export_lora(tmp_path)
    read = peft.PeftModel.from_pretrained(architecture.build(), str(tmp_path))
    with torch.no_grad():
        expected, found = call(model, inputs), call(read, inputs)
    assert max(relative(found[key], expected[key]) for key in expected) < 1e-4


def test_our_table_holds_all_that_the_installed_peft_takes_for_experts() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    from veratune.checkpoint import peft_rules

    for kind, ends in conversion._MOE_TARGET_MODULE_MAPPING.items():
        assert set(ends) == set(peft_rules._EXPERTS[kind])
        types = {name for name, own in conversion._MODEL_TO_CONVERSION_PATTERN.items() if own == kind}
        assert types == set(peft_rules._MODEL_TYPES[kind].split())


class Reads(nn.Module):
    """Computes with the weight of `b` itself, always or in a branch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).to(self.b.weight.dtype)
        return self.read(x) if self.how == "always" else self.elsewhere(x)

    def read(self, x: Tensor) -> Tensor:
        return F.linear(x, self.b.weight, self.b.bias)

    def elsewhere(self, x: Tensor) -> Tensor:
        return read_of(self, x)


def read_of(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.b.weight, module.b.bias)


class Always(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.to(self.a.weight.dtype)) @ self.b.weight.t()


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.b.weight, nn.Parameter) and x.dtype != self.b.weight.dtype:
            x = x.to(self.b.weight.dtype)
        out: Tensor = self.b(x)
        return out


def _exports(model: VeraModel, directory: Path) -> list[Callable[[], object]]:
    return [lambda: model.export_lora(directory / "lora"), lambda: model.export_peft(directory / "vera")]


def test_a_weight_read_in_the_source_is_refused_before_the_model_has_run(tmp_path: Path) -> None:
    model = get_peft_model(Always(), VeraConfig(r=4, target_modules=["a", "b"]))
    for export in _exports(model, tmp_path):
        with pytest.raises(ValueError, match="on b: Always computes with its weight without calling the layer"):
            export()
    assert not list(tmp_path.iterdir())


def test_a_weight_read_where_no_source_shows_it_is_refused_after_a_run(tmp_path: Path) -> None:
    model = get_peft_model(Reads("elsewhere"), VeraConfig(r=4, target_modules=["a", "b"]))
    model(X)
    for export in _exports(model, tmp_path):
        with pytest.raises(ValueError, match="on b: the model computes with its weight"):
            export()


def test_a_read_in_a_branch_is_told_of(tmp_path: Path) -> None:
    model = get_peft_model(Reads("never"), VeraConfig(r=4, target_modules=["b"]))
    for export in _exports(model, tmp_path):
        with pytest.warns(UserWarning, match="Reads has a branch"):
            export()


def test_asking_a_weight_for_its_type_is_no_use_of_it(tmp_path: Path) -> None:
    model = get_peft_model(Called(), VeraConfig(r=4, target_modules=["b"]))
    randomise(model)
    expected = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for export in _exports(model, tmp_path):
            export()
    for folder in tmp_path.iterdir():
        assert relative(peft.PeftModel.from_pretrained(Called(), str(folder))(X), expected) < 1e-5


@pytest.mark.parametrize("name", ["linear1", "linear2", "self_attn.out_proj"])
def test_torchs_encoder_layer_reads_weights_in_evaluation(name: str, tmp_path: Path) -> None:
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = get_peft_model(base, VeraConfig(r=4, target_modules=[name]))
    for export in _exports(model, tmp_path):
        with pytest.raises(ValueError, match="without calling the layer"):
            export()


@pytest.mark.parametrize("name", ["wavlm", "jamba", "mobilebert"])
def test_models_that_read_weights_are_refused(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = adapted_architecture(architecture)
    with torch.no_grad():
        call(model, architecture.inputs())
    with pytest.raises(ValueError, match="without calling the layer"):
        model.export_lora(tmp_path)


@pytest.mark.parametrize("native", [True, False])
def test_transformers_own_loader_is_refused_what_it_would_pass_over(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    install()
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.VERA, PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA])
    install(replace_vera=True)
    architecture = ARCHITECTURES["llama"]
    model = adapted_architecture(architecture)
    (model.save_pretrained if native else model.export_peft)(tmp_path)
    base = architecture.build()
    with pytest.raises(ValueError, match="veratune adapter" if native else "shared state"):
        base.load_adapter(str(tmp_path))
    found, expected = call(base, architecture.inputs()), call(architecture.build(), architecture.inputs())
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["export_lora", "export_peft"])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_an_export_names_the_class_of_its_base(kind: str, task: str | None, tmp_path: Path) -> None:
    """PEFT's auto classes and `veratune convert` find the model by it."""
    import transformers

    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    )
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base"),
        VeraConfig(r=4, target_modules=["query", "value", "dense"], task_type=task),
    )
    randomise(model, scale=0.5)
    model.eval()
    tokens = torch.tensor([[1, 2, 3]])
    getattr(model, kind)(tmp_path / "export")
    written = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert written["auto_mapping"] == {
        "base_model_class": "BertForSequenceClassification",
        "parent_library": "transformers.models.bert.modeling_bert",
    }
    auto = peft.AutoPeftModel if task is None else peft.AutoPeftModelForSequenceClassification
    read = auto.from_pretrained(str(tmp_path / "export")).eval()
    assert relative(read(tokens).logits, model(tokens).logits) < 1e-4
    if kind == "export_peft":
        from typer.testing import CliRunner

        from veratune.cli.main import app

        result = CliRunner().invoke(app, ["convert", str(tmp_path / "export"), str(tmp_path / "converted")])
        assert result.exit_code == 0, result.output
        fresh = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
        converted = VeraModel.from_pretrained(fresh, tmp_path / "converted")
        assert relative(converted(tokens).logits, model(tokens).logits) < 1e-4


def test_what_cannot_be_adapted_is_shown_with_its_reason() -> None:
    from veratune.adapters.coverage import WeightInfo
    from veratune.cli.inspecting import _how

    assert _how(WeightInfo("a", "parameter", "A", (2, 2), "", "it is odd")) == "nothing: it is odd"
    assert _how(WeightInfo("a", "parameter", "A", (2, 2), "target_parameters")) == "target_parameters, by its name"


# Files that are old or new after a kill


class Killed(BaseException):
    """As when a process ends: nothing that comes after does anything either."""


OPERATIONS = ["mkdir", "rename", "replace", "unlink", "rmdir", "write_bytes"]


def _kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    count = [0]

    def dying(original: Callable[..., object]) -> Callable[..., object]:
        def operation(*args: object, **kwargs: object) -> object:
            count[0] += 1
            if count[0] >= step:
                raise Killed
            return original(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(exchange.Path, name, dying(getattr(exchange.Path, name)))
    monkeypatch.setattr(exchange.os, "link", dying(exchange.os.link))
    monkeypatch.setattr(exchange, "_exchange", dying(exchange._exchange))
    return count


def _model(key: int) -> VeraModel:
    model = get_peft_model(Net(), VeraConfig(**{**SETTINGS, "r": 2 + key}, projection_prng_key=key))
    randomise(model, scale=0.5)
    return model


def _plugin(key: int) -> peft.PeftModel:
    install()
    model = peft.get_peft_model(Net(), VeratuneConfig(**{**SETTINGS, "r": 2 + key}, projection_prng_key=key))
    randomise(model, scale=0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*differs from the configuration inside:UserWarning")  # new weights, old JSON
@pytest.mark.parametrize("kind", ["export_lora", "export_peft", "plugin"])
@pytest.mark.parametrize("exchanged", [True, False])
def test_a_kill_at_any_step_leaves_the_old_files_or_the_new_ones(
    kind: str, exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an exchange of directories there may be no configuration, which is refused, but never a mixed pair.

    The plug-in's file has its configuration inside, and so is old or new by itself.
    """
    models = [(_plugin if kind == "plugin" else _model)(key) for key in (0, 1)]
    save = "save_pretrained" if kind == "plugin" else kind
    outputs = [model(X).detach() for model in models]
    seen: set[int | None] = set()
    for step in range(1, 60):
        directory = tmp_path / str(step)
        getattr(models[0], save)(str(directory))
        (directory / "notes.txt").write_text("somebody's")
        if not exchanged:
            (directory / "folder").mkdir()
        with monkeypatch.context() as context:
            count = _kill_at(context, step)
            with contextlib.suppress(Killed):
                getattr(models[1], save)(str(directory))
            ended = count[0] < step
        assert (directory / "notes.txt").read_text() == "somebody's"
        if not exchanged and not (directory / "adapter_config.json").exists():
            seen.add(None)
        else:
            found = peft.PeftModel.from_pretrained(Net(), str(directory))(X)
            seen.add(next(which for which in (0, 1) if relative(found, outputs[which]) < 1e-5))
        if ended:
            break
    else:
        pytest.fail("it has not come to an end")
    assert seen == ({0, 1} if exchanged or kind == "plugin" else {0, 1, None})


def test_the_first_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(0)
    for step in range(1, 60):
        directory = tmp_path / str(step)
        with monkeypatch.context() as context:
            count = _kill_at(context, step)
            with contextlib.suppress(Killed):
                model.export_lora(directory)
        if directory.exists():
            assert torch.isfinite(peft.PeftModel.from_pretrained(Net(), str(directory))(X)).all()
        if count[0] < step:
            break
    assert {path.name for path in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert step > 3
