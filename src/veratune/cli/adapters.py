"""`veratune merge`, `export`, `convert` and `diff`: commands that convert or compare adapters."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import typer

from veratune.checkpoint.files import CheckpointError
from veratune.checkpoint.formats import FORMATS, format_of
from veratune.checkpoint.native import NativeFormat, read_native
from veratune.cli.directories import check_new, writing_new
from veratune.cli.models import adapter_in, base_of, load_adapted, pad_with, tokenizer_of
from veratune.cli.options import Engine
from veratune.cli.output import bytes_text, print_json, print_table, print_text
from veratune.cli.train.settings import dtype_of
from veratune.export.vllm import max_lora_rank
from veratune.utils.text import counted

# Lists with more names than this are abbreviated.
_LISTED = 4
_LORA, _GGUF = "lora", "gguf"


def _export_formats() -> list[str]:
    """Return the formats that `veratune export` writes: those that `convert` does not, and the write-only ones."""
    written = [name for name, format in FORMATS.items() if format.is_written and not isinstance(format, NativeFormat)]
    return [*written, _LORA, _GGUF]


def merge(adapter: Path, output: Path, model: str | None, *, safe: bool) -> None:
    """Merge an adapter into its base model and save a plain model."""
    check_new(output)
    adapter = adapter_in(adapter)
    path_or_repo = base_of(adapter, model)
    merged: Any = load_adapted(path_or_repo, adapter).merge_and_unload(safe_merge=safe)
    tokenizer = _tokenizer(path_or_repo, adapter)
    if tokenizer is not None:
        pad_with(merged, tokenizer)
    with writing_new(output):
        merged.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
    print_text(f"{output}: {path_or_repo} with {adapter} merged in")


def export(
    adapter: Path,
    output: Path,
    to: str,
    model: str | None,
    *,
    dtype: str,
    rank: int | None,
    engine: Engine | None,
) -> None:
    """Write an adapter in another format, with the same outputs."""
    names = _export_formats()
    if to not in names:
        raise typer.BadParameter(f"{to!r} is not one of {', '.join(map(repr, names))}.", param_hint="'--format'")
    if to != _LORA and (rank is not None or engine is not None):
        raise typer.BadParameter(f"--r and --engine are for --format lora, not {to}")
    numbers = dtype_of(dtype)
    check_new(output)
    adapter = adapter_in(adapter)
    adapted = load_adapted(base_of(adapter, model), adapter)
    with writing_new(output):
        if to == _LORA:
            adapted.export_lora(output, dtype=numbers, rank=rank, engine="vllm" if engine is Engine.VLLM else None)
        elif to == _GGUF:
            adapted.export_gguf(output, dtype=numbers)
        else:
            adapted.export(to, output)
    layers = adapted.vera_layers().values()
    own = _bytes_in(adapter, [format.weights_name for format in FORMATS.values()])
    largest = max(entry.r for layer in layers for entry in layer.entries.values())
    print_text(
        f"{output}: {adapter} as {to}, rank {rank or largest}, {counted(len(layers), 'layer')},"
        f" {bytes_text(_bytes_in(output))}; the adapter has {bytes_text(own)}"
    )
    if engine is Engine.VLLM:
        print_text(f"to serve it, start vLLM with --enable-lora --max-lora-rank {max_lora_rank(rank or largest)}")


def convert(adapter: Path, output: Path, model: str | None) -> None:
    """Convert a VeRA adapter that PEFT wrote to veratune's format."""
    check_new(output)
    adapter = adapter_in(adapter)
    if isinstance(format_of(adapter), NativeFormat):
        raise CheckpointError(f"{adapter} is already in veratune's format")
    adapted = load_adapted(base_of(adapter, model), adapter)
    with writing_new(output):
        adapted.save_pretrained(output)
    print_text(f"{output}: {adapter} in veratune's format")


def diff(first: Path, second: Path, *, as_json: bool) -> bool:
    """Compare the settings, layers and vectors of two adapters, and return whether they differ."""
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
    return different


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


def _tokenizer(path_or_repo: str, adapter: Path) -> Any:
    """Return the tokenizer to save with a merged model: the adapter's or the base model's; many models have none."""
    try:
        return tokenizer_of(adapter, path_or_repo)
    except (OSError, ValueError):
        return None


def _bytes_in(directory: Path, names: Collection[str] = ()) -> int:
    """Return the size of a directory's files, or of those with these names."""
    return sum(
        file.stat().st_size for file in directory.iterdir() if file.is_file() and (not names or file.name in names)
    )
