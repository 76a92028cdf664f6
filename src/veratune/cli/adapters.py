"""`veratune merge`, `export`, `convert` and `diff`: commands that convert or compare adapters."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from veratune.checkpoint.files import CheckpointError
from veratune.checkpoint.formats import FORMATS, format_of
from veratune.checkpoint.native import NativeFormat, read_native
from veratune.cli.directories import check_new, writing_new
from veratune.cli.models import adapter_in, base_of, load_model
from veratune.cli.output import print_json, print_table, print_text
from veratune.cli.train.settings import dtype_of
from veratune.export.vllm import max_lora_rank
from veratune.model import VeraModel

MERGE_EXAMPLES = """Examples:

veratune merge run/adapter merged

veratune merge run/adapter merged --base MODEL
"""
EXPORT_EXAMPLES = """Examples:

veratune export run/adapter for-peft --format peft

veratune export run/adapter for-engines --format lora --dtype bfloat16
"""
CONVERT_EXAMPLES = """Example:

veratune convert peft-adapter adapter --base MODEL
"""
DIFF_EXAMPLES = """Example:

veratune diff run/adapter other/adapter --json
"""

# Lists with more names than this are abbreviated.
_LISTED = 4
_LORA, _GGUF = "lora", "gguf"

AdapterArgument = Annotated[Path, typer.Argument(help="Directory of an adapter, or of a training run.")]
OutputArgument = Annotated[Path, typer.Argument(help="Directory to write; it must be new or empty.")]
BaseOption = Annotated[
    str | None,
    typer.Option(help="The base model: a directory or a hub name. The default is the one that the adapter names."),
]


class Engine(StrEnum):
    """Engines whose support for a LoRA can be checked."""

    VLLM = "vllm"


def _export_formats() -> list[str]:
    """Return the formats that `veratune export` writes: those that `convert` does not, and the write-only ones."""
    written = [name for name, format in FORMATS.items() if format.is_written and not isinstance(format, NativeFormat)]
    return [*written, _LORA, _GGUF]


def _known_format(name: str) -> str:
    names = _export_formats()
    if name not in names:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, names))}.")
    return name


def merge(
    adapter: AdapterArgument,
    output: OutputArgument,
    base: BaseOption = None,
    safe: Annotated[bool, typer.Option(help="Check that all merged weights are finite.")] = True,
) -> None:
    """Merge an adapter into its base model and save a plain model."""
    check_new(output)
    adapter = adapter_in(adapter)
    path_or_repo = base_of(adapter, base)
    model: Any = _adapted(path_or_repo, adapter).merge_and_unload(safe_merge=safe)
    with writing_new(output):
        model.save_pretrained(output)
        _copy_tokenizer(path_or_repo, output)
    print_text(f"{output}: {path_or_repo} with {adapter} merged in")


def export(
    adapter: AdapterArgument,
    output: OutputArgument,
    to: Annotated[
        str,
        typer.Option(
            "--format",
            callback=_known_format,
            metavar=f"[{'|'.join(_export_formats())}]",
            help="peft: PEFT's VeRA. lora: a LoRA. gguf: a LoRA for llama.cpp.",
        ),
    ],
    base: BaseOption = None,
    dtype: Annotated[str, typer.Option(help="dtype of the matrices of a LoRA.")] = "float32",
    rank: Annotated[
        int | None, typer.Option(help="lora: a rank other than the adapter's, if it can represent the deltas exactly.")
    ] = None,
    engine: Annotated[Engine | None, typer.Option(help="lora: check that this engine can load it.")] = None,
) -> None:
    """Write an adapter in another format, with the same outputs."""
    if to != _LORA and (rank is not None or engine is not None):
        raise typer.BadParameter(f"--rank and --engine are for --format lora, not {to}")
    numbers = dtype_of(dtype)
    check_new(output)
    adapter = adapter_in(adapter)
    model = _adapted(base_of(adapter, base), adapter)
    with writing_new(output):
        if to == _LORA:
            model.export_lora(output, dtype=numbers, rank=rank, engine="vllm" if engine is Engine.VLLM else None)
        elif to == _GGUF:
            model.export_gguf(output, dtype=numbers)
        else:
            model.export(to, output)
    print_text(f"{output}: {adapter} as {to}")
    if engine is Engine.VLLM:
        largest = max(entry.r for layer in model.vera_layers().values() for entry in layer.entries.values())
        print_text(f"to serve it, start vLLM with --enable-lora --max-lora-rank {max_lora_rank(rank or largest)}")


def convert(
    adapter: Annotated[
        Path,
        typer.Argument(help="Directory of a VeRA adapter that PEFT wrote, also with veratune's layers."),
    ],
    output: OutputArgument,
    base: BaseOption = None,
) -> None:
    """Convert a VeRA adapter that PEFT wrote to veratune's format."""
    check_new(output)
    adapter = adapter_in(adapter)
    if isinstance(format_of(adapter), NativeFormat):
        raise CheckpointError(f"{adapter} is already in veratune's format")
    model = _adapted(base_of(adapter, base), adapter)
    with writing_new(output):
        model.save_pretrained(output)
    print_text(f"{output}: {adapter} in veratune's format")


def diff(
    first: AdapterArgument,
    second: AdapterArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the settings, layers and vectors of two adapters. The exit code is 1 if they differ."""
    a, b = read_native(adapter_in(first)), read_native(adapter_in(second))
    settings_a, settings_b = a.config.to_dict(), b.config.to_dict()
    settings = {
        name: [settings_a[name], settings_b[name]] for name in settings_a if settings_a[name] != settings_b[name]
    }
    comparable = a.header["fingerprint"] == b.header["fingerprint"]
    if not comparable:
        settings["fingerprint"] = [a.header["fingerprint"], b.header["fingerprint"]]
    only = {"first": sorted(a.vectors.keys() - b.vectors.keys()), "second": sorted(b.vectors.keys() - a.vectors.keys())}
    layers = {
        name: {which: _distance(x, b.vectors[name][which]) for which, x in a.vectors[name].items()}
        for name in a.vectors
        if name in b.vectors
    }
    saved = sorted(
        {
            f"{module}.{key}"
            for module in a.saved.keys() | b.saved.keys()
            for key in a.saved.get(module, {}).keys() | b.saved.get(module, {}).keys()
            if not _same(a.saved.get(module, {}).get(key), b.saved.get(module, {}).get(key))
        }
        | {name for name in a.biases.keys() | b.biases.keys() if not _same(a.biases.get(name), b.biases.get(name))}
    )
    moved = {name: distances for name, distances in layers.items() if any(distances.values())}
    different = bool(settings or only["first"] or only["second"] or moved or saved)
    if as_json:
        print_json(
            {
                "different": different,
                "same_projections": comparable,
                "settings": settings,
                "only": only,
                "layers": layers,
                "in_full": saved,
            }
        )
    else:
        _print_differences(settings, only, moved if comparable else None, saved, different=different)
    if different:
        raise typer.Exit(1)


def _adapted(path_or_repo: str, adapter: Path) -> VeraModel:
    base = load_model(path_or_repo, weights=True, adapter=adapter, remedy="give the base model with --base")
    return VeraModel.from_pretrained(base, adapter)


def _print_differences(
    settings: dict[str, list[Any]],
    only: dict[str, list[str]],
    moved: dict[str, dict[str, float | None]] | None,
    saved: list[str],
    *,
    different: bool,
) -> None:
    if not different:
        print_text("the adapters are equal")
    if settings:
        print_table(("setting", "first", "second"), [(name, *_sides(*pair)) for name, pair in settings.items()])
    for which, names in only.items():
        if names:
            print_text(f"only the {which} adapts {len(names)} layers: {_shortened(names)}")
    if moved is None:
        print_text(
            "the projections differ, as their fingerprints show, so the vectors of the two cannot be compared: equal"
            " numbers would change the weights differently"
        )
    elif moved:
        rows = [
            (name, *("other shape" if pair[x] is None else f"{pair[x]:.4g}" for x in "bd"))
            for name, pair in moved.items()
        ]
        print_table(("layer", "b apart", "d apart"), rows, title="|first - second| relative to |first|")
    if saved:
        print_text(f"trained in full and different: {', '.join(saved)}")


def _sides(first: Any, second: Any) -> tuple[str, str]:
    """Return two values of a setting as text; for two long lists, the elements that only one of them has."""
    if isinstance(first, list) and isinstance(second, list) and max(len(first), len(second)) > _LISTED:
        return _beside(first, second), _beside(second, first)
    return _shortened(first), _shortened(second)


def _beside(names: list[Any], others: list[Any]) -> str:
    own = [name for name in names if name not in others]
    return f"{len(names)}, of which only here: {_shortened(own) if own else 'none'}"


def _shortened(value: Any) -> str:
    """Return a value as text, with long lists abbreviated."""
    if not isinstance(value, list):
        return str(value)
    shown = value if len(value) <= _LISTED else [*value[:2], f"... ({len(value) - 3} more)", value[-1]]
    return ", ".join(map(str, shown))


def _distance(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Return |x - y| / |x|, or None if the shapes differ."""
    if x.shape != y.shape:
        return None
    apart = float((x.double() - y.double()).norm())
    return apart / max(float(x.double().norm()), torch.finfo(torch.float64).tiny) if apart else 0.0


def _same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    return x is not None and y is not None and torch.equal(x, y)


def _copy_tokenizer(path_or_repo: str, output: Path) -> None:
    """Save the base model's tokenizer with a merged model, if it has one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_repo)
    except (OSError, ValueError, KeyError, TypeError):
        return  # many models have none
    tokenizer.save_pretrained(output)
