"""The commands, and how their errors are reported."""

import logging
import os
import sys
import warnings
from typing import Annotated, Any

try:
    import typer
except ImportError as error:  # pragma: no cover - the extra is not installed
    raise SystemExit(f"veratune's command line needs more packages: pip install 'veratune[cli]' ({error})") from None

from veratune import __version__
from veratune.cli import bank_commands, commands
from veratune.cli.errors import SettingsError
from veratune.cli.output import error_line, warning_line
from veratune.cli.train import command as train
from veratune.utils.startup import INTERRUPTED, handle_interrupts_as_usual

app = typer.Typer(
    name="veratune",
    help="Train VeRA adapters, use them, and inspect, merge, export, convert, compare and time them.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's, or typer's copy of it

# Errors that a user's files or arguments can cause: the message is enough. Others are shown with their type.
_EXPECTED = (ValueError, TypeError, OSError, ImportError)
# Messages about missing parts of packages that transformers imports, which a user can do nothing about.
_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree", "DeepSpeed")
# Messages of typer in the words of the library that checks values.
_PLAINLY = {
    "Value error, ": "",
    "Input should be a valid integer, unable to parse string as an integer": "it must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "it must be a number",
}


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options for all commands, given before the command."""


app.command("train", epilog=train.EXAMPLES)(train.train)
for command in (
    commands.predict,
    commands.chat,
    commands.inspect,
    commands.merge,
    commands.export,
    commands.convert,
    commands.diff,
    commands.bench,
    commands.doctor,
):
    app.command(command.__name__, epilog=commands.epilog(command.__name__))(command)
app.add_typer(bank_commands.app, name="bank")


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    if sys.stdout is None:
        error_line("standard output is closed")
        return 1
    given = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in given  # anywhere, as users append it to the end
    given = [argument for argument in given if argument != "--traceback"]
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
        # DeepSpeed sets its log level when it is imported, and logs to standard output.
        logging.getLogger(name).addFilter(_is_error)
    app.rich_markup_mode = "rich" if sys.stdout.isatty() else None
    try:
        handle_interrupts_as_usual()
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            result = app(given or ["--help"], standalone_mode=False, prog_name="veratune")
        sys.stdout.flush()
    except KeyboardInterrupt:
        result = INTERRUPTED
    except typer.Abort:
        error_line("stopped")
        return 1
    except BrokenPipeError:
        # The reader of the output has closed it.
        _drop_output()
        return 1
    except Exception as error:
        if traceback:
            raise
        _drop_output_that_fails()
        error_line(_told(error))
        return 2 if isinstance(error, _USAGE_ERROR | SettingsError) else 1
    if result == INTERRUPTED:  # typer returns this for a KeyboardInterrupt, too
        error_line("stopped")
        return INTERRUPTED
    if not given:
        return 2
    return result if isinstance(result, int) else 0


def _drop_output() -> None:
    """Discard the buffered output, which must not be written at exit."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


def _drop_output_that_fails() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Print warnings for users on one line each, and drop those for developers, such as deprecations."""
    if issubclass(category, UserWarning):
        warning_line(" ".join(str(message).removeprefix("veratune: ").split()))


def _told(error: Exception) -> str:
    """Return the message of an error for a user."""
    if isinstance(error, _USAGE_ERROR):
        context = error.ctx
        command = "veratune" if context is None else context.command_path
        message = " ".join(error.format_message().split()).rstrip(".")
        for theirs, plain in _PLAINLY.items():
            message = message.replace(theirs, plain)
        return f"{message}; see {command} --help"
    import torch

    from veratune.cli.directories import why_not_written

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: a smaller batch or shorter texts need less ({_first_line(error)})"
    if isinstance(error, RecursionError):
        return f"a file or a setting is nested too deeply to be read ({_first_line(error)})"
    full = why_not_written(error)
    if full is not None:
        return full
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, _EXPECTED) and str(error):
        return str(error)
    return f"{type(error).__name__}: {_first_line(error)} (veratune --traceback shows where it came from)"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
