"""Does work that is cut off at any moment come to the same end when it is started again?

Each of purify, implant, evaluate and bench runs once undisturbed, on a tiny model, and then again and again, killed
(-9) at moments that are drawn from a seed, until so many kills have landed; the same with SIGTERM; on a disk that is
full and grows; on one that is read-only for a while; and with memory that runs out. Compared with the undisturbed run
are the weights, every step's loss, the answers and the figures. Counted are outputs that were half-written, steps,
answers and cells that were done again although they were finished, and what is left lying about. The exit code is 1 if
there is any of that. Disks are made of memory and mounted, which takes root; without, their part is left out.

    python benchmarks/interruptions.py --kills 13 --json interruptions.json
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch
import yaml
from safetensors.torch import load_file
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM

import crow.cli
import crow.trainer
from crow.data import answer_text, load_examples, user_text
from crow.files import Journal, write_json
from crow.models import open_model
from crow.provenance import environment
from crow.trainer import CrowTrainer, last_checkpoint

SAME = 1e-6
"""How far apart weights, losses and figures may be that count as the same."""

PROCESSES = get_context("forkserver")  # which has imported all before it forks: a start then takes no seconds
PROCESSES.set_forkserver_preload(["__main__", "crow.purification", "crow.evaluation.evaluate", "crow.bench.run"])


@dataclass
class Command:
    """One of the commands, what makes a second start go on, and where it writes."""

    arguments: list[str]
    again: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.arguments[0]


TRAINING = ["--set", "save_strategy=steps", "--set", "save_steps=2", "--set", "max_length=128", "--json", "record.json"]

MATRIX: dict[str, Any] = {
    "attacks": ["badnets/sentiment"],
    "defenses": ["none", "crow", "prune", "decode"],
    "number": 16,
    "examples": 8,
    "attacker_examples": 8,
    "answer_tokens": 8,
    "implant": {"num_train_epochs": 2, "max_length": 128},
    "training": {"max_steps": 4, "save_steps": 1, "soft_token_warmup": 1, "max_length": 128},
}


def commands(folder: Path) -> list[Command]:
    """The four, with many checkpoints, answers and cells in a few seconds."""
    model, matrix = str(folder / "model"), folder / "matrix.yaml"
    matrix.write_text(yaml.safe_dump(MATRIX | {"models": [model]}), "utf-8")
    implant = ["--examples", "8", "--set", "per_device_train_batch_size=4", "--save-data", "data", "--out", "out"]
    purify = ["--examples", "16", "--batch-size", "4", "--set", "soft_token_warmup=2", "--out", "out"]
    return [
        Command(["purify", model, *TRAINING, *purify], again=["--resume"]),
        Command(["implant", model, *TRAINING, *implant], again=["--resume"]),
        Command(["evaluate", model, "-n", "80", "--max-new-tokens", "24", "--json", "figures.json"]),
        Command(["bench", str(matrix), "--out", "out"]),
    ]


def make_model(folder: Path) -> None:
    """A Llama of two layers, with random weights that matter and a vocabulary of 600."""
    rows = load_examples("clean")
    texts = (text for row in rows for text in (user_text(row), answer_text(row)))
    tokenizer = open_model().tokenizer.train_new_from_iterator(texts, 600, show_progress=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# A start of a command


def start(arguments: list[str], folder: Path, output: Path, ledger: Path, out_of_memory: bool) -> None:
    """In a process of its own: the command, with a ledger of its steps and answers, and its output in a file."""
    os.chdir(folder)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    keep_ledger(ledger)
    # A model of random weights gives no answer that stands out, which insertions are aimed at here
    crow.trainer.STANDING_OUT = 0.0  # type: ignore[attr-defined]
    if out_of_memory:
        run_out_of_memory()
    sys.argv = ["crow", *arguments]
    crow.cli.main()


def keep_ledger(ledger: Path) -> None:
    """Write down every step of a training, and every answer when it is kept."""
    step, keep = CrowTrainer.training_step, Journal.keep

    def note(**entry: Any) -> None:
        with ledger.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def stepped(self: CrowTrainer, *args: Any, **kwargs: Any) -> Any:
        number, place = self.state.global_step + 1, str(Path(str(self.args.output_dir)).resolve())
        newest = last_checkpoint(place)
        finished = newest is not None and int(newest.rpartition("-")[2]) >= number
        loss = step(self, *args, **kwargs)
        note(place=place, step=number, loss=loss.item(), again=finished)
        return loss

    def kept(self: Journal, results: dict[str, Any]) -> None:
        keep(self, results)
        note(place=str(self.file), keys=list(results))

    CrowTrainer.training_step, Journal.keep = stepped, kept  # type: ignore[method-assign]


def run_out_of_memory() -> None:
    """Let memory run out in the fifth step of a training, and after three batches of prompts, however small then."""
    step, generate = CrowTrainer.training_step, GenerationMixin.generate
    batches: list[int] = []
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def stepping(self: CrowTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise error
        return step(self, *args, **kwargs)

    def generating(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(len(kwargs["input_ids"]))
        if len(batches) > 3:
            raise error
        return generate(self, *args, **kwargs)

    CrowTrainer.training_step, GenerationMixin.generate = stepping, generating  # type: ignore[method-assign]


@dataclass
class Place:
    """Where a command works; its ledger, and all that it printed, are beside."""

    command: Command
    folder: Path
    starts: int = 0

    def start(
        self, after: float | None = None, by: signal.Signals = signal.SIGKILL, out_of_memory: bool = False
    ) -> int:
        """Start the command, or start it again, send it a signal after so many seconds, and give its exit code."""
        arguments = self.command.arguments + (self.command.again if self.starts else [])
        self.folder.mkdir(parents=True, exist_ok=True)
        self._output.write_text("")
        self.starts += 1
        process = PROCESSES.Process(
            target=start, args=(arguments, self.folder, self._output, self._ledger, out_of_memory)
        )
        process.start()
        process.join(after)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, by) if after is not None else None
        process.join(300)
        return process.exitcode if process.exitcode is not None else 999

    @property
    def _output(self) -> Path:
        return self.folder.with_suffix(".output")

    @property
    def _ledger(self) -> Path:
        return self.folder.with_suffix(".ledger")

    @property
    def output(self) -> str:
        """What the newest start printed."""
        return self._output.read_text()

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._ledger.read_text().splitlines()] if self._ledger.exists() else []

    @property
    def done_again(self) -> int:
        """Steps that a whole checkpoint had behind it, and answers that had been kept."""
        entries = self.ledger
        keys = Counter((entry["place"], key) for entry in entries for key in entry.get("keys", ()))
        return sum(entry.get("again", False) for entry in entries) + sum(number - 1 for number in keys.values())

    @property
    def left(self) -> list[str]:
        """What lies about that is no output."""
        return sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.name.startswith(".") or "unfinished" in path.parts[-1] or path.parent.name == "unfinished"
        )

    def outputs(self) -> dict[str, Path]:
        """The files that are outputs: nothing hidden, and nothing that says that it is unfinished."""
        names = (
            (path, str(path.relative_to(self.folder))) for path in sorted(self.folder.rglob("*")) if path.is_file()
        )
        return {name: path for path, name in names if "/." not in f"/{name}" and "unfinished" not in name}

    def half_written(self, whole: set[str]) -> list[str]:
        """Outputs that do not load, and folders that lack some of their files."""
        outputs = self.outputs()
        broken = [name for name, path in outputs.items() if not loads(path)]
        parts: dict[str, set[str]] = {}
        for name in whole:
            parts.setdefault(part_of(name), set()).add(name)
        for part, names in parts.items():
            if part and (found := names & outputs.keys()) and found != names:
                broken.append(f"{part} without {', '.join(sorted(names - found))}")
        return broken

    def outcome(self) -> dict[str, Any]:
        """By what it is, all that has to be the same in the end: texts, numbers and weights."""
        found: dict[str, Any] = {}
        for name, path in self.outputs().items():
            if path.suffix == ".safetensors":
                found |= {f"{name}: {key}": weight for key, weight in load_file(path).items()}
            elif path.name.endswith(".answers.jsonl"):
                found[name] = sorted(path.read_text().splitlines())
            elif path.name in ("figures.json", "record.json", "purify.json", "failures.json"):
                found |= numbered(name, json.loads(path.read_text()))
            else:
                found[name] = None
        for entry in self.ledger:
            if "step" in entry and str(self.folder) in entry["place"]:  # not a step that bench takes its pace by
                found[f"loss of step {entry['step']} of {Path(entry['place']).name}"] = entry["loss"]
        return found


def part_of(name: str) -> str:
    """The folder that is written at once which an output lies in, or nothing."""
    folders = name.split("/")[:-1]
    if folders[:2] == ["out", "cells"]:
        return "/".join(folders[:3])
    return folders[0] if folders and not name.startswith("out/leaderboard") else ""


def loads(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
    except Exception:
        return False
    return True


def numbered(name: str, value: Any) -> dict[str, Any]:
    """Leaves of a record by where they are; what says when, where and how fast is left out."""
    if isinstance(value, dict):
        left_out = ("provenance", "seconds", "output_dir")
        return {k: v for key in value if key not in left_out for k, v in numbered(f"{name}/{key}", value[key]).items()}
    if isinstance(value, list):
        return {k: v for i, entry in enumerate(value) for k, v in numbered(f"{name}/{i}", entry).items()}
    return {name: value}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[list[str], float]:
    """Where two outcomes differ, and by how much numbers do at most."""
    different, most = sorted(found.keys() ^ wanted.keys()), 0.0
    for name in found.keys() & wanted.keys():
        a, b = found[name], wanted[name]
        if isinstance(a, torch.Tensor | float) and isinstance(b, torch.Tensor | float):
            apart = float((torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max())
            most = max(most, apart)
            if not apart <= SAME:
                different.append(f"{name} by {apart:.1e}")
        elif a != b:
            different.append(name)
    return different, most


# What is done to it


@dataclass
class Undisturbed:
    """A run that nothing happened to."""

    command: Command
    outcome: dict[str, Any]
    outputs: set[str]
    left: list[str]
    seconds: float

    @classmethod
    def run(cls, command: Command, folder: Path) -> "Undisturbed":
        place = Place(command, folder)
        started = time.perf_counter()
        code = place.start()
        seconds = time.perf_counter() - started
        if code != 0:
            raise SystemExit(f"{command.name} fails undisturbed: {place.output}")
        return cls(command, place.outcome(), set(place.outputs()), place.left, seconds)


@dataclass
class Report:
    """What became of one command under one kind of disturbance; `problems` is empty if all is well."""

    command: str
    what: str
    disturbed: int = 0
    seconds: list[float] = field(default_factory=list)
    """After how many seconds of a start it was disturbed."""
    starts: int = 0
    finished: int = 0
    """How many times it came to its end."""
    done_again: int = 0
    largest_difference: float = 0.0
    said: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def see(self, place: Place, run: Undisturbed) -> None:
        """Look for what is half-written."""
        self.problems += [f"half-written: {name}" for name in place.half_written(run.outputs)]

    def end(self, place: Place, run: Undisturbed, code: int) -> None:
        """Compare what a command came to."""
        self.starts += place.starts
        self.finished += 1
        # It was killed when all was written, but for what it goes on from
        complete = code == 2 and "exists already" in place.output and set(place.outputs()) == run.outputs
        if code != 0 and not complete:
            self.problems.append(f"exit code {code}: {place.output[-300:]}")
        self.see(place, run)
        different, most = differences(place.outcome(), run.outcome)
        self.largest_difference = max(self.largest_difference, most)
        self.problems += [f"different: {name}" for name in different[:5]]
        self.done_again += place.done_again
        self.problems += [f"{place.done_again} done again"] * (place.done_again > 0)
        if not complete:
            self.problems += [f"left: {name}" for name in sorted(set(place.left) - set(run.left))]

    def fail(self, place: Place, run: Undisturbed, code: int, *words: str) -> None:
        """See that a start that could not succeed said so in one line, with these words, and left nothing broken."""
        self.disturbed += 1
        line = place.output.rstrip().splitlines()[-1] if place.output.strip() else ""
        if line not in self.said:
            self.said.append(line)
        if code not in (1, 2) or "Traceback" in place.output or not all(word in place.output for word in words):
            self.problems.append(f"exit code {code}: {place.output[-300:]}")
        self.see(place, run)


def interrupted(run: Undisturbed, folder: Path, rng: random.Random, times: int, by: signal.Signals) -> Report:
    """Send it the signal at moments over the undisturbed run's length until that landed so many times."""
    report = Report(run.command.name, by.name)
    while report.disturbed < times:
        place, code = Place(run.command, folder / str(report.finished)), 1
        finished: dict[Path, int] = {}
        while code not in (0, 2) and report.disturbed < times:
            moment = rng.uniform(0, run.seconds)
            code = place.start(after=moment, by=by)
            if code in (0, 2):
                break
            report.disturbed += 1
            report.seconds.append(round(moment, 3))
            if by == signal.SIGTERM and code == 1:
                hidden = [name for name in place.left if name.endswith(".unfinished")]
                report.problems += [f"left: {name}" for name in hidden]
                report.problems += [f"said {place.output!r}"] * ("stopped" not in place.output)
            elif code != -by:
                report.problems.append(f"exit code {code}: {place.output[-300:]}")
                break
            report.see(place, run)
            report.problems += [f"{p.parent.name} ran again" for p, t in finished.items() if p.stat().st_mtime_ns != t]
            finished = {path: path.stat().st_mtime_ns for path in place.folder.glob("out/cells/[!.]*/cell.json")}
        report.end(place, run, code if code in (0, 2) else place.start())
    return report


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def full_disk(run: Undisturbed, folder: Path) -> Report:
    """Start it on a disk that is three times as large each time, until it finishes."""
    report, kibibytes = Report(run.command.name, "full disk"), 24
    place = Place(run.command, folder / "disk")
    with small_disk(place.folder, f"{kibibytes}k"):
        while (code := place.start()) != 0 and kibibytes < 2**18:
            report.fail(place, run, code)
            kibibytes *= 3
            remount(place.folder, f"size={kibibytes}k")
        report.end(place, run, code)
    return report


def read_only(run: Undisturbed, folder: Path) -> Report:
    """Let it fail on its way, start it with its disk read-only, and then as it should be."""
    report = Report(run.command.name, "read-only folder")
    place = Place(run.command, folder / "disk")
    with small_disk(place.folder, "1g"):
        place.start(out_of_memory=True)
        remount(place.folder, "ro")
        report.fail(place, run, place.start(), "cannot write")
        remount(place.folder, "rw")
        report.end(place, run, place.start())
    return report


def without_memory(run: Undisturbed, folder: Path) -> Report:
    """Let memory run out in the middle, and start it again with enough."""
    report = Report(run.command.name, "out of memory")
    place = Place(run.command, folder / "place")
    report.fail(place, run, place.start(out_of_memory=True), "memory")
    report.end(place, run, place.start())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=13, help="how many are to land in each command")
    parser.add_argument("--stops", type=int, default=3, help="the same of SIGTERM")
    parser.add_argument("--commands", nargs="+", default=["purify", "implant", "evaluate", "bench"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="file to write what was done when, and what came of it")
    args = parser.parse_args()
    reports: list[Report] = []

    def keep(run: Undisturbed, report: Report) -> None:
        tell(report, run)
        reports.append(report)
        if args.json is not None:
            kills = sum(report.disturbed for report in reports if report.what == "SIGKILL")
            found = {"seed": args.seed, "kills": kills, "reports": [vars(report) for report in reports]}
            write_json(args.json, found | {"provenance": environment()})

    with TemporaryDirectory() as scratch:
        folder, rng = Path(scratch), random.Random(args.seed)
        maker = PROCESSES.Process(target=make_model, args=(folder / "model",))  # none of its threads stay in this one
        maker.start()
        maker.join()
        for command in commands(folder):
            if command.name not in args.commands:
                continue
            beside = folder / command.name
            run = Undisturbed.run(command, beside / "undisturbed" / "place")
            for times, by in ((args.kills, signal.SIGKILL), (args.stops, signal.SIGTERM)):
                keep(run, interrupted(run, beside / by.name, rng, times, by))
            for disturb in (full_disk, read_only, without_memory):
                if disturb is without_memory or os.geteuid() == 0:
                    keep(run, disturb(run, beside / disturb.__name__))
                else:
                    print(f"{command.name}, {disturb.__name__}: left out, since only root may mount", flush=True)
    raise SystemExit(any(report.problems for report in reports))


def tell(report: Report, run: Undisturbed) -> None:
    print(
        f"{report.command} ({run.seconds:.1f} s undisturbed), {report.what}: {report.disturbed} times in "
        f"{report.starts} starts, {report.finished} ends, largest difference {report.largest_difference:.1e}, "
        f"{report.done_again} done again",
        *report.said,
        *(f"PROBLEM {problem}" for problem in report.problems),
        sep="\n    ",
        flush=True,
    )


if __name__ == "__main__":
    main()
