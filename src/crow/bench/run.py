"""Run what is missing, one cell after the other in this process, or on a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from crow.bench.cells import Cell, Implant, Measure
from crow.bench.store import Store, compute
from crow.errors import CrowError, Unfit
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
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:  # a panic of tokenizers is no Exception
                    reason = in_one_line(error)
            if reason is not None:
                failed[cell.key] = reason
            finished(cell, reason)


REFUSED = "can't be had: "
"""How reasons begin that are no failure: a defense that does not fit, which no second try will change."""


def in_one_line(error: BaseException) -> str:
    """What went wrong; an error that is not one of ours with its kind."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, Unfit):
        return f"{REFUSED}{text.removeprefix(REFUSED)}"
    return text if isinstance(error, CrowError) else f"{type(error).__name__}: {text}"


def run(
    measures: Sequence[Measure],
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

    Raises:
        UsageError: another run is at work in the store.
    """
    models: dict[str, Cell] = {}
    waiting: dict[str, set[str]] = {}  # by a model's cell, what is to be measured on it
    for measure in measures:
        for source in _stands_on(measure):
            models[source.key] = source
            waiting.setdefault(source.key, set())
            if not store.has(measure):
                waiting[source.key].add(measure.key)
    failures: dict[str, str] = {}
    ran: set[str] = set()

    def drop_if_done(source: Cell) -> None:
        if not waiting[source.key] and not keep_models and not isinstance(source, Implant):
            store.drop_model(source)

    def finished(cell: Cell, reason: str | None) -> None:
        ran.add(cell.key)
        if reason is not None:
            failures[cell.key] = reason
        elif isinstance(cell, Measure):
            for source in _stands_on(cell):
                waiting[source.key].discard(cell.key)
                drop_if_done(source)
        if on_finished is not None:
            on_finished(cell, reason)

    with store.owned():
        for model in models.values():  # which a killed run may have left
            drop_if_done(model)
        try:
            runner.run(cells, store, finished)
        finally:
            known = {key: why for key, why in store.failures.items() if key not in ran} | failures
            if known != store.failures:
                store.failures = known
    return failures


def _stands_on(cell: Cell) -> Iterator[Cell]:
    source = cell.source
    while source is not None:
        yield source
        source = source.source
