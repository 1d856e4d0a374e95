"""Cells on a Ray cluster: what a cell made travels to those that stand on it, so that no file system need be shared."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from crow.bench.cells import Cell
from crow.bench.run import Finished, in_one_line
from crow.bench.store import Store, compute
from crow.errors import UsageError
from crow.progress import progress_bar

Files = dict[str, bytes]


class OnRay:
    """Cells as tasks of a Ray cluster, each when what it stands on is there. A dead worker's cell is tried again.

    Args:
        address: Of the cluster, as `ray.init` takes it: `auto`, `local`, or `ray://HOST:PORT`.
        cpus: What a cell takes of a node; so is `gpus`.
        retries: How often a cell is tried again whose worker died.

    Raises:
        UsageError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str, *, cpus: float = 2, gpus: float = 0, retries: int = 3) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("--ray needs Ray: pip install 'crow-llm[ray]'") from error
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UsageError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
        self._ray: Any = ray
        self._task = ray.remote(_compute).options(num_cpus=cpus, num_gpus=gpus, max_retries=retries)

    def run(self, cells: Sequence[Cell], store: Store, finished: Finished) -> None:
        """Run the cells, which come in an order in which each stands behind its source."""
        made: dict[str, Any] = {}
        by_task: dict[Any, Cell] = {}
        for cell in cells:
            source = cell.source
            if source is not None and source.key not in made:
                made[source.key] = self._ray.put(_packed(store.folder(source)))
            task = self._task.remote(cell, None if source is None else made[source.key])
            made[cell.key] = task
            by_task[task] = cell
        del made  # Ray keeps what waiting tasks take, and lets go of the rest
        with progress_bar("Cells on the cluster") as advance:
            advance(0, len(cells))
            waiting = list(by_task)
            while waiting:
                (task,), waiting = self._ray.wait(waiting)
                cell, reason = by_task.pop(task), None
                try:
                    with store.writing(cell) as folder:
                        _unpack(self._ray.get(task), folder)
                except Exception as error:
                    reason = in_one_line(_cause(error))
                finished(cell, reason)
                advance(len(cells) - len(waiting), len(cells))


def _compute(cell: Cell, source: Files | None) -> Files:
    """A cell, on a worker."""
    with TemporaryDirectory() as place:
        folder, scratch, of_source = (Path(place) / name for name in ("made", "scratch", "source"))
        folder.mkdir()
        if source is not None:
            of_source = of_source / (cell.source.name if cell.source is not None else "")
            _unpack(source, of_source)
        compute(cell, folder, None if source is None else of_source, scratch, lambda done, total: None)
        return _packed(folder)


def _packed(folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _unpack(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _cause(error: Any) -> BaseException:
    """What a task raised, out of what Ray puts around it."""
    while isinstance(getattr(error, "cause", None), BaseException):
        error = error.cause
    return error  # type: ignore[no-any-return]
