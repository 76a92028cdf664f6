"""The command line, as a user or a program calls it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import veratune
from command_line import loaded, run
from tiny_models import main_output, randomise_trainable, tiny_inputs, tiny_model
from veratune import VeraConfig, VeraModel, get_peft_model, supported
from veratune.cli import main

peft = pytest.importorskip("peft")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = get_peft_model(loaded(base), VeraConfig(r=4, target_modules=["query", "value", "dense"]))
    randomise_trainable(model, std=0.3).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model.eval(), "bert")


def test_inspecting_a_model(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", base, "--r", 8)
    assert code == 0
    assert "BertForSequenceClassification" in out and "16x16" in out and "all-linear" in out
    code, out, _ = run(capsys, "inspect", base, "--r", 8, "--json")
    values = json.loads(out)
    expected = get_peft_model(tiny_model("bert"), VeraConfig(r=8, target_modules="all-linear", modules_to_save=[]))
    assert values["trained_parameters"] == expected.get_nb_trainable_parameters()[0]
    layers = expected.vera_layers()
    uses = Counter(("A", layer.in_features) for layer in layers.values())
    uses += Counter(("B", layer.out_features) for layer in layers.values())
    assert {(p["side"], p["width"]): p["layers"] for p in values["projections"]} == uses
    assert values["projection_bytes_float32"] == sum(4 * 8 * width for _, width in uses)
    assert values["adapted_layers"] == len(expected.vera_layers()) == len(values["routes"])
    assert values["parameters"] == sum(p.numel() for p in tiny_model("bert").parameters())
    assert {weight["name"] for weight in values["weights"]} == {info.name for info in supported(tiny_model("bert"))}
    code, out, _ = run(capsys, "inspect", base, "--all")
    assert code == 0 and "bert.encoder.layer.0.attention.self.query.weight" in out


def test_inspecting_an_adapter(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", adapter)
    assert code == 0 and "fingerprint" in out and "attention.self.query (2)" in out
    code, out, _ = run(capsys, "inspect", adapter, "--json", "--plot", tmp_path / "picture.png")
    values = json.loads(out)
    vectors = VeraModel.from_pretrained(tiny_model("bert"), adapter).adapter_state("default").vectors
    layers = {layer["layer"]: layer for layer in values["layers"]}
    assert layers.keys() == vectors.keys()
    for name, (b, d) in ((name, own.values()) for name, own in vectors.items()):
        assert layers[name]["b_norm"] == pytest.approx(float(b.detach().norm()), rel=1e-5)
        assert layers[name]["d_mean"] == pytest.approx(float(d.detach().mean()), rel=1e-4)
    assert values["config"]["r"] == 4
    assert values["base_model"].endswith("base") and values["base"]["class"] == "BertForSequenceClassification"
    for same in (adapter / "adapter_model.safetensors", adapter.parent):  # the file, and a training run's output
        assert json.loads(run(capsys, "inspect", same, "--json")[1])["layers"] == values["layers"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_merging_gives_a_plain_model_with_the_same_outputs(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = logits(VeraModel.from_pretrained(loaded(base), adapter))
    code, _, _ = run(capsys, "merge", adapter, tmp_path / "merged")  # the adapter knows its base model
    assert code == 0
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(loaded(base)))


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("to", ["peft", "lora"])
def test_exporting_and_converting_back(
    to: str, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = logits(VeraModel.from_pretrained(loaded(base), adapter))
    assert run(capsys, "export", adapter, tmp_path / to, "--format", to, "--model", base)[0] == 0
    theirs = peft.PeftModel.from_pretrained(loaded(base), tmp_path / to)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    if to == "peft":
        assert run(capsys, "convert", tmp_path / to, tmp_path / "back", "--model", base)[0] == 0
        again = VeraModel.from_pretrained(loaded(base), tmp_path / "back")
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    else:
        code, _, err = run(capsys, "convert", tmp_path / to, tmp_path / "back", "--model", base)
        assert code == 1 and "'LORA'" in err and not (tmp_path / "back").exists()


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_inspecting_and_converting_what_peft_wrote(
    task: str | None, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"r": 4, "target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "task_type": task}
    model = peft.get_peft_model(loaded(base), peft.VeraConfig(**settings))
    randomise_trainable(model, std=0.3).save_pretrained(tmp_path / "theirs")
    code, out, _ = run(capsys, "inspect", tmp_path / "theirs", "--json", "--plot", tmp_path / "picture.png")
    values = json.loads(out)
    assert code == 0 and values["kind"] == "peft"
    layers = {layer["layer"]: layer for layer in values["layers"]}
    expected = VeraModel.from_pretrained(loaded(base), tmp_path / "theirs")
    state = expected.adapter_state("default")
    assert layers.keys() == state.vectors.keys()
    for name, (b, d) in ((name, own.values()) for name, own in state.vectors.items()):
        assert layers[name]["b_norm"] == pytest.approx(float(b.detach().norm()), rel=1e-5)
        assert layers[name]["d_mean"] == pytest.approx(float(d.detach().mean()), rel=1e-4)
    assert values["other_parameters"] == sum(p.numel() for p in state.saved["classifier"].values())
    assert values["config"]["r"] == 4 and values["base_model"].endswith("base")
    assert values["projections"] == {"A": [4, 24], "B": [24, 4]} and values["fingerprint"] is None
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "inspect", tmp_path / "theirs")
    assert code == 0 and "attention.self.query (2)" in out and "projections in the file" in out
    assert "convert reads" not in out and "veratune convert writes it" in out
    assert run(capsys, "convert", tmp_path / "theirs", tmp_path / "ours")[0] == 0  # the file names its base model
    code, out, _ = run(capsys, "inspect", tmp_path / "ours", "--json")
    assert json.loads(out)["kind"] == "veratune" and json.loads(out)["layers"] == values["layers"]
    again = VeraModel.from_pretrained(loaded(base), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    code, _, err = run(capsys, "convert", tmp_path / "ours", tmp_path / "again")
    assert code == 1 and "already in veratune's format" in err


def test_inspecting_a_lora(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = VeraModel.from_pretrained(tiny_model("bert"), adapter)
    model.export_lora(tmp_path / "lora")
    code, out, _ = run(capsys, "inspect", tmp_path / "lora")
    assert code == 0 and "a LoRA adapter, which veratune cannot read as VeRA" in out and "convert" not in out
    assert "attention.self.query (2)" in out and "of rank 4" in out
    values = json.loads(run(capsys, "inspect", tmp_path / "lora", "--json")[1])
    assert values["kind"] == "lora" and values["config"]["lora_alpha"] == 4
    layers = {layer["layer"]: layer for layer in values["layers"]}
    vera = model.vera_layers()
    assert layers.keys() == vera.keys()
    assert values["matrix_parameters"] == sum(4 * (x.in_features + x.out_features) for x in vera.values())
    for name, layer in vera.items():
        b, d = (vector.detach() for vector in layer.vectors("default").values())
        a_projection = layer.entries["default"].a.values(torch.device("cpu"), torch.float32)
        assert layers[name]["shapes"] == {"lora_A": [4, layer.in_features], "lora_B": [layer.out_features, 4]}
        assert layers[name]["a_norm"] == pytest.approx(float((d[:, None] * a_projection).norm()), rel=1e-4)
        assert layers[name]["b_norm"] > 0 and b.norm() > 0
    code, _, err = run(capsys, "inspect", tmp_path / "lora", "--plot", tmp_path / "p.png")
    assert code == 1 and "is a LoRA adapter" in err and not (tmp_path / "p.png").exists()
    peft.get_peft_model(
        tiny_model("bert"), peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "ia3")
    code, _, err = run(capsys, "inspect", tmp_path / "ia3")
    assert code == 1 and "type 'IA3'" in err


@pytest.fixture
def language_adapter(tmp_path: Path) -> Path:
    """An adapter of rank 24 on a tiny Llama, of which 16 terms are zero in each layer."""
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    model = randomise_trainable(get_peft_model(base, VeraConfig(r=24, target_modules=["q_proj", "down_proj"])), std=0.3)
    with torch.no_grad():
        for layer in model.vera_layers().values():
            layer.vectors("default")["d"][8:] = 0
    model.save_pretrained(tmp_path / "language-adapter")
    return tmp_path / "language-adapter"


def test_exporting_for_llama_cpp(language_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    assert run(capsys, "export", language_adapter, tmp_path / "gguf", "--format", "gguf")[0] == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    file = VeraModel.from_pretrained(base, language_adapter).export_gguf(tmp_path / "by hand")
    assert (tmp_path / "gguf" / "adapter_model.gguf").read_bytes() == file.read_bytes()
    assert len(gguf.GGUFReader(file).tensors) == 2 * 2 * 2


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_exporting_for_vllm(language_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def llama() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()

    common = ("export", language_adapter, tmp_path / "lora", "--format", "lora")
    code, _, err = run(capsys, *common, "--r", 7)
    assert code == 1 and "rank=7 cannot hold" in err and not (tmp_path / "lora").exists()
    code, out, _ = run(capsys, *common, "--engine", "vllm", "--r", 8)
    assert code == 0 and "--max-lora-rank 8" in out
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert theirs.peft_config["default"].r == 8
    with torch.no_grad():
        expected = main_output(VeraModel.from_pretrained(llama(), language_adapter), "llama")
        torch.testing.assert_close(main_output(theirs.eval(), "llama"), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(main_output(llama(), "llama"), expected, atol=1e-2)
    code, out, _ = run(capsys, "export", language_adapter, tmp_path / "own", "--format", "lora", "--engine", "vllm")
    assert code == 0 and "--max-lora-rank 32" in out
    for wrong in (("--r", 8), ("--engine", "vllm")):
        code, _, err = run(capsys, "export", language_adapter, tmp_path / "x", "--format", "gguf", *wrong)
        assert code == 2 and "are for --format lora" in err


def test_comparing(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "diff", adapter, adapter)[:2] == (0, "the adapters are equal\n")
    model = VeraModel.from_pretrained(loaded(base), adapter)
    name = next(iter(model.vera_layers()))
    b = model.adapter_state("default").vectors[name]["b"]
    with torch.no_grad():
        moved = float((b * 0.5).norm() / b.norm())
        b.mul_(0.5)
    model.save_pretrained(tmp_path / "other")
    code, out, _ = run(capsys, "diff", adapter, tmp_path / "other", "--json")
    values = json.loads(out)
    assert code == 1 and values["different"] is True
    assert values["layers"][name] == {"b": pytest.approx(moved, rel=1e-5), "d": 0.0}
    assert all(pair == {"b": 0.0, "d": 0.0} for other, pair in values["layers"].items() if other != name)
    assert values["in_full"] == [] and values["only"] == {"first": [], "second": []}
    code, out, _ = run(capsys, "diff", adapter, tmp_path / "other")
    assert code == 1 and name in out and "0.5" in out


def test_vectors_for_other_projections_are_not_compared(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"bert.encoder.layer.{i}.attention.self.{x}" for i in range(2) for x in ("query", "key", "value")]
    for directory, targets in (("first", names), ("second", [*names[:3], *names[4:], "dense"])):
        config = VeraConfig(r=4, target_modules=targets, projection_prng_key=len(directory))
        get_peft_model(loaded(base), config).save_pretrained(tmp_path / directory)
    code, out, _ = run(capsys, "diff", tmp_path / "first", tmp_path / "second")
    assert code == 1 and "cannot be compared" in out and "b apart" not in out
    assert f"6, of which only here: {names[3]}" in out and "6, of which only here: dense" in out
    assert f"only the first adapts 1 layers: {names[3]}" in out
    assert max(map(len, out.splitlines())) < 300
    code, out, _ = run(capsys, "diff", tmp_path / "first", tmp_path / "second", "--json")
    assert json.loads(out)["same_projections"] is False


def test_the_output_of_a_training_run_stands_for_its_adapter(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tmp_path` has the adapter in its folder "adapter", as a run's output does."""
    assert run(capsys, "diff", tmp_path, adapter)[0] == 0
    assert run(capsys, "merge", tmp_path, tmp_path / "merged")[0] == 0
    assert run(capsys, "export", tmp_path, tmp_path / "for-peft", "--format", "peft")[0] == 0
    expected = logits(VeraModel.from_pretrained(loaded(base), adapter))
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)
    for command in ("merge", "convert", "diff"):
        code, _, err = run(capsys, command, base, tmp_path / "x")
        assert code == 1 and "has no adapter" in err and "It has a full model (model.safetensors)" in err


def test_errors_are_one_line_and_nothing_is_overwritten(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("kept")
    for arguments, code, message in (
        (("merge", adapter, full), 1, "nothing is overwritten"),
        (("merge", adapter, full / "precious" / "x"), 1, "cannot be written (Not a directory)"),
        (("inspect", tmp_path / "nowhere"), 1, "is not a directory"),
        (("inspect", full), 1, "does not contain a model"),
        (("export", adapter, tmp_path / "x", "--format", "lora", "--dtype", "int8"), 2, "--dtype int8"),
        (("inspect", base, "--plot", tmp_path / "p.png"), 1, "is not an adapter"),
        (("export", adapter, tmp_path / "x"), 2, "--format"),
        (("frobnicate",), 2, "frobnicate"),
        (("inspect",), 2, "see veratune inspect --help"),
        (("inspect", base, "--r", "many"), 2, "'--r' / '-r': it must be a whole number; see"),
        (("export", adapter, tmp_path / "x", "--format", "foo"), 2, "'--format': 'foo' is not one of 'peft', 'lora', "),
        (("bench", base, "--r", 0), 2, "'--r' / '-r'"),
        (("bench", base, "--dtype", "int8"), 2, "--dtype int8"),
        (("bench", base, "--device", "toaster"), 2, "--device toaster"),
        (("bench", base, "--device", "meta"), 2, "--device meta cannot compute here"),
        (("bench", base, "--length", 1000), 1, "32 positions"),
    ):
        found, out, err = run(capsys, *arguments)
        assert (found, out) == (code, ""), arguments
        lines = [line for line in err.splitlines() if "warning" not in line]
        assert len(lines) == 1 and lines[0].startswith("veratune: ") and message in lines[0], err
    assert [path.name for path in full.iterdir()] == ["precious"]
    for arguments in (["--traceback", "inspect", "no/where/at/all"], ["inspect", "no/where/at/all", "--traceback"]):
        with pytest.raises(FileNotFoundError):
            main(arguments)


def test_a_fault_of_ours_is_named_with_its_kind(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from veratune.cli import inspecting

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing\nat all")

    monkeypatch.setattr(inspecting, "load_model", broken)
    code, _, err = run(capsys, "inspect", base)
    assert (
        code == 1 and err == "veratune: ZeroDivisionError: by nothing (veratune --traceback shows where it came from)\n"
    )


@pytest.mark.filterwarnings("default::UserWarning")
def test_warnings_are_one_line(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where an adapter's two copies of its configuration are not the same."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"d_initial": 0.5}))
    code, _, err = run(capsys, "merge", adapter, tmp_path / "merged", "--model", base)
    assert code == 0 and err.startswith("veratune: warning: ") and err.count("\n") == 1 and "d_initial" in err


def test_damaged_adapters_and_those_of_other_models(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "other")
    code, _, err = run(capsys, "merge", adapter, tmp_path / "merged", "--model", tmp_path / "other")
    assert code == 1 and err.count("\n") == 1 and err.startswith("veratune: ")
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    for arguments in (("inspect", adapter), ("diff", adapter, adapter), ("merge", adapter, tmp_path / "merged")):
        code, _, err = run(capsys, *arguments)
        assert code == 1 and err.count("\n") == 1 and "adapter_model.safetensors" in err, err
    assert not (tmp_path / "merged").exists()


def test_what_reads_the_output_may_go_away(base: Path) -> None:
    command = [sys.executable, "-m", "veratune", "inspect", str(base), "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.parametrize(
    "command", ["train", "predict", "chat", "inspect", "merge", "export", "convert", "diff", "bench", "doctor"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and out.startswith(f"Usage: veratune {command} ") and "─" not in out
    if command != "doctor":
        assert f"\n  veratune {command} " in out.partition("Example")[2]
    assert f"\n  {command} " in run(capsys, "--help")[1]


def test_doctor_and_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from veratune.cli import doctor

    values = json.loads(run(capsys, "doctor", "--json")[1])
    assert values["packages"]["torch"] == torch.__version__ and "cpu" in values["devices"]
    assert values["missing"] == []
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else "1.0")
    values = json.loads(run(capsys, "doctor", "--json")[1])
    assert [lack["package"] for lack in values["missing"]] == ["peft"]
    shown = run(capsys, "doctor")[1]
    assert "peft is missing, for veratune.integrations.peft" in shown and shown.count("missing") == 1
    code, out, _ = run(capsys)
    assert code == 2 and out == run(capsys, "--help")[1] != ""
    assert run(capsys, "--version") == (0, f"{veratune.__version__}\n", "")


def test_the_program_itself(adapter: Path) -> None:
    """Output that no terminal reads has no colours and frames."""
    result = subprocess.run(
        [sys.executable, "-m", "veratune", "inspect", str(adapter)], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in result.stdout and "─" not in result.stdout
    assert tiny_inputs("bert")  # the same tiny model as everywhere


def test_packages_do_not_write_between_the_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    """DeepSpeed, which transformers imports to save a model, logs to the standard output."""
    result = subprocess.run(
        [sys.executable, "-m", "veratune", "merge", str(adapter), str(tmp_path / "merged")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"{tmp_path / 'merged'}: {base} with {adapter} merged in\n"
