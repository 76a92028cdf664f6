import functools
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from tiny_models import randomise_trainable
from veratune import VeraConfig, get_peft_model
from veratune.integrations.peft import VeratuneConfig, install

WEIGHTS = "adapter_model.safetensors"


CONFIG = "adapter_config.json"


# More than any of these small adapters needs, less than a hostile size asks for.
LARGEST_ALLOCATION = 64 << 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)}) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(x)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net()


INPUT = torch.linspace(-1, 1, 24).reshape(4, 6)


SETTINGS: dict[str, Any] = {"r": 4, "target_modules": ["up", "down"], "modules_to_save": ["head"], "d_initial": 0.2}


def randomised(model: nn.Module) -> Any:
    return randomise_trainable(model, seed=11, std=0.3)


def make_files(kind: str, directory: Path) -> None:
    if kind == "native from peft":
        install()
        randomised(peft.get_peft_model(net(), VeratuneConfig(**SETTINGS))).save_pretrained(directory)
        return
    projection = "peft" if kind.startswith("peft") else "per_dimension"
    more = {"save_projection": True} if kind == "native with projections" else {}
    model = randomised(get_peft_model(net(), VeraConfig(**SETTINGS, projection=projection, **more)))
    if kind == "peft without projections":
        model.export_peft(directory, save_projection=False)
    elif kind == "peft":
        model.export_peft(directory, save_projection=True)
    else:
        model.save_pretrained(directory)


KINDS = ("native", "native with projections", "peft", "peft without projections")


@functools.cache
def originals(kind: str) -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        make_files(kind, Path(place))
        return {name: (Path(place) / name).read_bytes() for name in (WEIGHTS, CONFIG)}


def split_file(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def resigned(header: dict[str, Any], data: bytes) -> bytes:
    """Return a file whose digest fits again, as someone who means it would write it."""
    try:
        own = json.loads(header["__metadata__"]["veratune"])
        own.pop("sha256", None)
        sha = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
        tensors = load_bytes(join_file(header, data))
        for name in sorted(tensors):
            tensor = tensors[name]
            sha.update(f'[{json.dumps(name)}, "{tensor.dtype}", {list(tensor.shape)}]'.encode())
            sha.update(bits(tensor))
        own["sha256"] = sha.hexdigest()
        header["__metadata__"]["veratune"] = json.dumps(own)
    except Exception:
        pass
    return join_file(header, data)


def rank(files: dict[str, bytes], rng: random.Random) -> None:
    """A rank of a million, with vectors that have it."""
    number = rng.choice((1 << 20, 5000, 1 << 31))
    settings_of = json.loads(files[CONFIG])
    settings_of["r"] = number
    files[CONFIG] = json.dumps(settings_of).encode()
    header, data = split_file(files[WEIGHTS])
    if "veratune" in header.get("__metadata__", {}):
        own = json.loads(header["__metadata__"]["veratune"])
        own["config"]["r"] = number
        header["__metadata__"]["veratune"] = json.dumps(own)
    length = min(number, 1 << 20)
    for key, found in header.items():
        if "vera_lambda_d" in key:
            found["shape"], found["data_offsets"] = [length], [len(data), len(data) + 4 * length]
            data += bytes(4 * length)
    files[WEIGHTS] = join_file(header, data)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """A model's modules, flags and bits."""
    return (
        [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()],
        hashlib.sha256(b"".join(bits(tensor) for tensor in model.state_dict().values())).hexdigest(),
    )


class NoLargeTensors(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses results that no adapter of so small a model needs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta and result.nbytes > LARGEST_ALLOCATION:
            raise AssertionError(f"{func} made {result.nbytes:,} bytes")
        return result


def mutated(kind: str, way: Callable[..., None], seed: int, directory: Path) -> None:
    files, rng = dict(originals(kind)), random.Random(seed)
    way(files, rng)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
