"""Mutated files of every kind: a load gives what the file says, or one of our errors and an unchanged model.

`VERATUNE_FUZZ` is the number of mutations of each kind and way; `make fuzz` runs many with other seeds.
"""

import functools
import json
import os
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from mutations import (
    CONFIG,
    INPUT,
    KINDS,
    SETTINGS,
    WEIGHTS,
    NoLargeTensors,
    join_file,
    make_files,
    mutated,
    net,
    originals,
    randomised,
    rank,
    resigned,
    split_file,
    state_of,
)
from veratune import AdapterBank, CheckpointError, VeraConfig, VeraModel, get_peft_model
from veratune.adapters.target import TargetError
from veratune.bank.layout import BankError
from veratune.integrations.peft import VeratuneConfig, install

EXAMPLES = int(os.environ.get("VERATUNE_FUZZ", "4"))
SEED = os.environ.get("VERATUNE_FUZZ_SEED", "")
LONGEST = 4000
# Outputs that are larger may overflow in float32 on the way.
LARGEST_OUTPUT = 1e36

install()


# Mutations. All are functions of a generator, so that hypothesis shrinks and repeats by its seed.

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 4.0, 1e39, float("nan"), float("inf"), 2**20, 2**31, 2**63, 2**70, 10**39, "",
    "x" * 20000, "\u001b[31m", "(\\w+\\.?)+!", "((a|a)*)*b", "(", [], [[]], {}, [None], ["head"], {"head": 4},
    {"(\\w+\\.?)+!": 4}, ["up", "up"], [1e400], {"a": {"b": []}}, "all-linear", "none", [0], 1e-50,
)  # fmt: skip


def flip(files: dict[str, bytes], rng: random.Random) -> None:
    name = rng.choice(list(files))
    data = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 3, 30))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def cut(files: dict[str, bytes], rng: random.Random) -> None:
    name = rng.choice(list(files))
    data = files[name]
    files[name] = rng.choice((data[: rng.randrange(len(data))], data + data[:9], b"", data[3:]))


def swap_or_drop(files: dict[str, bytes], rng: random.Random) -> None:
    other = originals(rng.choice(KINDS))
    name = rng.choice(list(files))
    if rng.random() < 0.3:
        del files[name]
    else:
        files[name] = other[rng.choice((name, WEIGHTS, CONFIG))]


def config_field(files: dict[str, bytes], rng: random.Random) -> None:
    values = json.loads(files[CONFIG])
    name = rng.choice([*values, "rank_pattern", "fused_parts", "target_parameters", "fingerprint"])
    if rng.random() < 0.1:
        values.pop(name, None)
    else:
        values[name] = rng.choice(HOSTILE)
    text = json.dumps(values)
    if rng.random() < 0.1:
        text = text[:-1] + f', "{name}": 1}}'  # the key a second time
    files[CONFIG] = text.encode()


def own_header(files: dict[str, bytes], rng: random.Random) -> None:
    header, data = split_file(files[WEIGHTS])
    metadata = header.get("__metadata__", {})
    if "veratune" not in metadata or rng.random() < 0.15:
        header["__metadata__"] = rng.choice((None, [], "x", {"veratune": 4}, {"veratune": "[" * 5000}, {"a": None}))
        files[WEIGHTS] = join_file(header, data)
        return
    own = json.loads(metadata["veratune"])
    where = rng.choice((own, own["config"], own["base"], own["inputs"]))
    where[rng.choice([*where, "id2label"])] = rng.choice(HOSTILE)
    metadata["veratune"] = json.dumps(own)
    files[WEIGHTS] = resigned(header, data)


def entry(files: dict[str, bytes], rng: random.Random) -> None:
    header, data = split_file(files[WEIGHTS])
    name = rng.choice([key for key in header if key != "__metadata__"])
    found = header[name]
    way = rng.randrange(7)
    if way == 0:
        found[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice((*HOSTILE, [2**60], [0, 2**60], [-1]))
    elif way == 1:
        found["shape"] = rng.choice(([1, *found["shape"]], [*found["shape"], 1], found["shape"][::-1], []))
    elif way == 2:
        found["dtype"] = rng.choice(("F64", "F16", "BF16", "I32", "U32", "BOOL", "C64", "F8_E4M3", "F4"))
    elif way == 3:
        header[rng.choice(("x" * 100000, name + ".x", "\u001b[2J", "projection.A.7", "vera_lambda_b.", ""))] = (
            header.pop(name)
        )
    elif way == 4:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif way == 5:
        found["data_offsets"] = [found["data_offsets"][0], rng.choice((2**40, 2**62, 0))]
    else:  # a tensor goes, with its data
        start, stop = found["data_offsets"]
        del header[name]
        data = data[:start] + data[stop:]
        for key, value in header.items():
            if key != "__metadata__" and value["data_offsets"][0] >= stop:
                value["data_offsets"] = [offset - (stop - start) for offset in value["data_offsets"]]
    files[WEIGHTS] = resigned(header, data) if rng.random() < 0.7 else join_file(header, data)


def values(files: dict[str, bytes], rng: random.Random) -> None:
    header, data = split_file(files[WEIGHTS])
    changed = bytearray(data)
    place = rng.randrange(len(data) // 4) * 4
    changed[place : place + 4] = struct.pack("<f", rng.choice((0.0, 1.5, -2e3, float("inf"), float("nan"))))
    files[WEIGHTS] = resigned(header, bytes(changed))


MUTATIONS: tuple[Callable[[dict[str, bytes], random.Random], None], ...] = (
    flip, cut, swap_or_drop, config_field, own_header, entry, values, rank,
)  # fmt: skip


# What may come of it.


def by_the_file(directory: Path) -> Tensor | None:
    """The output by what stands in the files, in float64 and without the code that loads; None if that cannot be."""
    tensors = load_bytes((directory / WEIGHTS).read_bytes())
    header, _ = split_file((directory / WEIGHTS).read_bytes())
    own = header.get("__metadata__", {}).get("veratune")
    config = json.loads(own)["config"] if own else json.loads((directory / CONFIG).read_bytes())
    shared = config.get("projection") == "peft" or config["peft_type"] == "VERA"
    key = config.get("projection_prng_key", 0)  # PEFT fills in a default, which the fingerprint is compared with
    model: Any = net().double()
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in plain.items():
        for which in "bd":
            mark = f"vera_lambda_{which}"
            if name.startswith(f"{mark}."):
                pairs.setdefault(name.removeprefix(f"{mark}."), {})[which] = tensor
            elif name.endswith(f".{mark}"):
                pairs.setdefault(name.removesuffix(f".{mark}"), {})[which] = tensor
    weights = {name: model.get_submodule(name).weight for name in pairs}
    widest_in, widest_out = max(w.shape[1] for w in weights.values()), max(w.shape[0] for w in weights.values())
    a = tensors.get("projection.A", tensors.get("base_model.vera_A"))
    b = tensors.get("projection.B", tensors.get("base_model.vera_B"))
    for name, pair in pairs.items():
        (out, width), d, own_b = weights[name].shape, pair["d"].float().double(), pair["b"].float().double()
        if shared:
            from veratune.projections.schemes import PeftShared

            if a is None or b is None:
                drawn = PeftShared(key, config["r"], widest_in, widest_out)
                cpu = torch.device("cpu")
                a = drawn.draw("A", range(config["r"]), widest_in, cpu)
                b = drawn.draw("B", range(config["r"]), widest_out, cpu).t()
            left, right = b[:out].float().double(), a[:, :width].float().double()
        else:
            from reference import projections

            right, left = projections(key, len(d), width, out)
        with torch.no_grad():
            weights[name] += own_b[:, None] * (left @ (d[:, None] * right))
    for full, tensor in plain.items():
        name = full.removeprefix("modules_to_save.").removeprefix("bias.").replace(".base_layer.", ".")
        if name in dict(model.named_parameters()) and not name.startswith("layers."):
            with torch.no_grad():
                model.get_parameter(name).copy_(tensor)
    with torch.no_grad():
        return model(INPUT.double())


WAYS = ("from_pretrained", "load_adapter", "restore", "bank")


def check(kind: str, way: str, directory: Path) -> str:
    """Load in one way and return what came of it; fail on anything that may not be."""
    base: Any = net()
    host: Any = base
    if way in ("load_adapter", "restore"):
        scheme = "peft" if kind.startswith("peft") else "per_dimension"
        host = randomised(get_peft_model(base, VeraConfig(**SETTINGS, projection=scheme)))
    elif way == "bank":
        host = AdapterBank(base, VeraConfig(**SETTINGS), capacity=2)
    model: nn.Module = host.model.base_model if way == "bank" else host
    before = state_of(model)
    names = [] if way == "bank" else list(getattr(host, "peft_config", {}))
    try:
        with NoLargeTensors(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if way == "from_pretrained":
                host = VeraModel.from_pretrained(base, directory)
            elif way == "load_adapter":
                host.load_adapter(directory, "other")
            elif way == "restore":
                host.restore(directory)
            else:
                host.load("other", directory)
    except (CheckpointError, BankError) as error:
        assert state_of(model) == before
        assert names == ([] if way == "bank" else list(getattr(host, "peft_config", {})))
        message = str(error)
        assert 10 < len(message) < LONGEST and "\x1b" not in message
        return "refused"
    if way == "load_adapter":
        host.set_adapter("other")
    with torch.no_grad():
        ours = host.model(INPUT, adapters=["other"] * 4) if way == "bank" else host.eval()(INPUT)
    expected = by_the_file(directory)
    assert expected is not None
    if any("NaN or infinity" in str(warning.message) for warning in told):
        return "loaded"  # which of the outputs are NaN depends on how they are computed
    assert expected.isfinite().all() or way == "bank"
    if expected.abs().max() > LARGEST_OUTPUT:
        return "loaded"
    torch.testing.assert_close(ours.double(), expected.double(), rtol=2e-4, atol=2e-5, equal_nan=True)
    return "loaded"


def examples(test: Callable[..., None]) -> Callable[..., None]:
    seeded = given(seed=st.integers(0, 2**32 - 1))(test)
    return settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=not SEED,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )(seeded)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", KINDS)
@examples
def test_a_mutated_file_loads_as_it_says_or_changes_nothing(
    kind: str, mutation: Any, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    mutated(kind, mutation, seed, directory)
    check(kind, WAYS[seed % len(WAYS)], directory)


PEFT_WAYS = ("from_pretrained", "load_adapter")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", ["native", "native from peft"])
@examples
def test_a_mutated_file_in_a_peft_model_loads_as_it_says_or_changes_nothing(
    kind: str, mutation: Any, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    mutated(kind, mutation, seed, directory)
    check_in_peft(PEFT_WAYS[seed % len(PEFT_WAYS)], directory)


def check_in_peft(way: str, directory: Path) -> None:
    """Load into a `PeftModel` in one way; fail on anything but the file's outputs or one of our errors."""
    host: Any = net()
    if way == "load_adapter":
        host = randomised(peft.get_peft_model(host, VeratuneConfig(**SETTINGS)))
    before, message, ours = state_of(host), None, False
    try:
        with NoLargeTensors():
            if way == "load_adapter":
                host.load_adapter(str(directory), "other")
                host.set_adapter("other")
            else:
                host = peft.PeftModel.from_pretrained(host, str(directory))
    except ValueError as error:
        message, ours = str(error), isinstance(error, CheckpointError | TargetError)
    if message is not None:
        assert state_of(host) == before
        # PEFT itself refuses a configuration that is missing, or of a type that it does not know.
        assert (ours and 10 < len(message) < LONGEST and "\x1b" not in message) or not _is_ours(directory / CONFIG)
        return
    if (directory / CONFIG).exists() and not _is_ours(directory / CONFIG):
        return  # of another method of PEFT's
    with torch.no_grad():
        found = host.eval()(INPUT)
    expected = by_the_file(directory)
    assert expected is not None
    if expected.isfinite().all() and expected.abs().max() <= LARGEST_OUTPUT:
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-4, atol=2e-5)


def _is_ours(config: Path) -> bool:
    try:
        values = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("peft_type") == "VERATUNE"


@functools.cache
def bank_file() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        make_files("native", Path(place) / "adapter")
        bank = AdapterBank(net(), VeraConfig(**SETTINGS), capacity=2, file=Path(place) / "bank")
        bank.load("one", Path(place) / "adapter")
        del bank
        return (Path(place) / "bank").read_bytes()


@examples
def test_a_mutated_bank_file_is_refused_or_has_the_same_bits(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, files, rng = tmp_path_factory.getbasetemp() / "bank", {"bank": bank_file()}, random.Random(seed)
    path.write_bytes(bank_file())
    expected = AdapterBank.open(net(), path, capacity=2).model(INPUT, adapters=["one"] * 4)
    rng.choice((flip, cut))(files, rng)
    path.unlink()
    path.write_bytes(files["bank"])
    model, opened = net(), False
    before = state_of(model)
    try:
        with NoLargeTensors():
            bank = AdapterBank.open(model, path, capacity=2)
            opened = True
            if "one" not in bank.names():
                return
            found = bank.model(INPUT, adapters=["one"] * 4)
    except BankError as error:
        message, found = str(error), None
    if found is None:
        assert 10 < len(message) < LONGEST
        assert opened or state_of(model) == before
    else:
        assert torch.equal(found, expected)
