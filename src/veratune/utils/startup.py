"""Handle Ctrl-C while the command is still importing packages: print one line instead of a traceback.

This module must be imported first, because importing torch takes most of the time. It has no effect in programs that
import veratune.
"""

import os
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
"""The exit code of a command stopped by Ctrl-C, as in shells."""


def _stop(number: int, frame: FrameType | None) -> None:
    # There is nothing to clean up yet, and packages that are being imported may swallow a KeyboardInterrupt.
    os.write(2, b"veratune: stopped\n")
    os._exit(INTERRUPTED)


def _is_command() -> bool:
    if sys.argv[0] == "-m":  # while the package is imported, before its __main__ runs
        return "-mveratune" in sys.orig_argv or ("-m", "veratune") in pairwise(sys.orig_argv)
    return Path(sys.argv[0]).stem == "veratune"


def handle_interrupts_as_usual() -> None:
    """Restore the default SIGINT handler, now that the command can handle KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _stop)
