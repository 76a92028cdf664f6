"""`veratune bank`, as a user or a program calls it, and what it is made of."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from command_line import loaded, run
from tiny_models import randomise_trainable, tiny_inputs
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.bank import AdapterBank, BankError
from veratune.bank.store import BankStore

_ADAPTERS = {
    "anna": VeraConfig(r=4, target_modules=["query", "value"], projection_prng_key=3),
    "bert": VeraConfig(r=6, target_modules=["dense"], modules_to_save=[]),
    "carl": VeraConfig(r=2, target_modules=["key"], projection="peft"),
}


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> dict[str, Path]:
    for seed, (name, config) in enumerate(_ADAPTERS.items()):
        model = get_peft_model(loaded(base), config)
        randomise_trainable(model, seed=seed, std=0.3).save_pretrained(tmp_path / "adapters" / name)
    return {name: tmp_path / "adapters" / name for name in _ADAPTERS}


def alone(base: Path, adapter: Path | None) -> torch.Tensor:
    model = loaded(base) if adapter is None else VeraModel.from_pretrained(loaded(base), adapter)
    with torch.no_grad():
        return model(**tiny_inputs("bert")).logits


def assert_serves(base: Path, file: Path, expected: dict[str, Path], **tolerance: float) -> None:
    bank = AdapterBank.open(loaded(base), file)
    assert bank.names() == list(expected)
    for name, adapter in expected.items():
        with torch.no_grad():
            found = bank.model(**tiny_inputs("bert"), adapters=[name, None]).logits
        torch.testing.assert_close(found[0], alone(base, adapter)[0], **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))
        torch.testing.assert_close(found[1], alone(base, None)[1], rtol=1e-4, atol=1e-5)
    bank.unload()


def test_building_adding_listing_removing(
    base: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "customers.bank"
    assert run(capsys, "bank", "build", file, *adapters.values(), "--model", base)[0] == 0
    # Not a directory's name: the layers of all, the largest rank, the module that two of them train in full.
    values = json.loads(run(capsys, "bank", "list", file, "--json")[1])
    model = loaded(base)
    kinds = ("query", "key", "value", "dense")
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(kinds)]
    assert sorted(values["layers"]) == sorted(linear)
    assert (values["rank"], values["dtype"], values["modules_to_save"]) == (6, "float32", ["classifier"])
    assert {a["name"]: (a["rank"], a["scheme"], a["key"]) for a in values["adapters"]} == {
        "anna": (4, "per_dimension", 3),
        "bert": (6, "per_dimension", 0),
        "carl": (2, "peft", 0),
    }
    for entry in values["adapters"]:
        saved = json.loads((adapters[entry["name"]] / "adapter_config.json").read_text())
        assert entry["fingerprint"] == saved["fingerprint"]
    assert values["bytes"] == file.stat().st_size
    assert_serves(base, file, adapters)

    shutil.copytree(adapters["anna"], tmp_path / "dora" / "adapter")  # as a training run leaves it
    assert run(capsys, "bank", "add", file, tmp_path / "dora")[0] == 0
    assert run(capsys, "bank", "add", file, f"carl={adapters['bert']}", "--replace")[0] == 0
    assert run(capsys, "bank", "remove", file, "anna")[1] == f"{file}: anna removed\n"
    expected = {"bert": adapters["bert"], "carl": adapters["bert"], "dora": adapters["anna"]}
    assert_serves(base, file, expected)
    code, out, _ = run(capsys, "bank", "list", file)
    digests = {line.split()[0]: line.split()[1] for line in out.splitlines()[3:]}
    assert code == 0 and digests == BankStore(file).names
    assert digests["bert"] == digests["carl"] != digests["dora"]
    assert "3 adapters, 13 layers, rank 6" in out


def test_a_layout_that_is_given(
    base: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "given.bank"
    arguments = ("bank", "build", file, f"a={adapters['anna']}", "--dtype", "bfloat16", "--r", 16)
    assert run(capsys, *arguments, "--target-modules", "query, value")[0] == 0
    again = [tmp_path / "repeated" if x == file else x for x in arguments]
    assert run(capsys, *again, "--target-modules", "query", "--target-modules", "value")[0] == 0
    assert BankStore(tmp_path / "repeated").header.layout == BankStore(file).header.layout
    header = BankStore(file).header
    assert header.layout["rank"] == 16 and len(header.layout["layers"]) == 4 and header.dtype == torch.bfloat16
    assert_serves(base, file, {"a": adapters["anna"]}, rtol=5e-2, atol=5e-2)
    code, _, err = run(capsys, "bank", "add", file, adapters["bert"])
    assert code == 1 and "which is not one of the 4 layers of this bank" in err
    assert list(BankStore(file).names) == ["a"]
    assert (
        run(capsys, *(tmp_path / "all" if x == file else x for x in arguments), "--target-modules", "all-linear")[0]
        == 0
    )
    assert len(BankStore(tmp_path / "all").header.layout["layers"]) == 13


def test_nothing_is_written_where_one_does_not_fit(
    base: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biases = get_peft_model(loaded(base), VeraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=[]))
    biases.save_pretrained(tmp_path / "biases")
    embedding = get_peft_model(loaded(base), VeraConfig(r=2, target_modules=["word_embeddings"], modules_to_save=[]))
    embedding.save_pretrained(tmp_path / "embedding")
    (tmp_path / "elsewhere" / "anna").mkdir(parents=True)
    biases.save_pretrained(tmp_path / "run" / "adapter")
    file, anna = tmp_path / "bank", adapters["anna"]
    for arguments, message in (
        ((anna, tmp_path / "biases"), "trains biases"),
        ((anna, tmp_path / "embedding"), "word_embeddings is adapted, but it is a Embedding"),
        ((anna, tmp_path / "nowhere"), "is not a directory of an adapter"),
        ((anna, f"x={tmp_path / 'nowhere'}"), "is not a directory of an adapter"),
        ((anna, tmp_path / "elsewhere" / "anna"), "are both named 'anna'"),
        ((anna, f"={anna}"), "name='' is not allowed"),
        ((anna, "--r", 2), "has rank 4"),
        ((anna, "--target-modules", "query"), "is not one of the 2 layers"),
        ((anna, "--dtype", "int8"), "dtype=torch.int8 is not allowed"),
        ((tmp_path / "elsewhere",), "elsewhere has no adapter"),
        ((tmp_path / "run",), "adapter 'run' ("),
    ):
        code, out, err = run(capsys, "bank", "build", file, *arguments)
        # transformers shows how far it is where other tests have made its progress bars visible.
        lines = [line for line in err.splitlines() if line.strip() and "Loading weights" not in line]
        assert (code, out) == (1, "") and message in err and len(lines) == 1, arguments
        assert not file.exists() and not list(tmp_path.glob(".bank*")), arguments
    assert run(capsys, "bank", "build", file, anna, adapters["bert"])[0] == 0
    before = file.read_bytes()
    for arguments, message in (
        (("build", file, anna), "already exists"),
        (("add", file, anna), "'anna' is already in"),
        (("add", file, f"x={anna}", "--replace"), "there is no adapter 'x'"),
        (("add", file, f"x={anna}", f"={anna}"), "name='' is not allowed"),
        (("add", file, f"x={anna}", f"y={adapters['carl']}"), "which is not one of the"),
        (("remove", file, "anna", "x"), "there is no adapter 'x'"),
        (("list", base), "is a directory: pass a bank file"),
        (("verify", tmp_path / "nothing"), "cannot be opened: No such file"),
    ):
        code, out, err = run(capsys, "bank", *arguments)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1, arguments
        assert file.read_bytes() == before
    assert run(capsys, "bank", "build", tmp_path / "x")[0] == 2


def test_verifying(base: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bank"
    run(capsys, "bank", "build", file, *adapters.values())
    whole = json.loads(run(capsys, "bank", "verify", file, "--json")[1])
    size = file.stat().st_size
    assert whole == {"names": 3, "adapters": 3, "problems": [], "free_bytes": 0, "total_bytes": size}
    run(capsys, "bank", "remove", file, "carl")
    after = json.loads(run(capsys, "bank", "verify", file, "--json")[1])
    assert (after["names"], after["adapters"], after["problems"], after["total_bytes"]) == (2, 2, [], size)
    assert after["free_bytes"] > 0
    code, out, _ = run(capsys, "bank", "compact", file)
    assert code == 0 and out.startswith(f"{file}: ") and out.endswith(" now\n")
    compacted = json.loads(run(capsys, "bank", "verify", file, "--json")[1])
    assert compacted == after | {"free_bytes": 0, "total_bytes": file.stat().st_size}
    assert file.stat().st_size < size

    store = BankStore(file)
    digest = store.names["anna"]
    vectors = store.row(digest).vectors.numpy().tobytes()
    store.close()
    data = bytearray(file.read_bytes())
    data[data.index(vectors[:200])] ^= 1
    file.write_bytes(data)
    code, out, _ = run(capsys, "bank", "verify", file)
    assert code == 1 and f"the tensors of adapter {digest} do not match its digest" in out.splitlines()[0]
    assert out.splitlines()[0].endswith("('anna')") and "problems: 1;" in out
    data[data.index(b"anna")] ^= 1  # a name
    file.write_bytes(data)
    code, out, err = run(capsys, "bank", "verify", file)
    assert (code, out) == (1, "") and "is damaged: its names and adapters do not match" in err


def test_a_name_that_would_reach_the_terminal(
    base: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bank"
    run(capsys, "bank", "build", file, adapters["anna"])
    connection = sqlite3.connect(file)
    connection.execute("UPDATE names SET name = char(27) || '[31m'")
    connection.commit()
    connection.close()
    for command in ("list", "verify", "compact"):
        code, out, err = run(capsys, "bank", command, file)
        assert (code, out) == (1, "") and "it has an invalid name" in err and "\x1b" not in err
    code, _, err = run(capsys, "bank", "build", tmp_path / "other", f"{'n' * 300}={adapters['anna']}")
    assert code == 1 and "1 to 256 bytes" in err and not (tmp_path / "other").exists()


def test_a_bank_for_adapters(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    bank = AdapterBank.for_adapters(loaded(base), adapters)
    names = [*adapters, None]
    inputs = {key: value[:1].expand(4, -1) for key, value in tiny_inputs("bert").items()}
    with torch.no_grad():
        found = bank.model(**inputs, adapters=names).logits
    for row, name in zip(found, names, strict=True):
        expected = alone(base, None if name is None else adapters[name])[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    model = loaded(base)
    modules = dict(model.named_modules())
    for wrong in ({}, {"": adapters["anna"]}, {"a": tmp_path}, list(adapters.values())):
        with pytest.raises(ValueError, match=r"no adapter|adapters is empty|is not allowed"):
            AdapterBank.for_adapters(model, wrong)
        assert dict(model.named_modules()) == modules


def test_a_file_that_is_refused_leaves_the_model_alone(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "bank"
    AdapterBank.for_adapters(loaded(base), adapters, file=file).unload()
    model = loaded(base)
    modules = dict(model.named_modules())
    with pytest.raises(BankError, match="rank 6, not 4"):
        AdapterBank(model, _ADAPTERS["anna"], file=file)
    with pytest.raises(BankError, match="cannot be opened"):
        AdapterBank.open(model, tmp_path / "none")
    before = file.read_bytes()  # the script that made it, run again, with one more adapter
    with pytest.raises(BankError, match=r"already contains 'anna': use AdapterBank\.open"):
        AdapterBank.for_adapters(model, {"new": adapters["anna"], **adapters}, file=file)
    assert file.read_bytes() == before
    data = bytearray(file.read_bytes())
    data[data.index(b'{"rank": 4') + 9] ^= 1
    file.write_bytes(data)
    with pytest.raises(BankError, match="damaged"):
        AdapterBank.open(model, file)
    assert dict(model.named_modules()) == modules


def test_two_banks_of_one_file(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """As two processes have them: each sees the other's changes when it refreshes, and overwrites none."""
    first = AdapterBank.for_adapters(loaded(base), adapters, file=tmp_path / "bank")
    second = AdapterBank.open(loaded(base), tmp_path / "bank")
    with second.lease(["anna"]) as lease:
        first.load("anna", adapters["bert"], replace=True)
        first.remove("carl")
        with pytest.raises(BankError, match=r"changed in .* by another process"):
            second.load("anna", adapters["carl"], replace=True)
        with pytest.raises(BankError, match=r"changed in .* by another process"):
            second.remove("carl")
        second.refresh()
        assert lease.digests == [digest for digest in lease.digests if digest != second.info("anna").digest]
    assert second.info("anna").digest == second.info("bert").digest == first.info("anna").digest
    assert sorted(second.names()) == ["anna", "bert"]
    second.load("dora", adapters["carl"])
    first.refresh()
    with torch.no_grad():
        found = first.model(**tiny_inputs("bert"), adapters=["dora", "anna"]).logits
    torch.testing.assert_close(found[0], alone(base, adapters["carl"])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], alone(base, adapters["bert"])[1], rtol=1e-4, atol=1e-5)
