"""`veratune doctor`: what is installed, and what is missing for which feature."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import torch
import typer

from veratune import __version__
from veratune.cli.output import print_json, print_table, print_text
from veratune.profiles import calibration_path

_FEATURES = {
    "transformers": "models, VeraTrainer: pip install 'veratune[hf]'",
    "safetensors": "files",
    "huggingface_hub": "the hub",
    "peft": "only to compare with, or to use what is exported",
    "gguf": "export for llama.cpp: pip install 'veratune[gguf]'",
    "bitsandbytes": "4-bit and 8-bit base models",
    "torchao": "quantised base models",
    "matplotlib": "pictures: pip install 'veratune[cli]'",
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions and devices, and what is missing for which feature."""
    packages = {name: _version(name) for name in ("torch", "numpy", *_FEATURES)}
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    calibrated = calibration_path().exists()
    if as_json:
        print_json(
            {
                "veratune": __version__,
                "python": platform.python_version(),
                "packages": packages,
                "devices": devices,
                "calibrated": calibrated,
            }
        )
        return
    rows = [("veratune", __version__, ""), ("python", platform.python_version(), "")]
    rows += [(name, found or "missing", _FEATURES.get(name, "")) for name, found in packages.items()]
    print_table(("package", "version", "for"), rows)
    print_table(("device", "name"), list(devices.items()))
    print_text(
        "Routes are chosen by what was measured on this machine (veratune.calibrate)."
        if calibrated
        else "Routes are chosen by built-in constants; veratune.calibrate() measures this machine, once."
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
