"""The command line: `veratune --help`."""

from veratune.cli.main import main

__all__ = ["main"]
