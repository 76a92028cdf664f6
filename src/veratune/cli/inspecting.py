"""`veratune inspect`: show a model's layers and what VeRA would train in them, or an adapter's vectors."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from veratune.adapters.coverage import WeightInfo, supported
from veratune.checkpoint.base import AdapterContents
from veratune.checkpoint.files import CheckpointError
from veratune.checkpoint.formats import FORMATS, read_contents
from veratune.checkpoint.lora import LoraFormat
from veratune.cli.directories import writing
from veratune.cli.models import adapter_at, load_model
from veratune.cli.output import bytes_text, print_json, print_table, print_text
from veratune.config import VeraConfig
from veratune.model import get_peft_model


def inspect(
    path_or_repo: str,
    rank: int = 256,
    tokens: int = 4096,
    *,
    every: bool = False,
    plot: Path | None = None,
    as_json: bool = False,
) -> None:
    """Show a model's layers grouped by shape, or an adapter's configuration and vectors."""
    if plot is not None and os.path.lexists(plot):
        raise CheckpointError(f"{plot} already exists and will not be overwritten: choose another file for --plot")
    if Path(path_or_repo).is_file() and Path(path_or_repo).suffix in (".safetensors", ".json"):
        path_or_repo = str(Path(path_or_repo).parent)
    adapter = adapter_at(path_or_repo)
    if adapter is not None:
        _inspect_adapter(adapter, every=every, plot=plot, as_json=as_json)
    elif plot is not None:
        raise ValueError(f"--plot shows an adapter's vectors, but {path_or_repo} is not an adapter")
    else:
        _inspect_model(path_or_repo, rank, tokens, every=every, as_json=as_json)


# A model


def _inspect_model(path_or_repo: str, rank: int, tokens: int, *, every: bool, as_json: bool) -> None:
    model = load_model(path_or_repo, weights=False)
    table = supported(model)
    adapted = get_peft_model(model, VeraConfig(r=rank, target_modules="all-linear", modules_to_save=[]))
    layers = adapted.vera_layers()
    trained = sum(vector.numel() for layer in layers.values() for vector in layer.vectors("default").values())
    uses = Counter((c.projection.side, c.projection.width) for x in layers.values() for c in x.entries["default"].views)
    projections: list[dict[str, Any]] = [
        {"side": side, "width": width, "layers": count, "bytes_float32": 4 * rank * width}
        for (side, width), count in sorted(uses.items())
    ]
    all_projections = sum(4 * rank * width for _, width in uses)
    routes = {r.layer: str(r.chosen.choice) for r in adapted.explain_routes(tokens, device=torch.device("cpu"))}
    total = sum(parameter.numel() for parameter in adapted.base_model.parameters()) - trained
    summary = {
        "model": path_or_repo,
        "class": type(model).__name__,
        "parameters": total,
        "rank": rank,
        "adapted_layers": len(layers),
        "trained_parameters": trained,
        "projection_bytes_float32": all_projections,
        "projections": projections,
        "coverage_all_linear": table.coverage(("all-linear",)),
        "coverage": table.coverage(),
    }
    if as_json:
        weights = [
            {
                "name": i.name,
                "kind": i.kind,
                "module": i.module,
                "shape": list(i.shape),
                "by": i.by,
                "why_not": i.why_not,
            }
            for i in table
        ]
        print_json(summary | {"weights": weights, "routes": routes})
        return
    if every:
        print_text(str(table))
    else:
        groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
        for info in table:
            if info.kind != "vector":
                layer = info.name.removesuffix(".weight")
                name = layer if layer in layers else info.name
                shape = "x".join(map(str, info.shape))
                how = _how(info)
                own = sum(v.numel() for v in layers[name].vectors("default").values()) if name in layers else 0
                groups[info.module, shape, how, routes.get(name, "-")].append(own)
        rows = [
            (str(len(own)), module, shape, f"{sum(own):,}" if sum(own) else "-", route, how)
            for (module, shape, how, route), own in groups.items()
        ]
        header = ("count", "module", "shape", "VeRA trains", f"route at {tokens} tokens", "adapted by")
        print_table(header, rows, title=path_or_repo)
        shared = [
            (f"{p['side']} for {p['width']}", f"{rank}x{p['width']}", str(p["layers"]), bytes_text(p["bytes_float32"]))
            for p in projections
        ]
        print_table(("projection", "shape", "layers that share it", "float32"), shared)
    print_text(
        f"{summary['class']}, {total:,} parameters. All linear layers at r={rank}: {len(layers)} layers, {trained:,}"
        f" trained parameters ({bytes_text(4 * trained)} in a file), projections of {bytes_text(all_projections)} in"
        f" float32; {100 * table.coverage(('all-linear',)):.1f} % of all matrices' elements,"
        f" {100 * table.coverage():.1f} % with those that have to be named"
    )


def _how(info: WeightInfo) -> str:
    """Return how a weight can be adapted, or why it cannot."""
    if not info.by:
        return f"nothing: {info.why_not}"
    return info.by if info.by == "all-linear" else f"{info.by}, by its name"


# An adapter


_NORMS = ("b_norm", "b_largest", "d_norm", "d_mean")
_LORA_NORMS = ("a_norm", "b_norm")


def _inspect_adapter(directory: Path, *, every: bool, plot: Path | None, as_json: bool) -> None:
    contents = read_contents(directory)
    if contents.format == LoraFormat.name:
        if plot is not None:
            raise ValueError(f"--plot shows VeRA's vectors, but {directory} is a LoRA adapter")
        _inspect_lora(directory, contents, every=every, as_json=as_json)
        return
    layers: list[dict[str, Any]] = [
        {
            "layer": name,
            "b_shape": list(b.shape),
            "d_shape": list(d.shape),
            "b_norm": float(b.float().norm()),
            "b_largest": float(b.float().abs().max()),
            "d_norm": float(d.float().norm()),
            "d_mean": float(d.float().mean()),
        }
        for name, b, d in ((name, pair["b"], pair["d"]) for name, pair in contents.vectors.items())
    ]
    if plot is not None:
        with writing(plot):
            _plot(layers, plot)
    others = sum(tensor.numel() for tensor in contents.others.values())
    summary = _summary(directory, contents) | {
        "base": contents.base,
        "fingerprint": contents.fingerprint,
        "format_version": contents.format_version,
        "projections": {side: list(tensor.shape) for side, tensor in contents.projections.items()},
        "vector_parameters": sum(t.numel() for pair in contents.vectors.values() for t in pair.values()),
        "other_parameters": others,
        "config": contents.config,
    }
    if as_json:
        print_json(summary | {"layers": layers})
        return
    _print_settings(directory, contents.config)
    if FORMATS[contents.format].about:
        print_text(FORMATS[contents.format].about)
    base_class = contents.base.get("class", "of an unknown class")
    print_text(f"for {summary['base_model'] or 'a model that is not named'}, {base_class}")
    known = f", fingerprint {contents.fingerprint}" if contents.fingerprint else ""
    shapes = ", ".join(f"{side} {'x'.join(map(str, tensor.shape))}" for side, tensor in contents.projections.items())
    print_text(
        f"{len(layers)} layers, {summary['vector_parameters']:,} numbers in vectors, {others:,} in what is trained in"
        f" full, {bytes_text(summary['bytes'])}{known}{f', projections in the file: {shapes}' if shapes else ''}"
    )
    _print_layers(layers, _NORMS, ("|b|", "max |b|", "|d|", "mean d"), every=every)
    if plot is not None:
        print_text(f"picture: {plot}")


def _inspect_lora(directory: Path, contents: AdapterContents, *, every: bool, as_json: bool) -> None:
    """Show a LoRA adapter, which veratune can inspect but not load."""
    layers: list[dict[str, Any]] = [
        {
            "layer": name,
            "shapes": {which: list(tensor.shape) for which, tensor in matrices.items()},
            **{f"{which[-1].lower()}_norm": float(tensor.float().norm()) for which, tensor in sorted(matrices.items())},
        }
        for name, matrices in contents.vectors.items()
    ]
    numbers = sum(tensor.numel() for matrices in contents.vectors.values() for tensor in matrices.values())
    others = sum(tensor.numel() for tensor in contents.others.values())
    summary = _summary(directory, contents) | {
        "matrix_parameters": numbers,
        "other_parameters": others,
        "config": contents.config,
    }
    if as_json:
        print_json(summary | {"layers": layers})
        return
    _print_settings(directory, contents.config)
    print_text(FORMATS[contents.format].about)
    print_text(
        f"{len(layers)} layers of rank {contents.config.get('r')}, {numbers:,} numbers in matrices, {others:,} in"
        f" other tensors, {bytes_text(summary['bytes'])}, for {summary['base_model'] or 'a model that is not named'}"
    )
    both = [layer for layer in layers if all(key in layer for key in _LORA_NORMS)]
    _print_layers(both, _LORA_NORMS, ("|lora_A|", "|lora_B|"), every=every)


def _summary(directory: Path, contents: AdapterContents) -> dict[str, Any]:
    return {
        "adapter": str(directory),
        "kind": contents.format,
        "base_model": contents.config.get("base_model_name_or_path"),
        "bytes": contents.path.stat().st_size,
    }


def _print_settings(directory: Path, config: dict[str, Any]) -> None:
    rows = [(name, str(value)) for name, value in config.items() if value not in (None, {}, [])]
    print_table(("setting", "value"), rows, title=str(directory))


def _print_layers(layers: list[dict[str, Any]], keys: Sequence[str], header: Sequence[str], *, every: bool) -> None:
    shown = layers if every else _grouped(layers, keys)
    rows = [(x["layer"], *(f"{x[key]:.4g}" for key in keys)) for x in shown]
    print_table(("layer" if every else "layers (means)", *header), rows)


def _grouped(layers: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return means over the layers of each type."""
    return [
        {"layer": f"{name} ({len(own)})"} | {key: sum(x[key] for x in own) / len(own) for key in keys}
        for name, own in _by_type(layers).items()
    ]


def _by_type(layers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group layers whose names differ only in numbers, and remove the common prefix from the groups' names."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for layer in layers:
        groups[tuple("*" if part.isdigit() else part for part in layer["layer"].split("."))].append(layer)
    common = 0
    while len({parts[: common + 1] for parts in groups}) == 1 and all(len(parts) > common + 1 for parts in groups):
        common += 1
    return {".".join(parts[common:]): own for parts, own in groups.items()}


def _plot(layers: list[dict[str, Any]], path: Path) -> None:
    """Plot |b| and |d| over the depth of the model, one line for each type of layer."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib: pip install 'veratune[cli]' ({error})") from None
    depths = _depths([layer["layer"] for layer in layers])
    groups = _by_type(layers)
    rows = -(-len(groups) // 3)
    figure = Figure(figsize=(10, 4 + 0.2 * rows), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("b_norm", "d_norm"), ("|b|", "|d|"), strict=True):
        for number, (name, own) in enumerate(groups.items()):
            style = {"color": f"C{number % 10}", "marker": "osD^v<>p*X"[number // 10 % 10]}
            axes.plot([depths[x["layer"]] for x in own], [x[key] for x in own], label=name, **style)
        axes.set(xlabel="depth (number of the block)", title=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120, format="png")


def _depths(names: list[str]) -> dict[str, int]:
    """Return each layer's depth: the first number in its name, or a position before or after the blocks."""
    depths: dict[str, int] = {}
    last = -1
    for name in names:
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        depths[name] = number if number is not None else last + (last >= 0)
        last = max(last, depths[name])
    return depths
