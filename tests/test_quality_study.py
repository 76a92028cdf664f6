"""The quality study of `benchmarks/quality.py`: what it runs, what it may look at, and what it says of it."""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("data", "methods", "plan", "queue", "report", "schemes", "training")
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 16,
    "vocab_size": 40,
    "pad_token_id": 0,
}


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The study's modules; what their import sets in this process is undone."""
    monkeypatch.setenv("VERATUNE_CACHE", "")  # restored afterwards, whatever the import of common.py makes of it
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return SimpleNamespace(**{name: importlib.import_module(f"quality_{name}") for name in MODULES})


@pytest.fixture
def folder(quality: SimpleNamespace, tmp_path: Path) -> Path:
    """A study of two tasks that can be learned, with a random encoder."""
    from transformers import BertConfig, BertModel

    generator = torch.Generator().manual_seed(0)
    described = {}
    for name, classes in (("first", 2), ("second", 3)):
        rows = {}
        for part, count in (("train", 64), ("validation", 30), ("test", 40)):
            labels = torch.randint(classes, (count,), generator=generator)
            ids = torch.randint(10, 40, (count, 8), generator=generator)
            ids[:, 2] = 1 + labels
            rows[part] = quality.data.split(ids.tolist(), labels.tolist(), 10)
        described[name] = quality.data.write_task(tmp_path, name, classes, 2, rows)
    weights = BertModel(BertConfig(**CONFIG)).state_dict()
    quality.data.write_study(tmp_path, described, CONFIG, weights)
    return tmp_path


def two_methods(quality: SimpleNamespace) -> list[Any]:
    dense = quality.methods.Vera(quality.methods.DENSE, (1e-2, 1e-1), 0, r=8)
    blocks = quality.methods.Vera("blocks", (1e-2, 1e-1), 0, r=8, projection=quality.schemes.blocks(2, 2))
    return [dense, blocks]


def new_plan(quality: SimpleNamespace, folder: Path, methods: list[Any] | None = None, repeats: int = 2) -> Any:
    journal = quality.plan.Journal(folder / "records.jsonl")
    methods = methods if methods is not None else two_methods(quality)
    return quality.plan.Plan(quality.data.read_study(folder), methods, repeats, journal.records), journal


def run(quality: SimpleNamespace, folder: Path, *arguments: Any, **settings: Any) -> Any:
    plan, journal = new_plan(quality, folder, *arguments)
    quality.queue.run_all(plan, journal, quality.queue.Settings(folder, "cpu", **{"workers": 0, **settings}))
    return plan


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_a_study_goes_on_where_it_was(quality: SimpleNamespace, folder: Path) -> None:
    plan = run(quality, folder, None, 1)
    first = lines(folder)
    assert len(first) == 2 * 2 * (2 + 1)
    assert {line["settings"]["part"] for line in first} == {"validation", "test"}

    run(quality, folder, None, 1)
    assert lines(folder) == first

    kept, lost = first[:3] + first[4:], first[3]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    (folder / "records.jsonl").write_text(text + json.dumps(lost)[:40])  # cut off as it was written
    run(quality, folder, None, 1)
    again = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()[len(kept) + 1 :]]
    assert [line["key"] for line in again] == [lost["key"]]
    assert (again[0]["accuracy"], again[0]["loss"]) == (lost["accuracy"], lost["loss"])

    run(quality, folder, None, 2)
    more = quality.plan.read_records(folder / "records.jsonl")
    assert len(more) == 2 * 2 * (2 + 2)
    keys = {run.key: (run.seed, run.settings["projection_key"]) for run in plan._runs.values() if run.part == "test"}
    assert keys.keys() <= more.keys() and all(seed == key for seed, key in keys.values())


def test_other_settings_are_other_runs(quality: SimpleNamespace, folder: Path) -> None:
    plan, _ = new_plan(quality, folder)
    task, (method, other) = plan.study.tasks["first"], plan.methods
    keys = {
        plan.run(task, method, 0.1, 0, "test").key,
        plan.run(task, method, 0.2, 0, "test").key,
        plan.run(task, method, 0.1, 1, "test").key,
        plan.run(task, method, 0.1, 0, "validation").key,
        plan.run(plan.study.tasks["second"], method, 0.1, 0, "test").key,
        plan.run(task, other, 0.1, 0, "test").key,
        plan.run(task, quality.methods.Vera("n", (0.1,), 0, r=8, options=(("d_initial", 0.2),)), 0.1, 0, "test").key,
    }
    assert len(keys) == 7
    renamed = quality.methods.Vera("another name", (0.3,), 5, r=8)
    assert plan.run(task, renamed, 0.1, 0, "test").key in keys


class _Watched(dict[str, Any]):
    """Rows that remember which parts were asked for."""

    def __init__(self, rows: Any) -> None:
        super().__init__(rows)
        self.asked: list[str] = []

    def __getitem__(self, part: str) -> Any:
        self.asked.append(part)
        return super().__getitem__(part)


def test_rates_are_chosen_without_the_test_rows(quality: SimpleNamespace, folder: Path) -> None:
    plan, journal = new_plan(quality, folder)
    watched = _Watched(plan.study.tasks["first"].rows)
    task = quality.data.Task("first", 2, 2, "0" * 16, watched)
    bench = quality.training.Bench(plan.study, torch.device("cpu"))
    arguments = (plan.methods[0], 0.1, 0, 0)
    quality.training.train_and_score(bench, task, *arguments, "validation", math.inf, False)
    assert set(watched.asked) == {"train", "validation"}
    quality.training.train_and_score(bench, task, *arguments, "test", math.inf, False)
    assert set(watched.asked) == {"train", "validation", "test"}

    # What is chosen follows the validation rows, whatever the test rows would say.
    task, method = plan.study.tasks["first"], plan.methods[0]
    assert plan.test_runs(task, method) == []
    for rate, part, accuracy in ((1e-2, "validation", 70.0), (1e-1, "test", 99.0), (1e-2, "test", 1.0)):
        for seed in (quality.plan.RATE_SEED, 0):
            journal.append({"key": plan.run(task, method, rate, seed, part).key, "accuracy": accuracy, "loss": 0.1})
    assert plan.chosen_rate(task, method) is None
    journal.append({"key": plan.rate_runs(task, method)[1].key, "accuracy": 69.0, "loss": 0.1})
    assert plan.chosen_rate(task, method) == 1e-2
    assert {run.rate for run in plan.test_runs(task, method)} == {1e-2}


def test_no_test_run_comes_before_its_rates(quality: SimpleNamespace, folder: Path) -> None:
    plan, journal = new_plan(quality, folder, None, 3)
    order = []
    while (following := plan.next_run(set())) is not None:
        order.append(following)
        journal.append({"key": following.key, "accuracy": 50.0 + len(order) % 7, "loss": 0.5})
    assert len(order) == len({run.key for run in order}) == 2 * 2 * (2 + 3)
    assert [run.part for run in order] == ["validation"] * 8 + ["test"] * 12
    # Round by round: after a third of the test runs each method has one on each task.
    assert {(run.method.name, run.task.name) for run in order[8:12]} == {
        (method.name, task) for method in plan.methods for task in plan.study.tasks
    }


@pytest.fixture
def invented(quality: SimpleNamespace, folder: Path) -> tuple[Any, dict[tuple[str, str], list[float]]]:
    """A plan with invented results of four runs, and their accuracies."""
    plan, journal = new_plan(quality, folder, None, 4)
    generator = np.random.default_rng(1)
    accuracies = {}
    for task in plan.study.tasks.values():
        for method in plan.methods:
            for run in plan.rate_runs(task, method):
                journal.append(_record(run, 60.0 + run.rate))
            values = (80 + generator.normal(size=4)).tolist()
            accuracies[task.name, method.name] = values
            for run, value in zip(plan.test_runs(task, method), values, strict=True):
                journal.append(_record(run, value))
    return plan, accuracies


def _record(run: Any, accuracy: float) -> dict[str, Any]:
    constant = {"loss": 0.5, "trained": 1234, "device": "cpu", "torch": "2", "date": "2026-01-01T00:00:00"}
    return {"key": run.key, "accuracy": accuracy, **constant}


def test_differences_are_paired(
    quality: SimpleNamespace, invented: tuple[Any, dict[tuple[str, str], list[float]]], folder: Path
) -> None:
    plan, accuracies = invented
    dense, blocks = plan.methods
    results = quality.report.Results(plan)
    differences = {
        task: np.array(accuracies[task, blocks.name]) - np.array(accuracies[task, dense.name])
        for task in plan.study.tasks
    }
    for task, expected in differences.items():
        found = results.difference(task, blocks, dense.name)
        np.testing.assert_allclose(found.mean, expected.mean(), rtol=1e-12)
        np.testing.assert_allclose(found.error, expected.std(ddof=1) / 2, rtol=1e-12)
    mean = results.mean_difference(blocks, dense.name)
    np.testing.assert_allclose(mean.mean, np.mean(list(differences.values())), rtol=1e-12)
    errors = [values.std(ddof=1) / 2 for values in differences.values()]
    np.testing.assert_allclose(mean.error, np.hypot(*errors) / 2, rtol=1e-12)

    page, picture = folder / "page.md", folder / "records.png"
    quality.report.write(plan, page, picture)
    text = page.read_text()
    values = np.array(accuracies["second", "blocks"])
    assert f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (4)" in text
    assert f"| blocks | {differences['first'].mean():+.2f} ± {errors[0]:.2f} |" in text
    assert f"{mean.mean:+.2f} ± {mean.error:.2f}" in text and "60.0 / **60.1**" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_unpaired_runs_do_not_count(
    quality: SimpleNamespace, invented: tuple[Any, dict[tuple[str, str], list[float]]]
) -> None:
    plan, accuracies = invented
    dense, blocks = plan.methods
    del plan.records[plan.test_runs(plan.study.tasks["first"], dense)[1].key]
    found = quality.report.Results(plan).difference("first", blocks, dense.name)
    pairs = np.delete(np.array(accuracies["first", blocks.name]) - np.array(accuracies["first", dense.name]), 1)
    assert found.count == 3
    np.testing.assert_allclose(found.mean, pairs.mean(), rtol=1e-12)


def test_a_run_that_is_out_of_time_leaves_nothing(quality: SimpleNamespace, folder: Path) -> None:
    run(quality, folder, deadline=0.0)
    assert not (folder / "records.jsonl").exists()
    plan, _ = new_plan(quality, folder)
    bench = quality.training.Bench(plan.study, torch.device("cpu"))
    task = plan.study.tasks["first"]
    with pytest.raises(quality.training.OutOfTimeError):
        quality.training.train_and_score(bench, task, plan.methods[0], 0.1, 0, 0, "test", 0.0, False)


def test_workers_that_die_are_replaced(quality: SimpleNamespace, folder: Path) -> None:
    from quality_methods_double import Misbehaves

    methods = [Misbehaves("bad", (0.1,), 0), quality.methods.Head("head", (0.1,), 1)]
    run(quality, folder, methods, 1, workers=1)
    errors = {line["settings"]["task"]: line["error"] for line in lines(folder) if "error" in line}
    assert errors.keys() == {"first", "second"}
    assert "this cannot be adapted" in errors["first"] and "exit code 7" in errors["second"]
    good = [(line["settings"]["task"], line["settings"]["part"]) for line in lines(folder) if "error" not in line]
    assert sorted(good) == [(task, part) for task in ("first", "second") for part in ("test", "validation")]


def test_training_learns_and_seeds_decide_it(quality: SimpleNamespace, folder: Path) -> None:
    study = quality.data.read_study(folder)
    bench = quality.training.Bench(study, torch.device("cpu"))
    task, method = study.tasks["first"], two_methods(quality)[1]

    def losses(seed: int, key: int, epochs: int = 2) -> tuple[float, float]:
        longer = quality.data.Task("first", 2, epochs, task.digest, task.rows)
        found = quality.training.train_and_score(bench, longer, method, 0.1, seed, key, "test", math.inf, False)
        return found["train_loss"], found["loss"]

    assert losses(0, 0) == losses(0, 0)
    assert losses(0, 0) != losses(0, 1) and losses(0, 0) != losses(1, 0)
    assert losses(0, 0, epochs=30)[0] < 0.9 * losses(0, 0)[0]


def test_each_epoch_takes_every_row(quality: SimpleNamespace) -> None:
    order = quality.training.batch_order(64, 3, seed=1)
    assert order.shape == (6, 32)
    for epoch in order.view(3, 64):
        assert epoch.sort().values.tolist() == list(range(64))
    assert not torch.equal(order[0], quality.training.batch_order(64, 3, seed=2)[0])


@pytest.mark.parametrize(("g", "out"), [(4, 4), (2, 8)])
def test_blocks_are_where_they_should_be(quality: SimpleNamespace, g: int, out: int) -> None:
    from veratune.projections.schemes import SCHEMES, PerDimension

    r, width, cpu = 64, 48, torch.device("cpu")
    scheme = SCHEMES[quality.schemes.blocks(g, out)].for_layers(3, r, width, width)
    dense = PerDimension(3)
    a, b = (scheme.draw(side, range(r), width, cpu) for side in ("A", "B"))
    full_a, full_b = (dense.draw(side, range(r), width, cpu) for side in ("A", "B"))
    for k in range(r):
        for j in range(width):
            in_block, out_block = j * g // width, j * out // width
            expected = full_a[k, j].item() * math.sqrt(g) if in_block == k % g else 0.0
            assert a[k, j].item() == pytest.approx(expected, rel=1e-6)
            assert b[k, j].item() == (full_b[k, j].item() if out_block == (k + k // g) % out else 0.0)
    assert scheme.scale(r) == pytest.approx(math.sqrt(out) * dense.scale(r))


def test_every_scheme_has_the_dense_ones_variance(quality: SimpleNamespace) -> None:
    """Sums of squares that decide the size of an output, on average over ranks and outputs: 2 for A, 2 for B."""
    from veratune.projections.schemes import SCHEMES

    r, width, cpu = 64, 256, torch.device("cpu")
    methods = [method for method in quality.methods.METHODS if isinstance(method, quality.methods.Vera)]
    assert len({(method.projection, method.options) for method in methods}) >= 10
    for method in methods:
        if method.projection == "peft":
            continue
        scheme = SCHEMES[method.projection].for_layers(5, r, width, width, **dict(method.options))
        a, b = (
            scheme.structure(side, r, width).dense(scheme.draw(side, range(r), width, cpu)).double()
            for side in ("A", "B")
        )
        assert a.square().sum(1).mean().item() == pytest.approx(2.0, rel=0.15), method.name
        assert (b * scheme.scale(r)).square().sum(0).mean().item() == pytest.approx(2.0, rel=0.15), method.name
