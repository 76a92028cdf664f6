"""`veratune inspect`: a model's layers and what VeRA would train in them, or what an adapter has learned."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from veratune.checkpoint.files import WEIGHTS_NAME, CheckpointError
from veratune.checkpoint.native import is_native, read_native
from veratune.cli.models import is_adapter, load_model
from veratune.cli.output import bytes_text, print_json, print_table, print_text
from veratune.config import VeraConfig
from veratune.model import get_peft_model
from veratune.supported import supported


def inspect(
    place: Annotated[str, typer.Argument(help="A model or an adapter: a directory, or a model's name on the hub.")],
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank that the numbers for a model are for.")] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens of a batch, for the routes.")] = 4096,
    every: Annotated[bool, typer.Option("--all", help="Show every weight or layer, not groups of them.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of an adapter's vectors to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's layers grouped by shape, or an adapter's configuration and vectors."""
    if is_adapter(place):
        _inspect_adapter(Path(place), every=every, plot=plot, as_json=as_json)
    elif plot is not None:
        raise ValueError(f"--plot shows an adapter's vectors, and {place} is no adapter")
    else:
        _inspect_model(place, rank, tokens, every=every, as_json=as_json)


# A model


def _inspect_model(place: str, rank: int, tokens: int, *, every: bool, as_json: bool) -> None:
    model = load_model(place, weights=False)
    table = supported(model)
    adapted = get_peft_model(model, VeraConfig(r=rank, target_modules="all-linear", modules_to_save=[]))
    layers = adapted.vera_layers()
    trained = sum(vector.numel() for layer in layers.values() for vector in layer.vectors("default"))
    widths = {(c.projection.side, c.projection.width) for x in layers.values() for c in x.slots["default"].corners}
    projections = sum(rank * width * 4 for _, width in widths)
    routes = {r.layer: str(r.chosen.plan) for r in adapted.explain_routes(tokens, device=torch.device("cpu"))}
    total = sum(parameter.numel() for parameter in adapted.base_model.parameters()) - trained
    summary = {
        "model": place,
        "class": type(model).__name__,
        "parameters": total,
        "rank": rank,
        "adapted_layers": len(layers),
        "trained_parameters": trained,
        "projection_bytes_float32": projections,
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
        groups: Counter[tuple[str, str, str, str, str]] = Counter()
        for info in table:
            if info.kind != "vector":
                layer = info.name.removesuffix(".weight")
                route = routes.get(layer) or routes.get(info.name) or "-"
                shape = "x".join(map(str, info.shape))
                groups[info.kind, info.module, shape, info.by or f"nothing: {info.why_not}", route] += 1
        rows = [(str(count), *group) for group, count in groups.items()]
        print_table(("count", "kind", "module", "shape", "adapted by", f"route at {tokens} tokens"), rows, title=place)
    print_text(
        f"{summary['class']}, {total:,} parameters. All linear layers at r={rank}: {len(layers)} layers, {trained:,}"
        f" trained parameters ({bytes_text(4 * trained)} in a file), projections of {bytes_text(projections)} in"
        f" float32; {100 * table.coverage(('all-linear',)):.1f} % of all matrices' elements,"
        f" {100 * table.coverage():.1f} % with those that have to be named"
    )


# An adapter


def _inspect_adapter(directory: Path, *, every: bool, plot: Path | None, as_json: bool) -> None:
    path = directory / WEIGHTS_NAME
    if not is_native(path):
        raise CheckpointError(f"{path} is not in veratune's own format: veratune convert reads PEFT's")
    loaded, header, _ = read_native(directory)
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
        for name, (b, d) in loaded.vectors.items()
    ]
    if plot is not None:
        _plot(layers, plot)
    others = sum(t.numel() for tensors in loaded.saved.values() for t in tensors.values())
    others += sum(bias.numel() for bias in loaded.biases.values())
    summary: dict[str, Any] = {
        "adapter": str(directory),
        "bytes": path.stat().st_size,
        "fingerprint": header["fingerprint"],
        "format_version": header["format_version"],
        "vector_parameters": sum(b.numel() + d.numel() for b, d in loaded.vectors.values()),
        "other_parameters": others,
        "config": loaded.config.to_dict(),
    }
    if as_json:
        print_json(summary | {"layers": layers})
        return
    config = [(name, str(value)) for name, value in loaded.config.to_dict().items() if value not in (None, {}, [])]
    print_table(("setting", "value"), config, title=str(directory))
    print_text(
        f"{len(layers)} layers, {summary['vector_parameters']:,} numbers in vectors, {others:,} in what is trained in"
        f" full, {bytes_text(summary['bytes'])}, fingerprint {header['fingerprint']}"
    )
    shown = layers if every else _grouped(layers)
    rows = [(x["layer"], *(f"{x[key]:.4g}" for key in ("b_norm", "b_largest", "d_norm", "d_mean"))) for x in shown]
    print_table(("layer" if every else "layers (means)", "|b|", "max |b|", "|d|", "mean d"), rows)


def _grouped(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over the layers whose names end alike."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for layer in layers:
        groups[_type(layer["layer"])].append(layer)
    keys = ("b_norm", "b_largest", "d_norm", "d_mean")
    return [
        {"layer": f"{name} ({len(own)})"} | {key: sum(x[key] for x in own) / len(own) for key in keys}
        for name, own in groups.items()
    ]


def _type(name: str) -> str:
    """Return a layer's name without what comes before the last number in it."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or name


def _plot(layers: list[dict[str, Any]], path: Path) -> None:
    """Draw |b| and |d| over the layers of each type, in the model's order."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib: pip install 'veratune[cli]' ({error})") from None
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for layer in layers:
        groups[_type(layer["layer"])].append(layer)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("b_norm", "d_norm"), ("|b|", "|d|"), strict=True):
        for name, own in groups.items():
            axes.plot(range(len(own)), [x[key] for x in own], marker="o", label=name)
        axes.set(xlabel="layer of this type, in the model's order", title=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
