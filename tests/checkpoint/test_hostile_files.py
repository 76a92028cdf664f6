"""Files that were made to do harm: what is no file, sizes without end, patterns that never end."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from mutations import CONFIG, INPUT, KINDS, SETTINGS, WEIGHTS, make_files, net, randomised, state_of
from small_net import small_adapted, small_net
from veratune import AdapterBank, CheckpointError, VeraConfig, VeraModel, get_peft_model
from veratune.adapters.target import TargetError
from veratune.checkpoint.formats import read_contents
from veratune.integrations.peft import install
from veratune.utils.atomic import temporary_beside, write_atomically

ENDLESS = r"(\w+\.?)+!"


def no_file(path: Path, how: str) -> None:
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "directory":
        path.mkdir()
    elif how == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(os.path.relpath(path))
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)


@pytest.mark.skipif(os.name != "posix", reason="there are no such files elsewhere")
@pytest.mark.parametrize("how", ["pipe", "device", "directory", "socket", "sparse"])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("kind", ["native", "peft"])
def test_what_is_no_file_is_refused_at_once(kind: str, name: str, how: str, tmp_path: Path) -> None:
    make_files(kind, tmp_path)
    no_file(tmp_path / name, how)
    model = net()
    before = state_of(model)
    with pytest.raises(CheckpointError, match=name):
        VeraModel.from_pretrained(model, tmp_path)
    assert state_of(model) == before
    if name == WEIGHTS or kind != "native":
        with pytest.raises(CheckpointError):
            read_contents(tmp_path)


def test_a_large_file_is_refused_by_its_header(tmp_path: Path) -> None:
    """A terabyte that is really described is not read before it is compared with the model."""
    shape = [1 << 38]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 << 38]}
    make_files("peft", tmp_path)
    text = json.dumps({"base_model.model.layers.0.up.vera_lambda_d": entry}).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (4 << 38))
    with pytest.raises(CheckpointError, match="the file has no projections"):
        VeraModel.from_pretrained(net(), tmp_path)
    with pytest.raises(CheckpointError, match="more than this machine's memory"):
        read_contents(tmp_path)


def set_fields(directory: Path, values: dict[str, Any]) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


HOSTILE = {
    "target": {"target_modules": ENDLESS},
    "excluded": {"exclude_modules": ENDLESS},
    "stack": {"layers_pattern": [ENDLESS], "layers_to_transform": [0, 1]},
    "saved": {"modules_to_save": ["head", ENDLESS]},
    "ranks": {"rank_pattern": {ENDLESS: 4}},
}


class LongNames(torch.nn.Module):
    """The net with a part whose name makes a backtracking match endless."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.add_module("a" * 60, torch.nn.Linear(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("kind", ["native", "peft"])
def test_patterns_in_files_are_not_run(kind: str, how: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "target_modules": ["up", "down"]}
    if kind == "peft":
        model = randomised(get_peft_model(LongNames(), VeraConfig(**settings, projection="peft")))
        model.export_peft(tmp_path)
        set_fields(tmp_path, {k: v for k, v in HOSTILE[how].items() if k != "rank_pattern"})
    else:
        model = randomised(get_peft_model(LongNames(), VeraConfig(**settings)))
        if how != "saved":
            for name, value in HOSTILE[how].items():
                setattr(model.peft_config["default"], name, value)
        model.save_pretrained(tmp_path)
    loaded = VeraModel.from_pretrained(LongNames(), tmp_path)
    assert len(loaded.vera_layers()) == 4
    bank = AdapterBank(LongNames(), VeraConfig(**settings), capacity=1)
    bank.load("one", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(bank.model(INPUT, adapters=["one"] * 4), loaded(INPUT))
    if kind == "native" and how != "ranks":
        install()
        through = peft.PeftModel.from_pretrained(LongNames(), tmp_path)
        assert torch.equal(through(INPUT), loaded(INPUT))


def test_patterns_of_users_are_bounded() -> None:
    with pytest.raises(TargetError, match="matches no module"):
        get_peft_model(LongNames(), VeraConfig(target_modules=ENDLESS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_out_of_proportion_is_refused_before_anything_is_drawn(kind: str, tmp_path: Path) -> None:
    from mutations import NoLargeTensors, mutated, rank

    for seed in range(3):
        mutated(kind, rank, seed, tmp_path / "files")
        with NoLargeTensors(), pytest.raises(CheckpointError):
            VeraModel.from_pretrained(net(), tmp_path / "files")
    with pytest.raises(TargetError, match="rank 4097 is not allowed"):
        get_peft_model(net(), VeraConfig(r=4097, target_modules=["up"]))


@pytest.mark.parametrize("value", [1e39, -1e39, 1e-39, float("nan"), 10**400, True, "0.1", None, 0.0])
def test_numbers_that_float32_does_not_hold_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="d_initial"):
        VeraConfig(d_initial=value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_told_of(bad: float, tmp_path: Path) -> None:
    model = randomised(get_peft_model(net(), VeraConfig(**SETTINGS)))
    with torch.no_grad():
        model.adapter_state("default").vectors["layers.0.up"]["b"][0] = bad
    with pytest.warns(UserWarning, match="NaN or infinity because training diverged"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"NaN or infinity \(vector b of layers\.0\.up\)"):
        VeraModel.from_pretrained(net(), tmp_path)
    with pytest.warns(UserWarning, match="NaN or infinity, and so will"):
        model.export_lora(tmp_path / "lora")
    with pytest.warns(UserWarning, match="NaN or infinity, and so will"):
        model.merge_adapter()


def test_messages_are_cut_and_have_no_control_characters(tmp_path: Path) -> None:
    make_files("peft", tmp_path)
    set_fields(tmp_path, {"task_type": "\u001b[31m" + "x" * 100_000})
    with pytest.raises(CheckpointError) as caught:
        VeraModel.from_pretrained(net(), tmp_path)
    assert len(str(caught.value)) < 4000 and "\x1b" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # pytest-xdist has a thread
def test_the_next_save_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    ours = temporary_beside(path)
    process = os.fork()
    if process == 0:
        temporary_beside(path).write_bytes(b"unfinished")
        os._exit(0)
    os.waitpid(process, 0)
    (abandoned,) = tmp_path.iterdir()
    kept = [ours, abandoned.with_name(f".other{abandoned.name[5:]}"), tmp_path / ".file.1-aa.tmp", tmp_path / "x.tmp"]
    for other in kept:
        other.write_bytes(b"kept")
    write_atomically(path, b"new")
    assert {p.name for p in tmp_path.iterdir()} == {"file", *(p.name for p in kept)}


@pytest.mark.parametrize(
    "text", ['{"r": ' + "9" * 5000 + "}", "[" * 100000, '{"format_version": 1, "sha256": ' + "9" * 5000 + "}"]
)
def test_absurd_json_is_a_checkpoint_error(text, tmp_path):
    small_adapted().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="JSON"):
        VeraModel.from_pretrained(small_net(), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {"veratune": text})
    with pytest.raises(CheckpointError, match="damaged"):
        VeraModel.from_pretrained(small_net(), tmp_path)


ODD_PLACES: list[tuple[Any, dict[str, Any]]] = [
    *(("a/b", {"revision": value}) for value in (5, "", "../x", "a/../b", "\0", "\x1b[31m", "r" * 5000, b"main")),
    *(("a/b", {"subfolder": value}) for value in (5, "\0", "*", "a[b]", "../x", "/x", "a:b")),
    *((value, {}) for value in ("", "a\0b", "a\nb/c", "\x1b[31m/x", "x" * 5000, 5, None, b"a/b")),
    *((value, {}) for value in ("some/../id", "../../nowhere", "a/b/c", "-a/b", "a--b/c", "http://x/y", "~/nowhere")),
]


@pytest.mark.parametrize(("place", "options"), ODD_PLACES)
def test_odd_places_are_refused_before_the_hub_is_asked(
    place: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", asked)
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", asked)
    with pytest.raises((TypeError, ValueError)) as caught:
        VeraModel.from_pretrained(net(), place, **options)
    message = str(caught.value)
    assert len(message) < 1000 and "\x1b" not in message and "\0" not in message
    assert "hub gave no such repository" not in message
