"""`veratune train --model RUN`, and the output of a training run where an adapter is expected."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from command_line import run
from training_runs import sentences, train, with_tokenizer, write_lines
from veratune import AdapterBank, VeraConfig, VeraModel
from veratune.cli.models import adapter_at
from veratune.cli.output import error_line, print_table, print_text, warning_line
from veratune.cli.train.preflight import steps_of_run
from veratune.cli.train.settings import ADAPTER_SETTINGS, TrainSettings
from veratune.cli.train.start import start_of


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("bert", tmp_path_factory.mktemp("start") / "encoder")


@pytest.fixture(scope="module")
def rows(encoder: Path) -> Path:
    return write_lines(encoder.parent / "rows.jsonl", [{"text": text, "label": name} for text, name in sentences()])


@pytest.fixture(scope="module")
def first(encoder: Path, rows: Path) -> Path:
    output = encoder.parent / "first"
    given = ("--r", 5, "--d-initial", 0.25, "--target-modules", "query,value", "--max-steps", 3, "--lr", 0.05)
    assert train("--model", encoder, "--data", rows, "--output", output, *given) == 0
    return output


@pytest.mark.parametrize("what", ["run", "adapter"])
def test_training_starts_from_an_adapter(
    what: str, first: Path, encoder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = first if what == "run" else first / "adapter"
    tiny = ("--lr", 1e-12, "--head-lr", 1e-12, "--max-steps", 1)
    assert train("--model", place, "--data", rows, "--output", tmp_path / "second", *tiny) == 0
    assert f"{first / 'adapter'} on {encoder}: " in capsys.readouterr().out
    before, after = (load_file(x / "adapter" / "adapter_model.safetensors") for x in (first, tmp_path / "second"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-9)
    saved = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["base_model_name_or_path"]) == (5, str(encoder))
    settings = yaml.safe_load((tmp_path / "second" / "train.yaml").read_text())
    assert (settings["r"], settings["d_initial"], settings["target_modules"]) == (5, 0.25, ["query", "value"])
    # Its settings can be used again; only what moves is learned.
    again = ("--config", tmp_path / "second" / "train.yaml", "--output", tmp_path / "third", "--lr", 0.05)
    assert train(*again) == 0
    third = load_file(tmp_path / "third" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(third[name], tensor) for name, tensor in before.items())


def test_settings_and_rows_that_are_not_the_adapters(
    first: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "vera.yaml"
    config.write_text("vera: {bias: all}\n")
    other = write_lines(tmp_path / "other.jsonl", [{"text": "good", "label": x} for x in ("pos", "new")] * 20)
    for arguments, code, message in (
        (("--data", rows, "--r", 6), 2, f"--r 6 is not what {first / 'adapter'} has: 5. Training continues"),
        (("--data", rows, "--target-modules", "query"), 2, "--target-modules ['query'] is not what"),
        (("--data", rows, "--task", "regression"), 2, "--task 'regression' is not what"),
        (("--data", rows, "--config", config), 2, "vera: bias 'all' is not what"),
        (("--data", other), 1, "was not trained with: it has ['neg', 'pos']: ['new']"),
    ):
        assert train("--model", first, "--output", tmp_path / "out", *arguments) == code
        shown = capsys.readouterr()
        assert message in shown.err.splitlines()[-1] and not (tmp_path / "out").exists(), shown.err
    assert train("--model", first, "--data", rows, "--output", tmp_path / "out", "--r", 5, "--max-steps", 1) == 0


def test_a_models_directory_with_an_adapter_in_it_is_a_model(first: Path, encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((encoder / "config.json").read_bytes())
    shutil.copytree(first / "adapter", tmp_path / "base" / "adapter")
    assert start_of(str(tmp_path / "base")) is None and adapter_at(str(tmp_path / "base")) is None
    (tmp_path / "base" / "config.json").rename(tmp_path / "config.json")
    assert start_of(str(tmp_path / "base")) == adapter_at(str(tmp_path / "base")) == tmp_path / "base" / "adapter"
    assert start_of("owner/name") is None and start_of("bert") is None


def test_random_weights_that_no_file_would_have(
    rows: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the pooler of a checkpoint that was trained without one."""
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "base")
    transformers.BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    given = ("--model", tmp_path / "base", "--data", rows, "--r", 4, "--max-steps", 1)
    assert train(*given, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "do not contain bert.pooler.dense.bias, bert.pooler.dense.weight: random values" in error
    config = tmp_path / "vera.yaml"
    config.write_text(error.partition("in full with ")[2].partition(" in a --config")[0])
    assert train(*given, "--config", config, "--output", tmp_path / "out") == 0
    assert run(capsys, "predict", tmp_path / "out", "--data", rows)[0] == 0
    err = run(capsys, "merge", tmp_path / "out", tmp_path / "merged")[2]
    assert "random values" not in err


def test_a_run_stands_for_its_adapter_everywhere(first: Path, encoder: Path, tmp_path: Path) -> None:
    def base() -> torch.nn.Module:
        return transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2).eval()

    ids = torch.tensor([[4, 5, 6]])
    model = VeraModel.from_pretrained(base(), first)
    with torch.no_grad():
        expected = VeraModel.from_pretrained(base(), first / "adapter")(ids).logits
        assert torch.equal(model(ids).logits, expected)
        model.load_adapter(first, "second")
        model.set_adapter("second")
        assert torch.equal(model(ids).logits, expected)
    bank = AdapterBank.for_adapters(base(), {"a": first}, capacity=3)
    bank.load("b", first)
    with torch.no_grad():
        for name in ("a", "b"):
            torch.testing.assert_close(bank.model(ids, adapters=[name]).logits, expected, rtol=1e-4, atol=1e-5)
    bank.unload()


def test_what_a_run_says_and_its_card(
    encoder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train("--model", encoder, "--data", rows, "--output", output, "--r", 4, "--max-steps", 2) == 0
    out = capsys.readouterr().out
    trivial = json.loads((output / "results.json").read_text())["trivial"]
    score = f"{trivial['score']:.4f}"
    assert f"(always {trivial['answer']}: {score})" in out and f"always {trivial['answer']}" in out
    assert f"veratune predict {output} --data" in out and f"veratune merge {output} NEW_DIRECTORY" in out
    card = (output / "adapter" / "README.md").read_text()
    for text in (
        "`BertForSequenceClassification`",
        '0 `"neg"`, 1 `"pos"`',
        "BertForSequenceClassification.from_pretrained(",
        "num_labels=2",
        "KeyError: 'VERATUNE'",
        "peft.PeftModel.from_pretrained",
        "| `r` | `4` |",
        '| `target_modules` | `"all-linear"` |',
        f"| `transformers` | `{transformers.__version__}` |",
        "| learning rate | `0.02 for the vectors, 0.004 for a new head` |",
        f"(always {trivial['answer']}: {score})",
    ):
        assert text in card, text
    assert str(tmp_path) not in card and str(encoder) not in card
    model = VeraModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2), output
    )
    model.save_pretrained(output / "adapter")  # the card is still ours, and its scores may not be those of the model
    assert "## Training" not in (output / "adapter" / "README.md").read_text()
    for format in ("lora", "peft"):
        code, out, _ = run(capsys, "export", output, tmp_path / format, "--format", format)
        size = sum(path.stat().st_size for path in (tmp_path / format).iterdir()) / 1000
        assert code == 0 and f"as {format}, rank 4, 13 layers, {size:.1f} KB; the adapter has" in out, out


def test_the_settings_of_the_adapter_are_those_of_its_configuration() -> None:
    ours, theirs = TrainSettings("m", "d", "o"), VeraConfig(target_modules="all-linear")
    assert {name: getattr(ours, name) for name in ADAPTER_SETTINGS} == {
        name: getattr(theirs, name) for name in ADAPTER_SETTINGS
    }


def test_one_of_several_processes_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def say() -> tuple[str, str]:
        print_text("text")
        print_table(("a",), [("1",)])
        warning_line("careful")
        error_line("wrong")
        shown = capsys.readouterr()
        return shown.out, shown.err

    alone = say()
    monkeypatch.setenv("RANK", "0")
    assert say() == alone and "text" in alone[0] and "careful" in alone[1]
    monkeypatch.setenv("RANK", "1")
    assert say() == ("", "veratune (process 1): wrong\n")
    settings = TrainSettings("m", "d", "o", batch_size=4, epochs=2)
    assert steps_of_run(settings, 36) == 18
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert steps_of_run(settings, 36) == 10


@pytest.mark.parametrize("command", ["", "train", "predict", "chat", "merge", "bank build"])
def test_help_imports_nothing_that_takes_seconds(command: str) -> None:
    code = (
        "import sys\nfrom veratune.cli import main\n"
        f"assert main([*{command.split()!r}, '--help']) == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pandas', 'safetensors', 'peft'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
