"""Device profiles: built-in defaults, and a calibration that is measured once and cached in a file."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from veratune.ops.costs import DeviceProfile
from veratune.utils.atomic import write_atomically
from veratune.utils.outside_files import parse_json, read_text
from veratune.utils.text import notify
from veratune.utils.torch_private import returns_sums

# Rates, bandwidths and launch times of typical devices: two cores of a server CPU, and an NVIDIA H200 as measured on
# 2026-11-28 with torch 2.11 (its float64 rate was not measured and is an assumption). The GPU's launch time, which is
# mostly Python overhead, was fitted to 50 cases so that the chosen routes come as close as possible to the fastest; in
# 60 % of 200 cases measured later, the chosen route is within 5 % of the fastest (`benchmarks/gpu/fit.py`). The choice
# of a route depends mostly on the ratio of rate to bandwidth and, for few tokens on a GPU, on the number of launches.
_DEFAULTS = {
    "cpu": {torch.float32: 1.5e11, torch.bfloat16: 3e11, torch.float16: 5e10, torch.float64: 7e10},
    "cuda": {torch.float32: 5e13, torch.bfloat16: 6.9e14, torch.float16: 6.9e14, torch.float64: 3e13},
}
_BANDWIDTH = {"cpu": 2e10, "cuda": 4e12}
_LAUNCH = {"cpu": 3e-6, "cuda": 2e-5}

_LARGEST_FILE = 1 << 20
_profiles: dict[tuple[str, torch.dtype], DeviceProfile] = {}


def device_profile(device: torch.device, dtype: torch.dtype) -> DeviceProfile:
    """Return the calibrated profile of a device and dtype, or the built-in one."""
    profile = _profiles.get((device.type, dtype))
    return _default(device.type, dtype) if profile is None else profile


@cache
def _default(device_type: str, dtype: torch.dtype) -> DeviceProfile:
    kind = "cpu" if device_type == "cpu" else "cuda"
    return DeviceProfile(
        flops=_DEFAULTS[kind].get(dtype, _DEFAULTS[kind][torch.float32]),
        bandwidth=_BANDWIDTH[kind],
        launch=_LAUNCH[kind],
        itemsize=dtype.itemsize,
        device_type=kind,
        wide_flops=_DEFAULTS[kind][torch.float32],
        returns_sums=_returns_sums(kind, dtype),
    )


def _returns_sums(device_type: str, dtype: torch.dtype) -> bool:
    return returns_sums and device_type == "cuda" and dtype.itemsize == 2


def calibrate(
    device: torch.device | str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> dict[torch.dtype, DeviceProfile]:
    """Measure a device (takes a few seconds), use the result from now on, and cache it on disk for later processes.

    The file is `calibration.json` in `VERATUNE_CACHE`, or else `veratune/calibration.json` in the user's cache
    directory. It applies only to the same device, torch version and number of threads.

    Args:
        device: the device to measure.
        dtypes: the compute dtypes to measure.

    Returns:
        The measured profiles.
    """
    device = torch.device(device)
    measured = {dtype: _measure(device, dtype) for dtype in dtypes}
    in_float32 = measured.get(torch.float32) or device_profile(device, torch.float32)
    measured = {dtype: replace(profile, wide_flops=in_float32.flops) for dtype, profile in measured.items()}
    path = calibration_path()
    values = _read(path)
    for dtype, profile in measured.items():
        _profiles[(device.type, dtype)] = profile
        values[_key(device, dtype)] = {
            "flops": profile.flops,
            "bandwidth": profile.bandwidth,
            "launch": profile.launch,
            "triton_flops": profile.triton_flops,
        }
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
    return measured


def load_calibration(device: torch.device) -> None:
    """Use the stored result of an earlier `calibrate` for this device, if there is one."""
    values = _read(calibration_path())
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        entry = values.get(_key(device, dtype))
        if entry is not None:
            wide = entry["flops"] if dtype == torch.float32 else device_profile(device, torch.float32).flops
            _profiles[(device.type, dtype)] = DeviceProfile(
                **entry,
                itemsize=dtype.itemsize,
                device_type=device.type,
                wide_flops=wide,
                returns_sums=_returns_sums(device.type, dtype),
            )


def calibration_path() -> Path:
    """Return the path of the calibration file."""
    chosen = os.environ.get("VERATUNE_CACHE")
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "veratune"
    return root / "calibration.json"


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Return the stored calibrations, or an empty dict if the file is missing or damaged: there are defaults."""
    try:
        values: Any = parse_json(read_text(path, _LARGEST_FILE))
        return {
            str(key): {name: float(entry.get(name, 0.0)) for name in ("flops", "bandwidth", "launch", "triton_flops")}
            for key, entry in values.items()
            if all(float(entry[name]) > 0 for name in ("flops", "bandwidth", "launch"))
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _key(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()} {torch.get_num_threads()} threads"
    return f"{device.type} | {name} | torch {torch.__version__} | {dtype}"


def _measure(device: torch.device, dtype: torch.dtype) -> DeviceProfile:
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / _seconds(lambda: a @ b, device)
    wide = torch.randn(1 << 24, device=device)
    bandwidth = 3 * wide.nbytes / _seconds(lambda: torch.mul(wide, wide), device)
    small = torch.randn(4, device=device)
    launch = _seconds(lambda: small * small, device, repeats=200)
    own = _returns_sums(device.type, dtype)
    kernel = _triton_flops(device, dtype)
    return DeviceProfile(flops, bandwidth, launch, dtype.itemsize, device.type, returns_sums=own, triton_flops=kernel)


def _triton_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of the Triton kernel, or 0 if it cannot run."""
    if device.type != "cuda" or dtype.itemsize > 4 or find_spec("triton") is None:
        return 0.0
    from veratune.ops.triton_kernel import add_product_

    tokens, size, rank = 4096, 4096, 256
    x, out = (torch.zeros(tokens, size, device=device, dtype=dtype) for _ in range(2))
    projection = torch.zeros(rank, size, device=device, dtype=dtype)
    d, b = torch.zeros(rank, device=device), torch.zeros(size, device=device)
    try:
        seconds = _seconds(lambda: add_product_(out, x, projection, projection, d, output_scale=b), device)
    except Exception as error:  # Triton raises errors of many types, and the other routes do not need the kernel
        notify(f"the Triton kernel failed on {torch.cuda.get_device_name(device)} and will not be used: {error}")
        return 0.0
    return 4 * tokens * rank * size / seconds


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Return the median time of one run, after a warm-up run."""
    times = []
    work()
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
