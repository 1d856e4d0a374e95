"""A matrix on a real Ray of this machine, with two workers of which one is killed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from crow.bench.cells import Cell, Measure
from crow.bench.cluster import OnRay
from crow.bench.matrix import CONFIGS, Matrix
from crow.bench.plan import entries, missing
from crow.bench.run import REFUSED, InProcess, run
from crow.bench.store import Store
from crow.errors import UsageError

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    # What else runs on this machine is not Ray's to judge
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112, as Ray spells it
    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, configure_logging=False)
    yield OnRay("local", cpus=1)
    ray.shutdown()


def matrix(llama_folder: Path, **changes: Any) -> Matrix:
    small = {"attacks": ["badnets/sentiment"], "relearn": [], "models": [str(llama_folder)]}
    return Matrix.read(yaml.safe_load(CONFIGS["smoke"].read_text("utf-8")) | small | changes)


def answers(measures: list[Measure], store: Store) -> list[str]:
    return [(store.folder(measure) / "figures.answers.jsonl").read_text() for measure in measures]


def test_a_killed_worker_changes_nothing(cluster: OnRay, llama_folder: Path, tmp_path: Path) -> None:
    measures = [entry.measure for entry in entries(matrix(llama_folder))]
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    cells = missing(measures, here)
    assert run(measures, cells, here, InProcess()) == {}
    killed: list[int] = []

    def kill_a_worker(cell: Cell, reason: str | None) -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in psutil.process_iter(["cmdline"]):
                if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::_compute"):
                    process.kill()
                    killed.append(process.pid)
                    break

    assert run(measures, cells, there, cluster, on_finished=kill_a_worker) == {}
    assert killed
    assert {path.name for path in there.cells.iterdir()} == {path.name for path in here.cells.iterdir()}
    for one, other in zip(answers(measures, here), answers(measures, there), strict=True):
        assert one == other


def test_a_cell_that_fails_says_why_and_so_does_what_stands_on_it(
    cluster: OnRay, llama_folder: Path, tmp_path: Path
) -> None:
    wanted = matrix(llama_folder, attacks=["none"], defenses=["none", "shrink"])
    measures = [entry.measure for entry in entries(wanted)]
    store = Store(tmp_path)
    failures = run(measures, missing(measures, store), store, cluster)
    assert len(failures) == 2
    assert all("is no adapter" in reason and "\n" not in reason for reason in failures.values())
    assert all(reason.startswith(REFUSED) for reason in failures.values())
    assert store.has(measures[0])
    assert missing(measures, store) == missing(measures[1:], store)


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UsageError, match="no Ray cluster at auto: Could not find any running Ray"):
        OnRay("auto")
