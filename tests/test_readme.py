"""The README's examples run as printed, on a tiny model in place of the hub's; its figures are those of the results."""

import copy
import functools
import importlib
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from tiny_models import tiny_model
from tiny_text import tiny_tokenizer
from veratune import VeraConfig, VeraModel, get_peft_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "benchmarks"
MAPPING = yaml.safe_load((BENCHMARKS / "headline.yaml").read_text(encoding="utf-8"))
(QUICKSTART,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


# Examples


def test_the_quickstart_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str, **settings: object) -> nn.Module:
        assert (name, settings) == ("bert-base-uncased", {"num_labels": 2})
        return tiny_model("bert")

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tiny_tokenizer())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(QUICKSTART, names)
    model, rows = names["model"], names["rows"]
    assert isinstance(model, VeraModel) and (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    layers = [module for module in tiny_model("bert").bert.modules() if isinstance(module, nn.Linear)]
    vectors = model.adapter_state("default").vectors.values()
    assert len(vectors) == len(layers) and all(bool((own["b"] != 0).any()) for own in vectors)
    with torch.no_grad():
        assert model(**rows).logits.argmax(-1).tolist() == [1, 0]
        assert tiny_model("bert")(**rows).logits.argmax(-1).tolist() != [1, 0]


@pytest.fixture
def _methods_of_peft() -> Iterator[None]:
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    yield
    PEFT_TYPE_TO_TUNER_MAPPING.update(before)


@pytest.mark.usefixtures("_methods_of_peft")
def test_one_line_puts_veratune_under_peft() -> None:
    (line,) = re.findall(r"`(veratune\.integrations\.peft\..*?)`", README.read_text(encoding="utf-8"))
    exec(f"import veratune.integrations.peft\n{line}", {})
    model = peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(r=4, target_modules=["query"]))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert type(layer).__module__.startswith("veratune.")


def test_readmes_are_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 105
    assert len((BENCHMARKS / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def test_relative_links_lead_somewhere() -> None:
    for page in (README, *BENCHMARKS.glob("*.md"), *BENCHMARKS.glob("results/*.md")):
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [target for target in targets if not (page.parent / target).exists()] == [], page


# Figures, computed here without the code that writes the tables

Results = Callable[[str], Any]
UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GiB": 2**30, "ms": 1e-3, "s": 1}
NUMBER = re.compile(r"(\d[\d,]*)(?:\.(\d+))?(?: (KB|MB|GiB|ms|s)\b)?")


@functools.cache
def committed(file: str) -> Any:
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def at(path: str, results: Results) -> Any:
    name, _, inner = path.partition(":")
    file, _, outer = MAPPING["sources"][name].partition(":")
    value = results(file)
    for key in [*outer.split("/"), *inner.split("/")]:
        if isinstance(value, list):
            field, wanted = key.split("=", 1)
            (value,) = (item for item in value if item[field] == wanted)
        elif key:
            value = value[key]
    return value


def value_of(expression: str, results: Results) -> float:
    if " minus " in expression:
        whole, part = (at(path, results) for path in expression.split(" minus "))
        return whole - part
    if " over " in expression:
        ours, base = (at(path, results) for path in expression.split(" over "))
        return statistics.median([a / b for a, b in zip(ours, base, strict=True)])
    value = at(expression, results)
    return statistics.median(value) if isinstance(value, list) else value


def agrees(text: str, cell: str | list[str], results: Results) -> bool:
    """Return whether a printed cell shows the figures, each rounded as it is printed."""
    if isinstance(cell, str):
        return text == cell
    _, *expressions = cell
    shown = list(NUMBER.finditer(text))
    if len(shown) != len(expressions):
        return False
    for number, expression in zip(shown, expressions, strict=True):
        whole, decimals, unit = number[1].replace(",", ""), number[2] or "", UNITS[number[3] or ""]
        tolerance = 0.5001 * 10.0 ** -len(decimals) * unit
        if abs(float(f"{whole}.{decimals or 0}") * unit - value_of(expression, results)) > tolerance:
            return False
    return True


def table_of(page: str, name: str) -> list[list[str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- table: {name}, .*? -->\n\n(.*?)\n\n<!-- /table -->", text, re.DOTALL)
    assert found is not None, f"{page} has no table {name}"
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    assert header == MAPPING["tables"][name]["header"]
    return rows


def cells(name: str) -> Iterator[tuple[str, str | list[str]]]:
    table = MAPPING["tables"][name]
    for row, wanted in zip(table_of(table["page"], name), table["rows"], strict=True):
        yield from zip(row, wanted, strict=True)


@pytest.mark.parametrize("name", MAPPING["tables"])
def test_the_tables_show_the_committed_results(name: str) -> None:
    assert [(text, cell) for text, cell in cells(name) if not agrees(text, cell, committed)] == []


def printed(value: float, spec: str) -> str:
    if spec != "size":
        return f"{value:{spec}}"
    kilobytes = value / 1e3
    return f"{kilobytes:.0f} KB" if kilobytes < 1000 else f"{kilobytes / 1000:.{int(kilobytes < 10_000)}f} MB"


def test_the_sentences_show_the_committed_results() -> None:
    for page, sentences in MAPPING["sentences"].items():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        for form, *expressions in sentences:
            specs = re.findall(r"\{:(.*?)\}", form)
            values = [printed(value_of(x, committed), spec) for spec, x in zip(specs, expressions, strict=True)]
            assert re.sub(r"\{.*?\}", lambda _, values=values: values.pop(0), form) in text


def test_a_changed_cell_and_a_changed_result_are_noticed() -> None:
    def changed(file: str) -> Any:
        def scaled(value: Any) -> Any:
            if isinstance(value, dict):
                # a ratio of two times changes only if one of them does
                return {key: item if key in BASELINES else scaled(item) for key, item in value.items()}
            if isinstance(value, list):
                return [scaled(item) for item in value]
            return value * 1.2 if isinstance(value, int | float) else value

        return scaled(copy.deepcopy(committed(file)))

    figures = [(text, cell) for text, cell in cells("methods") if isinstance(cell, list)]
    assert len(figures) >= 20
    for text, cell in figures:
        assert not agrees(text, cell, changed), text
        for digit in NUMBER.finditer(text):
            other = text[: digit.end(1) - 1] + str((int(text[digit.end(1) - 1]) + 1) % 10) + text[digit.end(1) :]
            assert not agrees(other, cell, committed), other


BASELINES = ("frozen backbone", "base model")


# What the generators write


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("VERATUNE_CACHE", "")  # restored afterwards, whatever the import of common.py makes of it
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return {name: importlib.import_module(name) for name in ("report", "headline", "figures")}


def test_the_pages_are_what_the_generator_writes(generators: dict[str, Any]) -> None:
    pages = generators["report"].pages() | generators["headline"].pages()
    assert {"steps.md", "bank_mixed.md", "README.md", "performance.md"} <= {path.name for path in pages}
    differing = [
        path.name for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert not differing, "run python benchmarks/report.py"


def test_the_pictures_show_the_committed_results(generators: dict[str, Any]) -> None:
    figures = generators["figures"]
    differing = [
        name
        for name, (data, _) in figures.PICTURES.items()
        if figures.shown(figures.DIRECTORY / f"{name}.svg") != data()
    ]
    assert not differing, "run python benchmarks/figures.py"


# Sizes

MODELS: dict[str, Callable[[], nn.Module]] = {
    "MiniLM, without the new head": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
    ),
    "BERT-base, without the new head": lambda: transformers.BertForSequenceClassification(transformers.BertConfig()),
    "SmolLM2-135M": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
    ),
    "Llama with 7B parameters": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig()),
}


def test_the_table_of_sizes_counts_what_is_trained() -> None:
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| (\d+) \| ([\d.]+ [KM]B) \| ([\d.]+ [KM]B) \| (\d+) \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == MODELS.keys()
    for name, rank, vera, lora, ratio in rows:
        with torch.device("meta"):
            base = MODELS[name]()
        model = get_peft_model(base, VeraConfig(r=int(rank), target_modules="all-linear"))
        sides = [
            (layer.base_layer.in_features, layer.base_layer.out_features)
            for layer in model.modules()
            if isinstance(getattr(layer, "base_layer", None), nn.Linear)
        ]
        trained = sum(
            vector.numel() for own in model.adapter_state("default").vectors.values() for vector in own.values()
        )
        assert trained == sum(int(rank) + out for _, out in sides)
        bytes_of = {vera: 4 * trained, lora: 4 * sum(8 * (fan_in + out) for fan_in, out in sides)}
        assert all(agrees_in_size(text, size) for text, size in bytes_of.items()), (name, bytes_of)
        assert int(ratio) == round(bytes_of[lora] / bytes_of[vera])
    _, _, vera, lora, _ = next(row for row in rows if row[:2] == ("Llama with 7B parameters", "256"))
    assert f"An adapter of a 7B Llama takes {vera}, a LoRA of rank 8 {lora}." in README.read_text(encoding="utf-8")


def agrees_in_size(text: str, size: float) -> bool:
    number, unit = text.split()
    decimals = len(number.partition(".")[2])
    return abs(float(number) * UNITS[unit] - size) <= 0.5001 * 10.0**-decimals * UNITS[unit]
