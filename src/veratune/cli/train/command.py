"""`veratune train`: fine-tune a model on rows of text, with one command."""

from pathlib import Path
from typing import Annotated, Any

import typer

from veratune.cli.directories import writing
from veratune.cli.train.run import run
from veratune.cli.train.settings import SETTINGS_NAME, SettingsError, TrainSettings, read_settings

EXAMPLES = """Examples:

veratune train --model MODEL --data reviews.csv --output run

veratune train --model MODEL --data scores.parquet --task regression --label-column score --output run

veratune train --model MODEL --data chats.jsonl --task causal-lm --text-column messages --output run

veratune train --model MODEL --data OWNER/NAME --split train --eval-split validation --output run

veratune train --config run/train.yaml --seed 1 --output run-1

veratune train --resume run
"""

_ROWS, _ADAPTER, _TRAINING, _RUN = "The rows", "The adapter", "The training", "The run"


def train(
    model: Annotated[
        str | None, typer.Option(help="Base model: a directory or a hub name.", rich_help_panel=_RUN)
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="New directory for all that comes out.", rich_help_panel=_RUN)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="sequence-classification (the default), regression, token-classification or causal-lm.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of settings, such as an earlier run's train.yaml; options go before it.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a run: its output directory.", rich_help_panel=_RUN)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random. [default: 0]", rich_help_panel=_RUN)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Training rows: a CSV, TSV, JSONL or Parquet file, or a data set's hub name.", rich_help_panel=_ROWS
        ),
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a data set on the hub.", rich_help_panel=_ROWS)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Part of a data set on the hub to train with. [default: train]", rich_help_panel=_ROWS),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Rows to evaluate with; else some of the training rows.", rich_help_panel=_ROWS),
    ] = None,
    eval_split: Annotated[
        str | None, typer.Option(help="Part of a data set on the hub to evaluate with.", rich_help_panel=_ROWS)
    ] = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the training rows to evaluate with. [default: 0.1]", rich_help_panel=_ROWS),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column of the text, of words, or of a chat. [default: text]", rich_help_panel=_ROWS),
    ] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of a second text.", rich_help_panel=_ROWS)
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the label. [default: label]", rich_help_panel=_ROWS)
    ] = None,
    chat_loss: Annotated[
        str | None,
        typer.Option(help="What is learned of a chat: assistant (the default) or all.", rich_help_panel=_ROWS),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens after which a text is cut. [default: 256]", rich_help_panel=_ROWS)
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="VeRA's rank. [default: 256]", rich_help_panel=_ADAPTER)
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Layers: all-linear (the default), or names with commas.", rich_help_panel=_ADAPTER),
    ] = None,
    d_initial: Annotated[
        float | None, typer.Option(help="Where d starts. [default: 0.1]", rich_help_panel=_ADAPTER)
    ] = None,
    vera_dropout: Annotated[
        float | None, typer.Option(help="Dropout on the adapter's input. [default: 0]", rich_help_panel=_ADAPTER)
    ] = None,
    projection_prng_key: Annotated[
        int | None, typer.Option(help="Key of the random projections. [default: 0]", rich_help_panel=_ADAPTER)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Of the vectors. [default: 0.02]", rich_help_panel=_TRAINING),
    ] = None,
    head_learning_rate: Annotated[
        float | None,
        typer.Option(
            "--head-learning-rate", "--head-lr", help="Of a new head. [default: 0.004]", rich_help_panel=_TRAINING
        ),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of both. [default: 0]", rich_help_panel=_TRAINING)] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help="Share of the steps with a growing rate. [default: 0.06]", rich_help_panel=_TRAINING),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="How often all rows are seen. [default: 3]", rich_help_panel=_TRAINING)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps after which to end all the same.", rich_help_panel=_TRAINING)
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations, with checkpoints; else once an epoch.", rich_help_panel=_TRAINING
        ),
    ] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(help="Evaluations without a better one to stop after; else never.", rich_help_panel=_TRAINING),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows in a step. [default: 16]", rich_help_panel=_TRAINING)
    ] = None,
    gradient_accumulation: Annotated[
        int | None,
        typer.Option(help="Steps added up before the optimizer's. [default: 1]", rich_help_panel=_TRAINING),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 (the default) or bfloat16.", rich_help_panel=_TRAINING)
    ] = None,
) -> None:
    """Fine-tune a model with VeRA on rows of text.

    Ctrl-C ends it with a checkpoint; --resume goes on to the same result.
    """
    options = {
        name: value for name, value in locals().items() if name not in ("config", "resume") and value is not None
    }
    if "target_modules" in options and options["target_modules"] != "all-linear":
        options["target_modules"] = [name.strip() for name in options["target_modules"].split(",")]
    settings = _settings(options, config, resume)
    with writing(Path(settings.output)):
        run(settings, resuming=resume is not None)


def _settings(options: dict[str, Any], config: Path | None, resume: Path | None) -> TrainSettings:
    if resume is not None:
        if options or config is not None:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in options or ["config"])
            raise SettingsError(f"--resume goes on with the settings in {resume / SETTINGS_NAME}: leave out {given}")
        return TrainSettings(**{**read_settings(resume / SETTINGS_NAME), "output": str(resume)})
    values = ({} if config is None else read_settings(config)) | options
    return TrainSettings(**{"model": "", "data": "", "output": "", **values})
