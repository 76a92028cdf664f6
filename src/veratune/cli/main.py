"""The commands, and what becomes of errors."""

import sys
from typing import Annotated

try:
    import typer
except ImportError as error:  # pragma: no cover - a message for who has not installed the extra
    raise SystemExit(f"veratune's command line needs more packages: pip install 'veratune[cli]' ({error})") from None

from veratune import __version__
from veratune.cli import adapters, bank, doctor, inspecting, train
from veratune.cli.output import error_line

app = typer.Typer(
    name="veratune",
    help="VeRA adapters: train them, look at them, merge, export, convert and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What a user's files or words can cause: one line is enough. Anything else is a fault of ours.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or typer's own copy of it
_EXPECTED = (ValueError, TypeError, OSError, ImportError, KeyError)


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
    """Options of all commands; they stand before the command."""


app.command("train")(train.train)
app.command("inspect")(inspecting.inspect)
app.command("merge")(adapters.merge)
app.command("export")(adapters.export)
app.command("convert")(adapters.convert)
app.command("diff")(adapters.diff)
app.command("doctor")(doctor.doctor)
app.add_typer(bank.app, name="bank")


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for an error, 2 for a wrong call."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        result = app(given, standalone_mode=False, prog_name="veratune")
    except _USAGE_ERROR as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except (typer.Abort, KeyboardInterrupt):
        error_line("stopped")
        return 1
    except _EXPECTED as error:
        if "--traceback" in given:
            raise
        error_line(str(error) or type(error).__name__)
        return 1
    return result if isinstance(result, int) else 0
