"""`veratune train`: fine-tune a model on a file of rows, with one command."""

import importlib.util
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from veratune.checkpoint.files import read_json, write_json
from veratune.cli.data import Examples, Row, check_columns, digest, label_names, read_rows, split
from veratune.cli.models import load_tokenizer
from veratune.cli.output import bytes_text, print_table, print_text, warning_line
from veratune.cli.settings import SETTINGS_NAME, TrainSettings, read_settings
from veratune.cli.tasks import Task, make_task
from veratune.config import VeraConfig
from veratune.model import get_peft_model
from veratune.training import parameter_groups

RESULTS_NAME, CURVES_NAME, ROWS_NAME = "results.json", "curves.png", "rows.json"
ADAPTER_NAME, CHECKPOINTS_NAME = "adapter", "checkpoints"


def train(
    model: Annotated[str | None, typer.Option(help="Base model: a directory or a hub name.")] = None,
    data: Annotated[str | None, typer.Option(help="Training rows: a CSV, TSV, JSONL or Parquet file.")] = None,
    output: Annotated[str | None, typer.Option(help="New directory for all that comes out.")] = None,
    task: Annotated[
        str | None, typer.Option(help="sequence-classification, regression, token-classification or causal-lm.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Rows to evaluate with; else some of the training rows.")
    ] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="How many of them.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text, of words, or of a chat.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Column of a second text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="VeRA's rank.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Layers: all-linear, or names with commas.")] = None,
    d_initial: Annotated[float | None, typer.Option(help="Where d starts.")] = None,
    vera_dropout: Annotated[float | None, typer.Option(help="Dropout on the adapter's input.")] = None,
    projection_prng_key: Annotated[int | None, typer.Option(help="Key of the random projections.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Of the vectors.")] = None,
    head_learning_rate: Annotated[float | None, typer.Option("--head-lr", help="Of a new head.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of both.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps with a growing rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How often all rows are seen.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a step.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Steps added up before the optimizer's.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens after which a text is cut.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    early_stopping: Annotated[int | None, typer.Option(help="Evaluations without a better one to stop after.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options go before it.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a run: its output directory.")] = None,
) -> None:
    """Fine-tune a model with VeRA on a file of rows."""
    options = {
        name: value for name, value in locals().items() if name not in ("config", "resume") and value is not None
    }
    if "target_modules" in options and options["target_modules"] != "all-linear":
        options["target_modules"] = [name.strip() for name in options["target_modules"].split(",")]
    run(_settings(options, config, resume), resuming=resume is not None)


def _settings(options: dict[str, Any], config: Path | None, resume: Path | None) -> TrainSettings:
    if resume is not None:
        if options or config is not None:
            given = ", ".join(options) or "config"
            raise ValueError(f"--resume goes on with the settings in {resume / SETTINGS_NAME}: leave out {given}")
        return TrainSettings(**{**read_settings(resume / SETTINGS_NAME), "output": str(resume)})
    values = ({} if config is None else read_settings(config)) | options
    return TrainSettings(**{"model": "", "data": "", "output": "", **values})


def run(settings: TrainSettings, *, resuming: bool) -> None:
    """Train as the settings say.

    Everything that can be wrong with the settings, the rows and the model is found before the training begins.
    """
    output = Path(settings.output)
    checkpoints = sorted((output / CHECKPOINTS_NAME).glob("checkpoint-*"))
    if resuming and not checkpoints:
        raise ValueError(f"{output} has no checkpoint to go on from: start the run anew, in another directory")
    if not resuming and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: choose another directory, or --resume {output}")
    train_rows, eval_rows = _rows(settings)
    labels = []
    if settings.task in ("sequence-classification", "token-classification"):
        labels = label_names(train_rows, eval_rows, settings)
    rows_digest = digest(train_rows, eval_rows)
    if resuming:
        if (output / RESULTS_NAME).exists():
            print_text(f"{output} is finished: its adapter is {output / ADAPTER_NAME}")
            return
        if read_json(output / ROWS_NAME).get("sha256") != rows_digest:
            raise ValueError(f"the rows are not those that {output} began with: start the run anew, elsewhere")
    tokenizer = load_tokenizer(settings.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    task = make_task(settings, tokenizer, labels)
    _set_seed(settings.seed)
    model = get_peft_model(
        task.model(),
        VeraConfig(
            r=settings.rank,
            target_modules=settings.target_modules,
            d_initial=settings.d_initial,
            vera_dropout=settings.vera_dropout,
            projection_prng_key=settings.projection_prng_key,
            task_type=task.task_type,
        ),
    )
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < settings.max_length:
        warning_line(f"texts are cut after {positions} tokens: {settings.model} has no more positions")
        settings.max_length = positions
    _warn_of_what_would_fail(settings)
    examples = Examples(train_rows, task.encode), Examples(eval_rows, task.encode)
    settings.write(output)
    write_json(output / ROWS_NAME, {"sha256": rows_digest, "labels": labels})
    trainable, total = model.get_nb_trainable_parameters()
    print_text(
        f"{settings.model}: {total:,} parameters, {trainable:,} of them trained in {len(model.vera_layers())} layers;"
        f" {len(train_rows):,} rows to train with, {len(eval_rows):,} to evaluate with"
    )
    trainer, signal_stop = _trainer(settings, task, model, examples, output)
    start = time.monotonic()
    with signal_stop.listening():
        trainer.train(resume_from_checkpoint=True if resuming else None)
    if signal_stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        print_text(f"stopped at step {trainer.state.global_step}. To go on: veratune train --resume {output}")
        raise typer.Exit(1)
    metrics = {
        name.removeprefix("eval_"): value
        for name, value in trainer.evaluate().items()
        if isinstance(value, float) and not name.endswith(("runtime", "per_second"))
    }
    if settings.task == "causal-lm":
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
    if not math.isfinite(metrics["loss"]):
        raise ValueError(
            f"the loss is {metrics['loss']}: nothing was saved but the checkpoints. A lower learning_rate may help"
        )
    model.save_pretrained(output / ADAPTER_NAME)
    tokenizer.save_pretrained(output / ADAPTER_NAME)
    size = (output / ADAPTER_NAME / "adapter_model.safetensors").stat().st_size
    history = trainer.state.log_history
    write_json(
        output / RESULTS_NAME,
        {
            "metrics": metrics,
            "labels": labels,
            "best_checkpoint": trainer.state.best_model_checkpoint,
            "steps": trainer.state.global_step,
            "seconds": time.monotonic() - start,
            "trained_parameters": trainable,
            "adapter_bytes": size,
            "history": history,
        },
    )
    _draw(history, output / CURVES_NAME)
    print_table(("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics.items()])
    print_text(f"{output / ADAPTER_NAME}: {bytes_text(size)}")


def _rows(settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    rows = read_rows(settings.data)
    check_columns(settings.data, rows, settings)
    if settings.eval_data is None:
        return split(rows, settings)
    others = read_rows(settings.eval_data)
    check_columns(settings.eval_data, others, settings)
    return rows, others


def _set_seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _warn_of_what_would_fail(settings: TrainSettings) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        warning_line("there will be no picture of the curves, since matplotlib is missing: pip install 'veratune[cli]'")
    if settings.learning_rate < 1e-3:
        warning_line(
            f"learning_rate={settings.learning_rate} is low for VeRA, whose vectors want about 1e-2: it may not learn"
        )
    if settings.precision == "bfloat16" and not torch.cuda.is_available():
        warning_line("bfloat16 is slower than float32 on many a CPU")


def _trainer(
    settings: TrainSettings, task: Task, model: Any, examples: tuple[Examples, Examples], output: Path
) -> tuple[Any, Any]:
    from transformers import EarlyStoppingCallback, TrainingArguments

    from veratune.cli.progress import Report, StopOnSignal
    from veratune.integrations.trainer import VeraTrainer

    steps = math.ceil(len(examples[0]) / (settings.batch_size * settings.gradient_accumulation))
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS_NAME),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        warmup_steps=round(settings.warmup * steps * settings.epochs),
        learning_rate=settings.learning_rate,
        bf16=settings.precision == "bfloat16",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=task.best,
        greater_is_better=task.greater_is_better,
        logging_steps=max(1, steps // 20),
        include_num_input_tokens_seen="all",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.learning_rate, settings.head_learning_rate, settings.weight_decay)
    )
    signal_stop = StopOnSignal()
    callbacks: list[Any] = [Report(), signal_stop]
    if settings.early_stopping:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping))
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
    _keep_quiet(trainer)
    return trainer, signal_stop


def _keep_quiet(trainer: Any) -> None:
    """Leave out transformers' own printing of each log entry."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _draw(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the training loss and what was evaluated over the steps, where matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            left.plot(*zip(*points, strict=True), label=label, marker="o" if name == "eval_loss" else None)
    left.set(title="loss", xlabel="step")
    left.legend()
    measured = {
        name
        for entry in history
        for name in entry
        if name.startswith("eval_") and name != "eval_loss" and not name.endswith(("runtime", "per_second"))
    }
    for name in sorted(measured):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        right.plot(*zip(*points, strict=True), label=name.removeprefix("eval_"), marker="o")
    right.set(title="evaluation", xlabel="step")
    if measured:
        right.legend()
    figure.savefig(path, dpi=120)
