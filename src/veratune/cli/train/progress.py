"""Show a training run's progress, and stop it cleanly on Ctrl-C."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from veratune.cli.output import error_line, is_main_process
from veratune.cli.train.metrics import TrivialAnswer, evaluated, scores_text

_QUIET_SECONDS = 15.0


class Report(TrainerCallback):
    """Prints a line for each evaluation, and progress in between: a bar on a terminal, lines elsewhere.

    Both show the loss, the tokens per second (of training alone) and the time left.

    Args:
        metric: the name of the metric that the bar shows.
        trivial: the best constant answer, to compare with.
    """

    def __init__(self, metric: str, trivial: TrivialAnswer | None = None) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not is_main_process())
        self._trivial = trivial
        self._bar: Progress | None = None
        self._bar_task: Any = None
        self._metric = metric
        self._numbers = {"loss": "", "metric": ""}
        self._first = (0.0, 0)
        self._tokens = 0
        self._training_seconds = 0.0
        self._step_began = 0.0
        self._told = -1
        self._last_sign = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar within this context if the output is a terminal, and remove it at the end."""
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._first = (time.monotonic(), int(state.global_step))
        self._tokens = -int(state.num_input_tokens_seen or 0)
        self._last_sign = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar_task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training_seconds += time.monotonic() - self._step_began
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=state.global_step, description=self._described(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise ValueError(_not_finite(logs["loss"], state.global_step))
        self._numbers["loss"] = f"loss {logs['loss']:.4f}"
        if self._bar is None and time.monotonic() - self._last_sign > _QUIET_SECONDS:
            self._last_sign = time.monotonic()
            left = self._seconds_left(state)
            self._console.print(f"step {state.global_step} of {state.max_steps}: {self._described(state)}, {left} left")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        found = evaluated(metrics or {})
        if not math.isfinite(found.get("loss", 0.0)):
            raise ValueError(_not_finite(found["loss"], state.global_step))
        if self._metric in found and self._metric != "loss":
            self._numbers["metric"] = f"{self._metric} {found[self._metric]:.4f}"
        if state.global_step == self._told:
            return
        self._told = state.global_step
        scores = scores_text(found, self._trivial)
        self._console.print(f"step {state.global_step} of {state.max_steps}: evaluation: {scores}")

    def _described(self, state: Any) -> str:
        tokens = self._tokens + int(state.num_input_tokens_seen or 0)
        rate = f"{tokens / self._training_seconds:,.0f} tokens/s" if self._training_seconds else ""
        return ", ".join(filter(None, (self._numbers["loss"], self._numbers["metric"], rate)))

    def _seconds_left(self, state: Any) -> str:
        start, first = self._first
        each = (time.monotonic() - start) / max(1, state.global_step - first)
        minutes, seconds = divmod(round(each * (state.max_steps - state.global_step)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _not_finite(loss: float, step: int) -> str:
    return (
        f"the loss is {loss} at step {step}: training has ended, and nothing was saved but earlier checkpoints. Start"
        " again with a lower --learning-rate, or --precision float32, and look for extreme values in the rows"
    )


class StopOnSignal(TrainerCallback):
    """Stops training after the current step, with a checkpoint, on Ctrl-C; a second one stops it immediately.

    SIGTERM, with which schedulers end a job, does the same.

    Attributes:
        stopped: whether that has happened.
    """

    def __init__(self) -> None:
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The epoch is not complete. An evaluation would draw random numbers that an uninterrupted run does not draw.
        if self.stopped and control.should_training_stop:
            control.should_evaluate = control.should_save = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM within this context."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            if is_main_process():
                error_line("stopping after this step, with a checkpoint; press again to stop at once, without one")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
