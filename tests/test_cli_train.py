"""`veratune train` on rows of every kind, interrupted and gone on with, and called wrongly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tiny_models import tiny_model
from veratune import VeraModel
from veratune.cli import main

WORDS = ["good", "bad", "film", "very", "not", "the", "a", "was", "boring", "fine"]


def with_tokenizer(kind: str, directory: Path) -> Path:
    vocabulary = {name: number for number, name in enumerate(["[BOS]", "[EOS]", "[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", bos_token="[BOS]"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(directory)
    model = tiny_model(kind)
    (model.bert if kind == "bert" else model).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("bert", tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("llama", tmp_path_factory.mktemp("decoder"))


def sentences(count: int = 40) -> list[tuple[str, str]]:
    return [
        (f"the film was {'very good' if i % 2 else 'not fine'} {WORDS[i % 10]}", "pos" if i % 2 else "neg")
        for i in range(count)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in sentences()), encoding="utf-8")
    return path


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def saved_tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


COMMON = ("--rank", 8, "--epochs", 2, "--batch-size", 4)


def test_a_classifier_is_trained_saved_and_loaded(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    rates = ("--epochs", 6, "--lr", 0.05, "--head-lr", 0.05)
    code = train("--model", encoder, "--data", table, "--output", output, *COMMON, *rates)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "accuracy" in shown.out and "\x1b" not in shown.out
    results = json.loads((output / "results.json").read_text())
    assert results["metrics"]["accuracy"] == 1.0
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    settings = yaml.safe_load((output / "train.yaml").read_text())
    assert settings["rank"] == 8 and settings["epochs"] == 6.0 and settings["weight_decay"] == 0.0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    model = VeraModel.from_pretrained(base, output / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "adapter")
    with torch.no_grad():
        logits = model(**tokenizer("the film was very good a", return_tensors="pt")).logits
    assert logits.argmax().item() == ["neg", "pos"].index("pos")
    checkpoints = list((output / "checkpoints").glob("checkpoint-*"))
    assert checkpoints and not any((path / "model.safetensors").exists() for path in checkpoints)


def test_a_configuration_file_is_read_and_options_go_before_it(encoder: Path, table: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    lines = [f"model: {encoder}", f"data: {table}", "rank: 4", "learning_rate: 1e-2", "epochs: 1"]
    lines.append("target_modules: [query]")
    config.write_text("\n".join(lines))
    assert train("--config", config, "--output", tmp_path / "out", "--rank", 6) == 0
    settings = yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())
    assert (settings["rank"], settings["learning_rate"], settings["target_modules"]) == (6, 0.01, ["query"])
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == 6 and saved["target_modules"] == ["query"]
    assert train("--config", tmp_path / "out" / "train.yaml", "--output", tmp_path / "again") == 0
    first, second = (saved_tensors(tmp_path / name) for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_regression_token_classification_and_language_models(
    encoder: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for i, (text, _) in enumerate(sentences()):
        words = text.split()
        tags = ["O"] * 3 + ["X"] * (len(words) - 3)
        rows.append({"text": text, "label": i % 2 + 0.5, "words": words, "tags": tags})
    data = write_lines(tmp_path / "rows.jsonl", rows)
    chats = [
        {"text": [{"role": "a", "content": text}, {"role": "the", "content": "good"}]} for text, _ in sentences(20)
    ]
    chat = write_lines(tmp_path / "chat.jsonl", chats)
    tagged = ("--data", data, "--text-column", "words", "--label-column", "tags")
    for name, model, given, metrics in (
        ("regression", encoder, ("--data", data), {"mse", "pearson"}),
        ("token-classification", encoder, tagged, {"f1", "accuracy"}),
        ("causal-lm", decoder, ("--data", data), {"perplexity"}),
        ("causal-lm", decoder, ("--data", chat, "--eval-data", chat), {"perplexity"}),
    ):
        output = tmp_path / f"{name}{len(given)}"
        rates = ("--epochs", 5, "--lr", 0.05)
        code = train("--model", model, "--task", name, *given, "--output", output, *COMMON, *rates)
        assert code == 0, capsys.readouterr().err
        results = json.loads((output / "results.json").read_text())
        assert metrics | {"loss"} <= set(results["metrics"])
        losses = [entry["loss"] for entry in results["history"] if "loss" in entry]
        quarter = len(losses) // 4
        assert sum(losses[-quarter:]) < sum(losses[:quarter])
        assert (output / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_that_is_interrupted_goes_on_to_the_same_end(encoder: Path, table: Path, tmp_path: Path) -> None:
    """Ctrl-C ends it with a checkpoint, and what follows is as if it had not been pressed."""
    arguments = ["--model", encoder, "--data", table, *COMMON, "--vera-dropout", 0.1]
    assert train(*arguments, "--output", tmp_path / "whole") == 0
    code = (
        "import os, signal, sys\n"
        "from transformers import TrainerCallback\n"
        "from veratune.cli import main, progress\n"
        "class Press(progress.StopOnSignal):\n"
        "    def on_step_begin(self, args, state, control, **_):\n"
        "        if state.global_step == 5: os.kill(os.getpid(), signal.SIGINT)\n"
        "progress.StopOnSignal = Press\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "train", *map(str, arguments), "--output", str(tmp_path / "parts")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    stopped = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert stopped.returncode == 1, stopped.stderr
    assert f"stopped at step 6. To go on: veratune train --resume {tmp_path / 'parts'}" in stopped.stdout
    assert not (tmp_path / "parts" / "adapter").exists()
    assert train("--resume", tmp_path / "parts") == 0
    first, second = (saved_tensors(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_early_stopping(encoder: Path, table: Path, tmp_path: Path) -> None:
    code = train(
        "--model",
        encoder,
        "--data",
        table,
        "--output",
        tmp_path / "out",
        "--rank",
        4,
        "--epochs",
        9,
        "--lr",
        1e-9,
        "--head-lr",
        1e-9,
        "--early-stopping",
        2,
    )
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    evaluations = [entry["epoch"] for entry in results["history"] if "eval_loss" in entry]
    assert max(evaluations) < 9


def test_wrong_calls_are_told_before_any_work(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("kept")
    one = write_lines(tmp_path / "one.jsonl", [{"text": "good", "label": "a"}] * 20)
    other = write_lines(tmp_path / "other.jsonl", [{"text": "good", "label": "new"}, {"text": "bad", "label": "pos"}])
    empty = write_lines(tmp_path / "empty.jsonl", [{"text": "good", "label": "a"}, {"text": None, "label": "b"}])
    bad = tmp_path / "bad.yaml"
    bad.write_text("modle: x\n")
    out = tmp_path / "never"
    rows = ("--data", table, "--output", out)
    for arguments, message in (
        (("--data", table, "--output", out), "model is missing"),
        (("--model", encoder, *rows, "--task", "poetry"), "task='poetry' is not allowed"),
        (("--model", encoder, "--data", tmp_path / "no.csv", "--output", out), "is not a file"),
        (("--model", encoder, *rows, "--label-column", "score"), "has no column 'score': it has ['label', 'text']"),
        (("--model", encoder, "--data", one, "--output", out), "all training rows have the same label"),
        (("--model", encoder, *rows, "--eval-data", other), "labels that no training row has: ['new']"),
        (("--model", encoder, "--data", empty, "--output", out), "row 2 has nothing in the column 'text'"),
        (("--model", encoder, "--data", table, "--output", full), "exists and is not empty"),
        (("--model", encoder, *rows, "--rank", 0), "rank=0"),
        (("--model", encoder, *rows, "--target-modules", "quary"), "no module is called 'quary'"),
        (("--model", tmp_path, *rows), "neither a model"),
        (("--config", bad, *rows), "unknown settings ['modle']"),
        (("--resume", full), "train.yaml does not exist"),
        (("--resume", full, "--rank", 3), "leave out rank"),
    ):
        code = train(*arguments)
        shown = capsys.readouterr()
        assert code == 1 and message in shown.err.splitlines()[-1], (arguments, shown.err)
    assert not out.exists() and [path.name for path in full.iterdir()] == ["precious"]


def test_what_was_trained_is_merged_with_its_head_and_the_names_of_its_classes(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base has no classification head, and says nothing of the labels."""
    output = tmp_path / "out"
    assert train("--model", encoder, "--data", table, "--output", output, *COMMON) == 0
    assert json.loads((output / "rows.json").read_text())["labels"] == ["neg", "pos"]
    assert main(["merge", str(output / "adapter"), str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "neg", 1: "pos"}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    model = VeraModel.from_pretrained(base, output / "adapter")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["export", str(output / "adapter"), str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "back")]) in (0, 1)
    capsys.readouterr()
    assert main(["merge", str(output), str(tmp_path / "no")]) == 1
    assert f"its adapter is {output / 'adapter'}" in capsys.readouterr().err


def test_going_on_with_other_rows_or_a_finished_run(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert train("--model", encoder, "--data", table, "--output", output, *COMMON) == 0
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    assert train("--resume", output) == 0
    assert "is finished: its adapter is" in capsys.readouterr().out
    (output / "results.json").unlink()
    table.write_text(table.read_text().replace("pos", "other"), encoding="utf-8")
    assert train("--resume", output) == 1
    assert "the rows are not those that" in capsys.readouterr().err
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_rows_are_taken_as_they_are_written(tmp_path: Path) -> None:
    from veratune.cli.data import read_rows

    table = tmp_path / "odd.csv"
    table.write_text('text,label,date\n007,01,2020-01-01\n"None",1,x\n12345678901234567890123,NA,\n', encoding="utf-8")
    assert [tuple(row.values()) for row in read_rows(str(table))] == [
        ("007", "01", "2020-01-01"),
        ("None", "1", "x"),
        ("12345678901234567890123", "NA", ""),
    ]
    table.write_text("text,label\nhello, world,x\n", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(str(table))
    lines = write_lines(tmp_path / "odd.jsonl", [{"text": "007", "label": "01"}])
    assert read_rows(str(lines)) == [{"text": "007", "label": "01"}]
    lines.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 holds no JSON object"):
        read_rows(str(lines))


@pytest.mark.parametrize("label", ["x", "inf", "nan"])
def test_regression_wants_numbers(
    label: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("text,label\ngood,1\nbad," + label + "\n" * 2, encoding="utf-8")
    assert train("--model", encoder, "--data", table, "--task", "regression", "--output", tmp_path / "out") == 1
    assert "row 2 has no number in 'label'" in capsys.readouterr().err and not (tmp_path / "out").exists()
