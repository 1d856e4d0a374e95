"""Run what is missing, one cell after the other in this process, or on a Ray cluster."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from crow.bench.cells import Cell, Implant, Measure
from crow.bench.store import Store, compute
from crow.errors import CrowError
from crow.progress import progress_bar

Finished = Callable[[Cell, str | None], None]
"""Called with each cell that is finished, or with what went wrong with it."""


class InProcess:
    """One cell after the other. A cell that was cut off goes on where it was."""

    def run(self, cells: Sequence[Cell], store: Store, finished: Finished) -> None:
        """Run the cells, which come in an order in which each stands behind its source."""
        failed: dict[str, str] = {}
        for place, cell in enumerate(cells, start=1):
            reason = None if cell.source is None else failed.get(cell.source.key)
            if reason is None:
                source = None if cell.source is None else store.folder(cell.source)
                try:
                    with progress_bar(f"{place}/{len(cells)} {cell.label}") as advance, store.writing(cell) as folder:
                        compute(cell, folder, source, store.unfinished / cell.name, advance)
                except Exception as error:
                    reason = in_one_line(error)
            if reason is not None:
                failed[cell.key] = reason
            finished(cell, reason)


def in_one_line(error: BaseException) -> str:
    """What went wrong; an error that is not one of ours with its kind."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if isinstance(error, CrowError) else f"{type(error).__name__}: {text}"


def run(
    measures: Iterable[Measure],
    cells: Sequence[Cell],
    store: Store,
    runner: Any,
    *,
    keep_models: bool = False,
    on_finished: Finished | None = None,
) -> dict[str, str]:
    """Run the missing cells of a matrix and give up defended models on which everything is measured.

    Args:
        measures: All that is to be measured.
        cells: What is missing of it: see `crow.bench.plan.missing`.
        runner: `InProcess`, or `crow.bench.cluster.OnRay`.
        keep_models: Keep those models.

    Returns:
        By cells' keys, why they failed. The others are run all the same.
    """
    waiting: dict[str, set[str]] = {}  # by a model's cell, what is to be measured on it
    for measure in measures:
        source: Cell | None = measure
        while (source := None if source is None else source.source) is not None:
            if not store.has(measure):
                waiting.setdefault(source.key, set()).add(measure.key)
    failures: dict[str, str] = {}

    def finished(cell: Cell, reason: str | None) -> None:
        if reason is not None:
            failures[cell.key] = reason
        source = cell.source
        while isinstance(cell, Measure) and reason is None and source is not None:
            waiting[source.key].discard(cell.key)
            if not waiting[source.key] and not keep_models and not isinstance(source, Implant):
                store.drop_model(source)
            source = source.source
        if on_finished is not None:
            on_finished(cell, reason)

    store.tidy()
    runner.run(cells, store, finished)
    return failures
