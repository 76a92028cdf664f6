"""A checkpoint format is one class and one line in `FORMATS`: a toy is written, loaded, listed, converted as ours."""

import json
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from command_line import run
from small_net import TwoLayers, all_adapted
from tiny_models import tiny_model
from veratune import AdapterBank, CheckpointError, VeraConfig, VeraModel
from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.plan import make_scheme
from veratune.bank.bank_config import config_for_adapters
from veratune.checkpoint.base import AdapterContents, AdapterFiles, Format
from veratune.checkpoint.files import read_json, write_json
from veratune.checkpoint.formats import FORMATS, format_of
from veratune.checkpoint.validate import LoadedAdapter, ReadyAdapter, make_ready, targets_of

VECTORS = "vectors.json"
X = torch.linspace(-1, 1, 5 * 12).view(5, 12)


class Listed(Format):
    """A format with no more than it must have."""

    name = "toy"
    weights_name = VECTORS

    def detect(self, files: AdapterFiles) -> bool:
        return "layers" in read_json(files.directory / VECTORS)

    def contents(self, files: AdapterFiles) -> AdapterContents:
        path = files.directory / VECTORS
        values = read_json(path)
        vectors = {
            name: {which: torch.tensor(numbers) for which, numbers in pair.items()}
            for name, pair in values["layers"].items()
        }
        return AdapterContents(path, self.name, values["config"], vectors)


class Toy(Listed):
    """One JSON file: the configuration, and lists of numbers."""

    about = "numbers that one can read"

    def read(self, modules: Mapping[str, nn.Module], files: AdapterFiles) -> ReadyAdapter:
        contents = self.contents(files)
        config = VeraConfig.from_dict(contents.config)
        loaded = LoadedAdapter(contents.vectors, origin=str(contents.path), config=config)
        targets = targets_of(modules, loaded)
        return make_ready(modules, loaded, targets, make_scheme(config, targets))

    def write(self, host: AdaptedModel, adapter_name: str, directory: Path) -> None:
        state = host.adapter_state(adapter_name)
        if state.saved or state.biases:
            raise ValueError(f"a toy holds vectors alone, and adapter {adapter_name!r} trains more")
        layers = {name: {which: v.tolist() for which, v in own.items()} for name, own in state.vectors.items()}
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / VECTORS, {"config": host.peft_config[adapter_name].to_dict(), "layers": layers})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy", Toy())


def adapted(make: Callable[[], nn.Module] = TwoLayers, **settings: Any) -> VeraModel:
    return all_adapted(make(), r=4, modules_to_save=[], **settings).eval()


@pytest.mark.usefixtures("registered")
def test_it_is_written_loaded_restored_and_kept_in_a_bank(tmp_path: Path) -> None:
    model = adapted()
    expected = model(X).detach()
    model.export("toy", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [VECTORS] and format_of(tmp_path).name == "toy"

    loaded = VeraModel.from_pretrained(TwoLayers(), tmp_path).eval()
    assert torch.equal(loaded(X), expected)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(loaded(X), expected)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert not torch.equal(model(X), expected)
    model.restore(tmp_path)
    assert torch.equal(model(X), expected)

    bank = AdapterBank(TwoLayers(), config_for_adapters(TwoLayers(), {"a": tmp_path}), capacity=2)
    bank.load("a", tmp_path)
    with torch.no_grad():
        mixed = bank.model(X, adapters=["a"] * 4 + [None])
    torch.testing.assert_close(mixed[:4], expected[:4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[4], TwoLayers()(X)[4])


@pytest.mark.usefixtures("registered")
def test_its_adapters_are_checked_as_others_are(tmp_path: Path) -> None:
    FORMATS["toy"].write(adapted(), "default", tmp_path)
    values = read_json(tmp_path / VECTORS)
    model = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(CheckpointError, match=r"vectors\.json adapts 2 layers that this Sequential does not have"):
        VeraModel.from_pretrained(model, tmp_path)
    assert type(model[0]) is nn.Linear
    values["layers"]["first"]["b"].append(1.0)
    write_json(tmp_path / VECTORS, values)
    with pytest.raises(CheckpointError, match=r"vectors\.json: b of first has shape \(9,\)"):
        VeraModel.from_pretrained(TwoLayers(), tmp_path)
    with pytest.raises(ValueError, match="a toy holds vectors alone"):
        FORMATS["toy"].write(adapted(bias="all"), "default", tmp_path / "other")
    model = adapted()
    with pytest.raises(ValueError, match=r"unknown format 'toys': choose one of .*'toy'"):
        model.export("toys", tmp_path / "other")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.warns(UserWarning, match="adapter 'default' contains NaN or infinity"):
        model.export("toy", tmp_path / "other")
    (tmp_path / VECTORS).write_text("{}")
    with pytest.raises(CheckpointError, match="not in one of the formats"):
        VeraModel.from_pretrained(TwoLayers(), tmp_path)


@pytest.mark.usefixtures("registered")
def test_the_command_line_inspects_exports_and_converts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, ours, toy = tmp_path / "base", tmp_path / "ours", tmp_path / "toy"
    tiny_model("bert").save_pretrained(base)
    model = adapted(lambda: tiny_model("bert"), base_model_name_or_path=str(base))
    model.save_pretrained(ours)
    assert run(capsys, "export", ours, toy, "--format", "toy")[0] == 0
    assert [path.name for path in toy.iterdir()] == [VECTORS]

    code, out, _ = run(capsys, "inspect", toy / VECTORS)
    assert code == 0 and "numbers that one can read" in out and "attention.self.query" in out
    values = json.loads(run(capsys, "inspect", toy, "--json")[1])
    assert values["kind"] == "toy" and values["bytes"] == (toy / VECTORS).stat().st_size
    native = json.loads(run(capsys, "inspect", ours, "--json")[1])["layers"]
    assert sorted(values["layers"], key=itemgetter("layer")) == sorted(native, key=itemgetter("layer"))

    assert run(capsys, "convert", toy, tmp_path / "back")[0] == 0  # the file names its base model
    code, out, _ = run(capsys, "diff", ours, tmp_path / "back")
    assert code == 0 and "the adapters are equal" in out


def test_a_format_that_is_only_listed_refuses_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Toy().write(adapted(), "default", tmp_path)
    monkeypatch.setitem(FORMATS, "toy", Listed())
    assert json.loads(run(capsys, "inspect", tmp_path, "--json")[1])["vector_parameters"] == 8 + 6 + 2 * 4
    model = TwoLayers()
    with pytest.raises(CheckpointError, match=r"vectors\.json is in the format 'toy', which veratune can inspect but"):
        VeraModel.from_pretrained(model, tmp_path)
    assert type(model.first) is nn.Linear
    with pytest.raises(ValueError, match=r"cannot be written in the format 'toy'.*use save_pretrained"):
        FORMATS["toy"].write(adapted(), "default", tmp_path / "again")
    code, _, err = run(capsys, "export", tmp_path, tmp_path / "again", "--format", "toy")
    assert code == 2 and "'toy'" in err and not (tmp_path / "again").exists()


@pytest.mark.usefixtures("registered")
def test_the_hub_is_asked_for_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = adapted(), {}
    FORMATS["toy"].write(model, "default", tmp_path)

    def snapshot_download(name: str, **settings: Any) -> str:
        asked.update(settings)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = VeraModel.from_pretrained(TwoLayers(), "owner/name").eval()
    assert VECTORS in asked["allow_patterns"] and torch.equal(loaded(X), model(X))


def test_without_the_line_its_files_are_no_adapter(tmp_path: Path) -> None:
    Toy().write(adapted(), "default", tmp_path)
    with pytest.raises(CheckpointError, match="has no adapter"):
        VeraModel.from_pretrained(TwoLayers(), tmp_path)
