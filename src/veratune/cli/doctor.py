"""`veratune doctor`: installed packages, and missing ones by feature."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from veratune import __version__
from veratune.cli.output import bytes_text, cpu_name, print_json, print_table, print_text
from veratune.ops.calibration import calibration_path
from veratune.utils.text import counted

# Packages installed with veratune, and those that a feature needs in addition.
_CORE = ("torch", "numpy", "safetensors", "huggingface_hub")
_FEATURES = {
    "transformers": ("transformers' models, VeraTrainer", "veratune[hf]"),
    "accelerate": ("veratune train, VeraTrainer", "veratune[cli]"),
    "typer": ("the command line", "veratune[cli]"),
    "rich": ("the command line", "veratune[cli]"),
    "pyyaml": ("veratune train", "veratune[cli]"),
    "pandas": ("veratune train, from files", "veratune[cli]"),
    "pyarrow": ("veratune train, from Parquet files", "veratune[cli]"),
    "datasets": ("veratune train, from the hub", "veratune[cli]"),
    "matplotlib": ("pictures", "veratune[cli]"),
    "peft": ("veratune.integrations.peft; comparing in veratune bench", "veratune[peft]"),
    "trl": ("veratune.integrations.trl", "veratune[trl]"),
    "sentence_transformers": ("veratune.integrations.sentence_transformers", "veratune[sentence-transformers]"),
    "deepspeed": ("DeepSpeed's ZeRO-2 and ZeRO-3", "deepspeed"),
    "gguf": ("export for llama.cpp", "veratune[gguf]"),
    "bitsandbytes": ("4-bit and 8-bit base models", "bitsandbytes"),
    "torchao": ("quantized base models", "torchao"),
}


def doctor(*, as_json: bool) -> None:
    """Show versions and devices, and the packages that features are missing."""
    packages = {name: _version(name) for name in (*_CORE, *_FEATURES)}
    devices = _devices()
    missing = [
        {"package": name, "feature": feature, "install": f"pip install '{source}'"}
        for name, (feature, source) in _FEATURES.items()
        if packages[name] is None
    ]
    calibrated = calibration_path().exists()
    if as_json:
        print_json(
            {
                "veratune": __version__,
                "python": platform.python_version(),
                "packages": packages,
                "missing": missing,
                "devices": devices,
                "calibrated": calibrated,
            }
        )
        return
    rows = [("veratune", __version__, ""), ("python", platform.python_version(), "")]
    rows += [(name, found, _FEATURES.get(name, ("", ""))[0]) for name, found in packages.items() if found is not None]
    print_table(("package", "version", "for"), rows)
    print_table(("device", "name"), list(devices.items()))
    for lack in missing:
        print_text(f"{lack['package']} is missing, for {lack['feature']}: {lack['install']}")
    if not missing:
        print_text("Nothing is missing for any feature.")
    print_text(
        "Routes are chosen by what was measured on this machine (veratune.calibrate)."
        if calibrated
        else "Routes are chosen by built-in constants; veratune.calibrate() measures this machine, once."
    )


def _devices() -> dict[str, str]:
    found = {"cpu": f"{cpu_name()}, {counted(torch.get_num_threads(), 'thread')}"}
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {bytes_text(memory)}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
