"""Loss curves on a bfloat16 base: rounded gradients, exact ones, PEFT's VeRA, and all in float32.

    python benchmarks/gradients_training.py --data .study

Every variant trains the same vectors from the same start on the same batches, without dropout: MiniLM's encoder with
PEFT's projections (r = 256, all linear layers) and a float32 head on the mean of its outputs. The encoder's weights are
those that bfloat16 can represent, also in float32, so that curves differ by what is rounded in computing alone. The
folder of rows and weights is the quality study's (`python benchmarks/quality.py prepare`).
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import plots
import veratune
from common import Benchmark, Case, Table, new_case, progress
from quality_data import PAD, Rows, Study, read_study
from quality_training import schedule, trimmed
from veratune.ops import planning

RANK, KEY = 256, 0
RATE, HEAD_RATE = 5e-3, 4e-3
BATCH, SCORED_ROWS = 8, 256
TASK = "rotten_tomatoes"
FLOAT32, ROUNDED, EXACT, PEFT = "float32 base", "bfloat16, rounded", "bfloat16, exact", "bfloat16, PEFT VeRA"
WINDOW = 20


@contextmanager
def exact_share(share: float) -> Iterator[None]:
    """Make gradients exact wherever they add at most this share to a step: -inf is never, inf always."""
    before = planning.EXACT_SHARE
    planning.EXACT_SHARE = share
    planning.route_table.cache_clear()
    try:
        yield
    finally:
        planning.EXACT_SHARE = before
        planning.route_table.cache_clear()


def with_veratune(encoder: nn.Module) -> nn.Module:
    config = veratune.VeraConfig(
        r=RANK, target_modules="all-linear", projection="peft", projection_prng_key=KEY, save_projection=False
    )
    return veratune.get_peft_model(encoder, config)


def with_peft(encoder: nn.Module) -> nn.Module:
    names = ["query", "key", "value", "dense"]
    return peft.get_peft_model(encoder, peft.VeraConfig(r=RANK, target_modules=names, projection_prng_key=KEY))


VARIANTS: dict[str, tuple[torch.dtype, float, Callable[[nn.Module], nn.Module]]] = {
    FLOAT32: (torch.float32, 0.03, with_veratune),
    ROUNDED: (torch.bfloat16, -math.inf, with_veratune),
    EXACT: (torch.bfloat16, math.inf, with_veratune),
    PEFT: (torch.bfloat16, 0.03, with_peft),
}


def encoder_of(study: Study, classes: int, dtype: torch.dtype) -> nn.Module:
    """Return the encoder without its pooler, without dropout, with weights that bfloat16 can represent."""
    encoder = study.new_model(classes, torch.device("cpu")).bert
    encoder.pooler = None
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return encoder.to(torch.bfloat16).to(dtype).requires_grad_(False)


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)
        drawn = torch.empty(classes, width).normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.head.weight.copy_(drawn)
            self.head.bias.zero_()

    def forward(self, token_ids: Tensor) -> Tensor:
        mask = (token_ids != PAD).long()
        hidden = self.encoder(input_ids=token_ids, attention_mask=mask).last_hidden_state.float()
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def train(study: Study, variant: str, steps: int, seed: int) -> Case:
    """Train one variant, and return its losses and test accuracy."""
    dtype, share, adapt = VARIANTS[variant]
    task = study.tasks[TASK]
    with exact_share(share):
        adapted = adapt(encoder_of(study, task.classes, dtype))
        vectors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        assert all(vector.dtype == torch.float32 for vector in vectors)
        model = Classifier(adapted, study.config["hidden_size"], task.classes, seed).eval()
        optimizer = torch.optim.AdamW(
            [{"params": vectors, "lr": RATE}, {"params": list(model.head.parameters()), "lr": HEAD_RATE}],
            weight_decay=0.0,
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        rows = task.rows["train"]
        generator = torch.Generator().manual_seed(seed)
        batches = torch.randint(len(rows), (steps, BATCH), generator=generator)
        losses = []
        for chosen, factor in zip(batches, schedule(steps).tolist(), strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = F.cross_entropy(model(trimmed(rows.token_ids[chosen])), rows.labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        test_loss = score(model, task.rows["test"])
    key = f"{variant}, seed {seed}"
    return new_case(key, variant=variant, seed=seed, steps=steps, losses=losses, test_loss=test_loss)


def score(model: nn.Module, rows: Rows) -> float:
    """Return the mean loss of the first rows."""
    with torch.no_grad():
        logits = torch.cat([model(trimmed(ids)) for ids in rows.token_ids[:SCORED_ROWS].split(64)])
        return F.cross_entropy(logits, rows.labels[:SCORED_ROWS]).item()


def distance(losses: list[float], reference: list[float]) -> float:
    """Return the mean over the steps of the difference of two losses."""
    return statistics.fmean(abs(a - b) for a, b in zip(losses, reference, strict=True))


def tables(cases: list[Case]) -> list[Table]:
    """Return the mean final loss, the test loss, and how far the curves are from float32's and from each other."""
    seeds = sorted({case["seed"] for case in cases})
    found = {(case["variant"], case["seed"]): case for case in cases}
    rows = []
    for variant in VARIANTS:
        own = [found[variant, seed] for seed in seeds if (variant, seed) in found]
        if not own:
            continue
        last = [statistics.fmean(case["losses"][-WINDOW:]) for case in own]
        test = [case["test_loss"] for case in own]
        apart = [
            distance(case["losses"], found[FLOAT32, case["seed"]]["losses"])
            for case in own
            if (FLOAT32, case["seed"]) in found
        ]
        rows.append((variant, _spread(last, 3), _spread(test, 3), f"{statistics.fmean(apart):.4f}" if apart else "-"))
    between = [
        distance(found[FLOAT32, a]["losses"], found[FLOAT32, b]["losses"])
        for a, b in itertools.combinations(seeds, 2)
        if (FLOAT32, a) in found and (FLOAT32, b) in found
    ]
    if between:
        rows.append((f"{FLOAT32}, two seeds", "-", "-", f"{statistics.fmean(between):.4f}"))
    steps = max(case["steps"] for case in cases)
    title = f"{TASK}, MiniLM, r = {RANK}, {steps} steps, {len(seeds)} seeds (spread: smallest to largest)"
    header = (
        "",
        f"loss, last {WINDOW} steps",
        f"loss, {SCORED_ROWS} test rows",
        "mean distance of losses to float32's",
    )
    return [Table(title, header, rows)]


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def plot(cases: list[Case], path: Path) -> None:
    """Draw the smoothed curves of every seed, and their distance to float32's."""
    seeds = sorted({case["seed"] for case in cases})
    figure, panels = plots.panels(len(seeds), width=5)
    for panel, seed in zip(panels, seeds, strict=True):
        for index, variant in enumerate(VARIANTS):
            losses = next((c["losses"] for c in cases if (c["variant"], c["seed"]) == (variant, seed)), None)
            if losses is not None:
                smooth = [statistics.fmean(losses[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(losses))]
                panel.plot(smooth, color=plots.CYCLE[index], label=variant, linewidth=1.2)
        panel.set_title(f"seed {seed}")
        panel.set_xlabel("step")
        panel.set_ylabel(f"loss, mean of {WINDOW} steps")
        panel.legend()
    plots.save(figure, path)


BENCHMARK = Benchmark("gradients_training", tables, plot=plot)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path(".study"), help="the quality study's folder")
    parser.add_argument("--steps", type=int, help="default: 200; quick: 20")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; quick: 0")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all")
    options = BENCHMARK.parse(parser)
    study = read_study(options.data)
    steps = options.steps or (20 if options.quick else 200)
    for seed in options.seeds or ([0] if options.quick else [0, 1, 2]):
        cases = []
        for variant in options.variants or VARIANTS:
            progress(f"gradients_training: {variant}, seed {seed}")
            cases.append(train(study, variant, steps, seed))
        BENCHMARK.finish(cases, options.output)


if __name__ == "__main__":
    main()
