"""What a user can get wrong or a disk refuse: one line that says what, where and what to do, and nothing half done."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import nn

from tiny_models import tiny_model
from training_runs import sentences, train, write_lines
from veratune import VeraConfig, get_peft_model
from veratune.checkpoint.formats import FORMATS
from veratune.cli import main
from veratune.cli.train.data import check_columns, label_names
from veratune.cli.train.fields import SettingsError
from veratune.cli.train.reading import read_rows
from veratune.cli.train.settings import TrainSettings
from veratune.utils.startup import INTERRUPTED


@pytest.fixture(scope="module")
def adapter(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run") / "adapter"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder)
    get_peft_model(base, VeraConfig(r=4, target_modules="all-linear")).save_pretrained(place)
    return place


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, which is one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("veratune: warning: ")]
    assert len(lines) == 1 and lines[0].startswith("veratune: "), lines
    assert "Traceback" not in lines[0] and "--traceback" not in lines[0] and lines[0].isprintable()
    return lines[0]


# Rows


def test_other_line_separators_are_text(tmp_path: Path) -> None:
    texts = [f"one{separator}two" for separator in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c")]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "label": "a"}, ensure_ascii=False) for text in texts]
    for end in ("\n", "\r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
        assert [row["text"] for row in read_rows(str(path))] == texts


def settings_for(task: str, **changes: Any) -> TrainSettings:
    return TrainSettings("m", "rows.jsonl", "o", task=task, **changes)


GOOD_CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("sequence-classification", {"text": {"a": 1}}, "'text' is an object, not a text"),
    ("sequence-classification", {"text": 5}, "'text' is a number (5), not a text"),
    ("sequence-classification", {"text": 1e400}, "'text' is a number (inf), not a text"),
    ("sequence-classification", {"text": True}, "'text' is a truth value (True), not a text"),
    ("sequence-classification", {"text": ["a"]}, "a list in 'text'"),
    ("sequence-classification", {"text": None}, "nothing in the column 'text'"),
    ("sequence-classification", {"text": "  \u3000"}, "nothing in the column 'text'"),
    ("sequence-classification", {"text": float("nan")}, "nothing in the column 'text'"),
    ("sequence-classification", {"label": {}}, "'label' is an object"),
    ("sequence-classification", {"label": ["a", {}]}, "'label' is an object"),
    ("sequence-classification", {"label": 0.5}, "--task regression learns numbers"),
    ("sequence-classification", {"label": " "}, "nothing in the column 'label'"),
    ("regression", {"label": True}, "no number in 'label': a truth value (True)"),
    ("regression", {"label": 1e39}, "no number in 'label': 1e+39"),
    ("regression", {"label": 10**400}, "no number in 'label': a number"),
    ("regression", {"label": [1]}, "no number in 'label': a list"),
    ("regression", {"text": 3, "label": 3}, "'text' is a number"),
    ("token-classification", {"text": ["a", 5], "label": ["x", "y"]}, "word 2 is a number (5)"),
    ("token-classification", {"text": ["a", ""], "label": ["x", "y"]}, "word 2 has nothing in it"),
    ("token-classification", {"text": ["a", "b"], "label": ["x", None]}, "an empty label"),
    ("token-classification", {"text": ["a", "b"], "label": ["x", {}]}, "'label' is an object"),
    ("token-classification", {"text": "a", "label": "x"}, "a list of words and a list of as many labels"),
    ("causal-lm", {"text": 7}, "'text' is a number (7)"),
    ("causal-lm", {"text": []}, "an empty chat"),
    ("causal-lm", {"text": ["hi"]}, "each message must have a 'role' and a 'content'"),
    ("causal-lm", {"text": [*GOOD_CHAT, {"role": 3, "content": "x"}]}, "message 3: its 'role' is a number (3)"),
    ("causal-lm", {"text": [*GOOD_CHAT, {"role": "user", "content": 4}]}, "message 3: its 'content' is a number"),
    ("causal-lm", {"text": [*GOOD_CHAT, {"role": "user", "content": [{"type": "text"}]}]}, "'content' is a list"),
    ("causal-lm", {"text": [*GOOD_CHAT, {"role": "assistant", "content": None}]}, "'content' has nothing in it"),
    ("causal-lm", {"text": [*GOOD_CHAT, {"role": "assistant", "content": ""}]}, "'content' has nothing in it"),
]
GOOD_ROWS: dict[str, dict[str, Any]] = {
    "sequence-classification": {"text": "a", "label": "x"},
    "regression": {"text": "a", "label": "0.5"},
    "token-classification": {"text": ["a", "b"], "label": ["x", "y"]},
    "causal-lm": {"text": [{"role": "system", "content": ""}, *GOOD_CHAT]},
}


@pytest.mark.parametrize("kind", ["jsonl", "table"])
@pytest.mark.parametrize(("task", "wrong", "message"), BAD_ROWS)
def test_what_is_no_text_is_not_made_into_one(
    task: str, wrong: dict[str, Any], message: str, kind: str, tmp_path: Path
) -> None:
    """The first row is as it should be, and the second one is refused with its place."""
    good = GOOD_ROWS[task]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_lines(path, [good, good | wrong])
        rows = read_rows(str(path))
    else:
        import pandas as pd

        from veratune.cli.values import plain

        # Parquet has one type for a column: what it cannot hold beside the good row is taken from a table in memory.
        rows = [plain(row) for row in pd.DataFrame([good, good | wrong], dtype=object).to_dict("records")]
    check_columns(str(path), rows[:1], settings_for(task))
    with pytest.raises(ValueError, match=r"rows\.\w+: row 2") as caught:
        check_columns(str(path), rows, settings_for(task))
    assert message in str(caught.value)


def test_every_missing_value_of_a_parquet_file_is_missing(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "rows.parquet"
    for column in (
        pd.array(["a", None], dtype="string"),
        pd.array([1, None], dtype="Int64"),
        pd.to_datetime(["2020-01-01", None]),
        pd.array([1.5, float("nan")]),
    ):
        pd.DataFrame({"text": ["a", "b"], "label": column}).to_parquet(path)
        rows = read_rows(str(path))
        assert rows[1]["label"] is None and rows[0]["label"] is not None


def test_labels_are_classes(tmp_path: Path) -> None:
    """Whole numbers that became floats are classes; measured numbers are not, in a file without types either."""
    settings = settings_for("sequence-classification")

    def names(rows: list[dict[str, Any]]) -> list[str]:
        check_columns("rows", rows, settings)
        return label_names(rows, rows, settings)

    assert names([{"text": "a", "label": label} for label in (0.0, 1.0, 10)]) == ["0", "1", "10"]
    assert names([{"text": "a", "label": label} for label in (True, False)]) == ["False", "True"]
    assert names([{"text": "a", "label": label} for label in ("1.0", "2", "n/a", "4.5")]) == ["1.0", "2", "4.5", "n/a"]
    with pytest.raises(ValueError, match=r"row 3: 'label' is 4\.5, and classes are names or whole numbers: --task reg"):
        names([{"text": "a", "label": label} for label in ("1.0", "2", "4.5")])
    with pytest.raises(ValueError, match=r"row 2: 'label' is a text \('1'\), and rows: row 1: 'label' is a int that"):
        names([{"text": "a", "label": label} for label in (1, "1")])


def test_names_that_stand_twice_and_columns_that_serve_twice(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("text,label,text\na,b,c\n")
    with pytest.raises(ValueError, match=r"rows\.csv cannot be read: two columns are called 'text'"):
        read_rows(str(table))
    table.write_text("text,label,,\na,b,,\n")  # as spreadsheets write them
    assert read_rows(str(table))[0]["text"] == "a"
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"line 1 cannot be read: 'text' occurs twice"):
        read_rows(str(lines))
    with pytest.raises(SettingsError, match="the column 'text' cannot have two uses"):
        check_columns("x", [{"text": "a"}], settings_for("sequence-classification", label_column="text"))


def test_a_text_without_tokens_is_refused(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As zero-width characters are to many a tokenizer."""
    from veratune.cli.train import data

    monkeypatch.setattr(data, "check_text", lambda *_: None)
    monkeypatch.setattr(data, "is_empty", lambda value: value is None)
    rows = [{"text": text, "label": label} for text, label in sentences()]
    path = write_lines(tmp_path / "rows.jsonl", [*rows[:5], {"text": " ", "label": "pos"}, *rows])
    given = ("--data", path, "--eval-data", path, "--output", tmp_path / "out")
    assert train("--model", decoder, *given) == 1
    assert told(capsys).endswith("rows.jsonl, row 6: the tokenizer returns no tokens for its text")


# Settings

WRONG_TYPES: list[object] = [["a"], {"a": 1}, True, 3.5, -7, None, "", "x\0", 10**30, float("nan"), b"x", "yes"]


@pytest.mark.parametrize("name", [name for name in TrainSettings.__dataclass_fields__ if name != "vera"])
def test_every_setting_has_its_type(name: str) -> None:
    """A value is taken or refused by a message that names the setting; none raises anything else."""
    good = {"model": "m", "data": "d", "output": "o"}
    refused = []
    for value in WRONG_TYPES:
        try:
            TrainSettings(**{**good, name: value})
        except SettingsError as error:
            refused.append(str(error))
    assert len(refused) >= 5
    assert all(message.startswith((f"{name}=", f"{name} is missing")) and len(message) < 1000 for message in refused)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 20_000, "nested too deeply"),
        ("task: [a]", "task=['a'] is not allowed: it must be one of sequence-classification"),
        ("learning_rate: true", "learning_rate=True is not allowed"),
        (
            "learning_rate: 1e300",
            "learning_rate='1e300' is not allowed: it must be a finite number above 0, of at most",
        ),
        ("r: 256.0", "r=256.0 is not allowed: it must be an integer"),
        ("split: 2020-01-01", "it must be a name; in a YAML file, put it in quotes"),
        ("model: 7", "model=7 is not allowed"),
        ("data: [rows.csv]", "data=['rows.csv'] is not allowed"),
        ("vera: [a]", "vera=['a'] is not allowed"),
        ("vera: {lora_alpha: 16}", "['lora_alpha'] (VeRA has no alpha"),
        ("learning_rat: 1", "(did you mean 'learning_rate'?)"),
        (f"seed: {'9' * 5000}", "has a value that cannot be read"),
        ("a: 2020-99-99", "has a value that cannot be read: month must be in 1..12"),
        ("? [a, b]\n: 1", "is not YAML"),
        ("- a", "does not contain settings"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("task: &a [x]\nsplit: &b [*a, *a]\nvera: &c [*b, *b]", "is not allowed"),
    ],
)
def test_settings_that_cannot_be(
    text: str, message: str, encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(text)
    given = () if text.startswith(("model", "data")) else ("--model", encoder, "--data", table)
    assert train("--config", config, *given, "--output", tmp_path / "out") == 2
    error = told(capsys)
    assert message in error or (text.startswith("data") and "model is missing" in error)
    assert not (tmp_path / "out").exists()


def test_an_alias_bomb_does_not_explode(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "settings.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 8)}]" for i in range(12)]
    config.write_text("\n".join(lines) + "\n")
    assert train("--config", config) == 2
    assert "unknown settings" in told(capsys)
    value = yaml.safe_load(config.read_text())["a12"]
    for wrong in ({"task": value}, {"vera": {"rank_pattern": value}}, {"target_modules": value}, {"seed": value}):
        with pytest.raises(SettingsError) as caught:
            TrainSettings(**{"model": "m", "data": "d", "output": "o", **wrong})
        assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    "option", ["--lr=1e300", "--head-lr=1e300", "--d-initial=1e39", "--epochs=1e300", f"--seed={10**30}"]
)
def test_numbers_without_bounds(
    option: str, encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--model", encoder, "--data", table, "--output", tmp_path / "out", option) == 2
    assert "is not allowed: it must be" in told(capsys) and not (tmp_path / "out").exists()


def test_special_files_are_not_read(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    rest = ("--model", encoder, "--output", tmp_path / "out")
    for place in (pipe, "/dev/zero"):
        assert train(*rest, "--data", table, "--config", place) == 2
        assert "is not a regular file" in told(capsys)
        assert train(*rest, "--data", place) == 2
        assert "is not a file" in told(capsys)
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    assert train(*rest, "--data", table, "--config", large) == 2
    assert "bytes; at most" in told(capsys)
    sparse = tmp_path / "large.csv"
    with sparse.open("wb") as file:
        file.truncate(1 << 42)
    assert train(*rest, "--data", sparse) == 1
    assert "more than this machine's memory" in told(capsys)


def test_a_picture_takes_no_files_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(nn.Sequential(nn.Linear(4, 3)), VeraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    for place in (picture, tmp_path / "link.png"):
        assert main(["inspect", str(tmp_path / "adapter"), "--plot", str(place)]) == 1
        assert "already exists and will not be overwritten" in told(capsys)
    assert picture.read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()
    picture.unlink()
    assert main(["inspect", str(tmp_path / "adapter"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_calibration_and_a_card_are_regular_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERATUNE_CACHE", str(tmp_path))
    os.mkfifo(tmp_path / "calibration.json")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), VeraConfig(r=2, target_modules="all-linear"))
    (tmp_path / "adapter").mkdir()
    os.mkfifo(tmp_path / "adapter" / "README.md")
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").is_fifo()  # none of veratune's cards, and stays
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


# Models


def test_an_adapter_in_the_place_of_a_model(
    adapter: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (adapter, adapter.parent):
        for call in (
            ("bench", place),
            ("merge", adapter, tmp_path / "out", "--model", place),
        ):
            assert main([str(argument) for argument in call]) == 1
            assert told(capsys).endswith(
                f"{adapter} is an adapter, not a model; its base model is {encoder}: pass that"
            )


@pytest.mark.parametrize("named", ["base-that-moved", "owner/model", "/moved/base"])
def test_a_base_model_that_is_not_there(
    named: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    moved = tmp_path / "adapter"
    moved.mkdir()
    (moved / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
    for call in (("merge", moved, tmp_path / "out"), ("export", moved, tmp_path / "out", "--format", "lora")):
        assert main([str(argument) for argument in call]) == 1
        error = told(capsys)
        assert named in error and error.endswith("give the base model with --model"), error
        assert "not in the hub's cache" in error or "is not a directory on this machine" in error
    assert main(["bench", named]) == 1
    assert told(capsys).endswith("check the name, or give a directory")


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "[1]", "{}", '{"model_type": 3}', '{"model_type": "bert", "hidden_size": "x"}']
)
def test_a_model_that_is_damaged(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    assert main(["inspect", str(tmp_path)]) == 1
    assert str(tmp_path) in told(capsys)


# The disk


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let this process write no file larger than this, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more(
    encoder: Path, table: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch says "basic_ios::clear: iostream error" of it, in the middle of a checkpoint."""
    output = tmp_path / "run"
    with files_of_at_most(9000):
        given = ("--model", encoder, "--data", table, "--r", 4, "--max-steps", 2, "--output", output)
        assert train(*given) == 1
    line = told(capsys)
    assert f"{output} cannot be written: a " in line and line.endswith(" left)") and "iostream" not in line
    with files_of_at_most(9000):
        assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 1
    assert f"{tmp_path / 'merged'} cannot be written: a " in told(capsys)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        OSError(28, "No space left on device", "x"),
        OSError(122, "Disk quota exceeded"),
    ],
)
def test_what_libraries_say_of_a_full_disk(
    error: Exception, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, host: Any, adapter_name: str, directory: Path) -> None:
        directory.mkdir()
        (directory / "half").write_text("done")
        raise error

    monkeypatch.setattr(type(FORMATS["peft"]), "write", fail)
    assert main(["export", str(adapter), str(tmp_path / "out"), "--format", "peft"]) == 1
    line = told(capsys)
    assert "cannot be written" in line and (str(tmp_path / "out") in line or "x cannot" in line)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["doctor"]) == 1
    assert told(capsys) == "veratune: the output cannot be written: the disk is full"
    sys.stdout.close()


# Interruptions


@pytest.mark.parametrize("module", ["veratune.utils.startup", "torch.nn", "typer"])
def test_ctrl_c_while_packages_are_imported_is_one_line(module: str) -> None:
    """Pressed as soon as the interpreter notes that this module is there."""
    command = [sys.executable, "-X", "importtime", "-m", "veratune", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while process.stderr.readline().rpartition("|")[2].strip() != module:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    own = [line for line in error.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, own) == (INTERRUPTED, ["veratune: stopped"])


def test_a_program_that_imports_veratune_keeps_its_ctrl_c() -> None:
    code = "import signal, veratune; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_in_a_command(
    encoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from veratune.cli import inspecting

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspecting, "load_model", pressed)
    assert main(["inspect", str(encoder)]) == INTERRUPTED
    assert told(capsys) == "veratune: stopped"


# Messages


def test_messages_are_printable_and_of_bounded_length(
    capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path
) -> None:
    assert main(["inspect", "\x1b[31m" + "x/" * 5000]) == 1
    assert len(told(capsys)) < 2200
    copied = tmp_path / "adapter"
    copied.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copied / name).write_bytes((adapter / name).read_bytes())
    escapes = {"base_model_name_or_path": "\x1b]0;title\x07\u202e", "peft_type": "LORA"}
    (copied / "adapter_config.json").write_text(json.dumps(escapes))
    main(["inspect", str(copied)])
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\u202e" not in shown.out + shown.err


# Training that comes to nothing


def test_advice_before_and_after_a_run(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"the film {i % 7}", "label": "often" if i % 4 else "seldom"} for i in range(40)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    given = ("--model", encoder, "--data", data, "--eval-data", data)
    rates = ("--r", 8, "--lr", 2, "--head-lr", 1e-9, "--max-steps", 1)
    assert train(*given, "--output", tmp_path / "a", *rates) == 0
    shown = capsys.readouterr()
    assert "learning_rate=2.0 is high for VeRA" in shown.err and "r=8 is low for VeRA" in shown.err
    assert "is short" not in shown.err
    assert "(always 'often': 0.7500), f1 " in shown.out and " always 'often' \n" in shown.out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["trivial"] == {"answer": "'often'", "metric": "accuracy", "score": 0.75}
    assert ("has learned nothing" in shown.err) == (results["metrics"]["accuracy"] <= 0.75)
    usual = ("--r", 64, "--epochs", 10, "--batch-size", 16)  # 30 steps of 2e-2 are no few
    assert train(*given, "--output", tmp_path / "b", *usual) == 0
    assert "is short" not in capsys.readouterr().err


def test_trivial_answers_are_what_they_are() -> None:
    from veratune.cli.train.metrics import trivial_answer

    def examples(*labels: Any) -> Any:
        return [{"input_ids": [1], "labels": label} for label in labels]

    settings = settings_for("regression")
    answer = trivial_answer(settings, (examples(1.0, 3.0), examples(2.0, 5.0)), [])
    assert answer is not None and (answer.answer, answer.score) == ("2", 4.5)
    assert answer.is_beaten_by({"mse": 4.4}) and not answer.is_beaten_by({"mse": 4.5})
    settings = settings_for("token-classification")
    answer = trivial_answer(settings, (examples([-100, 1, 1, 0]), examples([0, -100, 1, 1, 0])), ["O", "X"])
    assert answer is not None and (answer.answer, answer.score) == ("'X'", 0.5)
    assert trivial_answer(settings_for("causal-lm"), (examples([1]), examples([1])), []) is None


# Names


def test_names_that_cannot_be_folders_are_refused_at_once(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("bert"), VeraConfig(r=2, target_modules="all-linear"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("\u4e00" * 128, "\u4e00" * 75, "\U0001d4d0" * 60):
        with pytest.raises(ValueError, match="bytes in UTF-8"):
            model.add_adapter(name, VeraConfig(r=2, target_modules="all-linear"))
        with pytest.raises(ValueError, match="bytes in UTF-8"):
            get_peft_model(tiny_model("bert"), VeraConfig(r=2), name)
    assert model.state_dict().keys() == before.keys()
    longest = "\u4e00" * 74
    model.add_adapter(longest, VeraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / longest / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("same", [True, False])
def test_threads_that_add_adapters_at_once(same: bool, tmp_path: Path) -> None:
    """Of one name one thread wins; of several names, all do, on layers that none of them finds half replaced."""
    saved = get_peft_model(tiny_model("bert"), VeraConfig(r=2, target_modules="all-linear"))
    saved.save_pretrained(tmp_path)
    for load in (True, False):
        model = get_peft_model(tiny_model("bert"), VeraConfig(r=2, target_modules=["query"]))
        start, wrong = threading.Barrier(4), []

        def add(number: int, model: Any = model, start: Any = start, wrong: Any = wrong, load: bool = load) -> None:
            name = "new" if same else f"new{number}"
            start.wait()
            try:
                if load:
                    model.load_adapter(tmp_path, name)
                else:
                    model.add_adapter(name, VeraConfig(r=2, target_modules="all-linear"))
            except ValueError as error:
                wrong.append(str(error))

        threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wrong) == (3 if same else 0) and all("is taken" in message for message in wrong)
        names = ["new"] if same else [f"new{number}" for number in range(4)]
        assert set(model.peft_config) == {"default", *names}
        layers = saved.vera_layers().keys()
        assert all(model.adapter_state(name).vectors.keys() == layers for name in names)
        torch.testing.assert_close(
            model.adapter_state(names[0]).vectors[next(iter(layers))]["d"].detach(), torch.full((2,), 0.1)
        )
