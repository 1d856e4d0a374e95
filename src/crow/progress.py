"""Progress bars with an estimate, for trainings and evaluations."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from crow.errors import printable
from crow.files import write_text

console = Console(stderr=True)

SILENCE = 30.0
"""Seconds from one line of progress to the next, where there is no terminal to draw a bar on."""


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar, or in a log a line now and then, while the block runs.

    Yields a function that takes what is done and the total.
    """
    text = printable(text)  # a matrix from a stranger names its cells
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(text, total=None)
        told = time.monotonic()

        def advance(done: int, total: int) -> None:
            nonlocal told
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - told >= SILENCE:
                told = time.monotonic()
                left = bar.tasks[task].time_remaining
                estimate = "" if left is None else f", about {timedelta(seconds=round(left))} left"
                console.print(f"{text}: {done} of {total}{estimate}", markup=False, highlight=False)

        yield advance
        if bar.tasks[task].total is None:  # what was done has no parts to tell of
            bar.update(task, completed=1, total=1)


def summed(on_progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """A function of what was done since its last call, that calls one of all that is done and the total."""
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if on_progress is not None:
            on_progress(done, total)

    return advance


class TrainingProgress(TrainerCallback):
    """Reports what a trainer does before its first step, and then its steps, to a function of done and total."""

    def __init__(self, advance: Callable[[int, int], None]) -> None:
        self.advance = advance

    def on_prepare(self, done: int, total: int) -> None:
        """Batches that `CrowTrainer` sees before its first step."""
        self.advance(done, total)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step, state.max_steps)


class OfRun(TrainerCallback):
    """Says beside a training's checkpoints which run they are of, so that no other one goes on from them."""

    FILE = "run.txt"

    def __init__(self, run: str) -> None:
        self.run = run

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_text(Path(args.output_dir, self.FILE), self.run)
