"""Adapters' files between veratune itself and its layers in the real `peft`, in both directions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft_suite import base, outputs
from tiny_models import TARGETS, randomise_trainable, tiny_inputs, tiny_model

peft = pytest.importorskip("peft")

from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap  # noqa: E402

from veratune import AdapterBank, CheckpointError, VeraConfig, VeraModel, get_peft_model  # noqa: E402
from veratune.checkpoint import native  # noqa: E402
from veratune.integrations.peft import VeratuneConfig, install  # noqa: E402
from veratune.integrations.peft.layers import TunedLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SELECTING = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# A kind of model, and settings that both configurations take.
CASES = {
    "a list, and a head": ("bert", {"target_modules": TARGETS["bert"], "modules_to_save": ["classifier"]}),
    "an expression": ("bert", {"target_modules": r".*\.(query|intermediate\.dense)", "modules_to_save": None}),
    "layers of the stack": ("bert", {"target_modules": ["query", "dense"], "layers_to_transform": [1]}),
    "exclusions": ("bert", {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]}),
    "biases of the layers": ("bert", {"target_modules": TARGETS["bert"], "bias": "vera_only"}),
    "all biases": ("bert", {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "two heads": (
        "distilbert",
        {"target_modules": TARGETS["distilbert"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "a transposed weight in parts": ("gpt2", {"target_modules": TARGETS["gpt2"], "fused_parts": {"c_attn": 3}}),
    "other ranks": ("llama", {"target_modules": TARGETS["llama"], "rank_pattern": {"q_proj": 3, "down_proj": 7}}),
    "PEFT's projections": ("t5", {"target_modules": TARGETS["t5"], "projection": "peft", "projection_prng_key": 5}),
    "projections in blocks": (
        "llama",
        {"target_modules": TARGETS["llama"], "projection": "blocks", "projection_blocks": 4},
    ),
    "another key": ("vit", {"target_modules": TARGETS["vit"], "projection_prng_key": 77}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts alone": ("mixtral", {"target_modules": None, "target_parameters": EXPERTS}),
}
EVERY = pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _installed() -> None:
    install()


def own(kind: str, settings: dict[str, Any], name: str = "default", seed: int = 7) -> VeraModel:
    """veratune's own model, as if it had been trained."""
    settings = {"modules_to_save": [], **settings}
    model = get_peft_model(tiny_model(kind), VeraConfig(r=4, **settings), name)
    return randomise_trainable(model, seed, std=0.3).eval()


def through_peft(kind: str, settings: dict[str, Any], name: str = "default") -> Any:
    """The same in PEFT."""
    model = peft.get_peft_model(tiny_model(kind), VeratuneConfig(r=4, **settings), adapter_name=name)
    return randomise_trainable(model, 7, std=0.3).eval()


def vectors(model: VeraModel, name: str = "default") -> dict[str, list[torch.Tensor]]:
    return {key: [v.detach() for v in own.values()] for key, own in model.adapter_state(name).vectors.items()}


def assert_equal(first: dict[str, list[torch.Tensor]], second: dict[str, list[torch.Tensor]]) -> None:
    assert first.keys() == second.keys() and first
    for key, pair in first.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, second[key], strict=True)), key


def assert_same_file(directory: Path, other: Path) -> None:
    """Both have the same tensors and the same header, but for what chose the layers."""
    first, second = load_file(directory / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    headers = []
    for path in (directory, other):
        with safe_open(path / WEIGHTS, "pt") as file:
            header = json.loads(file.metadata()["veratune"])
        assert header.pop("sha256") and {key: header["config"].pop(key) for key in SELECTING}
        header["inputs"] = dict(sorted(header["inputs"].items()))
        headers.append(header)
    assert headers[0] == headers[1]


@EVERY
def test_peft_loads_native_files_and_veratune_what_peft_makes_of_them(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = own(kind, settings)
    expected = outputs(model, kind)
    assert not torch.allclose(expected, outputs(tiny_model(kind), kind))
    model.save_pretrained(tmp_path / "native")
    loaded = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path / "native")
    assert loaded.peft_type.value == "VERATUNE"
    # PEFT leaves trained biases trainable.
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if not n.endswith(".bias"))
    assert torch.equal(outputs(loaded, kind), expected)
    assert loaded.peft_config["default"].fingerprint == model.projection_scheme("default").fingerprint()
    loaded.save_pretrained(tmp_path / "peft")
    assert_same_file(tmp_path / "peft", tmp_path / "native")
    again = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path / "peft")
    assert torch.equal(outputs(again, kind), expected)
    back = VeraModel.from_pretrained(tiny_model(kind), tmp_path / "peft")
    assert torch.equal(outputs(back, kind), expected)
    assert_equal(vectors(back), vectors(model))
    assert back.projection_scheme("default") == model.projection_scheme("default")


@EVERY
def test_veratune_loads_what_the_plug_in_writes_and_peft_what_veratune_makes_of_it(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = through_peft(kind, settings)
    expected = outputs(model, kind)
    assert not torch.allclose(expected, outputs(tiny_model(kind), kind))
    model.save_pretrained(tmp_path / "plug-in")
    loaded = VeraModel.from_pretrained(tiny_model(kind), tmp_path / "plug-in")
    assert torch.equal(outputs(loaded, kind), expected)
    assert sum(isinstance(module, TunedLayer) for module in model.modules()) == len(loaded.vera_layers())
    loaded.save_pretrained(tmp_path / "native")
    assert_same_file(tmp_path / "native", tmp_path / "plug-in")
    again = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path / "native")
    assert torch.equal(outputs(again, kind), expected)


class Attention(nn.Module):
    """Packed attention, and a module whose name the plug-in's wrappers have as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        )
        self.adapted = nn.Linear(8, 5)
        self.base_layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(torch.tanh(self.adapted(self.layers(x))))


def attention() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Attention().eval()


def test_packed_attention_and_names_of_wrappers(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 48).sin().view(2, 3, 8)
    model = get_peft_model(attention(), VeraConfig(r=4, target_modules="all-linear", modules_to_save=[]))
    randomise_trainable(model, std=0.3).eval()
    assert {"adapted", "base_layer", "layers.layers.0.self_attn.in_proj_weight"} <= model.vera_layers().keys()
    model.save_pretrained(tmp_path / "native")
    with torch.no_grad():
        expected = model(x)
        loaded = peft.PeftModel.from_pretrained(attention(), tmp_path / "native")
        assert torch.equal(loaded(x), expected)
        loaded.save_pretrained(tmp_path / "plug-in")
        back = VeraModel.from_pretrained(attention(), tmp_path / "plug-in")
        assert torch.equal(back(x), expected)
    assert_equal(vectors(back), vectors(model))
    # PEFT would take parts of the layers themselves for modules to save.
    config = VeraConfig(r=4, target_modules=["adapted"], modules_to_save=["base_layer"])
    get_peft_model(attention(), config).save_pretrained(tmp_path / "inside")
    plain = attention()
    with pytest.raises(
        CheckpointError, match="cannot be loaded into PEFT here, because PEFT would not treat base_layer"
    ):
        peft.PeftModel.from_pretrained(plain, tmp_path / "inside")
    assert not any(isinstance(module, TunedLayer) for module in plain.modules())


def test_adapters_of_other_names_and_in_folders(tmp_path: Path) -> None:
    _, settings = CASES["a list, and a head"]
    model = own("bert", settings, "anna")
    model.add_adapter("boris", VeraConfig(r=6, target_modules=["dense"], projection_prng_key=3, modules_to_save=[]))
    expected = {"anna": outputs(model, "bert")}
    model.set_adapter("boris")
    randomise_trainable(model, 8, std=0.3)
    expected["boris"] = outputs(model, "bert")
    model.save_pretrained(tmp_path / "native")
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "native", "first", subfolder="anna")
    loaded.load_adapter(tmp_path / "native" / "boris", "anna", is_trainable=True)
    for name, here in (("anna", "first"), ("boris", "anna")):
        loaded.set_adapter(here)
        assert torch.equal(outputs(loaded, "bert"), expected[name])
    assert any(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "plug-in")
    back = VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "plug-in", "one", subfolder="first")
    back.load_adapter(tmp_path / "plug-in" / "anna", "two")
    for name, here in (("anna", "one"), ("boris", "two")):
        back.set_adapter(here)
        assert torch.equal(outputs(back, "bert"), expected[name])


def test_training_goes_on_where_the_other_left_off(tmp_path: Path) -> None:
    _, settings = CASES["a list, and a head"]
    own("bert", settings).save_pretrained(tmp_path)
    losses = []
    for load in (VeraModel.from_pretrained, peft.PeftModel.from_pretrained):
        model = load(tiny_model("bert"), tmp_path, is_trainable=True).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        steps = []
        for _ in range(3):
            ids = torch.arange(3, 17).view(2, 7)
            loss = model(input_ids=ids, labels=torch.tensor([0, 2])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(float(loss.detach()))
        losses.append(steps)
    assert losses[0] == losses[1] and losses[0][2] < losses[0][0]


def test_the_bank_takes_what_the_plug_in_wrote(tmp_path: Path) -> None:
    _, settings = CASES["a list, and a head"]
    model = through_peft("bert", settings)
    model.save_pretrained(tmp_path / "plug-in")
    bank = AdapterBank.for_adapters(tiny_model("bert"), {"anna": tmp_path / "plug-in"})
    with torch.no_grad():
        found = bank.model(**tiny_inputs("bert"), adapters=["anna", None]).logits
    torch.testing.assert_close(found[:1], outputs(model, "bert")[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:], outputs(tiny_model("bert"), "bert")[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_half_precision_base(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=TARGETS["llama"])
    model = randomise_trainable(get_peft_model(tiny_model("llama", torch.bfloat16), config), std=0.3)
    model.save_pretrained(tmp_path)
    if low_cpu_mem_usage:  # PEFT rounds what it loads to the base layer's dtype then, LoRA's matrices as well
        with torch.no_grad():
            for own in model.adapter_state("default").vectors.values():
                for vector in own.values():
                    vector.copy_(vector.bfloat16())
    expected = outputs(model, "llama")
    loaded = peft.PeftModel.from_pretrained(
        tiny_model("llama", torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not any(p.is_meta for p in loaded.parameters())
    assert {p.dtype for n, p in loaded.named_parameters() if ".vera_lambda_" in n} == {torch.float32}
    assert torch.equal(outputs(loaded, "llama"), expected)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", None])
@pytest.mark.parametrize("head", [["classifier"], []])
def test_heads_that_peft_would_train_for_a_task(task: str | None, head: list[str], tmp_path: Path) -> None:
    model = own("bert", {"target_modules": ["query", "dense"], "task_type": task, "modules_to_save": head})
    model.save_pretrained(tmp_path / "native")
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "native")
    assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))
    assert loaded.peft_config["default"].task_type == (task if head else None)
    loaded.save_pretrained(tmp_path / "plug-in")
    back = VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "plug-in")
    assert torch.equal(outputs(back, "bert"), outputs(model, "bert"))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.classifier = nn.Linear(6, 2)
        self.my_classifier = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.body(x))
        return self.classifier(x) + self.my_classifier(x).sin()


def two_heads() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return TwoHeads()


def test_modules_that_peft_takes_for_saved_ones_keep_their_weights(tmp_path: Path) -> None:
    """PEFT compares the ends of names, letter by letter."""
    x = torch.linspace(-1, 1, 12).view(2, 6)
    model = get_peft_model(two_heads(), VeraConfig(r=4, target_modules=["body"], modules_to_save=["classifier"]))
    randomise_trainable(model, std=0.3).save_pretrained(tmp_path / "body")
    loaded = peft.PeftModel.from_pretrained(two_heads(), tmp_path / "body")
    assert torch.equal(loaded(x), model(x))
    assert loaded.base_model.model.my_classifier.modules_to_save.keys() == {"default"}
    # One that it would train in full as well as adapt.
    config = VeraConfig(r=4, target_modules=["body", "my_classifier"], modules_to_save=["classifier"])
    randomise_trainable(get_peft_model(two_heads(), config), std=0.3).save_pretrained(tmp_path / "both")
    plain = two_heads()
    with pytest.raises(CheckpointError, match=r"my_classifier.*VeraModel\.from_pretrained"):
        peft.PeftModel.from_pretrained(plain, tmp_path / "both")
    assert not any(isinstance(module, TunedLayer) for module in plain.modules())


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = own("bert", {"target_modules": TARGETS["bert"]})
    model.save_pretrained(tmp_path / "native")

    def refused(directory: Path, match: str, kind: str = "bert", **settings: Any) -> None:
        plain = tiny_model(kind)
        with pytest.raises(ValueError, match=match):
            peft.PeftModel.from_pretrained(plain, directory, **settings)
        assert not any(isinstance(module, TunedLayer) for module in plain.modules())
        assert torch.equal(outputs(plain, kind), outputs(tiny_model(kind), kind))

    refused(tmp_path / "native", "layers that this GPT2LMHeadModel does not have", "gpt2")
    refused(
        tmp_path / "native",
        "compared with adapter 'default', has unexpected names",
        config=VeratuneConfig(r=4, target_modules=["query"]),
    )
    refused(tmp_path / "native", r"key_mapping, which would rename .*'\^bert'", key_mapping={"^bert": "roberta"})
    damaged = tmp_path / "damaged"
    model.save_pretrained(damaged)
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(damaged, "SHA-256")
    (damaged / WEIGHTS).unlink()
    refused(damaged, "does not exist")
    for settings in ({}, {"peft_config": VeratuneConfig(r=4, target_modules=TARGETS["bert"])}):
        plain = tiny_model("bert")
        with pytest.raises(CheckpointError, match="transformers' load_adapter cannot read"):
            plain.load_adapter(str(tmp_path / "native"), **settings)
        assert not any(isinstance(module, TunedLayer) for module in plain.modules())
    # Projections that are in the file alone.
    theirs = peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(r=4, target_modules=TARGETS["bert"]))
    with torch.no_grad():
        randomise_trainable(theirs, std=0.3).base_model.vera_A["default"].mul_(0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "theirs").save_pretrained(tmp_path / "stored")
    refused(tmp_path / "stored", "export_peft")
    VeraModel.from_pretrained(tiny_model("bert"), tmp_path / "stored").export_peft(tmp_path / "exported")
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "exported")
    torch.testing.assert_close(outputs(loaded, "bert"), outputs(theirs, "bert"), rtol=1e-4, atol=1e-5)


def test_loading_over_an_adapter_swaps_its_values(tmp_path: Path) -> None:
    settings = {"target_modules": TARGETS["bert"], "modules_to_save": ["classifier"]}
    models = {"one": own("bert", settings), "two": own("bert", settings, seed=8)}
    models["key"] = own("bert", {**settings, "projection_prng_key": 5})
    models["rank"] = own("bert", {**settings, "rank_pattern": {"query": 3}})
    models["fewer"] = own("bert", {**settings, "target_modules": ["query"]})
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "one")
    parameters = {name: id(parameter) for name, parameter in loaded.named_parameters()}
    loaded.load_adapter(tmp_path / "two", "default")
    assert torch.equal(outputs(loaded, "bert"), outputs(models["two"], "bert"))
    assert {name: id(parameter) for name, parameter in loaded.named_parameters()} == parameters
    with pytest.raises(CheckpointError, match="trained with other projections"):
        loaded.load_adapter(tmp_path / "key", "default")
    with pytest.raises(CheckpointError, match=r"query has shape \(3,\), but \(4,\)"):
        loaded.load_adapter(tmp_path / "rank", "default")
    with pytest.raises(CheckpointError, match="compared with adapter 'default', is missing"):
        loaded.load_adapter(tmp_path / "fewer", "default")
    assert torch.equal(outputs(loaded, "bert"), outputs(models["two"], "bert"))
    lora = peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(CheckpointError, match="has type LORA: load it under another name"):
        lora.load_adapter(tmp_path / "one", "default")


def edited(directory: Path, change: Any) -> None:
    """Change a file's tensors and header, with a digest that fits again."""
    tensors = load_file(directory / WEIGHTS)
    with safe_open(directory / WEIGHTS, "pt") as file:
        header = json.loads(file.metadata()["veratune"])
    del header["sha256"]
    change(tensors, header)
    header["sha256"] = native.digest_of(header, tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt", "veratune": json.dumps(header)})
    copy = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(copy | header["config"]))


LAYER = "bert.encoder.layer.0.attention.self.query"
CHANGES = {
    "one vector": (lambda tensors, _: tensors.pop(f"vera_lambda_b.{LAYER}"), "has the vectors"),
    "no head": (lambda tensors, _: tensors.pop("modules_to_save.classifier.weight"), r"missing .*classifier\.weight"),
    "a wider head": (
        lambda tensors, _: tensors.update({"modules_to_save.classifier.bias": torch.ones(7)}),
        r"classifier\.bias has shape \(7,\)",
    ),
    "whole numbers": (
        lambda tensors, _: tensors.update({"modules_to_save.classifier.bias": torch.ones(3, dtype=torch.int32)}),
        r"classifier\.bias is torch\.int32",
    ),
    "a bias": (lambda tensors, _: tensors.update({f"bias.{LAYER}.bias": torch.ones(24)}), "has unexpected names"),
    "another width": (lambda _, header: header["inputs"].update({LAYER: 3}), "had 3 inputs when"),
    "other projections": (lambda _, header: header.update(fingerprint="0" * 16), "trained with other projections"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_files_are_checked_before_a_peft_model_changes(change: Any, message: str, tmp_path: Path) -> None:
    settings = {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}
    through_peft("bert", settings).save_pretrained(tmp_path)
    edited(tmp_path, change)
    plain, model = tiny_model("bert"), through_peft("bert", settings)
    expected = outputs(model, "bert")
    for load in (
        lambda: peft.PeftModel.from_pretrained(plain, tmp_path),
        lambda: model.load_adapter(tmp_path, "other"),
        lambda: model.load_adapter(tmp_path, "default"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load()
    assert not any(isinstance(module, TunedLayer) for module in plain.modules())
    assert list(model.peft_config) == ["default"] and torch.equal(outputs(model, "bert"), expected)


def test_a_configuration_of_another_adapter_or_of_none_is_refused(tmp_path: Path) -> None:
    peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(r=4, target_modules=["query"])).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / CONFIG).read_text())
    own("bert", {"target_modules": ["query"]}).save_pretrained(tmp_path)
    for values, message in (
        (theirs, "of type 'VERA', but adapter_model.safetensors next to it is a veratune adapter"),
        ({**theirs, "peft_type": "FOO"}, "peft_type='FOO' is not an adapter type that PEFT supports"),
        ({"r": 4}, "peft_type=None is not an adapter type"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(values))
        plain, model = tiny_model("bert"), through_peft("bert", {"target_modules": ["query"]})
        for load in (
            lambda plain=plain: peft.PeftModel.from_pretrained(plain, tmp_path),
            lambda model=model: model.load_adapter(tmp_path, "other"),
        ):
            with pytest.raises(CheckpointError, match=message):
                load()
        assert not any(isinstance(module, TunedLayer) for module in plain.modules())
        assert list(model.peft_config) == ["default"]


def test_the_vectors_say_which_layers_a_file_is_for(tmp_path: Path) -> None:
    model = own("bert", {"target_modules": ["query"]})
    model.save_pretrained(tmp_path)
    edited(tmp_path, lambda _, header: header["config"].update(target_modules=None))
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))


def test_pefts_own_auto_classes_load_native_files(tmp_path: Path) -> None:
    plain = base("bert")
    plain.save_pretrained(tmp_path / "base")
    model = type(plain).from_pretrained(tmp_path / "base")
    model = get_peft_model(model, VeraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    randomise_trainable(model, std=0.3).save_pretrained(tmp_path / "native")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "native", num_labels=3)
    assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))
    model.peft_config["default"] = model.peft_config["default"].replace(task_type=None)
    model.save_pretrained(tmp_path / "native")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "native", num_labels=3)  # by the class in the JSON
    assert type(loaded.get_base_model()) is type(plain) and torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))


def test_a_configuration_from_the_json_alone_goes_by_pefts_rules(tmp_path: Path) -> None:
    model = own("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]})
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, VeratuneConfig) and config.r == 4 and config.target_modules == {"query"}
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path, config=config)
    assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))


def test_weights_without_a_peft_model(tmp_path: Path) -> None:
    """`load_peft_weights` and `set_peft_model_state_dict`, on layers that PEFT put into a model alone as well."""
    model = own("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "bias": "vera_only"})
    model.save_pretrained(tmp_path)
    config = VeratuneConfig.from_pretrained(tmp_path)
    injected = peft.inject_adapter_in_model(config, tiny_model("mixtral"))
    assert torch.equal(outputs(injected, "mixtral"), outputs(tiny_model("mixtral"), "mixtral"))
    peft.set_peft_model_state_dict(injected, peft.load_peft_weights(tmp_path, device="cpu"))
    assert torch.equal(outputs(injected, "mixtral"), outputs(model, "mixtral"))
    # Their keys in the file are none of PEFT's.
    with pytest.raises(CheckpointError, match="none of its vectors are among these tensors"):
        peft.set_peft_model_state_dict(injected, load_file(tmp_path / WEIGHTS))
    assert torch.equal(outputs(injected, "mixtral"), outputs(model, "mixtral"))


def test_projections_in_the_file(tmp_path: Path) -> None:
    settings = {"target_modules": TARGETS["llama"], "save_projection": True}
    model = through_peft("llama", settings)
    model.save_pretrained(tmp_path / "plug-in")
    own("llama", settings).save_pretrained(tmp_path / "native")
    assert_same_file(tmp_path / "plug-in", tmp_path / "native")
    assert any(key.startswith("projection.A") for key in load_file(tmp_path / "plug-in" / WEIGHTS))
    for load in (peft.PeftModel.from_pretrained, VeraModel.from_pretrained):
        assert torch.equal(outputs(load(tiny_model("llama"), tmp_path / "plug-in"), "llama"), outputs(model, "llama"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT's
def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = type(tiny_model("llama")).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 3)
    model = peft.get_peft_model(base, VeratuneConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    for settings, message in (
        ({}, r"embed_tokens\.base_layer\.weight would be lost.*modules_to_save"),  # as it was resized
        ({"save_embedding_layers": True}, r"embed_tokens\.base_layer\.weight would be lost"),
        ({"safe_serialization": False}, "never pickles"),
        ({"selected_adapters": ["unknown"]}, "invalid `selected_adapters`"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "refused", **settings)
        assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="can only be saved with its adapter"):
        model.peft_config["default"].save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_transformers_own_ways_to_files_are_refused(tmp_path: Path) -> None:
    plain = base("bert")
    plain.save_pretrained(tmp_path / "base")
    plain.add_adapter(VeratuneConfig(r=4, target_modules=["query"]))
    with pytest.raises(ValueError, match="can only be saved with its adapter"):
        plain.save_pretrained(tmp_path / "refused")
    assert not list((tmp_path / "refused").iterdir())
    model = type(plain).from_pretrained(tmp_path / "base")
    get_peft_model(model, VeraConfig(r=4, target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="transformers' load_adapter cannot read"):
        type(plain).from_pretrained(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT's
def test_embeddings_that_an_adapter_trains_are_saved_and_adapted_ones_need_no_base(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")

    def base(more: int) -> Any:
        torch.manual_seed(2)
        model = type(tiny_model("llama")).from_pretrained(tmp_path / "base")
        if more:
            model.resize_token_embeddings(model.config.vocab_size + more)
        return model

    for more, settings in (
        (3, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        (0, {"target_modules": ["q_proj", "embed_tokens"]}),
    ):
        model = randomise_trainable(peft.get_peft_model(base(more), VeratuneConfig(r=4, **settings)), 7, std=0.3).eval()
        model.save_pretrained(tmp_path / str(more))
        assert not any(key.startswith("base_model") for key in load_file(tmp_path / str(more) / WEIGHTS))
        for load in (peft.PeftModel.from_pretrained, VeraModel.from_pretrained):
            assert torch.equal(outputs(load(base(more), tmp_path / str(more)), "llama"), outputs(model, "llama"))


def test_biases_of_an_adapter_next_to_one_that_trains_the_head(tmp_path: Path) -> None:
    model = through_peft("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, "heads")
    model.add_adapter("biases", VeratuneConfig(r=4, target_modules=["query"], bias="all"))
    model.set_adapter("biases")
    randomise_trainable(model, 9, std=0.3)
    expected = outputs(model, "bert")
    model.save_pretrained(tmp_path)
    assert "bias.classifier.bias" in load_file(tmp_path / "biases" / WEIGHTS)
    for load in (peft.PeftModel.from_pretrained, VeraModel.from_pretrained):
        assert torch.equal(outputs(load(tiny_model("bert"), tmp_path / "biases"), "bert"), expected)


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path: Path) -> None:
    model = through_peft("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]})
    expected = outputs(model, "bert")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    randomise_trainable(model, 8, std=0.3)
    model.save_pretrained(tmp_path / "given", state_dict=state)
    model.save_pretrained(tmp_path / "other", state_dict=state, is_main_process=False)
    assert not (tmp_path / "other").exists()
    loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "given")
    assert torch.equal(outputs(loaded, "bert"), expected)


@pytest.mark.parametrize("replaced", [True, False])
def test_pefts_own_vera_files_are_loaded_as_before(replaced: bool, tmp_path: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    theirs = peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(r=4, target_modules=TARGETS["bert"]))
    randomise_trainable(theirs, std=0.3).save_pretrained(tmp_path)
    try:
        install(replace_vera=replaced)
        loaded = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING.update(before)
    assert any(isinstance(module, TunedLayer) for module in loaded.modules()) == replaced
    torch.testing.assert_close(outputs(loaded, "bert"), outputs(theirs, "bert"), rtol=1e-4, atol=1e-5)


def test_hotswapping_is_for_lora_alone_as_peft_says(tmp_path: Path) -> None:
    model = through_peft("bert", {"target_modules": ["query"]})
    model.save_pretrained(tmp_path / "plug-in")
    own("bert", {"target_modules": ["query"]}).save_pretrained(tmp_path / "native")
    expected = outputs(model, "bert")
    for form in ("plug-in", "native"):
        with pytest.raises(ValueError, match="only supports LORA but VERATUNE was passed"):
            hotswap_adapter(model, tmp_path / form, "default")
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.equal(outputs(model, "bert"), expected)
