"""Measure the share of weights that veratune and PEFT adapt, over many architectures: docs/architectures.md.

The architectures, tiny and random, come from tests/helpers/sweep_models.py, the checks from
tests/helpers/sweep_check.py.

    PYTHONPATH=src:tests/helpers python benchmarks/coverage.py
"""

import contextlib
import io
import os
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from peft.tuners.vera import VeraLayer as PeftVeraLayer
from torch import nn

from sweep_check import CHECKS, CONFIG, no_op_reference
from sweep_models import ARCHITECTURES, Architecture, call
from veratune import TargetError, VeraModel, get_peft_model
from veratune.adapters.coverage import supported

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
COMMAND = "PYTHONPATH=src:tests/helpers python benchmarks/coverage.py"


@dataclass(frozen=True)
class Row:
    """The results for one architecture.

    Attributes:
        name: its name.
        kind: what sort of model it is.
        layers: how many layers "all-linear" adapts; expert tensors count as one.
        shapes: how many distinct (in, out) these have.
        adapted: the share of the elements of all matrices that "all-linear" adapts.
        reachable: the share that can be adapted if it is named.
        peft: the share that PEFT's VeRA adapts, or None.
        peft_error: the exception of PEFT.
        failures: the checks that failed, with what they said.
        frozen: whether the new adapter gives the bits of the frozen base model, not those of the trainable one.
    """

    name: str
    kind: str
    layers: int
    shapes: int
    adapted: float
    reachable: float
    peft: float | None
    peft_error: str
    failures: dict[str, str]
    frozen: bool


def measure(name: str, architecture: Architecture) -> Row:
    """Return an architecture's row."""
    base = architecture.build()
    matrices = matrix_elements(base)
    table = supported(base)
    assert sum(info.size for info in table if info.kind != "vector") == matrices, name
    model = get_peft_model(base, CONFIG)
    layers = list(model.vera_layers().values())
    # The table of what is supported leaves a new head out, which is trained in full by default.
    default = share_by_default(architecture, matrices)
    assert abs(default - table.coverage(("all-linear",))) < 1e-9, name
    failures = failed_checks(architecture)
    peft_share, peft_error = with_peft(architecture)
    return Row(
        name,
        architecture.kind,
        len(layers),
        len({(layer.in_features, layer.out_features) for layer in layers}),
        share(model, matrices),
        table.coverage(),
        peft_share,
        peft_error,
        failures,
        no_op_reference(architecture) == "frozen",
    )


def share(model: VeraModel, matrices: int) -> float:
    """Return the share of all matrices' elements that are adapted."""
    return sum(layer.base_weight.numel() for layer in model.vera_layers().values()) / matrices


def share_by_default(architecture: Architecture, matrices: int) -> float:
    """Return that share if a new head is trained in full: of a network of convolutions nothing may be left."""
    try:
        return share(get_peft_model(architecture.build(), CONFIG.replace(modules_to_save=None)), matrices)
    except TargetError:
        return 0.0


def matrix_elements(model: nn.Module) -> int:
    """Return the number of elements of all matrices."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2)


def failed_checks(architecture: Architecture) -> dict[str, str]:
    """Return the failing checks, each with the known reason or the error."""
    failures = {}
    for check, run in CHECKS.items():
        with tempfile.TemporaryDirectory() as directory:
            try:
                run(architecture, Path(directory))
            except Exception as error:
                failures[check] = architecture.fails.get(check, f"{type(error).__name__}: {error}")
    return failures


def with_peft(architecture: Architecture) -> tuple[float | None, str]:
    """Return the share that PEFT's VeRA adapts, and the exception that it raises, also where only the call does."""
    model = architecture.build()
    matrices = matrix_elements(model)
    config = peft.VeraConfig(r=4, target_modules="all-linear")
    try:
        adapted = peft.get_peft_model(model, config)
    except Exception as error:
        return None, type(error).__name__
    # What is counted is what PEFT replaced, by identity: one layer in several places is one.
    layers = {id(module): module for module in adapted.modules() if isinstance(module, PeftVeraLayer)}
    adapted_share = sum(layer.get_base_layer().weight.numel() for layer in layers.values()) / matrices
    try:
        with torch.no_grad():
            call(adapted, architecture.inputs())
    except Exception as error:
        return adapted_share, f"{type(error).__name__} when it is called"
    return adapted_share, ""


def document(rows: list[Row]) -> str:
    """Return the text of the document."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft"))
    good = [row for row in rows if not row.failures]
    works = [row for row in rows if row.peft is not None and not row.peft_error]
    errors: dict[str, int] = {}
    for row in rows:
        if row.peft_error:
            errors[row.peft_error] = errors.get(row.peft_error, 0) + 1
    counted = ", ".join(f"{error} {count}" for error, count in sorted(errors.items(), key=lambda item: -item[1]))
    frozen = [row.name for row in rows if row.frozen]
    bad = [f"- {row.name}, {check}: {reason}." for row in rows for check, reason in row.failures.items()]
    excused = [
        f"- {name}: `{each.pattern}`: {each.reason}."
        for name, architecture in ARCHITECTURES.items()
        for each in architecture.unreached
    ]
    lines = [
        "# Architectures",
        "",
        filled(f"Made by `{COMMAND}` with {versions} on a CPU, in float32. Do not edit it by hand."),
        "",
        filled(
            f"**{len(good)} of {len(rows)} architectures pass all checks.** `all-linear` adapts"
            f" {percent(mean([row.adapted for row in rows]))} of the elements of all matrices on average;"
            f" {percent(mean([row.reachable for row in rows]))} can be adapted if they are named. PEFT's VeRA with"
            f" `all-linear` runs on {len(works)} of the {len(rows)} and adapts"
            f" {percent(mean([row.peft or 0.0 for row in works]))}"
            f" there (veratune on the same: {percent(mean([row.adapted for row in works]))})."
            + (f" On the others it raises: {counted}." if counted else "")
            + " For PEFT, the only checks are that it adapts the model and that a call raises no error."
        ),
        "",
        filled(
            "Every model is tiny and random, so the percentages show which kinds of weights are adapted, not how the"
            " weights of a large model are distributed: token embeddings take a different share there. The checks, in"
            " `tests/test_sweep.py`: a new adapter leaves the outputs identical to the bit; one training step changes"
            " all vectors of all layers; a saved adapter on a fresh model gives the same bits; merging changes the"
            " outputs by at most 1e-5 of their largest value; unmerging restores all weights bit for bit; unloading"
            " leaves no veratune module in the model."
        ),
        "",
        "## Results",
        "",
        filled(
            "Percentages refer to the elements of all parameters with two dimensions or more. A stack of expert"
            " matrices counts as one layer. No head is trained in full (`modules_to_save=[]`), so classifier heads are"
            " adapted; output heads of language models are adapted only by name."
        ),
        "",
        "| architecture | kind | layers | shapes | all-linear | by name | PEFT | checks |",
        "|---|---|--:|--:|--:|--:|--:|---|",
        *(
            f"| {row.name} | {row.kind} | {row.layers} | {row.shapes} | {percent(row.adapted)} |"
            f" {percent(row.reachable)} | {peft_cell(row)} | {checks_cell(row)} |"
            for row in rows
        ),
        "",
        "## Failures",
        "",
        *(bad or ["None."]),
        "",
        "## Layers that the check does not reach",
        "",
        filled(
            "These layers are adapted but cannot learn in the call that the check makes. The check fails if one of them"
            " learns, or if any other layer does not."
        ),
        "",
        *excused,
        "",
        "## Bits",
        "",
        filled(
            "An adapter freezes the base model, and torch computes some products differently if a weight requires"
            " gradients, even under `no_grad`, so freezing alone may change the last bits. With a new adapter,"
            f" {len(rows) - len(frozen)} architectures give the bits of the original model, and {len(frozen)} those of"
            " the frozen model" + (f" ({', '.join(frozen)})." if frozen else ".")
        ),
        "",
    ]
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return a paragraph in lines."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def mean(shares: list[float]) -> float:
    """Return the mean, 0 of nothing."""
    return sum(shares) / max(1, len(shares))


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f} %"


def peft_cell(row: Row) -> str:
    """Return PEFT's cell of the table."""
    if row.peft is None:
        return row.peft_error
    return percent(row.peft) + (f", {row.peft_error}" if row.peft_error else "")


def checks_cell(row: Row) -> str:
    """Return the checks' cell of the table."""
    return f"{', '.join(row.failures)} failed" if row.failures else "passed"


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, architecture in ARCHITECTURES.items():
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            rows.append(measure(name, architecture))
    DOCUMENT.write_text(document(rows), encoding="utf-8")
    print(f"{sum(not row.failures for row in rows)} of {len(rows)} architectures pass: {DOCUMENT}")


if __name__ == "__main__":
    main()
