"""`veratune predict`: the predictions of a training run for other rows."""

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from command_line import run
from training_runs import sentences, train, with_tokenizer, write_lines
from veratune import VeraConfig, VeraModel, get_peft_model

RATES = ("--r", 8, "--batch-size", 4, "--lr", 0.05, "--head-lr", 0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def encoder(place: Path) -> Path:
    return with_tokenizer("bert", place / "encoder")


def tagged() -> list[dict[str, Any]]:
    return [
        {"words": text.split(), "tags": ["A" if word in ("good", "very") else "O" for word in text.split()]}
        for text, _ in sentences()
    ]


@pytest.fixture(scope="module")
def runs(place: Path, encoder: Path) -> dict[str, tuple[Path, Path]]:
    """A training run of each task, and the rows that it was evaluated with."""
    found = {}
    for task, rows, columns in (
        ("sequence-classification", [{"text": t, "label": n} for t, n in sentences()], ()),
        ("regression", [{"text": t, "label": i % 7 / 2} for i, (t, _) in enumerate(sentences())], ()),
        ("token-classification", tagged(), ("--text-column", "words", "--label-column", "tags")),
    ):
        data = write_lines(place / f"{task}.jsonl", rows[:21])
        given = ("--data", data, "--eval-data", data, *columns, *RATES, "--epochs", 2)
        assert train("--model", encoder, "--task", task, "--output", place / task, *given) == 0
        found[task] = (place / task, data)
    return found


def results(output: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((output / "results.json").read_text())["metrics"]
    return metrics


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def adapted(encoder: Path, adapter: Path, kind: str, **settings: Any) -> tuple[Any, Any]:
    base = getattr(transformers, kind).from_pretrained(encoder, **settings)
    return VeraModel.from_pretrained(base, adapter), transformers.AutoTokenizer.from_pretrained(adapter)


@pytest.mark.parametrize("what", ["run", "adapter"])
def test_classes_are_those_of_the_evaluation_that_ended_the_training(
    what: str,
    runs: dict[str, tuple[Path, Path]],
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, data = runs["sequence-classification"]
    given = output if what == "run" else output / "adapter"
    code, out, err = run(capsys, "predict", given, "--data", data, "--json")
    assert code == 0, err
    found = lines_of(out)
    model, tokenizer = adapted(encoder, output / "adapter", "AutoModelForSequenceClassification", num_labels=2)
    rows = lines_of(data.read_text())
    for row, own in zip(rows, found, strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert own == row | {"prediction": ["neg", "pos"][shares.argmax()], "probabilities": own["probabilities"]}
        assert own["probabilities"] == pytest.approx({"neg": float(shares[0]), "pos": float(shares[1])}, abs=2e-5)
    metrics = results(output)
    often = max(sum(row["label"] == name for row in rows) for name in ("neg", "pos")) / len(rows)
    assert f"accuracy {metrics['accuracy']:.4f} (always 'neg': {often:.4f}), f1 {metrics['f1']:.4f}; 21 rows" in err
    assert (
        metrics["accuracy"] == sum(row["label"] == own["prediction"] for row, own in zip(rows, found, strict=True)) / 21
    )
    # The same, in a table; another batch size changes nothing but rounding.
    table = tmp_path / "out.csv"
    code, out, _ = run(capsys, "predict", given, "--data", data, "--output", table, "--batch-size", 1)
    assert code == 0 and "accuracy" in out and f"21 predictions: {table}" in out
    read = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["prediction"] for row in read] == [row["prediction"] for row in found]
    assert float(read[3]["p(pos)"]) == pytest.approx(found[3]["probabilities"]["pos"], abs=2e-5)


def test_numbers(runs: dict[str, tuple[Path, Path]], encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, data = runs["regression"]
    code, out, err = run(capsys, "predict", output, "--data", data, "--json")
    assert code == 0, err
    kind = "AutoModelForSequenceClassification"
    model, tokenizer = adapted(encoder, output / "adapter", kind, num_labels=1, problem_type="regression")
    for row in lines_of(out):
        with torch.no_grad():
            value = model(**tokenizer(row["text"], return_tensors="pt")).logits.item()
        assert row["prediction"] == pytest.approx(value, rel=1e-4, abs=1e-5)
    metrics = results(output)
    assert f"mse {metrics['mse']:.4f} (always" in err and f"pearson {metrics['pearson']:.4f}; 21 rows" in err


def test_labels_of_words(
    runs: dict[str, tuple[Path, Path]], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, data = runs["token-classification"]
    code, out, err = run(capsys, "predict", output, "--data", data, "--json")  # the columns are the run's
    assert code == 0, err
    model, tokenizer = adapted(encoder, output / "adapter", "AutoModelForTokenClassification", num_labels=2)
    found = lines_of(out)
    for row in found:
        encoded = tokenizer(row["words"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**encoded).logits.argmax(-1)[0].tolist()
        first = [encoded.word_ids().index(word) for word in range(len(row["words"]))]
        assert row["prediction"] == [["A", "O"][best[position]] for position in first]
    assert f"f1 {results(output)['f1']:.4f}; 21 rows" in err
    code, out, err = run(capsys, "predict", output, "--data", data, "--json", "--max-length", 3)
    cut = lines_of(out)
    assert cut[0]["prediction"].count(None) == len(cut[0]["words"]) - 3 and "got no label" in err
    code, out, err = run(capsys, "predict", output, "--data", data)
    assert json.loads(next(csv.DictReader(io.StringIO(out)))["prediction"]) == found[0]["prediction"]


class Typed(io.StringIO):
    """Standard input, with the bytes behind it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data.decode("latin-1"))
        self.buffer = io.BytesIO(data)  # type: ignore[assignment]


def test_lines_of_standard_input(
    runs: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = runs["sequence-classification"]
    monkeypatch.setattr("sys.stdin", Typed(b"the film was very good\r\nthe film was not fine, bad\n"))
    code, out, err = run(capsys, "predict", output, "--data", "-")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["text"] for row in rows] == ["the film was very good", "the film was not fine, bad"]
    assert {row["prediction"] for row in rows} <= {"neg", "pos"}
    monkeypatch.setattr("sys.stdin", Typed(b"the film\n\nwas good\n"))
    assert "row 2 has nothing in the column 'text'" in run(capsys, "predict", output, "--data", "-")[2]
    monkeypatch.setattr("sys.stdin", Typed(b""))
    assert "standard input has no rows" in run(capsys, "predict", output, "--data", "-")[2]


def test_rows_without_labels_and_with_some(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = runs["sequence-classification"]
    table = tmp_path / "rows.csv"
    table.write_text("id,text\n7,the film was good\n8,bad\n")
    code, out, err = run(capsys, "predict", output, "--data", table)
    assert (code, err) == (0, "") and out.startswith("id,text,prediction,p(neg),p(pos)\n7,the film was good,")
    table.write_text("text,label\nthe film was good,pos\nbad,\nfine,neg\n")
    assert "; 2 rows with labels" in run(capsys, "predict", output, "--data", table)[2]


def test_a_run_that_was_moved_and_an_adapter_without_its_run(
    runs: dict[str, tuple[Path, Path]], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, data = runs["sequence-classification"]
    shutil.copytree(output / "adapter", tmp_path / "alone")
    expected = run(capsys, "predict", output, "--data", data)[1]
    assert run(capsys, "predict", tmp_path / "alone", "--data", data, "--model", encoder)[1] == expected
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "predict", tmp_path / "alone", "--data", data)
    assert code == 1 and "give the base model with --model" in err.splitlines()[-1]


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_base_with_another_head(
    runs: dict[str, tuple[Path, Path]], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter has its own head, so that the base model's may be of another size."""
    output, data = runs["sequence-classification"]
    other = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=5)
    other.save_pretrained(tmp_path / "five")
    expected = run(capsys, "predict", output, "--data", data)[1]
    code, out, err = run(capsys, "predict", output, "--data", data, "--model", tmp_path / "five")
    assert (code, out) == (0, expected), err
    model = get_peft_model(other, VeraConfig(r=2, target_modules=["query"], modules_to_save=[]))
    model.save_pretrained(tmp_path / "without")
    three = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    for base in (encoder, tmp_path / "three"):
        code, _, err = run(capsys, "merge", tmp_path / "without", tmp_path / f"merged-{base.name}", "--model", base)
        assert code == 0 and "contains classifier.bias, classifier.weight of the right shape: random values" in err


def test_what_cannot_be_predicted(
    runs: dict[str, tuple[Path, Path]], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, data = runs["sequence-classification"]
    there = tmp_path / "there.csv"
    there.write_text("kept")
    taken = tmp_path / "taken.csv"
    taken.write_text("text,prediction\ngood,x\n")
    new = tmp_path / "new.csv"
    new.write_text("text,label\ngood,other\n")
    base = transformers.AutoModelForMaskedLM.from_pretrained(encoder)
    get_peft_model(base, VeraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "masked")
    decoder = with_tokenizer("llama", tmp_path / "decoder")
    language = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    get_peft_model(language, VeraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "language")
    unfinished, gap, unquoted = tmp_path / "unfinished", tmp_path / "gap.csv", tmp_path / "unquoted.csv"
    unfinished.mkdir()
    (unfinished / "train.yaml").write_text("model: m")
    gap.write_text("text\ngood\n\nbad\n\n")
    unquoted.write_text("text\na film, great\nbad\n")
    for arguments, code, message in (
        ((output, "--data", data, "--output", there), 1, "nothing is overwritten"),
        ((output, "--data", data, "--output", tmp_path / "out.xlsx"), 2, "unsupported file type"),
        ((output, "--data", data, "--output", tmp_path / "no" / "out.csv"), 1, "cannot be written"),
        ((output, "--data", data, "--text-column", "body"), 2, "has no column 'body'"),
        ((output, "--data", data, "--label-column", "score"), 2, "has no column 'score'"),
        ((output, "--data", taken), 2, "has a column 'prediction', which is what predict adds"),
        ((output, "--data", new), 1, "was not trained with: it has ['neg', 'pos']: ['other']"),
        ((output, "--data", tmp_path / "no.csv"), 2, "is not a file"),
        ((tmp_path / "masked", "--data", data), 1, "is for a BertForMaskedLM"),
        ((tmp_path / "language", "--data", data), 1, "veratune chat"),
        ((encoder, "--data", data), 1, "has no adapter"),
        ((tmp_path / "nowhere", "--data", data), 1, "there is no such directory"),
        ((unfinished, "--data", data), 1, f"has not finished: veratune train --resume {unfinished}"),
        ((output, "--data", gap), 1, "row 2 has nothing in the column 'text'"),
        ((output, "--data", unquoted), 1, "must be in double quotes"),
    ):
        found, out, err = run(capsys, "predict", *arguments)
        assert (found, out) == (code, "") and message in err.splitlines()[-1], (arguments, err)
    assert there.read_text() == "kept" and not os.path.lexists(tmp_path / "out.xlsx")


def test_a_relative_base_is_the_same_model_from_another_directory(
    runs: dict[str, tuple[Path, Path]], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, data = runs["sequence-classification"]
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "base").mkdir(parents=True)  # which is another thing of the same name
    shutil.copytree(encoder, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    arguments = ("--max-length", "8", "--epochs", "1", "--batch-size", "8", "--r", "2")
    assert run(capsys, "train", "--model", "base", "--data", data, "--output", tmp_path / "run", *arguments)[0] == 0
    found = run(capsys, "predict", tmp_path / "run", "--data", data)
    monkeypatch.chdir(tmp_path / "there")
    assert run(capsys, "predict", tmp_path / "run", "--data", data) == found
    assert found[0] == 0
