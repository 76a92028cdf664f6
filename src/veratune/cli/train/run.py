"""A training run: from settings to an adapter, results and curves."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import typer

from veratune.adapters.target import TargetError
from veratune.checkpoint.card import add_training
from veratune.checkpoint.files import read_json, write_json
from veratune.checkpoint.formats import ADAPTER_FOLDER
from veratune.cli.directories import check_new
from veratune.cli.errors import SettingsError
from veratune.cli.models import GIVE_BASE, base_of, in_full, load_tokenizer, loaded, tokenizer_of, usable_length
from veratune.cli.options import SETTINGS_NAME
from veratune.cli.output import bytes_text, is_main_process, print_table, print_text, process_count, warning_line
from veratune.cli.train.chat_rows import with_chats
from veratune.cli.train.curves import draw_curves
from veratune.cli.train.data import Examples, check_columns, digest, label_names, looks_measured, split
from veratune.cli.train.metrics import TrivialAnswer, evaluated, scores_text, trivial_answer
from veratune.cli.train.preflight import check_vocabulary, steps_of_run, unknown_tokens, warnings_of
from veratune.cli.train.reading import Row, read_rows
from veratune.cli.train.settings import CLASSIFICATION, TrainSettings
from veratune.cli.train.start import adapted_model, classes_of_adapter, start_of
from veratune.cli.train.tasks import Task, make_task
from veratune.model import VeraModel
from veratune.training import trained_parts
from veratune.utils.text import counted

RESULTS_NAME, CURVES_NAME, ROWS_NAME = "results.json", "curves.png", "rows.json"
CHECKPOINTS_NAME = "checkpoints"

# Runs of at most this many steps store every step's loss; longer ones store means over several steps.
_MOST_LOGGED = 2000
# Settings that are only paths: a run may be resumed after its files have moved.
_PLACES = {"model", "data", "eval_data", "output"}


def run(settings: TrainSettings, *, resuming: bool) -> None:
    """Train with the given settings.

    Everything that can be wrong with the settings, the rows and the model is found before the training begins.
    """
    settings = dataclasses.replace(settings, model=in_full(settings.model))
    output = Path(settings.output)
    if resuming and (output / RESULTS_NAME).exists():
        print_text(f"{output} is finished: its adapter is {output / ADAPTER_FOLDER}")
        return
    checkpoint = last_checkpoint(output) if resuming else None
    if not resuming and is_main_process():
        otherwise = "choose another --output"
        if (output / SETTINGS_NAME).is_file():
            otherwise += f", or resume the run there: veratune train --resume {output}"
        check_new(output, otherwise)
    start = start_of(settings.model)
    base = settings.model if start is None else base_of(start, None)
    train_rows, eval_rows = _rows(settings)
    labels = []
    if settings.task in CLASSIFICATION:
        labels = label_names(train_rows, eval_rows, settings, None if start is None else classes_of_adapter(start))
    tokenizer = load_tokenizer(base) if start is None else tokenizer_of(start, base)
    remedy = GIVE_BASE if start is None else f"put back the base model of {start}, or train from another base model"
    length = usable_length(settings.max_length, base, tokenizer, remedy=remedy)
    settings = dataclasses.replace(settings, max_length=length)
    identity = {"sha256": digest(train_rows, eval_rows), "labels": labels, "settings": dataclasses.asdict(settings)}
    if resuming:
        _check_same(output, identity)
    task = make_task(dataclasses.replace(settings, model=base), tokenizer, labels)
    _set_seed(settings.seed)
    try:
        model = adapted_model(*loaded(base, task.model), start, settings.vera_config())
    except TargetError as error:
        raise SettingsError(str(error)) from None
    examples = (
        Examples(settings.data, train_rows, task.encode),
        Examples(settings.eval_data or settings.data, eval_rows, task.encode),
    )
    if not len(examples[0]) or not len(examples[1]):
        raise ValueError(
            "no rows are left to train or to evaluate with:"
            f" max_length={settings.max_length} cuts off everything to be learned"
        )
    for part in examples:
        check_vocabulary(model.base_model, part, base)
    steps = steps_of_run(settings, len(examples[0]))
    trainable, total = model.get_nb_trainable_parameters()
    for warning in warnings_of(settings, examples, labels, trainable, steps):
        warning_line(warning)
    unknown = unknown_tokens(tokenizer, examples[0])
    if unknown is not None:
        warning_line(unknown)
    if settings.task == "sequence-classification" and looks_measured(train_rows, settings):
        warning_line(
            f"the {len(labels)} classes in {settings.label_column!r} are all numbers, and their order is ignored:"
            " --task regression learns numbers"
        )
    if not resuming and is_main_process():
        settings.write(output)
        write_json(output / ROWS_NAME, identity)
    print_text(
        f"{base if start is None else f'{start} on {base}'}: {total:,} parameters, {trainable:,} of them trained in"
        f" {counted(len(model.vera_layers()), 'layer')}; {counted(len(examples[0]), 'row')} to train with,"
        f" {len(examples[1]):,} to evaluate with; {counted(steps, 'step')}"
    )
    trivial = trivial_answer(settings, examples, labels)
    trainer, seconds = _train(settings, task, model, examples, steps, checkpoint, trivial)
    history = list(trainer.state.log_history)
    metrics = evaluated(trainer.evaluate())  # of the best checkpoint, which is loaded at this point
    if settings.task == "causal-lm":
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
    model.save_pretrained(output / ADAPTER_FOLDER, is_main_process=is_main_process())
    if not is_main_process():
        return
    tokenizer.save_pretrained(output / ADAPTER_FOLDER)
    size = (output / ADAPTER_FOLDER / "adapter_model.safetensors").stat().st_size
    draw_curves(history, output / CURVES_NAME)
    best = trainer.state.best_global_step
    results = {
        "metrics": metrics,
        "trivial": None if trivial is None else dataclasses.asdict(trivial),
        "labels": labels,
        "best_step": best,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "trained_parameters": trainable,
        "adapter_bytes": size,
        "history": history,
    }
    add_training(
        output / ADAPTER_FOLDER, _facts(settings, metrics, trivial, examples, best or trainer.state.global_step)
    )
    write_json(output / RESULTS_NAME, results)
    _print_scores(f"step {best or trainer.state.global_step}", metrics, trivial)
    print_text(f"adapter ({bytes_text(size)}): {output / ADAPTER_FOLDER}")
    for line in _how_to_use(settings, output):
        print_text(line)


def _print_scores(title: str, metrics: dict[str, float], trivial: TrivialAnswer | None) -> None:
    """Print the final metrics next to the score of a constant answer."""
    if trivial is None:
        print_table((title, "value"), [(name, f"{value:.4f}") for name, value in metrics.items()])
        return
    rows = [
        (name, f"{value:.4f}", f"{trivial.score:.4f}" if name == trivial.metric else "")
        for name, value in metrics.items()
    ]
    print_table((title, "value", f"always {trivial.answer}"), rows)
    if not trivial.is_beaten_by(metrics):
        warning_line(f"the adapter does no better than always answering {trivial.answer}: it has learned nothing")


def _facts(
    settings: TrainSettings,
    metrics: dict[str, float],
    trivial: TrivialAnswer | None,
    examples: tuple[Examples, Examples],
    step: int,
) -> dict[str, str]:
    """Return what the adapter's card says about its training."""
    return {
        "task": settings.task,
        "rows": f"{len(examples[0]):,} to train with, {len(examples[1]):,} to evaluate with",
        "step": f"{step:,}",
        "learning rate": f"{settings.learning_rate:g} for the vectors, {settings.head_learning_rate:g} for a new head",
        "batch size": f"{settings.batch_size * settings.gradient_accumulation * process_count():,}",
        "evaluation": scores_text(metrics, trivial),
    }


def _how_to_use(settings: TrainSettings, output: Path) -> list[str]:
    """Return the commands that use what was trained."""
    use = (
        f"veratune chat {output}"
        if settings.task == "causal-lm"
        else f"veratune predict {output} --data {_sample(settings)}"
    )
    return [
        "to use it:",
        f"  {use}",
        f"  veratune merge {output} NEW_DIRECTORY",
        f'  VeraModel.from_pretrained(base_model, "{output}")',
    ]


def _sample(settings: TrainSettings) -> str:
    """Return what `--data` may be, as an example."""
    return "rows.jsonl" if settings.task == "token-classification" else "rows.csv"


def last_checkpoint(output: Path) -> Path:
    """Return the newest complete checkpoint: one with a trainer's state, which is written last.

    Raises:
        ValueError: no checkpoint is complete.
    """
    found = [
        path
        for path in (output / CHECKPOINTS_NAME).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and (path / "trainer_state.json").is_file()
    ]
    if not found:
        raise ValueError(f"{output} has no checkpoint to resume from: start a new run in another directory")
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _rows(settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    if settings.subset is not None and Path(settings.data).exists():
        raise SettingsError("subset only applies to a data set on the hub: leave it out when data is a local file")
    rows = read_rows(settings.data, settings.subset, settings.split, settings.encoding)
    rows = with_chats(settings.data, rows, settings)
    check_columns(settings.data, rows, settings)
    if settings.eval_data is None and settings.eval_split is None:
        return split(rows, settings)
    if settings.eval_split is not None and Path(settings.eval_data or settings.data).exists():
        raise SettingsError("eval_split names a part of a data set on the hub: give --eval-data for a file")
    path = settings.eval_data or settings.data
    others = read_rows(path, settings.subset, settings.eval_split or settings.split, settings.encoding)
    others = with_chats(path, others, settings)
    check_columns(path, others, settings)
    return rows, others


def _check_same(output: Path, identity: dict[str, Any]) -> None:
    """Raise ValueError unless rows and settings are those of the run to resume."""
    begun = read_json(output / ROWS_NAME)
    before, now = begun.get("settings", {}), identity["settings"]
    changed = [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in _PLACES and before.get(name) != value
    ]
    if changed:
        raise SettingsError(
            f"{output / SETTINGS_NAME} is not what the run began with: {'; '.join(changed)}. Restore it, or start"
            " a new run in another directory"
        )
    if begun.get("sha256") != identity["sha256"]:
        raise ValueError(f"the rows are not those that {output} began with: start a new run in another directory")


def _set_seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _train(
    settings: TrainSettings,
    task: Task,
    model: VeraModel,
    examples: tuple[Examples, Examples],
    steps: int,
    checkpoint: Path | None,
    trivial: TrivialAnswer | None,
) -> tuple[Any, float]:
    """Train, and return the trainer and the seconds it took.

    Raises:
        typer.Exit: it was interrupted.
    """
    from veratune.cli.train.progress import Report, StopOnSignal

    output = Path(settings.output)
    report, signal_stop = Report(task.best, trivial), StopOnSignal()
    trainer = _trainer(settings, task, model, examples, steps, [report, signal_stop])
    start = time.monotonic()
    try:
        with signal_stop.listening(), report.shown():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        print_text(_how_to_go_on(output, trainer.state.global_step))
        raise typer.Exit(1) from None
    if signal_stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        print_text(_how_to_go_on(output, trainer.state.global_step))
        raise typer.Exit(1)
    return trainer, time.monotonic() - start


def _how_to_go_on(output: Path, step: int) -> str:
    try:
        saved = last_checkpoint(output).name.rpartition("-")[2]
    except ValueError:
        return f"stopped at step {step}, before the first checkpoint: start a new run in another directory"
    since = "" if int(saved) == step else f", the last checkpoint is of step {saved}"
    return f"stopped at step {step}{since}. To resume: veratune train --resume {output}"


def _trainer(
    settings: TrainSettings,
    task: Task,
    model: VeraModel,
    examples: tuple[Examples, Examples],
    steps: int,
    callbacks: list[Any],
) -> Any:
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

    from veratune.integrations.trainer import VeraTrainer

    by_steps = settings.eval_steps > 0
    arguments = TrainingArguments(
        output_dir=str(Path(settings.output) / CHECKPOINTS_NAME),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        warmup_steps=round(settings.warmup * steps),
        learning_rate=settings.learning_rate,
        use_cpu=not torch.accelerator.is_available(),  # bf16 is refused on a CPU unless it is requested explicitly
        bf16=settings.precision == "bfloat16",
        eval_strategy="steps" if by_steps else "epoch",
        save_strategy="steps" if by_steps else "epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=task.best,
        greater_is_better=task.greater_is_better,
        logging_steps=-(-steps // _MOST_LOGGED),
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
        eval_steps=settings.eval_steps if by_steps else None,
        save_steps=settings.eval_steps if by_steps else 500,  # unused, and 500 is its default
    )
    # The groups of parameter_groups, without its warnings about learning rates, which were printed before.
    groups = zip(trained_parts(model), (settings.learning_rate, settings.head_learning_rate), strict=True)
    optimizer = torch.optim.AdamW(
        [{"params": part, "lr": rate, "weight_decay": settings.weight_decay} for part, rate in groups if part]
    )
    if settings.early_stopping:
        callbacks = [*callbacks, EarlyStoppingCallback(settings.early_stopping)]
    trainer = VeraTrainer(
        model,
        arguments,
        data_collator=task.collator,
        train_dataset=examples[0],
        eval_dataset=examples[1],
        compute_metrics=task.metrics,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    # Only language models divide their loss by the accumulated batch's token count; transformers assumes that all do.
    trainer.model_accepts_loss_kwargs = settings.task == "causal-lm"
    trainer.remove_callback(PrinterCallback)  # the report prints these lines
    return trainer
