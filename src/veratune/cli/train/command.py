"""`veratune train`: fine-tune a model on rows of text, with one command."""

import inspect
from pathlib import Path
from typing import Any

import typer

from veratune.cli.errors import SettingsError
from veratune.cli.options import SETTINGS_NAME
from veratune.cli.train.fields import flag, options_of, parameter, parameters_of
from veratune.cli.train.settings import PANELS, TrainSettings, read_settings

EXAMPLES = """Examples:

veratune train --model MODEL --data reviews.csv --output run

veratune train --model MODEL --data scores.parquet --task regression --label-column score --output run

veratune train --model MODEL --data chats.jsonl --task causal-lm --text-column messages --output run

veratune train --model MODEL --data OWNER/NAME --split train --eval-split validation --output run

veratune train --config run/train.yaml --seed 1 --output run-1

veratune train --model run --data more.csv --output run-2

veratune train --resume run
"""


def train(*, config: Path | None = None, resume: Path | None = None, **given: Any) -> None:
    """Fine-tune a model with VeRA on rows of text.

    Ctrl-C saves a checkpoint and stops; --resume then gives the same result as an uninterrupted run.
    """
    options = {}
    for name, option in options_of(TrainSettings).items():
        if given.get(name) is not None:
            options[name] = given[name] if option.parse is None else option.parse(given[name])
    from veratune.cli.directories import writing
    from veratune.cli.train.run import run

    settings = _settings(options, config, resume)
    with writing(Path(settings.output)):
        run(settings, resuming=resume is not None)


def _signature() -> inspect.Signature:
    """Return the signature from which typer makes options: the settings, and two files that contain settings."""
    files = {
        "config": "YAML file of settings, such as an earlier run's train.yaml; options override it.",
        "resume": "Resume a run: its output directory.",
    }
    parameters = parameters_of(TrainSettings)
    parameters += [
        parameter(name, Path, typer.Option(help=text, rich_help_panel=PANELS[0])) for name, text in files.items()
    ]
    return inspect.Signature(
        sorted(parameters, key=lambda found: PANELS.index(found.annotation.__metadata__[0].rich_help_panel))
    )


train.__signature__ = _signature()  # type: ignore[attr-defined]


def _settings(options: dict[str, Any], config: Path | None, resume: Path | None) -> TrainSettings:
    if resume is not None:
        if options or config is not None:
            given = ", ".join(flag(name) for name in options or ["config"])
            raise SettingsError(f"--resume uses the settings in {resume / SETTINGS_NAME}: leave out {given}")
        return TrainSettings(**{**read_settings(resume / SETTINGS_NAME), "output": str(resume)})
    from veratune.cli.train.start import with_adapters_settings

    values = ({} if config is None else read_settings(config)) | options
    return with_adapters_settings({"model": "", "data": "", "output": "", **values})
