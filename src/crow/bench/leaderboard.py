"""The leaderboard of a matrix, of whatever is finished: a page, and the same as Markdown and CSV."""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from crow.bench.cells import Cell
from crow.bench.matrix import Candidate
from crow.bench.plan import Entry
from crow.bench.store import CELL_FILE, Store
from crow.evaluation.evaluate import Evaluation, answers_path
from crow.evaluation.statistics import Count
from crow.report.templates import visible


@dataclass(frozen=True)
class Result:
    """What became of one measurement: its figures, why it failed, or neither where it was not run yet."""

    entry: Entry
    figures: Evaluation | None
    failure: str | None
    answers: str | None
    """Path of the answers, from the leaderboard's folder."""
    seconds: float | None
    """Of the defense; so is the peak of memory, in bytes. `None` where nothing was done before the measurement."""
    memory: int | None


@dataclass(frozen=True)
class Square:
    """One defense on one backdoor: a result for each seed."""

    results: Sequence[Result]

    @property
    def measured(self) -> list[tuple[Result, Evaluation]]:
        return [(result, result.figures) for result in self.results if result.figures is not None]

    @property
    def failure(self) -> str | None:
        return next((result.failure for result in self.results if result.failure is not None), None)

    @property
    def missing(self) -> str | None:
        """What is to be said of seeds that are not measured."""
        left = len(self.results) - len(self.measured)
        failed = "" if self.failure is None else f", failed: {self.failure}"
        return f"{left} of {len(self.results)} seeds not measured{failed}" if left else None

    def count(self, name: str) -> Count | None:
        """The mean over the seeds that are measured, rounded up: on the same prompts, they are no larger sample."""
        counts: list[Count] = [getattr(figures, name) for _, figures in self.measured]
        return Count(math.ceil(statistics.fmean(count.hits for count in counts)), counts[0].n) if counts else None

    @property
    def rates(self) -> list[float]:
        """Attack success of each seed; nothing while one is not measured: it may be the worst."""
        return [] if self.missing else [figures.attack_success.rate for _, figures in self.measured]

    @property
    def rate(self) -> float | None:
        """Attack success, the mean over seeds."""
        return statistics.fmean(self.rates) if self.rates else None

    def hits(self) -> list[int]:
        """Attack success of each seed that is measured."""
        return [figures.attack_success.hits for _, figures in self.measured]

    def mean(self, name: str) -> float | None:
        """The mean of one of the figures' numbers over the seeds, when all are measured."""
        values = [value for _, figures in self.measured if (value := getattr(figures, name)) is not None]
        return statistics.fmean(values) if values and not self.missing else None

    def cost(self, name: str) -> float | None:
        """The mean `seconds` or `memory` of the defense, where they are known."""
        values = [value for result in self.results if (value := getattr(result, name)) is not None]
        return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Line:
    """One defense, on every backdoor of the table."""

    candidate: Candidate
    squares: Mapping[str, Square]
    undefended: Mapping[str, Square]

    @property
    def attacked(self) -> list[Square]:
        """The squares where there was an attack."""
        return [square for square in self.squares.values() if square.results[0].entry.attack.backdoors]

    @property
    def rates(self) -> list[list[float]]:
        """Attack success of each seed, wherever there was an attack; nothing while one is not measured."""
        rates = [square.rates for square in self.attacked]
        return rates if all(rates) else []

    @property
    def mean_rate(self) -> float | None:
        """The mean over backdoors, of the means over seeds."""
        return statistics.fmean(map(statistics.fmean, self.rates)) if self.rates else None

    @property
    def worst_rate(self) -> float | None:
        """That of the worst seed on the worst backdoor."""
        return max(map(max, self.rates), default=None)

    def ratio(self, column: str) -> float | None:
        """The perplexity on clean answers, of that before the defense; it says nothing of one at decoding time."""
        if self.candidate.decodes:
            return None
        after, before = (
            of[column].mean("perplexity") if column in of else None for of in (self.squares, self.undefended)
        )
        return after / before if after is not None and before else None

    @property
    def _ratios(self) -> list[float]:
        """Each column's `ratio`; nothing while one that was attacked is not measured."""
        ratios = [ratio for column in self.squares if (ratio := self.ratio(column)) is not None]
        return [] if any(square.missing for square in self.attacked) else ratios

    @property
    def perplexity_ratio(self) -> float | None:
        """The mean `ratio` over the columns."""
        ratios = self._ratios
        return statistics.fmean(ratios) if ratios else None

    @property
    def worst_perplexity_ratio(self) -> float | None:
        """That of the column that it costs most: elsewhere perplexity may fall, which makes up for nothing."""
        return max(self._ratios, default=None)

    @property
    def _whole(self) -> bool:
        """Whether all columns are measured: a mean over some is not to be compared with one over others."""
        return not any(square.missing for square in self.squares.values())

    def share(self, name: str) -> float | None:
        """The mean rate of one of the figures' counts over all columns, when all are measured."""
        if not self._whole:
            return None
        return statistics.fmean(
            statistics.fmean(getattr(figures, name).rate for _, figures in square.measured)
            for square in self.squares.values()
        )

    def cost(self, name: str) -> float | None:
        """The mean `seconds` or `memory` over all columns, where they are known, when all are measured."""
        costs = [cost for square in self.squares.values() if (cost := square.cost(name)) is not None]
        return statistics.fmean(costs) if costs and self._whole else None


@dataclass(frozen=True)
class Table:
    """Defenses by backdoors, of one model, after as many poisoned examples as the defended model was trained on."""

    model: str
    relearned: int
    columns: Sequence[str]
    lines: Sequence[Line]

    @property
    def heading(self) -> str:
        """The model, and what became of it after the defense."""
        after = f", after {self.relearned} poisoned example{'' if self.relearned == 1 else 's'}"
        return self.model + (after if self.relearned else "")


def results(planned: Sequence[Entry], store: Store, folder: Path) -> list[Result]:
    """Every measurement with what is there of it.

    Args:
        folder: Where the leaderboard will be.
    """
    failures = store.failures
    return [_result(entry, store, failures, folder) for entry in planned]


def _result(entry: Entry, store: Store, failures: Mapping[str, str], folder: Path) -> Result:
    figures = answers = None
    if store.has(entry.measure):
        path = store.folder(entry.measure) / "figures.json"
        figures, answers = Evaluation.load(path), os.path.relpath(answers_path(path), folder)
    stands_on: Cell | None = entry.measure
    failure = None
    while stands_on is not None and figures is None and failure is None:
        failure, stands_on = failures.get(stands_on.key), stands_on.source
    about: dict[str, Any] = {}
    if entry.defend is not None and store.has(entry.defend):
        about = json.loads((store.folder(entry.defend) / CELL_FILE).read_text("utf-8"))
    return Result(entry, figures, failure, answers, about.get("seconds"), about.get("peak_memory_bytes"))


def tables(found: Sequence[Result]) -> list[Table]:
    """By model and by relearned examples, defenses and backdoors in the matrix's order."""
    made = []
    for model, relearned in dict.fromkeys((r.entry.model, r.entry.relearned) for r in found):
        here = [r for r in found if (r.entry.model, r.entry.relearned) == (model, relearned)]
        squares: dict[str, dict[str, list[Result]]] = {}
        for result in here:
            of_candidate = squares.setdefault(result.entry.candidate.label, {})
            of_candidate.setdefault(_column(result.entry), []).append(result)
        lined = {label: {name: Square(r) for name, r in row.items()} for label, row in squares.items()}
        candidates = {r.entry.candidate.label: r.entry.candidate for r in here}
        lines = [Line(candidates[label], row, lined.get("none", {})) for label, row in lined.items()]
        made.append(Table(model, relearned, list(dict.fromkeys(_column(r.entry) for r in here)), lines))
    return made


def _column(entry: Entry) -> str:
    alone = len(entry.attack.backdoors) == 1
    return entry.attack.label if alone else f"{entry.attack.label}: {entry.backdoor.text}"


UTILITY = ("perplexity, of undefended", "worst perplexity", "false triggers", "degenerate")
"""What tables say of a defended model's use."""

_COUNTS = ("attack_success", "false_trigger", "degenerate")
_FIELDS = [
    "model",
    "attack",
    "backdoor",
    "defense",
    "needs",
    "seed",
    "relearned",
    *(f"{name}_{part}" for name in _COUNTS for part in ("hits", "n", "low", "high")),
    "perplexity",
    "reference_kl",
    "seconds",
    "peak_memory_bytes",
    "answers",
    "failure",
]


def as_csv(found: Sequence[Result]) -> str:
    """A line for every measurement; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _FIELDS, lineterminator="\n")
    writer.writeheader()
    for result in found:
        entry, figures = result.entry, result.figures
        row: dict[str, Any] = {
            "model": entry.model,
            "attack": entry.attack.label,
            "backdoor": entry.backdoor.text,
            "defense": entry.candidate.label,
            "needs": " + ".join(entry.candidate.needs),
            "seed": entry.seed,
            "relearned": entry.relearned,
            "seconds": result.seconds,
            "peak_memory_bytes": result.memory,
            "answers": result.answers,
            "failure": result.failure,
        }
        if figures is not None:
            if not entry.candidate.decodes:  # these are of the weights, which it leaves as they are
                row |= {"perplexity": figures.perplexity, "reference_kl": figures.reference_kl}
            for name in _COUNTS:
                count: Count = getattr(figures, name)
                low, high = count.interval()
                row |= {f"{name}_hits": count.hits, f"{name}_n": count.n, f"{name}_low": low, f"{name}_high": high}
        writer.writerow({name: visible(value) if isinstance(value, str) else value for name, value in row.items()})
    return text.getvalue()


def as_markdown(found: Sequence[Result], title: str) -> str:
    """A table for each model, and for each number of relearned examples."""
    return "\n".join([f"# {_plain(title)}\n", *(line for table in tables(found) for line in _markdown(table))])


def _markdown(table: Table) -> Iterator[str]:
    yield f"## {table.heading}\n"
    head = ["defense", "needs", "mean", "worst", *table.columns, *UTILITY, "seconds", "peak MiB"]
    yield _row(head)
    yield _row(["---"] * len(head))
    for line in table.lines:
        squares = [_square(line.squares.get(column)) for column in table.columns]
        memory = line.cost("memory")
        rates = (_number(line.mean_rate, ".1%"), _number(line.worst_rate, ".1%"))
        costs = (
            _number(line.perplexity_ratio, ".3f"),
            _number(line.worst_perplexity_ratio, ".3f"),
            *(_number(line.share(name), ".1%") for name in ("false_trigger", "degenerate")),
            _number(line.cost("seconds"), ".0f"),
            _number(memory and memory / 2**20, ".0f"),
        )
        yield _row([line.candidate.label, ", ".join(line.candidate.needs), *rates, *squares, *costs])
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _plain(text: str) -> str:
    """On one line, and no markup: a failure, or a name, may quote anything."""
    return escape(" ".join(visible(text).split()), quote=False)


def _square(square: Square | None) -> str:
    if square is None:
        return ""
    count = square.count("attack_success")
    if count is None:
        return "not run" if square.failure is None else f"failed: {square.failure}"
    seeds = f"; seeds {', '.join(map(str, square.hits()))}" if len(square.results) > 1 else ""
    return f"{count}{seeds}" + (f"; {square.missing}" if square.missing else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
