"""The bank against each adapter alone, and against the model itself with W + diag(b) B diag(d) A in float64."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from banks import CUSTOMERS, alone, assert_alone, bank_of, inputs_of, tiny, with_adapters
from dense import dense_parameters
from reference import randomise, relative
from tiny_models import tiny_model
from veratune import TargetError, VeraConfig, VeraModel, get_peft_model
from veratune.bank import AdapterBank, BankError
from veratune.bank import layers as banked
from veratune.bank.layer_call import serving
from veratune.bank.layers import BankedLinear
from veratune.ops.linear import project

ROWS: list[str | None] = ["anna", None, "carl", "bert", "anna"]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit", "distilbert"])
def test_each_row_computes_with_its_own_adapter(kind: str) -> None:
    bank, model = tiny(kind)
    inputs = inputs_of(kind)
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=ROWS).logits
    for row, name in enumerate(ROWS):
        own = alone(model, name, lambda m: m(**inputs).logits)
        assert relative(mixed[row], own[row]) < 1e-5
        others = [alone(model, other, lambda m: m(**inputs).logits) for other in (*CUSTOMERS, None) if other != name]
        assert all(relative(mixed[row], other[row]) > 1e-2 for other in others)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_rows_agree_with_dense_algebra_in_float64(kind: str) -> None:
    config = VeraConfig(r=8, target_modules="all-linear", modules_to_save=[])
    model = with_adapters(tiny_model(kind), config)
    bank = bank_of(tiny_model(kind).double(), model, config)
    inputs, reference = inputs_of(kind), tiny_model(kind).double()
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=ROWS).logits
        for row, name in enumerate(ROWS):
            weights = {} if name is None else dense_parameters(model, name)[0]
            expected = torch.func.functional_call(reference, weights, (), inputs).logits
            assert relative(mixed[row], expected[row]) < 1e-6  # d times its scale is a float32


def test_the_base_model_is_the_base_model_to_the_bit() -> None:
    bank, _ = tiny("llama")
    inputs = inputs_of("llama")
    with torch.no_grad():
        expected = tiny_model("llama")(**inputs).logits
        assert torch.equal(bank.model(**inputs, adapters=[None] * 5).logits, expected)
        mixed = bank.model(**inputs, adapters=[None, "anna", None, "carl", None]).logits
    for row in (0, 2, 4):
        assert torch.equal(mixed[row], expected[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_in_half_precision_round_and_nothing_else(dtype: torch.dtype) -> None:
    config = VeraConfig(r=8, target_modules="all-linear", modules_to_save=[])
    model = with_adapters(tiny_model("bert"), config)
    with torch.no_grad():
        for layer in model.vera_layers().values():
            for own in CUSTOMERS:
                b, d = layer.vectors(own).values()
                scale = layer.entries[own].scale
                b.copy_(b.to(dtype))
                d.copy_((d * scale).to(dtype).float() / scale)
    bank = bank_of(tiny_model("bert"), model, config, dtype=dtype)
    inputs = inputs_of("bert")
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=ROWS).logits
    assert_alone(mixed, ROWS, model, lambda m: m(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(dtype: torch.dtype) -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("llama").to(dtype), config, 0.2)
    bank = bank_of(tiny_model("llama").to(dtype), model, config)
    inputs = inputs_of("llama")
    exact = with_adapters(tiny_model("llama"), config, 0.2)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=ROWS).logits
    for row, name in enumerate(ROWS):
        truth = alone(exact, name, lambda m: m(**inputs).logits)[row]
        own = alone(model, name, lambda m: m(**inputs).logits)[row]
        # As near to float32 as the adapter alone is: both round, in other places.
        assert relative(mixed[row], truth) < 2 * relative(own, truth) + torch.finfo(dtype).eps


def test_autocast() -> None:
    bank, model = tiny("bert", modules_to_save=[])
    inputs = inputs_of("bert")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = bank.model(**inputs, adapters=ROWS).logits
        assert mixed.dtype == torch.bfloat16
        assert_alone(mixed, ROWS, model, lambda m: m(**inputs).logits, 0.05)


def test_adapters_of_fewer_layers_are_zero_elsewhere() -> None:
    config = VeraConfig(r=8, target_modules="all-linear", modules_to_save=[])
    bank = AdapterBank(tiny_model("bert"), config)
    models = {}
    for name, targets in (("queries", ["query"]), ("dense", ["dense"])):
        models[name] = get_peft_model(tiny_model("bert"), config.replace(target_modules=targets))
        randomise(models[name])
        bank.add(name, models[name].eval())
    inputs = inputs_of("bert")
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=["queries", "dense", None, "dense", "queries"]).logits
        for row, name in ((0, "queries"), (1, "dense"), (3, "dense"), (4, "queries")):
            assert relative(mixed[row], models[name](**inputs).logits[row]) < 1e-5


@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B")
@pytest.mark.parametrize("save_projection", [True, False])
def test_adapters_that_peft_wrote(tmp_path: Any, save_projection: bool) -> None:
    import peft

    settings = {"r": 8, "target_modules": ["query", "value"], "save_projection": save_projection}
    theirs = peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(**settings))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    bank = AdapterBank(tiny_model("bert"), VeraConfig(r=8, target_modules="all-linear", modules_to_save=[]))
    bank.load("peft", tmp_path)
    inputs = inputs_of("bert")
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=["peft", None, "peft", "peft", None]).logits
        expected = theirs(**inputs).logits
        with theirs.disable_adapter():
            base = theirs(**inputs).logits
    assert relative(mixed[0], expected[0]) < 1e-5
    assert relative(mixed[4], base[4]) < 1e-6


def test_loading_is_what_adding_is(tmp_path: Any) -> None:
    bank, model = tiny("bert")
    model.save_pretrained(tmp_path)
    modules = [(name, id(module)) for name, module in bank.model.named_modules()]
    tensors = [(name, id(tensor)) for name, tensor in bank.model.state_dict(keep_vars=True).items()]
    for name in CUSTOMERS:
        assert bank.load(f"{name} again", tmp_path / name).digest == bank.info(name).digest
    assert len(bank) == 6
    # Nothing of the model is touched by it.
    assert [(name, id(module)) for name, module in bank.model.named_modules()] == modules
    assert [(name, id(tensor)) for name, tensor in bank.model.state_dict(keep_vars=True).items()] == tensors


def test_an_adapter_that_seems_to_be_another_models_is_told_of(tmp_path: Path) -> None:
    def net(layers: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))

    config = VeraConfig(r=2, target_modules="all-linear")
    get_peft_model(net(1), config).save_pretrained(tmp_path / "shallow")
    get_peft_model(net(2), config).save_pretrained(tmp_path / "right")
    bank = AdapterBank(net(2), config)
    bank.load("right", tmp_path / "right")  # without a warning, which would be an error here
    for call in (lambda: bank.check(tmp_path / "shallow"), lambda: bank.load("shallow", tmp_path / "shallow")):
        with pytest.warns(UserWarning, match="adapts 1 of the 2 layers .* but not 1: is this the model"):
            call()
    bank.load("right again", tmp_path / "right")
    elsewhere = get_peft_model(tiny_model("bert"), config.replace(base_model_name_or_path="one/base"))
    elsewhere.save_pretrained(tmp_path / "elsewhere")
    base = tiny_model("bert")
    base.config._name_or_path = "another/model"
    with pytest.warns(UserWarning, match="was trained on 'one/base', but this model is 'another/model'"):
        AdapterBank(base, config).load("a", tmp_path / "elsewhere")


# Heads


def test_heads_of_their_own() -> None:
    bank, model = tiny("bert", modules_to_save=["classifier", "pooler"])
    inputs = inputs_of("bert")
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=ROWS).logits
    assert_alone(mixed, ROWS, model, lambda m: m(**inputs).logits)


class RobertaLikeHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.dense(features[:, 0]))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.score = nn.Linear(12, 16), RobertaLikeHead()

    def forward(self, x: Tensor) -> Tensor:
        return self.score(torch.relu(self.layer(x)))


def test_heads_of_several_layers() -> None:
    config = VeraConfig(r=8, target_modules=["layer"], modules_to_save=["score"])
    model = with_adapters(Encoder().eval(), config)
    bank = bank_of(Encoder().eval(), model, config)
    x = torch.randn(5, 4, 12)
    with torch.no_grad():
        mixed = bank.model(x, adapters=ROWS)
    assert_alone(mixed, ROWS, model, lambda m: m(x))


def test_a_head_is_not_read_behind_the_banks_back() -> None:
    class Reads(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.layer(x), self.score.weight)

    base = Reads()
    base.score = nn.Linear(16, 3)
    config = VeraConfig(r=8, target_modules=["layer"], modules_to_save=["score"])
    model = get_peft_model(copy.deepcopy(base), config)
    bank = AdapterBank(base, config)
    bank.add("a", model)
    with pytest.raises(RuntimeError, match="reads weight of score itself"):
        bank.model(torch.randn(1, 12), adapters=["a"])


# Packed sequences


def test_packed_sequences_have_an_adapter_for_each_token() -> None:
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(copy.deepcopy(base), config)
    bank = bank_of(base, model, config)
    x, lengths = torch.randn(1, 11, 12), [3, 0, 5, 1, 2]
    with torch.no_grad():
        packed = bank.model(x, adapters=ROWS, adapter_lengths=lengths)
    start = 0
    for name, length in zip(ROWS, lengths, strict=True):
        tokens = slice(start, start + length)
        if length:
            assert relative(packed[:, tokens], alone(model, name, lambda m: m(x))[:, tokens]) < 1e-5
        start += length


@pytest.mark.parametrize("modules_to_save", [[], ["lm_head"]])
def test_packed_sequences_of_a_language_model(modules_to_save: list[str]) -> None:
    bank, model = tiny("llama", modules_to_save=modules_to_save)
    lengths = [4, 3, 5, 1, 6]
    ids = torch.randint(3, 50, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    by_token = [name for name, length in zip(ROWS, lengths, strict=True) for _ in range(length)]
    with torch.no_grad():
        packed = bank.model(**inputs, adapters=ROWS, adapter_lengths=lengths).logits
        one_by_one = bank.model(**inputs, adapters=by_token, adapter_lengths=[1] * len(by_token)).logits
    assert torch.equal(packed, one_by_one)
    start = 0
    for name, length in zip(ROWS, lengths, strict=True):
        tokens = slice(start, start + length)
        own = alone(model, name, lambda m, tokens=tokens: m(input_ids=ids[:, tokens]).logits)
        assert relative(packed[:, tokens], own) < 1e-5
        start += length


def test_packed_lengths_must_fit() -> None:
    base = nn.Sequential(nn.Linear(12, 16))
    bank = AdapterBank(base, VeraConfig(r=8, target_modules="all-linear"))
    bank.add(
        "a", get_peft_model(copy.deepcopy(nn.Sequential(nn.Linear(12, 16))), VeraConfig(r=8, target_modules=["0"]))
    )
    with pytest.raises(RuntimeError, match="7 tokens, but adapter_lengths add up to 6"):
        bank.model(torch.randn(1, 7, 12), adapters=["a", None], adapter_lengths=[3, 3])
    with pytest.raises(BankError, match="one non-negative integer for each of 2 adapters"):
        bank.model(torch.randn(1, 7, 12), adapters=["a", None], adapter_lengths=[7])


# What is computed


def test_layers_of_one_input_share_a_product_for_all_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VeraConfig(r=8, target_modules="all-linear", modules_to_save=[])
    model = with_adapters(tiny_model("llama"), config)
    bank = bank_of(tiny_model("llama"), model, config, dtype=torch.float16)
    products: list[tuple[int, ...]] = []

    def counted(x: Tensor, a_projection: Tensor) -> Tensor:
        products.append(tuple(x.shape))
        return project(x, a_projection)

    monkeypatch.setattr(banked, "project", counted)
    inputs = inputs_of("llama")
    # In each of two blocks for q, k and v together, for o, for gate and up, for down; again for carl, of another key.
    for names, kinds in ((["anna"] * 5, 1), (["anna", "bert", None, "bert", "anna"], 1), (ROWS, 2)):
        products.clear()
        with torch.no_grad():
            bank.model(**inputs, adapters=names)
        assert [shape[0] for shape in products] == [30] * 2 * 4 * kinds


def test_the_operations_do_not_depend_on_how_many_adapters_there_are() -> None:
    config = VeraConfig(r=8, target_modules="all-linear", route="factored", modules_to_save=[])
    bank, model = AdapterBank(tiny_model("bert"), config), with_adapters(tiny_model("bert"), config)
    for number in range(8):
        randomise(model)
        bank.add(str(number), model, "anna")
    inputs = inputs_of("bert", 8)

    def in_place(_: Any, first: tuple[int, int], second: tuple[int, int], **__: Any) -> int:
        return 2 * first[0] * first[1] * second[1]  # torch's counter leaves this form out

    def operations(names: list[str | None]) -> int:
        mapping = {torch.ops.aten.addmm_: in_place}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            bank.model(**inputs, adapters=names)
        return counter.get_total_flops()

    one = operations(["0"] * 8)
    assert one == operations([str(number) for number in range(8)]) == operations(["0", None, "1", *["2"] * 5])
    assert one > operations([None] * 8)


# Few adapters in a batch


def dense_layer(**settings: Any) -> tuple[AdapterBank, VeraModel, BankedLinear]:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(64, 48))
    config = VeraConfig(r=256, target_modules="all-linear")
    model = with_adapters(copy.deepcopy(base), config, 0.1)
    bank = bank_of(base, model, config, **settings)
    layer = bank.model.base_model[0]
    assert isinstance(layer, BankedLinear)
    return bank, model, layer


@pytest.mark.parametrize(
    "names", [["anna"] * 4, ["anna", "bert", "anna", "bert"], ["anna", "anna", "anna", "bert"], ["anna", None] * 2]
)
def test_few_adapters_in_a_batch_are_dense(names: list[str | None]) -> None:
    bank, model, layer = dense_layer()
    x = torch.randn(4, 600, 64)
    with bank.lease(names) as lease:
        dense = layer._dense_groups(x, bank.call_of(lease))
    assert {group.sequences.numel() for group in dense} <= {1, 2, 3, 4} and dense
    with torch.no_grad():
        mixed = bank.model(x, adapters=names)
    assert_alone(mixed, names, model, lambda m: m(x))


def test_few_tokens_are_not_dense() -> None:
    bank, _, layer = dense_layer()
    with bank.lease(["anna"] * 4) as lease:
        assert layer._dense_groups(torch.randn(4, 1, 64), bank.call_of(lease)) == []


# Generation

GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "static cache, several beams": {"cache_implementation": "static", "num_beams": 4, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_generation_is_token_for_token_that_of_each_adapter(kind: str, way: str, padding: str) -> None:
    settings = {"max_new_tokens": 6, "eos_token_id": None, "decoder_start_token_id": 0, **GENERATION[way]}
    bank, model = tiny(kind)
    ids, mask = torch.randint(3, 50, (5, 6)), torch.ones(5, 6, dtype=torch.int64)
    for row, length in enumerate((0, 2, 3, 1, 0)):
        mask[row, slice(0, length) if padding == "left" else slice(6 - length, 6)] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask}

    def generate(model: Any, **adapters: Any) -> Tensor:
        torch.manual_seed(11)
        return model.generate(**inputs, **settings, **adapters)

    mixed = generate(bank.model, adapters=ROWS)
    own = {name: alone(model, name, generate) for name in {*ROWS}}
    copies = settings.get("num_return_sequences", 1)
    differing = 0
    for row, name in enumerate(ROWS):
        rows = slice(row * copies, (row + 1) * copies)
        assert torch.equal(mixed[rows], own[name][rows])
        differing += not torch.equal(own[name][rows], own[None][rows])
    assert differing >= 3


def test_what_is_set_on_the_banks_model_is_set_on_the_model() -> None:
    bank, _ = tiny("llama")
    inputs = inputs_of("llama", 2)
    bank.model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=2)
    assert bank.model.base_model.generation_config is bank.model.generation_config
    assert bank.model.generate(**inputs, adapters=["anna", None]).shape == (2, 6 + 3)
    bank.model.generation_config.max_new_tokens = 4
    assert bank.model.generate(**inputs, adapters=["anna", None]).shape == (2, 6 + 4)
    # What is the wrapper's own stays there.
    bank.model.train()
    assert bank.model.training and bank.model.eval().training is False
    assert "_bank" not in vars(bank.model.base_model)


# Versions


def test_a_request_sees_one_version_to_its_end() -> None:
    bank, model = tiny("bert")
    inputs = inputs_of("bert", 2)
    with torch.no_grad():
        before = bank.model(**inputs, adapters=["anna", "bert"]).logits
        with bank.lease(["anna", "bert"]) as lease:
            randomise(model)
            bank.add("anna", model, "anna", replace=True)
            bank.remove("bert")
            for number in range(100):  # more than there is room for, so that freed rows are written to
                bank.add(f"other {number}", model, "carl")
                bank.add(f"another {number}", model, "anna")
            with serving(bank.call_of(lease)):
                during = bank.model.base_model(**inputs).logits
        after = bank.model(**inputs, adapters=["anna", "anna"]).logits
    assert torch.equal(before, during)
    assert relative(after[0], alone(model, "anna", lambda m: m(**inputs).logits)[0]) < 1e-5
    with pytest.raises(BankError, match="there is no adapter 'bert'"):
        bank.model(**inputs, adapters=["anna", "bert"])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_generation_sees_one_version_to_its_end(kind: str) -> None:
    bank, model = tiny(kind)
    inputs = {"input_ids": torch.randint(3, 50, (3, 6))}
    settings = {"max_new_tokens": 8, "eos_token_id": None, "decoder_start_token_id": 0}
    names = ["anna", None, "bert"]
    before = bank.model.generate(**inputs, **settings, adapters=names)
    steps: list[int] = []

    def change(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(ids.shape[1])
        if len(steps) == 3:
            randomise(model, 2.0)
            bank.add("anna", model, "anna", replace=True)
            bank.remove("bert")
            for number in range(100):  # more than there is room for
                bank.add(f"other {number}", model, "carl")
                bank.add(f"another {number}", model, "bert")
        return scores

    assert torch.equal(bank.model.generate(**inputs, **settings, adapters=names, logits_processor=[change]), before)
    assert len(steps) == 8
    after = bank.model.generate(**inputs, **settings, adapters=["anna", None, "another 7"])
    assert torch.equal(after[1], before[1])
    for row, own in ((0, "anna"), (2, "bert")):
        assert not torch.equal(after[row], before[row])
        assert torch.equal(after[row], alone(model, own, lambda m: m.generate(**inputs, **settings))[row])


def test_equal_adapters_share_a_row_and_the_last_name_frees_it() -> None:
    bank, model = tiny("bert")
    free = len(bank._resident.free)
    bank.add("anna's twin", model, "anna")
    assert len(bank._resident.free) == free
    bank.remove("anna")
    assert len(bank._resident.free) == free and "anna" not in bank
    bank.remove("anna's twin")
    assert len(bank._resident.free) == free + 1


def test_a_full_bank_in_memory_grows() -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("bert"), config)
    bank = AdapterBank(tiny_model("bert"), config, capacity=1)
    inputs, expected = inputs_of("bert", 1), {}
    for number in range(150):
        randomise(model)
        bank.add(str(number), model, "anna")
        expected[str(number)] = alone(model, "anna", lambda m: m(**inputs).logits)
    with torch.no_grad():
        for name in ("0", "1", "63", "64", "65", "149"):
            assert relative(bank.model(**inputs, adapters=[name]).logits, expected[name]) < 1e-5


def test_a_bank_with_a_file_makes_room(tmp_path: Any) -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("bert"), config)
    path = tmp_path / "customers.bank"
    bank = bank_of(tiny_model("bert"), model, config, capacity=2, file=path)
    inputs = inputs_of("bert")
    again = AdapterBank(tiny_model("bert"), config, capacity=2, file=path)
    for served in (bank, again):
        assert served.names() == list(CUSTOMERS)
        for pair in (("anna", "bert"), ("carl", "anna"), ("bert", "carl"), ("bert", "anna")):
            names = [*pair, None, *pair]
            with torch.no_grad():
                mixed = served.model(**inputs, adapters=names).logits
            assert_alone(mixed, names, model, lambda m: m(**inputs).logits)
        with pytest.raises(BankError, match="all 2 adapters"):
            served.model(**inputs, adapters=ROWS)
        with torch.no_grad():  # and nothing stays taken
            served.model(**inputs, adapters=["anna", "bert", None, "anna", "bert"])


def test_names_follow_what_another_process_wrote(tmp_path: Any) -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("bert"), config)
    path = tmp_path / "customers.bank"
    writer = bank_of(tiny_model("bert"), model, config, file=path)
    reader = AdapterBank(tiny_model("bert"), config, file=path)
    writer.remove("bert")
    writer.add("carl", model, "anna", replace=True)
    writer.add("dora", model, "carl")
    assert reader.names() == list(CUSTOMERS)
    reader.refresh()
    assert set(reader.names()) == {"anna", "carl", "dora"}
    assert reader.info("carl").digest == reader.info("anna").digest
    writer.remove("dora")
    with pytest.raises(BankError, match=r"changed .* by another process"):
        reader.remove("dora")


def test_an_adapter_that_another_process_has_removed_or_replaced_since(tmp_path: Any) -> None:
    """Its row is gone from the file, and a bank that does not have it on the device cannot serve it any more."""
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("bert"), config)
    writer = bank_of(tiny_model("bert"), model, config, file=tmp_path / "bank")
    reader = AdapterBank(tiny_model("bert"), config, capacity=1, file=tmp_path / "bank")
    inputs = inputs_of("bert", 2)
    with reader.lease(["carl", None]) as lease:
        writer.add("anna", model, "bert", replace=True)
        writer.remove("carl")
        with torch.no_grad():  # what a request has begun with it ends with
            mixed = reader.model(**inputs, adapters=lease).logits
    assert_alone(mixed, ["carl", None], model, lambda m: m(**inputs).logits)
    assert reader.names() == list(CUSTOMERS)
    with torch.no_grad():
        mixed = reader.model(**inputs, adapters=["anna", None]).logits
    assert_alone(mixed, ["bert", None], model, lambda m: m(**inputs).logits)
    with pytest.raises(BankError, match="there is no adapter 'carl'"):
        reader.model(**inputs, adapters=["carl", None])


@pytest.mark.parametrize("in_file", [False, True])
def test_of_threads_that_add_one_name_one_wins(in_file: bool, tmp_path: Any) -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("bert"), config)
    bank = AdapterBank(tiny_model("bert"), config, file=tmp_path / "bank" if in_file else None)
    barrier, outcomes = threading.Barrier(3), []

    def add(adapter: str) -> None:
        barrier.wait()
        try:
            outcomes.append(bank.add("new", model, adapter).digest)
        except BankError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=add, args=(adapter,)) for adapter in CUSTOMERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [outcome for outcome in outcomes if "'new' is already in the bank" in outcome]
    assert len(refused) == 2 and len(outcomes) == 3 and bank.info("new").digest in outcomes


def test_adapters_come_and_go_while_threads_compute() -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("bert"), config)
    bank = AdapterBank(tiny_model("bert"), config, capacity=4)
    inputs = inputs_of("bert", 3)
    versions: dict[str, list[Tensor]] = {}
    schemes: list[tuple[str, VeraModel]] = []
    for number in range(12):
        name = f"customer {number % 4}"
        one = with_adapters(tiny_model("bert"), config)
        schemes.append((name, one))
        versions.setdefault(name, []).append(alone(one, "anna", lambda m: m(**inputs).logits))
    for name, one in schemes[:4]:
        bank.add(name, one, "anna")
    wrong: list[str] = []
    stop = threading.Event()

    def request(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        while not stop.is_set():
            chosen = [f"customer {i}" for i in torch.randint(4, (3,), generator=generator)]
            with torch.no_grad():
                answer = bank.model(**inputs, adapters=chosen).logits
            for row, name in enumerate(chosen):
                if min(relative(answer[row], version[row]) for version in versions[name]) > 1e-5:
                    wrong.append(name)

    threads = [threading.Thread(target=request, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        for name, one in schemes:
            bank.add(name, one, "anna", replace=True)
            bank.add("passing", one, "bert")
            bank.remove("passing")
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(bank) == 4 and all(version.leases == 0 for version in bank._registry.versions.values())
    assert model.training is False


# Compiling


def test_other_adapters_do_not_compile_the_model_again() -> None:
    bank, model = tiny("bert")
    inputs = inputs_of("bert")
    counter = CompileCounter()
    bank.compile(backend=counter, fullgraph=True)
    for names in (ROWS, ["bert"] * 5, [None] * 5, ["carl", "carl", None, "anna", "bert"]):
        with torch.no_grad():
            mixed = bank.model(**inputs, adapters=names).logits
        assert counter.frame_count == 1
        assert_alone(mixed, names, model, lambda m: m(**inputs).logits)
    randomise(model, 0.5)
    for name in CUSTOMERS:
        bank.add(name, model, name, replace=True)
    bank.add("dora", model, "bert")
    bank.remove("bert")
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=["dora", "anna", None, "carl", "dora"]).logits
    assert counter.frame_count == 1
    assert_alone(mixed, ["bert", "anna", None, "carl", "bert"], model, lambda m: m(**inputs).logits)


# What is refused


def test_the_model_itself_refuses_to_be_called() -> None:
    bank, _ = tiny("bert")
    with pytest.raises(RuntimeError, match=r"call bank\.model"):
        bank.model.base_model(**inputs_of("bert"))
    with pytest.raises(BankError, match="adapters=None is not allowed"):
        bank.model(**inputs_of("bert"))
    model = bank.unload()
    expected = tiny_model("bert")
    inputs = inputs_of("bert")
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in expected.named_modules()]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["anna", "nobody"], "there is no adapter 'nobody'"),
        (["anna", "Anna"], "did you mean 'anna'"),
        ("anna", "pass a list"),
        ([], "adapters is empty"),
    ],
)
def test_unknown_adapters_are_errors(names: Any, message: str) -> None:
    bank, _ = tiny("bert")
    with pytest.raises(BankError, match=message):
        bank.model(**inputs_of("bert", 2), adapters=names)
    with pytest.raises(BankError, match=message):
        tiny("llama")[0].model.generate(**inputs_of("llama", 2), adapters=names)


def test_a_number_of_names_that_does_not_fit_is_an_error() -> None:
    bank, _ = tiny("bert")
    for rows in (5, 6):  # also where some rows would fall to each name
        with pytest.raises(BankError, match=f"adapters has 3 names, but the batch has {rows} sequences"):
            bank.model(**inputs_of("bert", rows), adapters=["anna", None, "bert"])
        with pytest.raises(BankError, match="adapters has 3 names"):
            tiny("llama")[0].model.generate(**inputs_of("llama", rows), adapters=["anna", None, "bert"])


def test_what_does_not_fit_is_refused_with_its_reason() -> None:
    config = VeraConfig(r=8, target_modules=["query"], modules_to_save=[])
    bank = AdapterBank(tiny_model("bert"), config)

    def refused(message: str, base: nn.Module | None = None, **settings: Any) -> None:
        model = get_peft_model(base or tiny_model("bert"), config.replace(**settings))
        with pytest.raises(ValueError, match=message):
            bank.add("x", model)
        assert len(bank) == 0

    refused("has rank 16 on .*, but this bank's maximum is 8", r=16)
    refused("adapts .*key, which is not one of the 2 layers", target_modules=["query", "key"])
    refused(r"trains \['classifier'\] in full", modules_to_save=["classifier"])
    refused("trains biases", bias="vera_only")
    refused("does not have|has none", tiny_model("llama"), target_modules=["q_proj"])
    model = get_peft_model(tiny_model("bert"), config)
    bank.add("x", model)
    with pytest.raises(BankError, match="already in the bank"):
        bank.add("x", model)
    with pytest.raises(BankError, match="there is no adapter 'y'"):
        bank.add("y", model, replace=True)
    for name in ("", "a\n", 3, "x" * 257):
        with pytest.raises(BankError, match="1 to 256 bytes"):
            bank.add(name, model)  # type: ignore[arg-type]
    with torch.no_grad():
        next(iter(model.vera_layers().values())).vectors("default")["b"].fill_(float("nan"))
    with pytest.raises(BankError, match="not finite"):
        bank.add("nan", model)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bert", {"target_modules": ["word_embeddings"]}, "it is a Embedding"),
        ("vit", {"target_modules": ["projection"]}, "it is a Conv2d"),
        ("mixtral", {"target_parameters": ["gate_up_proj"]}, "reads the parameter itself"),
        ("bert", {"target_modules": ["query"], "bias": "all"}, "does not support per-adapter biases"),
    ],
)
def test_layers_that_a_bank_cannot_hold(kind: str, settings: dict[str, Any], message: str) -> None:
    base = tiny_model(kind)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(BankError, match=message):
        AdapterBank(base, VeraConfig(r=8, modules_to_save=[], **settings))
    assert [name for name, _ in base.named_modules()] == names
    with pytest.raises(TargetError):
        AdapterBank(base, VeraConfig(r=8, target_modules=["nothing"]))


class TimeFirst(nn.Module):
    """Gives its layer time before rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def test_check_isolation_finds_models_that_mix_sequences() -> None:
    bank = AdapterBank(TimeFirst(), VeraConfig(r=8, target_modules=["layer"]))
    with pytest.raises(BankError, match="changed the wrong sequences"):
        bank.check_isolation(x=torch.randn(3, 3, 12))
    for kind in ("bert", "llama", "t5", "gpt2", "vit"):
        tiny(kind)[0].check_isolation(**inputs_of(kind))


def test_a_model_that_reads_the_weight_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            assert self.layer.weight.dtype == x.dtype  # asking is no reading
            return nn.functional.linear(x, self.layer.weight)

    config = VeraConfig(r=8, target_modules=["layer"])
    bank = AdapterBank(Reads(), config)
    bank.add("a", get_peft_model(Reads(), config))
    with pytest.raises(RuntimeError, match="reads the weight of layer instead of calling"):
        bank.model(torch.randn(2, 12), adapters=["a", None])


def test_quantized_layers() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make() -> nn.Module:
        torch.manual_seed(2)
        plain = nn.Linear(64, 64)
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(plain.state_dict())
        return nn.Sequential(layer.to("cpu"))

    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(make(), config)
    bank = bank_of(make(), model, config)
    x = torch.randn(5, 3, 64)
    with torch.no_grad():
        mixed = bank.model(x, adapters=ROWS)
    assert_alone(mixed, ROWS, model, lambda m: m(x))


def test_parts_of_fused_layers() -> None:
    bank, model = tiny("gpt2", fused_parts={"c_attn": 3})
    assert any(len(place.parts) == 3 for place in bank.layout.layers.values())
    inputs = inputs_of("gpt2")
    with torch.no_grad():
        mixed = bank.model(**inputs, adapters=ROWS).logits
    assert_alone(mixed, ROWS, model, lambda m: m(**inputs).logits)
    whole = get_peft_model(tiny_model("gpt2"), VeraConfig(r=8, target_modules=["c_attn"]))
    with pytest.raises(BankError, match=r"c_attn into one part, but this bank into parts of \[16, 16, 16\]"):
        bank.add("whole", whole)


# What a hostile reader has tried


def test_a_bank_that_was_unloaded_serves_nothing() -> None:
    bank, _ = tiny("bert")
    with bank.lease([None]), pytest.raises(BankError, match="cannot be unloaded while requests are running"):
        bank.unload()
    bank.unload()
    with pytest.raises(BankError, match="was unloaded"):
        bank.model(**inputs_of("bert", 1), adapters=["anna"])


def test_layers_serve_their_own_banks_calls_only() -> None:
    one, _ = tiny("bert")
    other, _ = tiny("bert")
    layer = other.model.base_model.bert.encoder.layer[0].attention.self.query
    one.model.base_model.bert.encoder.layer[0].attention.self.query = layer
    with pytest.raises(RuntimeError, match="was called without adapters"):
        one.model(**inputs_of("bert", 1), adapters=["anna"])


def test_unloading_gives_flags_and_modes_back() -> None:
    base = tiny_model("bert").train()
    base.bert.pooler.eval()
    base.bert.embeddings.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    modes = {name: module.training for name, module in base.named_modules()}
    back = AdapterBank(base, VeraConfig(r=8, target_modules="all-linear")).unload()
    assert {name: parameter.requires_grad for name, parameter in back.named_parameters()} == flags
    assert {name: module.training for name, module in back.named_modules()} == modes


def test_gradients_reach_the_inputs() -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
    model = with_adapters(copy.deepcopy(base), config)
    bank = bank_of(base, model, config)
    x, gradient = torch.randn(5, 4, 12, requires_grad=True), torch.randn(5, 4, 6)
    (mixed,) = torch.autograd.grad(bank.model(x, adapters=ROWS), x, gradient)
    for row, name in enumerate(ROWS):
        with torch.enable_grad():
            if name is None:
                with model.disable_adapter():
                    (own,) = torch.autograd.grad(model(x), x, gradient)
            else:
                model.set_adapter(name)
                (own,) = torch.autograd.grad(model(x), x, gradient)
        assert relative(mixed[row], own[row]) < 1e-5


def test_rows_of_the_base_model_have_the_head_that_it_has_now() -> None:
    bank, _ = tiny("bert")
    inputs = inputs_of("bert", 2)
    head = bank.model.base_model.classifier.original_module
    with torch.no_grad():
        head.weight.normal_()
        plain = bank.model(**inputs, adapters=[None, None]).logits
        mixed = bank.model(**inputs, adapters=[None, "anna"]).logits
    assert torch.equal(mixed[0], plain[0])


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_what_overflows_beside_an_adapter_does_not_reach_the_base_models_rows(route: Any) -> None:
    base = nn.Sequential(nn.Linear(64, 8)).half()
    config = VeraConfig(r=8, target_modules=["0"], route=route)
    bank = AdapterBank(base, config)
    bank.add("a", with_adapters(nn.Sequential(nn.Linear(64, 8)).half(), config), "anna")
    x = torch.full((2, 1, 64), 6e4).half()
    x[1] = 1.0
    expected = base[0].base_layer(x)
    with torch.no_grad():
        mixed = bank.model(x, adapters=[None, "a"])
    assert torch.equal(mixed[0].isnan(), expected[0].isnan())
    assert mixed[1].isfinite().all()


def test_a_lease_serves_several_calls_with_one_version() -> None:
    bank, model = tiny("bert")
    inputs = inputs_of("bert", 2)
    with torch.no_grad(), bank.lease(["anna", None]) as lease:
        before = bank.model(**inputs, adapters=lease).logits
        randomise(model)
        bank.add("anna", model, "anna", replace=True)
        assert torch.equal(bank.model(**inputs, adapters=lease).logits, before)
        assert not torch.equal(bank.model(**inputs, adapters=["anna", None]).logits, before)
    with pytest.raises(BankError, match="has been released"):
        bank.model(**inputs, adapters=lease)


def test_a_lease_that_was_dropped_lets_go(tmp_path: Any) -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("bert"), config)
    bank = bank_of(tiny_model("bert"), model, config, capacity=2, file=tmp_path / "bank")
    inputs = inputs_of("bert", 2)
    lease = bank.lease(["anna", "bert"])
    with pytest.raises(BankError, match="all 2 adapters"):
        bank.lease(["carl"])
    call = bank.call_of(lease)
    del lease
    with pytest.raises(BankError, match="all 2 adapters"):  # a call that is there holds them
        bank.lease(["carl"])
    with torch.no_grad(), serving(call):
        assert_alone(bank.model.base_model(**inputs).logits, ["anna", "bert"], model, lambda m: m(**inputs).logits)
    del call
    with torch.no_grad():
        served = bank.model(**inputs, adapters=["carl", None]).logits
    assert_alone(served, ["carl", None], model, lambda m: m(**inputs).logits)
    assert all(version.leases == 0 for version in bank._registry.versions.values())
    bank.lease([None])
    bank.unload()


def test_few_adapters_under_autocast() -> None:
    bank, model, _ = dense_layer()
    x = torch.randn(4, 600, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = bank.model(x, adapters=["anna", "anna", "bert", None])
        assert relative(mixed[2], alone(model, "bert", lambda m: m(x))[2]) < 0.05


def test_projections_go_with_their_last_adapter() -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    bank = AdapterBank(nn.Sequential(nn.Linear(12, 16)), config)
    for key in range(5):
        model = get_peft_model(nn.Sequential(nn.Linear(12, 16)), config.replace(projection_prng_key=key))
        bank.add(str(key), model)
        if key:
            bank.remove(str(key))
        bank.model(torch.randn(2, 12), adapters=["0", None])
    layer = bank.model.base_model[0]
    assert len(layer.projections) == 1


def test_a_bank_made_in_inference_mode_goes_on() -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    model = with_adapters(tiny_model("bert"), config)
    with torch.inference_mode():
        bank = AdapterBank(tiny_model("bert"), config, capacity=1)
        bank.add("first", model, "anna")
    for name in CUSTOMERS:
        bank.add(name, model, name)
    inputs = inputs_of("bert")
    with torch.inference_mode():
        mixed = bank.model(**inputs, adapters=ROWS).logits
    assert relative(mixed[3], alone(model, "bert", lambda m: m(**inputs).logits)[3]) < 1e-5


class TextAndImages(nn.Module):
    """As LLaVA: any number of images for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.text(input_ids) + self.vision(pixel_values).sum(0)


@pytest.mark.parametrize("shape", [(4, 12), (4, 3, 12)])
def test_images_are_not_divided_among_rows(shape: tuple[int, ...]) -> None:
    config = VeraConfig(r=8, target_modules="all-linear")
    bank = AdapterBank(TextAndImages(), config)
    bank.add("a", get_peft_model(TextAndImages(), config))
    with pytest.raises(RuntimeError, match=r"vision received an input of shape .*cannot be matched"):
        bank.model(input_ids=torch.randn(2, 3, 12), pixel_values=torch.randn(shape), adapters=["a", None])


def test_a_banks_model_is_neither_saved_nor_copied() -> None:
    bank, _ = tiny("bert")
    with pytest.raises(BankError, match="cannot be saved"):
        bank.model.save_pretrained("anywhere")
    with pytest.raises(BankError, match="be copied or pickled"):
        copy.deepcopy(bank.model)


def test_room_that_is_not_used_takes_no_memory() -> None:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("this system does not tell what is resident")
    config = VeraConfig(r=64, target_modules="all-linear")
    before = int(pages.read_text().split()[1])
    bank = AdapterBank(nn.Sequential(nn.Linear(64, 1024)), config, capacity=100_000)  # 435 MB
    bank.add("a", get_peft_model(nn.Sequential(nn.Linear(64, 1024)), config))
    assert (int(pages.read_text().split()[1]) - before) * 4096 < 100e6
