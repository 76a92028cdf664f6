"""What is seen of a training run: progress, and an orderly stop by Ctrl-C."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_QUIET_SECONDS = 15.0


class Report(TrainerCallback):
    """A bar with loss, tokens per second and time left on a terminal, and a line for each evaluation everywhere."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = (0.0, 0)
        self._told = -1
        self._last_sign = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = (time.monotonic(), int(state.num_input_tokens_seen or 0))
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self._bar is None and logs and "loss" in logs and time.monotonic() - self._last_sign > _QUIET_SECONDS:
            self._last_sign = time.monotonic()
            self._console.print(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}")
        if self._bar is not None and logs and "loss" in logs:
            seconds = time.monotonic() - self._started[0]
            tokens = int(state.num_input_tokens_seen or 0) - self._started[1]
            self._bar.update(
                self._task,
                completed=state.global_step,
                description=f"loss {logs['loss']:.4f}, {tokens / seconds:.0f} tokens/s",
            )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        numbers = [
            f"{name.removeprefix('eval_')} {value:.4f}"
            for name, value in (metrics or {}).items()
            if name.startswith("eval_") and not name.endswith(("runtime", "per_second", "_time"))
        ]
        if state.global_step == self._told:
            return
        self._told = state.global_step
        self._console.print(f"step {state.global_step} of {state.max_steps}: {', '.join(numbers)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class StopOnSignal(TrainerCallback):
    """Ends training after the step in hand, with a checkpoint, when Ctrl-C is pressed; a second one ends it at once.

    Attributes:
        stopped: whether that has happened.
    """

    def __init__(self) -> None:
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # What ends here is not the epoch. An evaluation would draw random numbers that the whole run does not draw.
        if self.stopped and control.should_training_stop:
            control.should_evaluate = control.should_save = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to Ctrl-C within this context."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
