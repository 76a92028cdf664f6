"""Ctrl-C while the command is still importing packages: one line instead of a traceback.

Imported first of all, since importing torch takes most of the time. In a program that imports veratune it does nothing.
"""

import os
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C has ended, as shells have it."""


def _stop(number: int, frame: FrameType | None) -> None:
    # Nothing is there yet that would have to be put in order, and packages take the exception for their own.
    os.write(2, b"veratune: stopped\n")
    os._exit(INTERRUPTED)


def _is_command() -> bool:
    if sys.argv[0] == "-m":  # as long as the package is imported whose __main__ will run
        return "-mveratune" in sys.orig_argv or ("-m", "veratune") in pairwise(sys.orig_argv)
    return Path(sys.argv[0]).stem == "veratune"


def handle_interrupts_as_usual() -> None:
    """Give Ctrl-C back its usual effect, now that the command can handle it."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _stop)
