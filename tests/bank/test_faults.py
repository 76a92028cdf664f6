"""Faults that a bank could serve silently: leases of other banks, unusual inputs, modules_to_save, nested models."""

import copy
import pickle
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig

import veratune.bank.resident
from banks import CUSTOMERS, alone, assert_alone, bank_of, inputs_of, tiny, with_adapters
from reference import relative
from tiny_models import tiny_model
from veratune import VeraConfig, get_peft_model
from veratune.bank import AdapterBank, BankError
from veratune.bank.layers import BankedLinear

CONFIG = VeraConfig(r=4, target_modules=["linear"], modules_to_save=["head"])


class WithHead(nn.Module):
    """A layer and a head, whose input a function makes of the layer's output."""

    def __init__(self, head: nn.Module, give: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(8, 8)
        self.head = head
        self._give = give

    def forward(self, features: Tensor) -> Any:
        return self._give(self.head, self.linear(features))


def served(base: nn.Module, config: VeraConfig = CONFIG) -> tuple[AdapterBank, Any]:
    model = with_adapters(copy.deepcopy(base), config)
    return bank_of(copy.deepcopy(base), model, config), model


# Leases


def test_a_lease_of_another_bank_is_refused() -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("llama"), config)
    bank = bank_of(tiny_model("llama"), model, config)
    other = AdapterBank(tiny_model("llama"), config)
    for name in reversed(CUSTOMERS):  # equal rows there are other adapters, and equal numbers other projections
        other.add(name, model, name)
    with other.lease(["anna", None]) as lease:
        for call in (bank.model, bank.model.generate):
            with pytest.raises(BankError, match="this lease belongs to another bank"):
                call(**inputs_of("llama", 2), adapters=lease)


def test_a_lease_that_is_released_meanwhile_serves_its_call_to_the_end() -> None:
    bank, model = tiny("llama")
    inputs = inputs_of("llama", 2)
    lease = bank.lease(["anna", "anna"])

    def release(*_: Any) -> None:
        if lease.is_open:
            lease.release()
            bank.remove("anna")
            with torch.no_grad():
                for vector in model.adapter_state("bert").parameters():
                    vector.mul_(2.0)
            bank.add("new", model, "bert")  # into the row that would be free

    bank.model.base_model.model.layers[1].register_forward_pre_hook(release)
    with torch.no_grad():
        outputs = bank.model(**inputs, adapters=lease).logits
    assert relative(outputs, alone(model, "anna", lambda m: m(**inputs).logits)) < 1e-5
    assert all(version.leases == 0 for version in bank._registry.versions.values())


# What a call is given


def test_rows_are_counted_in_inputs_of_any_name() -> None:
    bank, _ = served(WithHead(nn.Linear(8, 3), lambda head, x: head(x)))
    with pytest.raises(BankError, match="adapters has 2 names, but the batch has 4 sequences"):
        bank.model(features=torch.randn(4, 8), adapters=["anna", "bert"])  # not two rows for each


@pytest.mark.parametrize("adapters", [None, 5, iter(["anna", "bert"]), {"anna", "bert"}, torch.tensor([0, 1])])
def test_adapters_that_are_no_list_are_refused(adapters: Any) -> None:
    bank, _ = tiny("llama")
    for call in (bank.model, bank.model.generate):
        with pytest.raises(BankError, match="pass a list with a name, or None, for each sequence"):
            call(**inputs_of("llama", 2), adapters=adapters)


@pytest.mark.parametrize("lengths", [[6.0, 6.0], ["6", "6"], 12, torch.tensor([6.0, 6.0]), [6, -6]])
def test_lengths_that_are_no_whole_numbers_are_refused(lengths: Any) -> None:
    bank, _ = tiny("llama")
    with pytest.raises(BankError, match="must have one non-negative integer for each of 2 adapters"):
        bank.model(torch.ones(1, 12, dtype=torch.int64), adapters=["anna", None], adapter_lengths=lengths)


class TextByPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.text(input_ids) + self.image(pixel_values).mean()


def test_images_are_not_divided_among_rows_of_a_text_given_by_position() -> None:
    bank, _ = served(TextByPosition(), VeraConfig(r=4, target_modules=["text", "image"], modules_to_save=[]))
    with pytest.raises(RuntimeError, match=r"image received an input of shape \(6, 8\)"):
        bank.model(torch.randn(2, 5, 8), pixel_values=torch.randn(6, 8), adapters=["anna", "bert"])


@pytest.mark.parametrize("way", ["position", "name", "the model's"])
def test_beams_are_known_wherever_they_are_set(way: str) -> None:
    bank, model = tiny("llama")
    inputs = inputs_of("llama", 2)["input_ids"]
    beams = GenerationConfig(num_beams=2, num_return_sequences=2, max_new_tokens=4)
    if way == "the model's":  # which fills in what the given one leaves open
        bank.model.generation_config.update(num_beams=2, num_return_sequences=2)
        found = bank.model.generate(
            inputs, generation_config=GenerationConfig(max_new_tokens=4), adapters=["anna", None]
        )
    elif way == "name":
        found = bank.model.generate(inputs, generation_config=beams, adapters=["anna", None])
    else:
        found = bank.model.generate(inputs, beams, adapters=["anna", None])
    for row, name in enumerate(["anna", None]):
        own = alone(model, name, lambda m: m.generate(inputs, generation_config=beams))
        assert torch.equal(found[2 * row : 2 * row + 2], own[2 * row : 2 * row + 2])


# Heads


class OfSeveral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, states: list[Tensor], *, more: dict[str, Tensor]) -> Tensor:
        return self.first(states[0]) * self.second(states[1]) + more["x"]


@pytest.mark.parametrize("names", [["anna", "bert", None], ["anna", "carl", "bert"]])
@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8)])
def test_a_head_that_is_given_lists_and_dictionaries(shape: tuple[int, ...], names: list[str | None]) -> None:
    bank, model = served(WithHead(OfSeveral(), lambda head, x: head([x, x + 1], more={"x": x[..., :3]})))
    x = torch.randn(shape)
    with torch.no_grad():
        outputs = bank.model(x, adapters=names)
    assert outputs.shape == (*shape[:-1], 3)
    assert_alone(outputs, names, model, lambda m: m(x))


def test_a_head_that_is_given_time_before_rows_is_refused() -> None:
    bank, _ = served(WithHead(nn.LayerNorm(8), lambda head, x: head(x.transpose(0, 1))))
    with pytest.raises(RuntimeError, match=r"head received a tensor of shape \(4, 2, 8\)"):
        bank.model(torch.randn(2, 4, 8), adapters=["anna", "carl"])  # four is a multiple of two


def test_hooks_of_a_head_are_called() -> None:
    head = nn.Linear(8, 3)
    head.register_forward_hook(lambda module, args, output: 3 * output)
    bank, model = served(WithHead(head, lambda head, x: head(x)))
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert_alone(bank.model(x, adapters=["anna", "bert", None]), ["anna", "bert", None], model, lambda m: m(x))


# Models


def _clip_like(kind: str) -> nn.Module:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    if kind == "XCLIP":
        vision |= {f"mit_{name}": value for name, value in tower.items()} | {"num_frames": 2}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=16)
    model: nn.Module = getattr(transformers, f"{kind}Model")(config)
    return model


@pytest.mark.parametrize("kind", ["CLIP", "XCLIP", "CLIPSeg", "OwlViT", "Siglip"])
def test_models_that_compare_each_row_with_each_are_refused(kind: str) -> None:
    with pytest.raises(BankError, match=f"cannot serve {kind}Model: it compares each text in a batch with each image"):
        AdapterBank(_clip_like(kind), VeraConfig(r=4, target_modules=["q_proj"]))


def test_a_part_of_such_a_model_is_served() -> None:
    model = transformers.CLIPForImageClassification(_clip_like("CLIP").config)
    bank = AdapterBank(model, VeraConfig(r=4, target_modules=["q_proj"]))
    assert bank.model(pixel_values=torch.randn(2, 3, 8, 8), adapters=[None, None]).logits.shape[0] == 2


def test_a_model_of_time_before_rows_is_refused_inside_another_one() -> None:
    config = transformers.LongformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    inside = nn.ModuleDict({"encoder": transformers.LongformerModel(config), "classifier": nn.Linear(16, 2)})
    with pytest.raises(BankError, match="cannot serve longformer"):
        AdapterBank(inside, VeraConfig(r=4, target_modules=["query"]))


# Devices, and torch's own transformations


def test_a_model_whose_weights_are_brought_when_they_are_needed() -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("llama"), config)
    bank = bank_of(accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu")), model, config)
    inputs = inputs_of("llama", 3)
    names = ["anna", None, "carl"]
    with torch.no_grad():
        assert_alone(bank.model(**inputs, adapters=names).logits, names, model, lambda m: m(**inputs).logits)


def test_layers_on_several_devices_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    with pytest.raises(BankError, match=r"layers are on several devices \(cpu, meta\)"):
        AdapterBank(model, VeraConfig(r=4, target_modules=["0", "1"]), file=tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_heads_without_values_are_refused() -> None:
    model = WithHead(nn.Linear(8, 3, device="meta"), lambda head, x: head(x))
    with pytest.raises(BankError, match=r"\['head'\] are on the meta device"):
        AdapterBank(model, CONFIG)


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_rows_under_vmap(route: Any) -> None:
    config = VeraConfig(r=4, target_modules="all-linear", modules_to_save=[], route=route)
    bank, model = served(nn.Sequential(nn.Linear(8, 8)), config)
    x, names = torch.randn(5, 3, 8), ["anna", "bert", None]
    with torch.no_grad():
        outputs = torch.vmap(lambda rows: bank.model(rows, adapters=names))(x)
    assert_alone(outputs.transpose(0, 1), names, model, lambda m: m(x).transpose(0, 1))


# The bank itself


def test_a_file_of_a_name_that_the_system_does_not_take(tmp_path: Path) -> None:
    base = WithHead(nn.Linear(8, 3), lambda head, x: head(x))
    with pytest.raises(BankError, match=r"cannot be created: File name too long"):
        AdapterBank(base, CONFIG, file=tmp_path / ("n" * 300))
    assert type(base.linear) is nn.Linear


@pytest.mark.parametrize("failing", [1, 2])
def test_without_memory_to_grow_a_bank_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    base = WithHead(nn.Linear(8, 3), lambda head, x: head(x))
    model = with_adapters(copy.deepcopy(base), CONFIG)
    bank = AdapterBank(copy.deepcopy(base), CONFIG, capacity=1)
    bank.add("anna", model, "anna")
    make, calls = veratune.bank.resident._zeros, []

    def refuse(*args: Any) -> Tensor:  # first the slab, then modules_to_save
        calls.append(args)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("none left")
        return make(*args)

    monkeypatch.setattr(veratune.bank.resident, "_zeros", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        bank.add("bert", model, "bert")
    assert bank.names() == ["anna"]
    bank.add("bert", model, "bert")
    bank.add("carl", model, "carl")
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert_alone(bank.model(x, adapters=[*CUSTOMERS]), [*CUSTOMERS], model, lambda m: m(x))


def test_a_bank_that_was_unloaded_takes_nothing(tmp_path: Path) -> None:
    bank, model = tiny("bert")
    bank.unload()
    model.save_pretrained(tmp_path, selected_adapters=["anna"])
    place = next(path.parent for path in tmp_path.rglob("adapter_model.safetensors"))
    for put in (lambda: bank.add("new", model, "anna"), lambda: bank.load("new", place)):
        with pytest.raises(BankError, match="this bank was unloaded"):
            put()
    assert "new" not in bank


def test_a_bank_is_neither_copied_nor_pickled() -> None:
    bank, _ = tiny("bert")
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(BankError, match="a bank cannot be copied or pickled"):
            attempt(bank)


@pytest.mark.parametrize(
    ("in_bank", "in_adapter", "message"),
    [
        ([], None, r"trains \['classifier'\] in full, .*: create it with modules_to_save=\['classifier'\]"),
        (
            None,
            [],
            "adapts classifier, but this bank holds classifier in full .* without 'classifier' in modules_to_save",
        ),
    ],
)
def test_heads_that_one_adapts_and_the_other_trains_in_full(
    in_bank: list[str] | None, in_adapter: list[str] | None, message: str, tmp_path: Path
) -> None:
    config = VeraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    get_peft_model(tiny_model("bert"), config.replace(modules_to_save=in_adapter)).save_pretrained(tmp_path)
    bank = AdapterBank(tiny_model("bert"), config.replace(modules_to_save=in_bank))
    with pytest.raises(BankError, match=message):
        bank.load("anna", tmp_path)
    assert len(bank) == 0


def test_what_a_bank_says_of_itself(tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    bank = AdapterBank(tiny_model("bert"), config, capacity=2, dtype=torch.bfloat16)
    rows = 3  # the base model's as well
    numbers = sum(4 + layer.out_features for layer in bank.model.modules() if isinstance(layer, BankedLinear))
    head = sum(parameter.numel() for parameter in tiny_model("bert").classifier.parameters())
    assert (bank.capacity, bank.nbytes) == (2, rows * (2 * numbers + 4 * head))
    model = get_peft_model(tiny_model("bert"), config)
    for name in ("anna", "bert", "carl"):
        with torch.no_grad():
            next(iter(model.adapter_state("default").parameters())).add_(1.0)
        bank.add(name, model)
    assert bank.capacity == 66
    assert f"{bank!r}".startswith(
        "AdapterBank(3 adapters of 66 at a time, r <= 4, 2 layers, modules_to_save: classifier, torch.bf"
    )
