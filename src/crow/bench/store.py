"""What is finished: each cell's outcome in a folder that is named by its content."""

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from crow.bench.cells import MODEL, Cell, Measure
from crow.errors import UsageError
from crow.files import atomic_directory, write_json

CELL_FILE = "cell.json"


class Store:
    """A folder of finished cells, and of what unfinished ones go on from.

    Args:
        folder: Made when the first cell is finished.
    """

    def __init__(self, folder: Path) -> None:
        self.cells, self.unfinished = folder / "cells", folder / "unfinished"
        self._failures = folder / "failures.json"
        self._lock = FileLock(folder / ".lock")

    def folder(self, cell: Cell) -> Path:
        return self.cells / cell.name

    def has(self, cell: Cell) -> bool:
        """Whether the cell need not be run again for what was measured, or written about it."""
        return (self.folder(cell) / CELL_FILE).is_file()

    def serves(self, cell: Cell) -> bool:
        """Whether other cells can start from it."""
        return self.has(cell) and (isinstance(cell, Measure) or (self.folder(cell) / MODEL).is_dir())

    @contextmanager
    def writing(self, cell: Cell) -> Iterator[Path]:
        """Yield a folder that becomes the cell's when the block ends without an error."""
        with atomic_directory(self.folder(cell), overwrite=True) as folder:
            yield folder
        shutil.rmtree(self.unfinished / cell.name, ignore_errors=True)

    def drop_model(self, cell: Cell) -> None:
        """Give up the model, and keep what is written about it."""
        model = self.folder(cell) / MODEL
        if model.is_dir():
            dropped = self.cells / f".{cell.name}.dropped"
            model.rename(dropped)  # at once, so that no part of it can be taken for the whole
            shutil.rmtree(dropped, ignore_errors=True)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Keep other runs out, and remove what killed ones left beside the cells, and of those that they finished.

        Raises:
            UsageError: another run is at work there.
        """
        self.cells.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(f"another crow bench is at work in {self.cells.parent}: wait for it") from error
        try:
            whole = (*self.cells.glob(f"*/{MODEL}"), *self.cells.glob(f"{Measure.kind}-*/{CELL_FILE}"))
            for left in (*self.cells.glob(".*"), *(self.unfinished / part.parent.name for part in whole)):
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            self._lock.release()

    @property
    def failures(self) -> dict[str, str]:
        """By cells' keys, why they failed when they were run last."""
        return dict(json.loads(self._failures.read_text("utf-8"))) if self._failures.is_file() else {}

    @failures.setter
    def failures(self, reasons: dict[str, str]) -> None:
        write_json(self._failures, reasons)


def compute(cell: Cell, folder: Path, source: Path | None, scratch: Path, advance: Callable[[int, int], None]) -> None:
    """Run a cell into `folder`, and say there what it was, how long it took and how much memory."""
    resumed = scratch.is_dir() and any(scratch.iterdir())
    scratch.mkdir(parents=True, exist_ok=True)
    _reset_peak_memory()
    started = time.perf_counter()
    cell.run(folder, source, scratch, advance)
    about: dict[str, Any] = {
        "label": cell.label,
        "facts": cell.facts(),
        "source": None if cell.source is None else cell.source.name,
        # Of a run that went on from another's part it is not known what the whole would take
        "seconds": None if resumed else time.perf_counter() - started,
        "peak_memory_bytes": None if resumed else _peak_memory(),
    }
    write_json(folder / CELL_FILE, about)


def _reset_peak_memory() -> None:
    gc.collect()  # the trainer of the cell before is in circles, and holds its model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak becomes what it holds now


def _peak_memory() -> int | None:
    """Of the process since the reset, or of the GPU where there is one; `None` where the system doesn't tell."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if peak is None else 1024 * int(peak)
