"""`veratune train` on rows of every kind, interrupted and gone on with, and called wrongly."""

import dataclasses
import json
import os
import re
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

from tiny_models import tiny_model
from training_runs import sentences, train, write_lines
from veratune import VeraConfig, VeraModel
from veratune.cli import main
from veratune.cli.train.chats import chat_tokens
from veratune.cli.train.fields import options_of
from veratune.cli.train.reading import read_rows
from veratune.cli.train.settings import TrainSettings
from veratune.cli.train.tasks import make_task


def saved_tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


COMMON = ("--r", 8, "--epochs", 2, "--batch-size", 4)


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
    assert settings["r"] == 8 and settings["epochs"] == 6.0 and settings["weight_decay"] == 0.0
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
    lines = [f"model: {encoder}", f"data: {table}", "r: 4", "learning_rate: 1e-2", "epochs: 1"]
    lines.append("target_modules: [query]")
    config.write_text("\n".join(lines))
    assert train("--config", config, "--output", tmp_path / "out", "--r", 6) == 0
    settings = yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())
    assert (settings["r"], settings["learning_rate"], settings["target_modules"]) == (6, 0.01, ["query"])
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == 6 and saved["target_modules"] == ["query"]
    assert train("--config", tmp_path / "out" / "train.yaml", "--output", tmp_path / "again") == 0
    first, second = (saved_tensors(tmp_path / name) for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("task", ["sequence-classification", "regression"])
def test_accumulated_batches_learn_what_one_batch_does(task: str, encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": name if task[0] == "s" else i % 3} for i, (text, name) in enumerate(sentences())]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    losses = []
    for batch, accumulated in ((8, 1), (2, 4)):
        output = tmp_path / f"{batch}"
        sizes = ("--batch-size", batch, "--gradient-accumulation", accumulated, "--eval-data", data)
        code = train("--model", encoder, "--data", data, "--output", output, "--task", task, "--epochs", 2, *sizes)
        assert code == 0
        history = json.loads((output / "results.json").read_text())["history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert len(losses[0]) == 10 and losses[1] == pytest.approx(losses[0], rel=1e-4)


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
        ("causal-lm", decoder, ("--data", chat, "--eval-data", chat, "--chat-loss", "all"), {"perplexity"}),
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
        "from veratune.cli import main\nfrom veratune.cli.train import progress\n"
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
    assert f"stopped at step 6. To resume: veratune train --resume {tmp_path / 'parts'}" in stopped.stdout
    assert not (tmp_path / "parts" / "adapter").exists()
    assert train("--resume", tmp_path / "parts") == 0
    first, second = (saved_tensors(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "whole")["loss"]) == 18
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def losses(output: Path) -> dict[str, list[tuple[int, float]]]:
    history = json.loads((output / "results.json").read_text())["history"]
    return {
        name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in ("loss", "eval_loss")
    }


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # pytest-xdist has a thread
def test_what_a_terminal_shows_and_ctrl_c_in_it(encoder: Path, table: Path, tmp_path: Path) -> None:
    """The real program in a pseudo-terminal, whose driver makes the signal of the key."""
    pty = pytest.importorskip("pty")
    arguments = ["train", "--model", encoder, "--data", table, "--r", 4, "--epochs", 400, "--batch-size", 4]
    output = tmp_path / "out"
    command = [sys.executable, "-m", "veratune", *map(str, arguments), "--output", str(output)]
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "150"}
        os.execv(sys.executable, command)
    shown, pressed = b"", False
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not pressed and b"tokens/s" in shown and b"step 18 of 3600: evaluation: loss" in shown:
            os.write(terminal, b"\x03")
            pressed = True
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text = shown.decode()
    assert pressed and code == 1, text
    assert "stopping after this step, with a checkpoint" in text
    found = re.search(r"stopped at step (\d+)\. To resume: veratune train --resume", " ".join(text.split()))
    assert found is not None, text
    assert (output / "checkpoints" / f"checkpoint-{found[1]}" / "trainer_state.json").exists()
    assert "accuracy 0." in text and "/3600" in text and "Traceback" not in text


def test_a_checkpoint_that_was_not_finished_is_passed_over(encoder: Path, table: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train("--model", encoder, "--data", table, "--output", output, *COMMON) == 0
    before = saved_tensors(output)
    (output / "results.json").unlink()
    (output / "checkpoints" / "checkpoint-18" / "trainer_state.json").unlink()
    assert train("--resume", output) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in saved_tensors(output).items())


def test_every_setting_is_an_option_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # words are broken at hyphens
    options = options_of(TrainSettings)
    assert {field.name for field in dataclasses.fields(TrainSettings)} - options.keys() == {"vera"}
    for name, option in options.items():
        text = option.help_text(TrainSettings.__dataclass_fields__[name].default)
        assert text and "{" not in text
        assert re.search(rf"--{name.replace('_', '-')}\b[^.]*? {re.escape(text)}", shown), name
    assert "-r, --r" in shown and "--learning-rate, --lr" in shown and "--head-learning-rate, --head-lr" in shown
    assert "sequence-classification (the default), regression, token-classification or causal-lm." in shown
    assert "Initial value of d. [default: 0.1]" in shown and "Rows in a step. [default: 16]" in shown


def test_all_settings_are_printed_back_and_used(encoder: Path, table: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("vera: {exclude_modules: [query], rank_pattern: {value: 3}, bias: vera_only}\n")
    output = tmp_path / "out"
    assert train("--config", config, "--model", encoder, "--data", table, "--output", output, *COMMON) == 0
    settings = yaml.safe_load((output / "train.yaml").read_text())
    assert list(settings) == [field.name for field in dataclasses.fields(TrainSettings)]
    own = {"r", "target_modules", "d_initial", "vera_dropout", "projection_prng_key", "task_type"}
    elsewhere = {"inference_mode", "init_weights", "base_model_name_or_path", "revision"}
    assert settings["vera"].keys() == VeraConfig().to_dict().keys() - own - elsewhere - {"peft_type"}
    saved = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert {name: saved[name] for name in settings["vera"]} == settings["vera"] | {"modules_to_save": ["classifier"]}
    tensors = saved_tensors(output)
    assert not any(".query" in name for name in tensors if name.startswith("vera_lambda"))
    assert {t.numel() for name, t in tensors.items() if name.startswith("vera_lambda_d") and "value" in name} == {3}


def test_evaluations_and_the_end_by_steps(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from veratune.cli.train import progress

    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    output = tmp_path / "out"
    steps = ("--max-steps", 7, "--eval-steps", 3)
    assert train("--model", encoder, "--data", table, "--output", output, *COMMON, *steps) == 0
    results = json.loads((output / "results.json").read_text())
    history = results["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6, 7]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7]
    best = results["best_step"]
    assert [e["eval_loss"] for e in history if e["step"] == best and "eval_loss" in e] == [results["metrics"]["loss"]]
    assert {path.name for path in (output / "checkpoints").iterdir()} <= {f"checkpoint-{n}" for n in (3, 6, 7)}
    out = capsys.readouterr().out
    line = r"step 5 of 7: loss \d\.\d{4}, accuracy \d\.\d{4}, [\d,]+ tokens/s, 0:00:0\d left\n"
    assert re.search(line, out), out


def test_a_loss_that_is_no_number_ends_it_at_once(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    rates = ("--lr", 1e30, "--head-lr", 1e30, "--warmup", 0)
    assert train("--model", encoder, "--data", table, "--output", output, *COMMON, *rates) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"veratune: the loss is (nan|inf) at step [23]: .* lower --learning-rate", error), error
    assert not (output / "adapter").exists() and not (output / "results.json").exists()


def test_rows_from_the_hub(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the hub that serves a real data set."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
        }
    )
    rows = [{"sentence": text, "label": int(label == "pos")} for text, label in sentences()]
    parts = {"train": rows, "validation": rows[:8]}
    asked = []

    def load_dataset(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(parts[split], features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    output = tmp_path / "out"
    hub = ("--data", "some/reviews", "--subset", "en", "--eval-split", "validation", "--text-column", "sentence")
    assert train("--model", encoder, *hub, "--output", output, *COMMON) == 0
    assert asked == [("some/reviews", "en", "train"), ("some/reviews", "en", "validation")]
    results = json.loads((output / "results.json").read_text())
    assert results["labels"] == ["neg", "pos"] and "40 rows to train with, 8 to" in capsys.readouterr().out
    wrong = ("--data", table, "--eval-split", "validation", "--output", tmp_path / "no")
    assert train("--model", encoder, *wrong) == 2
    assert "eval_split names a part of a data set on the hub" in capsys.readouterr().err


def test_classes_of_words_from_the_hub_are_named() -> None:
    datasets = pytest.importorskip("datasets")
    from veratune.cli.train.hub_rows import _named

    tag = datasets.ClassLabel(names=["O", "PER"])
    assert _named(datasets.Sequence(tag), [0, 1]) == ["O", "PER"]
    assert _named(tag, 1) == "PER" and _named(tag, -1) is None and _named(datasets.Value("int64"), 1) == 1


def test_the_hub_cannot_be_reached(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    assert train("--model", encoder, "--data", "some/reviews", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("veratune: some/reviews is not a file here, and cannot be read as a data set on the hub: ")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


CHAT = [
    {"role": "user", "content": "good film"},
    {"role": "assistant", "content": "very fine"},
    {"role": "user", "content": "bad"},
    {"role": "assistant", "content": "not boring"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def test_of_a_chat_the_assistants_words_are_learned(decoder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = TEMPLATE
    ids, labels = chat_tokens(tokenizer, CHAT, every=False)
    assert tokenizer.decode(ids).split().count("[BOS]") == 1
    learned = tokenizer.decode([label for label in labels if label != -100])
    assert learned == "very fine [EOS] not boring [EOS]"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert chat_tokens(tokenizer, CHAT, every=True) == (ids, ids)
    # A template that leaves out earlier answers, as those of models that reason do.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="--chat-loss all"):
        chat_tokens(tokenizer, CHAT, every=False)
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(ValueError, match="refuses this chat: no system message"):
        chat_tokens(tokenizer, CHAT, every=True)


def test_the_end_of_a_text_is_learned_where_it_also_pads(decoder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    tokenizer.pad_token = tokenizer.eos_token
    settings = TrainSettings(str(decoder), "x", "y", task="causal-lm", chat_loss="all")
    task = make_task(settings, tokenizer, [])
    batch = task.collator([task.encode({"text": text}) for text in ("good film", "the film was boring")])
    end = tokenizer.eos_token_id
    assert batch["input_ids"][0].tolist()[-3:] == [end] * 3
    assert batch["labels"][0].tolist()[-3:] == [end, -100, -100] and batch["attention_mask"][0].tolist()[-3:] == [
        1,
        0,
        0,
    ]
    assert batch["labels"][1].tolist() == batch["input_ids"][1].tolist()


def test_what_would_disappoint_is_told_before(
    encoder: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": text, "label": label} for text, label in sentences(12)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    given = ("--max-length", 4, "--early-stopping", 3, "--lr", 1e-4, "--precision", "bfloat16", "--epochs", 1)
    assert train("--model", encoder, "--data", data, "--output", tmp_path / "out", "--r", 4, *given) == 0
    told = capsys.readouterr().err
    for warning in (
        "learning_rate=0.0001 is low for VeRA",
        "precision=bfloat16 is slower",
        "11 of 11 texts fill max_length=4 tokens",
        "there are only 11 rows to train with, fewer than batch_size=16",
        "a run of 1 step is short",
        "early_stopping=3 cannot happen with only 1 evaluation in all",
    ):
        assert warning in told, told
    assert all(line.startswith("veratune: warning: ") for line in told.splitlines()), told
    # An answer that is cut off altogether leaves nothing to learn.
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = TEMPLATE
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "chatty").mkdir(exist_ok=True)
        (tmp_path / "chatty" / name).write_bytes((decoder / name).read_bytes())
    tokenizer.save_pretrained(tmp_path / "chatty")
    long = [{"role": "user", "content": "very " * 30}, CHAT[1]]
    chats = write_lines(tmp_path / "chats.jsonl", [{"text": CHAT}] * 9 + [{"text": long}] * 2)
    given = ("--task", "causal-lm", "--eval-data", data, "--max-length", 20, "--epochs", 1, "--r", 4)
    assert train("--model", tmp_path / "chatty", "--data", chats, "--output", tmp_path / "chat", *given) == 0
    shown = capsys.readouterr()
    assert "2 rows left out" in shown.err and "9 rows to train with" in shown.out


def test_early_stopping(encoder: Path, table: Path, tmp_path: Path) -> None:
    code = train(
        "--model",
        encoder,
        "--data",
        table,
        "--output",
        tmp_path / "out",
        "--r",
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
    encoder: Path, decoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("kept")
    one = write_lines(tmp_path / "one.jsonl", [{"text": "good", "label": "a"}] * 20)
    other = write_lines(tmp_path / "other.jsonl", [{"text": "good", "label": "new"}, {"text": "bad", "label": "pos"}])
    empty = write_lines(tmp_path / "empty.jsonl", [{"text": "good", "label": "a"}, {"text": None, "label": "b"}])
    fewer = write_lines(tmp_path / "fewer.jsonl", [{"text": "good", "label": "a"}, {"text": "good"}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good", "label": "a"}\n{"text": \n')
    nothing = tmp_path / "nothing.csv"
    nothing.touch()
    header = tmp_path / "header.csv"
    header.write_text("text,label\n")
    parquet = tmp_path / "bad.parquet"
    parquet.write_bytes(b"not parquet")
    sheet = tmp_path / "rows.xlsx"
    sheet.write_bytes(b"x")
    chats = write_lines(tmp_path / "chats.jsonl", [{"text": [{"role": "user", "content": "good"}]}] * 20)
    letters = write_lines(tmp_path / "letters.jsonl", [{"text": [{"from": "me", "value": "good"}]}] * 20)
    without = tmp_path / "without"
    tiny_model("bert").save_pretrained(without)
    larger = tmp_path / "larger"
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(larger)
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(larger)
    bad = tmp_path / "bad.yaml"
    bad.write_text("modle: x\n")
    worse = tmp_path / "worse.yaml"
    worse.write_text("a: [1\n")
    vera = tmp_path / "vera.yaml"
    vera.write_text("vera: {r: 3}\n")
    out = tmp_path / "never"
    rows = ("--data", table, "--output", out)
    lm = ("--task", "causal-lm", "--output", out)
    for arguments, code, message in (
        (("--data", table, "--output", out), 2, "model is missing"),
        (("--model", encoder, *rows, "--task", "poetry"), 2, "task='poetry' is not allowed"),
        (("--model", encoder, *rows, "--r", 0), 2, "r=0"),
        (("--model", encoder, *rows, "--r", "many"), 2, "--r"),
        (("--model", encoder, *rows, "--d-initial", 0), 2, "d_initial=0.0"),
        (("--model", encoder, *rows, "--epochs", "nan"), 2, "epochs=nan"),
        (("--model", encoder, *rows, "--chat-loss", "mine"), 2, "chat_loss='mine'"),
        (("--config", bad, *rows), 2, "unknown settings ['modle']"),
        (("--config", worse, *rows), 2, "is not YAML"),
        (("--config", tmp_path, *rows), 2, "is a directory"),
        (("--config", vera, "--model", encoder, *rows), 2, "vera has unknown settings ['r']"),
        (("--resume", full), 2, "train.yaml does not exist"),
        (("--resume", full, "--r", 3), 2, "leave out --r"),
        (("--model", encoder, "--data", tmp_path / "no.csv", "--output", out), 2, "is not a file"),
        (("--model", encoder, "--data", tmp_path, "--output", out), 2, "is not a file"),
        (("--model", encoder, "--data", nothing, "--output", out), 1, "nothing.csv is empty"),
        (("--model", encoder, "--data", header, "--output", out), 1, "has no rows"),
        (("--model", encoder, "--data", parquet, "--output", out), 1, "bad.parquet cannot be read"),
        (("--model", encoder, "--data", sheet, "--output", out), 2, "unsupported file type"),
        (("--model", encoder, "--data", broken, "--output", out), 1, "line 2 is not JSON"),
        (
            ("--model", encoder, *rows, "--label-column", "score"),
            2,
            "has no column 'score': it has ['label', 'text']; name one with --label-column",
        ),
        (("--model", encoder, *rows, "--text-column", "body"), 2, "name one with --text-column"),
        (("--model", encoder, *rows, "--task", "regression"), 1, "row 1 has no number in 'label': 'neg'"),
        (("--model", encoder, *rows, "--task", "token-classification"), 1, "a list of as many labels"),
        (("--model", encoder, "--data", one, "--output", out), 1, "all training rows have the same label"),
        (("--model", encoder, *rows, "--eval-data", other), 1, "1 label that no training row has: ['new']"),
        (("--model", encoder, "--data", empty, "--output", out), 1, "row 2 has nothing in the column 'text'"),
        (("--model", encoder, "--data", fewer, "--output", out), 1, "row 2 has nothing in the column 'label'"),
        (("--model", encoder, *rows, "--eval-fraction", 0.001), 1, "another --eval-fraction"),
        (("--model", decoder, "--data", chats, *lm), 1, "row 1 has no message of the role 'assistant'"),
        (("--model", decoder, "--data", letters, *lm), 1, "is from 'me', whose role is unknown"),
        (("--model", encoder, "--data", table, *lm), 1, "not a left-to-right language model"),
        (("--model", encoder, "--data", table, "--output", full), 1, "nothing is overwritten: choose another --output"),
        (("--model", encoder, "--data", table, "--output", full / "precious" / "x"), 1, "cannot be written"),
        (("--model", encoder, *rows, "--target-modules", "quary"), 2, "no module is called 'quary'"),
        (("--model", tmp_path, *rows), 1, "does not contain a model"),
        (("--model", without, *rows), 1, "has no tokenizer that can be read"),
        (("--model", larger, *rows), 1, "the model has only 9 tokens"),
        (("--model", "some/model", *rows), 1, "some/model"),
    ):
        found = train(*arguments)
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if "texts are cut after 32 tokens" not in line]
        assert found == code and len(lines) == 1 and message in lines[0], (arguments, shown.err)
        assert shown.out == "" and not out.exists(), arguments
    assert [path.name for path in full.iterdir()] == ["precious"]


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

    def base_of_two(place: Path) -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(place, num_labels=2)

    model = VeraModel.from_pretrained(base_of_two(encoder), output / "adapter")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["export", str(output / "adapter"), str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "back")]) == 0
    back = VeraModel.from_pretrained(base_of_two(encoder), tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_going_on_with_other_rows_or_a_finished_run(
    encoder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert train("--model", encoder, "--data", table, "--output", output, *COMMON) == 0
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    assert train("--resume", output) == 0
    assert "is finished: its adapter is" in capsys.readouterr().out
    (output / "results.json").unlink()
    settings = (output / "train.yaml").read_text()
    (output / "train.yaml").write_text(settings.replace("weight_decay: 0.0", "weight_decay: 0.1"))
    assert train("--resume", output) == 2
    assert "is not what the run began with: weight_decay was 0.0 and is 0.1" in capsys.readouterr().err
    (output / "train.yaml").write_text(settings)
    table.write_text(table.read_text().replace("pos", "other"), encoding="utf-8")
    assert train("--resume", output) == 1
    assert "the rows are not those that" in capsys.readouterr().err
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_the_same_rows_are_read_from_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = pandas.DataFrame([{"text": text, "label": label} for text, label in sentences()])
    write = {
        "csv": lambda path: rows.to_csv(path, index=False),
        "tsv": lambda path: rows.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda path: rows.to_json(path, orient="records", lines=True),
        "json": lambda path: rows.to_json(path, orient="records"),
        "parquet": rows.to_parquet,
    }
    write[kind](tmp_path / f"rows.{kind}")
    found = [(row["text"], row["label"]) for row in read_rows(str(tmp_path / f"rows.{kind}"))]
    assert found == sentences()


def test_lists_and_numbers_from_parquet(encoder: Path, tmp_path: Path) -> None:
    """Which Arrow and pandas make arrays and their own numbers of."""
    pandas = pytest.importorskip("pandas")
    rows = [
        {
            "text": sentence,
            "words": sentence.split(),
            "tags": ["O", "X", *["O"] * (len(sentence.split()) - 2)],
            "chat": [{"role": "user", "content": sentence}, {"role": "assistant", "content": "good"}],
            "label": name,
            "score": i / 4,
        }
        for i, (sentence, name) in enumerate(sentences())
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    found = read_rows(str(tmp_path / "rows.parquet"))
    assert found == rows and json.loads(json.dumps(found)) == rows
    given = ("--task", "token-classification", "--text-column", "words", "--label-column", "tags", "--max-steps", 1)
    output = tmp_path / "out"
    assert train("--model", encoder, "--data", tmp_path / "rows.parquet", "--output", output, "--r", 4, *given) == 0


def test_rows_are_taken_as_they_are_written(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_rows(str(lines))


@pytest.mark.parametrize("label", ["x", "inf", "nan"])
def test_regression_wants_numbers(
    label: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("text,label\ngood,1\nbad," + label + "\n" * 2, encoding="utf-8")
    assert train("--model", encoder, "--data", table, "--task", "regression", "--output", tmp_path / "out") == 1
    assert "row 2 has no number in 'label'" in capsys.readouterr().err and not (tmp_path / "out").exists()
