"""What must hold for every architecture in `sweep_models`, whatever its layers are."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reference import randomise
from sweep_models import Architecture, call
from veratune import VeraConfig, VeraModel, get_peft_model

CONFIG = VeraConfig(r=4, target_modules="all-linear", modules_to_save=[])
RATE = 1e-2
NOISE = 1e-5
TOLERANCE = 1e-5


def adapted(architecture: Architecture) -> VeraModel:
    """A model with an adapter whose vectors are random, the same at every call."""
    model = get_peft_model(architecture.build(), CONFIG)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        randomise(model, scale=0.5)
    return model


def check_no_op(architecture: Architecture, _: Path) -> None:
    """A new adapter changes no bit of the outputs."""
    assert no_op_reference(architecture), "the outputs are not those of the model, neither as it was nor frozen"


def no_op_reference(architecture: Architecture) -> str:
    """Return which base model's outputs are those with a new adapter: the one "as it was", or "frozen", or neither.

    An adapter freezes the base model, and torch folds some products in another way where a weight requires gradients,
    under no_grad too: freezing alone may change last bits.
    """
    base, inputs = architecture.build(), architecture.inputs()
    with torch.no_grad():
        references = {"as it was": call(base, inputs)}
        references["frozen"] = call(base.requires_grad_(False), inputs)
        outputs = call(get_peft_model(base, CONFIG), inputs)
    for values in references.values():
        assert all(value.isfinite().all() for value in values.values())
    return next((name for name, values in references.items() if _equal(outputs, values)), "")


def check_training(architecture: Architecture, _: Path) -> None:
    """A step changes all vectors of all layers but those that are named as not reached, and these not at all."""
    model = adapted(architecture).train()
    before = {name: [v.detach().clone() for v in layer.vectors("default").values()] for name, layer in _layers(model)}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, eps=NOISE, weight_decay=0.0
    )
    outputs = [output for output in call(model, architecture.inputs()).values() if output.requires_grad]
    assert outputs, "no output has a gradient"
    generator = torch.Generator().manual_seed(3)
    loss = torch.stack([_loss(output, generator) for output in outputs]).sum()
    loss.backward()
    optimizer.step()
    moved: dict[str, list[bool]] = {}
    for name, layer in _layers(model):
        for old, new in zip(before[name], layer.vectors("default").values(), strict=True):
            for key, change in _rows(name, new.detach() - old, stacked=new.ndim == 2):
                # AdamW's first step is the rate times g / (g + eps): rounding errors in place of a gradient give less.
                moved.setdefault(key, []).append(bool(change.abs().max() > RATE / 2))
    excused = {key for key in moved if any(re.fullmatch(u.pattern, key) for u in architecture.unreached)}
    still = {key for key, both in moved.items() if not all(both)}
    assert not still - excused, f"these have not learned: {sorted(still - excused)}"
    learned = {key for key in excused if any(moved[key])}
    assert not learned, f"these have learned, though they are said to be not reached: {sorted(learned)}"
    for u in architecture.unreached:
        assert any(re.fullmatch(u.pattern, key) for key in moved), f"nothing is called {u.pattern}"


def check_files(architecture: Architecture, directory: Path) -> None:
    """A saved adapter on a fresh base computes the same bits."""
    model, inputs = adapted(architecture), architecture.inputs()
    model.save_pretrained(directory)
    with torch.no_grad():
        expected = call(model, inputs)
        assert _equal(call(VeraModel.from_pretrained(architecture.build(), directory), inputs), expected)


def check_merging(architecture: Architecture, _: Path) -> None:
    """Merging keeps the outputs, unmerging restores the weights' bits, unloading leaves nothing of veratune."""
    base, inputs = architecture.build(), architecture.inputs()
    with torch.no_grad():
        plain = call(base, inputs)
        model = adapted(architecture)
        expected = call(model, inputs)
        assert max(_relative(expected[name], plain[name]) for name in plain) > 1e-3, "the adapter does nothing"
        model.merge_adapter()
        _assert_close(call(model, inputs), expected)
        model.unmerge_adapter()
        assert _equal(call(model, inputs), expected)
        restored = model.unload().state_dict()
        for name, value in base.state_dict().items():
            assert _bits(restored[name]).equal(_bits(value)), f"{name} has other bits after unmerging"
        merged = adapted(architecture).merge_and_unload()
        _assert_close(call(merged, inputs), expected)
    left = [name for name, module in merged.named_modules() if type(module).__module__.startswith("veratune")]
    assert not left, f"these are veratune's: {left}"
    assert type(merged) is type(base)


CHECKS: dict[str, Callable[[Architecture, Path], None]] = {
    "no-op": check_no_op,
    "training": check_training,
    "files": check_files,
    "merging": check_merging,
}


def _layers(model: VeraModel) -> list[tuple[str, nn.Module]]:
    return list(model.vera_layers().items())


def _rows(name: str, vector: Tensor, *, stacked: bool) -> list[tuple[str, Tensor]]:
    return [(f"{name}[{row}]", part) for row, part in enumerate(vector)] if stacked else [(name, vector)]


def _loss(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return a loss with a gradient of its own size for every element of an output."""
    weights = torch.randn(output.shape, generator=generator)
    return (output * weights).sum() / output.detach().abs().max()


def _bits(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).view(torch.uint8)


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def _equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[name], value) for name, value in expected.items()
    )


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = _relative(actual[name], value)
        assert difference <= TOLERANCE, f"{name} differs by {difference:.1e} of its largest value"
