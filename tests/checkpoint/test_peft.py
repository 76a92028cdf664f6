"""Adapters that go from the real `peft` package to veratune and back compute the same, on several architectures.

Tolerance: all models are float32 and a few dozen operations deep. Both packages add up the same products in another
order, which moves an output by some units of float32's 6e-8 in each layer, and the layers after it enlarge that to
about 1e-6 of the largest output. 1e-5 leaves a margin for other BLAS libraries, and is far below what any wrong
vector, projection or bias does (tenths).
"""

import json
from functools import lru_cache
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.tuners.vera.layer import VeraLayer as PeftVeraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from reference import dense_delta, projections, relative
from tiny_models import KINDS, TARGETS, main_output, randomise_trainable, tiny_model
from veratune import CheckpointError, VeraConfig, VeraModel, get_peft_model

RANK = 8
TOLERANCE = 1e-5
CHANGE = 0.05  # by how much, at the least, an adapter that is compared changes the output

pytestmark = [
    # PEFT says this of every adapter with save_projection=False.
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
]


# Making and comparing models


def peft_model(kind: str, *, dtype=torch.float32, adapter_name="default", seed=7, autocast=True, **settings):
    """A model of the real peft whose trainable parameters are random."""
    settings = {"r": RANK, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **settings}
    model = peft.get_peft_model(
        tiny_model(kind, dtype), peft.VeraConfig(**settings), adapter_name, autocast_adapter_dtype=autocast
    )
    return randomise_trainable(model, seed).eval()


def vera_model(kind: str, *, adapter_name="default", seed=7, **settings) -> VeraModel:
    """A model of veratune whose trainable parameters are random."""
    settings = {"r": RANK, "target_modules": TARGETS[kind], **settings}
    model = get_peft_model(tiny_model(kind), VeraConfig(**settings), adapter_name)
    return randomise_trainable(model, seed).eval()


def load_in_peft(kind: str, directory: Path, **settings) -> peft.PeftModel:
    # PEFT warns of keys that it misses in the file, and pytest makes that an error.
    return peft.PeftModel.from_pretrained(tiny_model(kind), directory, **settings).eval()


def load_in_veratune(kind: str, directory: Path, **settings) -> VeraModel:
    return VeraModel.from_pretrained(tiny_model(kind), directory, **settings).eval()


def output(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model, kind)


def assert_same(kind: str, actual: nn.Module, expected: nn.Module | torch.Tensor, tolerance: float = TOLERANCE):
    """Both compute the same, and something else than the model without an adapter."""
    expected = output(expected, kind) if isinstance(expected, nn.Module) else expected
    assert relative(expected, output(tiny_model(kind), kind)) > CHANGE
    assert relative(output(actual, kind), expected) < tolerance


def peft_layers(model: peft.PeftModel) -> dict[str, PeftVeraLayer]:
    """PEFT's adapted layers by their names in the model without adapters."""
    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, PeftVeraLayer)}


def peft_vectors(model: peft.PeftModel, adapter_name: str = "default") -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    return {
        name: (layer.vera_lambda_b[adapter_name], layer.vera_lambda_d[adapter_name])
        for name, layer in peft_layers(model).items()
    }


def backward(model: nn.Module, kind: str) -> float:
    logits = main_output(model, kind)
    generator = torch.Generator().manual_seed(5)
    loss = (logits * torch.randn(logits.shape, generator=generator)).sum()
    loss.backward()
    return loss.item()


def read(directory: Path) -> tuple[dict[str, torch.Tensor], dict]:
    tensors = load_file(directory / "adapter_model.safetensors")
    return tensors, json.loads((directory / "adapter_config.json").read_text())


def write(directory: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config))


# 1. From PEFT


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_checkpoint_gives_equal_outputs_and_gradients(kind, save_projection, tmp_path):
    theirs = peft_model(kind, save_projection=save_projection, projection_prng_key=11)
    theirs.save_pretrained(tmp_path)
    assert ("base_model.vera_A" in read(tmp_path)[0]) == save_projection

    ours = load_in_veratune(kind, tmp_path, is_trainable=True)

    assert_same(kind, ours, theirs)
    loss, expected_loss = backward(ours, kind), backward(theirs, kind)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-4)
    vectors, expected_vectors = ours.adapter_state("default").vectors, peft_vectors(theirs)
    assert vectors.keys() == expected_vectors.keys()
    assert len({(layer.in_features, layer.out_features) for layer in ours.vera_layers().values()}) > 1
    for name, expected_pair in expected_vectors.items():
        for which, actual, expected in zip("bd", vectors[name].values(), expected_pair, strict=True):
            assert torch.equal(actual, expected), (name, which)
            assert expected.grad.abs().max() > 0, (name, which)
            assert relative(actual.grad, expected.grad) < 2 * TOLERANCE, (name, which)  # twice as deep as an output


@pytest.mark.parametrize("autocast", [True, False])
def test_peft_checkpoint_from_a_bfloat16_base(autocast, tmp_path):
    # PEFT rounds the projections to the base's dtype, and writes them so.
    peft_model("llama", dtype=torch.bfloat16, autocast=autocast).save_pretrained(tmp_path)
    stored = read(tmp_path)[0]["base_model.vera_A"]
    assert torch.equal(stored, stored.to(torch.bfloat16).to(stored.dtype))
    assert_same("llama", load_in_veratune("llama", tmp_path), load_in_peft("llama", tmp_path))


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("sizes", [(5, 1), (1, 6), (1, 1)])
def test_peft_checkpoint_of_layers_with_one_input_or_output(sizes, halved, tmp_path):
    def base() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(*sizes))

    theirs = randomise_trainable(peft.get_peft_model(base(), peft.VeraConfig(r=RANK, target_modules=["0"])), std=5.0)
    if halved:  # projections that are in the file alone
        with torch.no_grad():
            theirs.base_model.vera_A["default"].mul_(0.5)
    theirs.save_pretrained(tmp_path)
    ours = VeraModel.from_pretrained(base(), tmp_path)
    x = torch.linspace(-1, 1, 3 * sizes[0]).view(3, -1)
    assert relative(ours(x), theirs(x)) < TOLERANCE
    assert relative(base()(x), theirs(x)) > CHANGE


def test_peft_checkpoint_of_an_adapter_of_another_name(tmp_path):
    theirs = peft_model("bert")
    theirs.add_adapter("other", peft.VeraConfig(r=RANK, target_modules=["value"]))
    theirs.set_adapter("other")
    randomise_trainable(theirs, seed=8)
    theirs.save_pretrained(tmp_path)
    outputs = {"other": output(theirs, "bert")}
    theirs.set_adapter("default")
    outputs["default"] = output(theirs, "bert")
    assert relative(outputs["default"], outputs["other"]) > CHANGE

    ours = load_in_veratune("bert", tmp_path, adapter_name="first")
    ours.load_adapter(tmp_path, "second", subfolder="other")
    assert_same("bert", ours, outputs["default"])
    ours.set_adapter("second")
    assert_same("bert", ours, outputs["other"])
    assert_same("bert", load_in_veratune("bert", tmp_path / "other"), outputs["other"])


def test_peft_checkpoint_with_every_d_starting_at_zero(tmp_path):
    # Useless for training, but a file whose vectors were made in another way may say so.
    theirs = peft_model("bert", d_initial=0.0)
    theirs.save_pretrained(tmp_path)
    assert_same("bert", load_in_veratune("bert", tmp_path), theirs)


# 2. To PEFT

RANK_PATTERNS = {
    "bert": {"query": 5, r"layer\.1\.output\.dense": 13},
    "gpt2": {r"attn\.c_proj": 5, "c_fc": 13},
    "llama": {"k_proj": 5, r"layers\.0\.mlp\.down_proj": 13},
    "t5": {r"SelfAttention\.q": 5, "wo": 13},
    "vit": {"q_proj": 5, "fc2": 13},
    "mixtral": {"v_proj": 5, r"layers\.1\.self_attn\.o_proj": 13},
}


@pytest.mark.parametrize(
    ("projection", "save_projection", "written"),
    [
        ("peft", None, False),
        ("peft", False, False),
        ("peft", True, True),
        ("per_dimension", None, True),
        ("per_dimension", True, True),
        ("ranks", None, True),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_equal_outputs_in_peft(kind, projection, save_projection, written, tmp_path):
    settings = {"projection": projection}
    if projection == "ranks":
        settings = {"rank_pattern": RANK_PATTERNS[kind]}
    ours = vera_model(kind, projection_prng_key=3, modules_to_save=[], **settings)
    assert len({entry.r for layer in ours.vera_layers().values() for entry in layer.entries.values()}) == (
        3 if projection == "ranks" else 1
    )

    ours.export_peft(tmp_path, save_projection=save_projection)

    tensors, config = read(tmp_path)
    assert ("base_model.vera_A" in tensors) == ("base_model.vera_B" in tensors) == written
    assert config["save_projection"] == written
    assert config["peft_type"] == "VERA"
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    theirs = load_in_peft(kind, tmp_path)
    assert list(peft_layers(theirs)) == list(ours.vera_layers())
    assert_same(kind, theirs, ours)


@pytest.mark.parametrize("ranks", [{}, {"query": 5}])
def test_export_without_projections_is_refused_where_peft_cannot_draw_them(ranks, tmp_path):
    ours = vera_model("bert", rank_pattern=ranks)
    with pytest.raises(ValueError, match="save_projection=False"):
        ours.export_peft(tmp_path, save_projection=False)
    assert list(tmp_path.iterdir()) == []


def test_export_without_projections_is_refused_for_foreign_ones(tmp_path):
    peft_model("bert").save_pretrained(tmp_path / "peft")
    tensors, config = read(tmp_path / "peft")
    write(tmp_path / "peft", replace_projections(tensors), config)
    ours = load_in_veratune("bert", tmp_path / "peft")
    with pytest.raises(ValueError, match="save_projection=False"):
        ours.export_peft(tmp_path / "exported", save_projection=False)
    assert not (tmp_path / "exported").exists()


def test_export_of_an_adapter_of_another_name(tmp_path):
    ours = vera_model("bert", modules_to_save=[])
    ours.add_adapter("other", VeraConfig(r=RANK, target_modules=["value"], modules_to_save=[]))
    ours.set_adapter("other")
    randomise_trainable(ours, seed=8)
    ours.export_peft(tmp_path / "other")
    expected_other = output(ours, "bert")
    ours.set_adapter("default")
    ours.export_peft(tmp_path, "default")
    expected = output(ours, "bert")
    assert relative(expected, expected_other) > CHANGE

    assert_same("bert", load_in_peft("bert", tmp_path), expected)
    theirs = load_in_peft("bert", tmp_path, subfolder="other", adapter_name="other")
    assert theirs.active_adapter == "other"
    assert_same("bert", theirs, expected_other)


def test_export_can_be_trained_on_in_peft(tmp_path):
    ours = vera_model("llama", rank_pattern=RANK_PATTERNS["llama"])
    ours.export_peft(tmp_path)
    theirs = load_in_peft("llama", tmp_path, is_trainable=True)
    backward(theirs, "llama")
    backward(ours, "llama")
    for name, own in ours.adapter_state("default").vectors.items():
        # d is scaled in the file, b is not: its gradient is the same.
        assert relative(peft_vectors(theirs)[name][0].grad, own["b"].grad) < 2 * TOLERANCE


# 3. To LoRA


@lru_cache
def reference_projections(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return projections(*shape)


def dense_weights(model: VeraModel, key: int) -> dict[str, torch.Tensor]:
    """W0 + diag(b) B diag(d) A by dense algebra in float64, (out, in), with projections from plain Python integers."""
    weights = {}
    for name, layer in model.vera_layers().items():
        b, d = (vector.detach() for vector in layer.vectors("default").values())
        pair = reference_projections(key, d.numel(), layer.in_features, layer.out_features)
        weight = layer.base_weight.detach().double()
        weights[name] = (weight.t() if isinstance(layer.base_layer, Conv1D) else weight) + dense_delta(b, d, *pair)
    return weights


@pytest.mark.parametrize("ranks", [False, True], ids=["one-rank", "ranks"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_lora_gives_equal_outputs_in_peft(kind, ranks, tmp_path):
    rank_pattern = RANK_PATTERNS[kind] if ranks else {}
    ours = vera_model(kind, modules_to_save=[], rank_pattern=rank_pattern, projection_prng_key=3)
    ours.export_lora(tmp_path)

    assert read(tmp_path)[1]["peft_type"] == "LORA"
    theirs = load_in_peft(kind, tmp_path)
    adapted = [name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == list(ours.vera_layers())
    assert_same(kind, theirs, ours)

    merged = theirs.merge_and_unload()
    assert_same(kind, merged, ours)
    base = tiny_model(kind)
    for name, expected in dense_weights(ours, key=3).items():
        module = merged.get_submodule(name)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        assert relative(weight, expected) < 1e-6  # one sum over the rank and one addition in float32
        assert relative(module.weight, base.get_submodule(name).weight) > CHANGE


def test_export_lora_of_a_peft_checkpoint(tmp_path):
    theirs = peft_model("gpt2", bias="vera_only")
    theirs.save_pretrained(tmp_path / "vera")
    load_in_veratune("gpt2", tmp_path / "vera").export_lora(tmp_path / "lora")
    assert_same("gpt2", load_in_peft("gpt2", tmp_path / "lora"), theirs)


@pytest.mark.parametrize("bias", ["none", "all", "vera_only"])
def test_export_lora_takes_head_and_biases_along(bias, tmp_path):
    ours = vera_model("bert", task_type="SEQ_CLS", bias=bias)
    ours.export_lora(tmp_path)
    assert_same("bert", load_in_peft("bert", tmp_path), ours)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 5)
        self.other = nn.Linear(5, 6)

    def forward(self, x):
        return self.other(torch.tanh(self.dense(x)))


class Net(nn.Module):
    """Names that are the ends of other names: dense and block.dense, head and my_head."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 6)
        self.block = Block()
        self.head = nn.Linear(6, 3)
        self.my_head = nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.block(torch.tanh(self.dense(x)))
        return self.head(hidden) + self.my_head(hidden)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net()


def net_output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(-2, 2, 12).view(3, 4))


@pytest.mark.parametrize("export", ["export_peft", "export_lora"])
@pytest.mark.parametrize(
    ("settings"),
    [
        {"target_modules": "all-linear", "rank_pattern": {r"block\.dense": 4, "dense": 9}},
        {"target_modules": "dense"},
        {"target_modules": "dense|block.other"},
        {"target_modules": ["head"]},
        {"target_modules": ["other"], "modules_to_save": ["head"]},
        {"target_modules": ["head"], "modules_to_save": ["dense"]},
    ],
    ids=["ranks", "one", "some", "head", "saved-head", "saved-dense"],
)
def test_export_of_names_that_are_ends_of_other_names(export, settings, tmp_path):
    ours = get_peft_model(net(), VeraConfig(r=RANK, **settings))
    randomise_trainable(ours)
    getattr(ours, export)(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert relative(net_output(ours), net_output(net())) > CHANGE
    assert relative(net_output(theirs), net_output(ours)) < TOLERANCE


# 4. Round trips


def replace_projections(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        key: torch.randn(tensor.shape, generator=generator) * 0.5 if key.startswith("base_model.vera_") else tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_from_peft_through_veratune_to_peft(kind, save_projection, tmp_path):
    theirs = peft_model(kind, save_projection=save_projection, projection_prng_key=5)
    theirs.save_pretrained(tmp_path / "first")
    ours = load_in_veratune(kind, tmp_path / "first")
    ours.export_peft(tmp_path / "second")

    (first, config), (second, second_config) = read(tmp_path / "first"), read(tmp_path / "second")
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(second[key], tensor), key
    assert set(second_config) <= set(config)
    for field in ("r", "projection_prng_key", "save_projection", "fan_in_fan_out", "bias", "peft_type"):
        assert second_config[field] == config[field], field
    assert_same(kind, load_in_peft(kind, tmp_path / "second"), output(theirs, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_projections_survive_every_way(kind, tmp_path):
    own = peft_model(kind)
    own.save_pretrained(tmp_path / "peft")
    tensors, config = read(tmp_path / "peft")
    write(tmp_path / "peft", replace_projections(tensors), config)
    theirs = load_in_peft(kind, tmp_path / "peft")
    assert relative(output(theirs, kind), output(own, kind)) > CHANGE

    ours = load_in_veratune(kind, tmp_path / "peft")
    assert_same(kind, ours, theirs)
    ours.save_pretrained(tmp_path / "native")
    again = load_in_veratune(kind, tmp_path / "native")
    assert torch.equal(output(again, kind), output(ours, kind))
    again.export_peft(tmp_path / "exported")
    assert_same(kind, load_in_peft(kind, tmp_path / "exported"), theirs)
    again.export_lora(tmp_path / "lora")
    assert_same(kind, load_in_peft(kind, tmp_path / "lora"), theirs)


def test_native_save_of_a_drawable_peft_adapter_needs_no_projections(tmp_path):
    theirs = peft_model("bert", save_projection=False, projection_prng_key=-5)
    theirs.save_pretrained(tmp_path / "peft")
    load_in_veratune("bert", tmp_path / "peft").save_pretrained(tmp_path / "native")
    assert not any(key.startswith("projection") for key in read(tmp_path / "native")[0])
    assert_same("bert", load_in_veratune("bert", tmp_path / "native"), theirs)


# 5. Heads, biases, and which layers


@pytest.mark.parametrize("bias", ["none", "all", "vera_only"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["LayerNorm", "pooler"]}),
        ("bert", {"target_modules": ["query", "dense"], "modules_to_save": []}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_1", "ln_f"]}),
        ("vit", {"modules_to_save": ["classifier"]}),
        ("distilbert", {"task_type": "SEQ_CLS"}),
    ],
    ids=["bert-head", "bert-norms", "bert", "gpt2", "gpt2-norms", "vit-head", "distilbert-head"],
)
class TestHeadsAndBiases:
    def test_from_peft(self, kind, settings, bias, tmp_path):
        theirs = peft_model(kind, bias=bias, **settings)
        theirs.save_pretrained(tmp_path)
        ours = load_in_veratune(kind, tmp_path)
        assert_same(kind, ours, theirs)
        with ours.disable_adapter():
            assert torch.equal(output(ours, kind), output(tiny_model(kind), kind))

    def test_to_peft(self, kind, settings, bias, tmp_path):
        ours = vera_model(kind, bias=bias, **settings)
        assert bool(ours.adapter_state("default").biases) == (bias != "none")
        ours.export_peft(tmp_path)
        assert_same(kind, load_in_peft(kind, tmp_path), ours)

    def test_there_and_back(self, kind, settings, bias, tmp_path):
        ours = vera_model(kind, bias=bias, **settings)
        ours.export_peft(tmp_path / "exported")
        load_in_peft(kind, tmp_path / "exported").save_pretrained(tmp_path / "peft")
        assert_same(kind, load_in_veratune(kind, tmp_path / "peft"), ours)


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("llama", ["embed_tokens", "lm_head"]),
        ("gpt2", ["wte"]),  # lm_head is tied to it, and keeps the model's own
    ],
)
def test_saved_embeddings_and_output_heads(kind, modules, tmp_path):
    theirs = peft_model(kind, modules_to_save=modules)
    theirs.save_pretrained(tmp_path / "peft")
    assert_same(kind, load_in_veratune(kind, tmp_path / "peft"), theirs)
    ours = vera_model(kind, modules_to_save=modules)
    ours.export_peft(tmp_path / "exported")
    assert_same(kind, load_in_peft(kind, tmp_path / "exported"), ours)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "TOKEN_CLS"])
def test_export_of_a_classifier_whose_head_was_not_trained(task_type, tmp_path):
    # PEFT wants weights of the head from every adapter of such a task.
    ours = vera_model("bert", modules_to_save=[], task_type=task_type)
    ours.export_peft(tmp_path)
    assert_same("bert", load_in_peft("bert", tmp_path), ours)


@pytest.mark.parametrize("head", [["qa_outputs"], []])
def test_export_of_a_question_answerer(head, tmp_path):
    def base() -> nn.Module:
        torch.manual_seed(5)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
        return transformers.BertForQuestionAnswering(config).eval()

    settings = {"target_modules": ["query", "dense"], "modules_to_save": head, "task_type": "QUESTION_ANS"}
    ours = randomise_trainable(get_peft_model(base(), VeraConfig(r=RANK, **settings))).eval()
    ours.export_peft(tmp_path)
    assert read(tmp_path)[1]["task_type"] == ("QUESTION_ANS" if head else None)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        expected, plain = ours(ids).start_logits, base()(ids).start_logits
        assert relative(plain, expected) > CHANGE
        assert relative(theirs(ids).start_logits, expected) < TOLERANCE


def test_export_with_one_of_two_similarly_named_heads(tmp_path):
    # PEFT takes "classifier" for the end of "pre_classifier" as well.
    ours = vera_model("distilbert", modules_to_save=["classifier"])
    ours.export_peft(tmp_path)
    assert_same("distilbert", load_in_peft("distilbert", tmp_path), ours)


SELECTIONS = {
    "index": ("llama", {"layers_to_transform": 1}),
    "indices": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "conv1d-index": ("gpt2", {"layers_to_transform": [0], "layers_pattern": "h"}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q_proj|down_proj)"}),
    "t5-regex": ("t5", {"target_modules": r"decoder\..*EncDecAttention\.[qo]"}),
    "full-name": ("bert", {"target_modules": ["bert.pooler.dense", "query"]}),
    **{
        f"{kind}-all-linear": (kind, {"target_modules": "all-linear"})
        for kind in ("bert", "gpt2", "llama", "t5", "vit", "mixtral")
    },
}


@pytest.mark.parametrize(("kind", "settings"), SELECTIONS.values(), ids=SELECTIONS)
def test_the_same_settings_choose_the_same_layers(kind, settings, tmp_path):
    theirs = peft_model(kind, **settings)
    theirs.save_pretrained(tmp_path / "peft")
    # Expert tensors are what PEFT's VeRA does not know.
    excluded = {"exclude_modules": ["experts"]} if kind == "mixtral" else {}
    ours = vera_model(kind, modules_to_save=[], **settings, **excluded)
    assert list(ours.vera_layers()) == list(peft_layers(theirs))

    loaded = load_in_veratune(kind, tmp_path / "peft")
    assert loaded.vera_layers().keys() == peft_layers(theirs).keys()
    assert_same(kind, loaded, theirs)
    ours.export_peft(tmp_path / "exported")
    exported = load_in_peft(kind, tmp_path / "exported")
    assert peft_layers(exported).keys() == ours.vera_layers().keys()
    assert_same(kind, exported, ours)


def test_classification_head_is_left_out_of_all_linear_in_both(tmp_path):
    settings = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    theirs, ours = peft_model("bert", **settings), vera_model("bert", **settings)
    assert list(ours.vera_layers()) == list(peft_layers(theirs))
    assert "classifier" not in ours.vera_layers()
    theirs.save_pretrained(tmp_path / "peft")
    assert_same("bert", load_in_veratune("bert", tmp_path / "peft"), theirs)
    ours.export_peft(tmp_path / "exported")
    assert_same("bert", load_in_peft("bert", tmp_path / "exported"), ours)


def test_conv1d_delta_is_transposed(tmp_path):
    theirs = peft_model("gpt2")
    theirs.save_pretrained(tmp_path)
    assert read(tmp_path)[1]["fan_in_fan_out"] is True
    ours = load_in_veratune("gpt2", tmp_path)
    for name, layer in ours.vera_layers().items():
        expected = peft_layers(theirs)[name].get_delta_weight("default")
        assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
        assert relative(layer.get_delta_weight("default"), expected) < 1e-6  # one sum over the rank
    ours.export_peft(tmp_path / "exported")
    assert read(tmp_path / "exported")[1]["fan_in_fan_out"] is True
    assert_same("gpt2", ours.merge_and_unload(), theirs)


# 6. Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_the_same_steps_as_peft(kind):
    settings = {"r": RANK, "target_modules": TARGETS[kind], "projection_prng_key": 2, "d_initial": 0.3}
    theirs = peft.get_peft_model(tiny_model(kind), peft.VeraConfig(fan_in_fan_out=kind == "gpt2", **settings)).eval()
    ours = get_peft_model(tiny_model(kind), VeraConfig(projection="peft", modules_to_save=[], **settings)).eval()

    losses = {}
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            logits = main_output(model, kind)
            target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
            loss = (logits - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.setdefault(id(model), []).append(loss.item())

    assert losses[id(ours)] == pytest.approx(losses[id(theirs)], rel=1e-5)
    assert len(set(losses[id(ours)])) == 3
    vectors = ours.adapter_state("default").vectors
    moved_d = 0.0
    for name, (expected_b, expected_d) in peft_vectors(theirs).items():
        b, d = vectors[name].values()
        assert expected_b.abs().max() > 1e-3, name  # it started at zero
        moved_d = max(moved_d, (expected_d.detach() - 0.3).abs().max().item())
        assert relative(b, expected_b) < 5 * TOLERANCE, name  # three gradients added up
        assert relative(d, expected_d) < TOLERANCE, name
    assert moved_d > 1e-3
    assert relative(output(ours, kind), output(theirs, kind)) < TOLERANCE
    assert relative(output(ours, kind), output(tiny_model(kind), kind)) > 1e-3


def test_new_adapters_start_alike():
    for init_weights in (True, False):
        theirs = peft_model_as_made("bert", init_weights=init_weights)
        ours = get_peft_model(
            tiny_model("bert"),
            VeraConfig(r=RANK, target_modules=["query"], projection="peft", init_weights=init_weights),
        )
        for name, own in ours.adapter_state("default").vectors.items():
            expected_b, expected_d = peft_vectors(theirs)[name]
            assert torch.equal(own["b"], expected_b)
            assert torch.equal(own["d"], expected_d) == init_weights  # otherwise both are random


def peft_model_as_made(kind: str, **settings) -> peft.PeftModel:
    return peft.get_peft_model(tiny_model(kind), peft.VeraConfig(r=RANK, target_modules=["query"], **settings))


# 7. Files of other kinds


def test_a_lora_directory_is_refused(tmp_path):
    lora = peft.LoraConfig(r=4, target_modules=["query"])
    peft.get_peft_model(tiny_model("bert"), lora).save_pretrained(tmp_path)
    assert_refused(tmp_path, "LORA")


# 8. Damaged files


def snapshot(model: nn.Module):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    trainable = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return state, modules, trainable


def assert_refused(directory: Path, match: str) -> None:
    """Loading raises CheckpointError, and leaves the model as it was, and usable."""
    model = tiny_model("bert")
    model.bert.pooler.requires_grad_(False)
    state, modules, trainable = snapshot(model)
    with pytest.raises(CheckpointError, match=match):
        VeraModel.from_pretrained(model, directory)
    state_after, modules_after, trainable_after = snapshot(model)
    assert modules_after == modules
    assert trainable_after == trainable
    assert list(state_after) == list(state)
    assert all(torch.equal(state_after[key], tensor) for key, tensor in state.items())
    assert torch.equal(output(model, "bert"), output(tiny_model("bert"), "bert"))

    # Nor does it change a model that has an adapter.
    adapted = vera_model("bert", target_modules=["key"], bias="vera_only")
    before, (state, modules, trainable) = output(adapted, "bert"), snapshot(adapted)
    with pytest.raises(CheckpointError, match=match):
        adapted.load_adapter(directory, "other")
    state_after, modules_after, trainable_after = snapshot(adapted)
    assert (modules_after, trainable_after, list(state_after)) == (modules, trainable, list(state))
    assert list(adapted.peft_config) == ["default"]
    assert torch.equal(output(adapted, "bert"), before)


LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"
KEY_LAYER = "base_model.model.bert.encoder.layer.0.attention.self.key"

# What is done to the tensors and the configuration of a whole PEFT checkpoint, and what the message then says.
DAMAGES = {
    "no-projections": (lambda t, c: (t.pop("base_model.vera_A"), t.pop("base_model.vera_B")), "no projections"),
    "only-A": (lambda t, c: t.pop("base_model.vera_B"), "one of base_model.vera_A and base_model.vera_B"),
    "only-B": (lambda t, c: t.pop("base_model.vera_A"), "one of base_model.vera_A and base_model.vera_B"),
    "no-d": (lambda t, c: t.pop(f"{LAYER}.vera_lambda_d"), "query has the vectors"),
    "no-b": (lambda t, c: t.pop(f"{LAYER}.vera_lambda_b"), "query has the vectors"),
    "no-vectors": (lambda t, c: [t.pop(key) for key in list(t) if "vera_lambda" in key], "no layer"),
    "no-head": (lambda t, c: [t.pop(f"base_model.model.classifier.{key}") for key in ("weight", "bias")], "classifier"),
    "no-layer": (
        lambda t, c: [t.pop(f"{LAYER}.vera_lambda_{which}") for which in "bd"],
        "query",
    ),
    "no-bias": (lambda t, c: t.pop(f"{LAYER}.base_layer.bias"), r"query.*bias"),
    "half-a-head": (lambda t, c: t.pop("base_model.model.classifier.bias"), "classifier.*bias"),
    "extra-root-key": (lambda t, c: t.update(foo=torch.zeros(3)), "'foo'"),
    "extra-key": (lambda t, c: t.update({f"{LAYER}.foo": torch.zeros(3)}), r"query\.foo"),
    "extra-bias": (lambda t, c: t.update({f"{KEY_LAYER}.bias": torch.zeros(16)}), r"key\.bias"),
    "unknown-layer": (
        lambda t, c: t.update(
            {"base_model.model.foo.vera_lambda_b": torch.ones(16), "base_model.model.foo.vera_lambda_d": torch.ones(8)}
        ),
        "foo",
    ),
    "no-linear-layer": (
        lambda t, c: t.update(
            {
                "base_model.model.bert.embeddings.LayerNorm.vera_lambda_b": torch.ones(16),
                "base_model.model.bert.embeddings.LayerNorm.vera_lambda_d": torch.ones(8),
            }
        ),
        "LayerNorm",
    ),
    "larger-r": (lambda t, c: c.update(r=9), "r is 9"),
    "smaller-r": (lambda t, c: c.update(r=7), "r is 7"),
    "r-of-another-type": (lambda t, c: c.update(r="8"), "r='8'"),
    "b-too-long": (lambda t, c: t.update({f"{LAYER}.vera_lambda_b": torch.ones(17)}), r"\(17,\)"),
    "b-two-dimensional": (lambda t, c: t.update({f"{LAYER}.vera_lambda_b": torch.ones(16, 1)}), r"\(16, 1\)"),
    "d-too-short": (lambda t, c: t.update({f"{LAYER}.vera_lambda_d": torch.ones(7)}), "7 elements"),
    "d-two-dimensional": (lambda t, c: t.update({f"{LAYER}.vera_lambda_d": torch.ones(8, 1)}), r"\(8, 1\)"),
    "A-too-narrow": (lambda t, c: t.update({"base_model.vera_A": torch.ones(8, 23)}), r"\(8, 23\)"),
    "A-of-another-rank": (lambda t, c: t.update({"base_model.vera_A": torch.ones(7, 24)}), r"\(7, 24\)"),
    "B-too-narrow": (lambda t, c: t.update({"base_model.vera_B": torch.ones(23, 8)}), r"\(23, 8\)"),
    "B-of-another-rank": (lambda t, c: t.update({"base_model.vera_B": torch.ones(24, 7)}), r"\(24, 7\)"),
    "A-one-dimensional": (lambda t, c: t.update({"base_model.vera_A": torch.ones(24)}), r"\(24,\)"),
    "head-of-other-labels": (
        lambda t, c: t.update(
            {"base_model.model.classifier.weight": torch.ones(4, 16), "base_model.model.classifier.bias": torch.ones(4)}
        ),
        "labels",
    ),
    "bias-too-long": (lambda t, c: t.update({f"{LAYER}.base_layer.bias": torch.ones(17)}), r"\(17,\)"),
    "unknown-bias-setting": (lambda t, c: c.update(bias="some"), "bias='some'"),
    "no-regex": (lambda t, c: c.update(target_modules="(query"), "regular expression"),
    "peft-type": (lambda t, c: c.update(peft_type="FOO"), "FOO"),
    "no-peft-type": (lambda t, c: c.pop("peft_type"), "type None"),
}


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    peft_model("bert", task_type="SEQ_CLS", bias="vera_only").save_pretrained(directory)
    return directory


def test_a_checkpoint_without_its_widest_layers_is_refused(tmp_path):
    # What is left would be computed with projections of other shapes, and so of other values.
    peft_model("bert", save_projection=False).save_pretrained(tmp_path)
    tensors, config = read(tmp_path)
    write(tmp_path, {key: value for key, value in tensors.items() if ".dense." not in key}, config)
    assert_refused(tmp_path, "dense")


def test_the_undamaged_checkpoint_loads(whole_checkpoint):
    assert_same("bert", load_in_veratune("bert", whole_checkpoint), load_in_peft("bert", whole_checkpoint))


@pytest.mark.parametrize(("damage", "match"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_contents_are_refused(damage, match, whole_checkpoint, tmp_path):
    tensors, config = read(whole_checkpoint)
    damage(tensors, config)
    write(tmp_path, tensors, config)
    assert_refused(tmp_path, match)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(name, kept, whole_checkpoint, tmp_path):
    for path in ("adapter_model.safetensors", "adapter_config.json"):
        data = (whole_checkpoint / path).read_bytes()
        (tmp_path / path).write_bytes(data[: int(len(data) * kept)] if path == name else data)
    assert_refused(tmp_path, name)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_refused(name, whole_checkpoint, tmp_path):
    for path in {"adapter_model.safetensors", "adapter_config.json"} - {name}:
        (tmp_path / path).write_bytes((whole_checkpoint / path).read_bytes())
    assert_refused(tmp_path, "adapter_model.safetensors")


def test_a_checkpoint_for_another_model_is_refused(tmp_path):
    model = tiny_model("bert")
    del model.bert.encoder.layer[1]
    peft_model("bert", target_modules=["query"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not have") as error:
        VeraModel.from_pretrained(model, tmp_path)
    assert "layer.1.attention.self.query" in str(error.value)


def test_a_refused_checkpoint_leaves_no_hook_behind(tmp_path):
    # With gradient checkpointing on, an adapted model has a hook on its embeddings.
    model = tiny_model("bert")
    model.gradient_checkpointing_enable()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(CheckpointError):
        VeraModel.from_pretrained(model, tmp_path)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
