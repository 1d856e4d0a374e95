"""Progress bars with an estimate, for trainings and evaluations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

console = Console(stderr=True)


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs; yields a function that takes what is done and the total."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
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
