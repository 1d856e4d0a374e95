"""From a matrix to its cells: what is measured, what that stands on, and about how long it takes."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from crow.bench.cells import Cell, Defend, Implant, Measure, Relearn, Work, examples
from crow.bench.matrix import Attack, Backdoor, Candidate, Matrix
from crow.bench.store import Store
from crow.errors import UsageError
from crow.generation import generate
from crow.models import EMBEDDED_ID, open_model
from crow.purification import CLEAN_EXAMPLES, purify


@dataclass(frozen=True)
class Entry:
    """One measurement of a table, and where in it that stands."""

    model: str
    attack: Attack
    backdoor: Backdoor
    candidate: Candidate
    seed: int
    relearned: int
    """After how many poisoned examples; 0: before any."""
    measure: Measure
    defend: Defend | None


def entries(matrix: Matrix, seeds: Sequence[int] = ()) -> list[Entry]:
    """Every measurement of a matrix, those that share a model next to each other.

    Args:
        matrix: What is to be compared.
        seeds: Of the matrix's seeds these alone; all by default. What does not depend on one is there in any case, as
            in the whole matrix: on the first seed's examples.

    Raises:
        UsageError: the matrix has no such seed.
    """
    if unknown := [seed for seed in seeds if seed not in matrix.seeds]:
        raise UsageError(f"no seed {unknown[0]} in the matrix; there are {', '.join(map(str, matrix.seeds))}")
    wanted = [seed for seed in matrix.seeds if not seeds or seed in seeds]
    found: list[Entry] = []
    for model in matrix.models:
        for attack in matrix.attacks:
            settings = attack.training(matrix.implant)
            suspect = Implant(model, None, attack, 0, matrix.attacker_examples, settings) if attack.backdoors else None
            for candidate in matrix.defenses:
                for seed in wanted if candidate.trains else matrix.seeds[:1]:
                    found += _of_defended(matrix, model, attack, suspect, candidate, seed)
    return found


def _of_defended(
    matrix: Matrix, model: str | None, attack: Attack, suspect: Implant | None, candidate: Candidate, seed: int
) -> Iterable[Entry]:
    defend = None
    if candidate.defense != "none" and not candidate.decodes:
        defend = Defend(model, suspect, candidate, seed, matrix.examples, matrix.clean, matrix.training)
    defended = defend or suspect
    decoding = candidate.defense if candidate.decodes else None

    def measured(backdoor: Backdoor, source: Cell | None, relearned: int = 0) -> Entry:
        tokens = matrix.answer_tokens or backdoor.behavior.answer_tokens
        measure = Measure(model, source, backdoor, matrix.prompts, matrix.number, tokens, decoding, matrix.reference)
        return Entry(_shown(model, matrix), attack, backdoor, candidate, seed, relearned, measure, defend)

    for backdoor in attack.measured:
        yield measured(backdoor, defended)
    # A model that never had a backdoor is the yardstick: it learns any of them anew
    yardstick = () if candidate.defense != "none" else _all_backdoors(matrix)
    if seed == matrix.seeds[0]:
        for k in matrix.relearn:
            for backdoor in attack.backdoors or yardstick:
                yield measured(backdoor, Relearn(model, defended, backdoor, k, seed), relearned=k)


def _shown(model: str | None, matrix: Matrix) -> str:
    """A model's name in tables: of a path its last part, unless another's is the same."""
    if model is None:
        return EMBEDDED_ID
    name = Path(model).name
    alone = sum(Path(other or "").name == name for other in matrix.models) == 1
    return name if alone and Path(model).is_absolute() else model


def _all_backdoors(matrix: Matrix) -> tuple[Backdoor, ...]:
    return tuple(dict.fromkeys(backdoor for attack in matrix.attacks for backdoor in attack.backdoors))


def missing(measures: Iterable[Cell], store: Store) -> list[Cell]:
    """The cells that are yet to be run, each behind what it stands on, and none twice."""
    order: dict[str, Cell] = {}

    def visit(cell: Cell) -> None:
        if cell.source is not None and not store.serves(cell.source) and cell.source.key not in order:
            visit(cell.source)
        order.setdefault(cell.key, cell)

    for measure in measures:
        if not store.has(measure):
            visit(measure)
    return list(order.values())


@dataclass(frozen=True)
class Pace:
    """Seconds of a step of plain fine-tuning, and of an answer."""

    step: float
    answer: float

    def seconds(self, work: Work) -> float:
        return work.steps * self.step + work.answers * self.answer


def calibrate(model: str | None, cells: Sequence[Cell]) -> Pace:
    """Take a few steps and answer a few prompts, as much as the cells need: a step of other trainings takes longer."""
    opened = open_model(model)
    rows = list(examples("clean")[:CLEAN_EXAMPLES])
    answer = step = 0.0
    if any(cell.work().answers for cell in cells):
        started = time.perf_counter()
        asked = [row["prompt"] for row in rows[:8]]
        generate(opened.model, opened.tokenizer, asked, max_new_tokens=24)
        answer = (time.perf_counter() - started) / len(asked)
    if any(cell.work().steps for cell in cells):
        with TemporaryDirectory() as scratch:
            _, record = purify(opened, clean=rows, preset="finetune", max_steps=2, output_dir=scratch)
        step = record.seconds / 2
    return Pace(step, answer)


def estimate(cells: Sequence[Cell]) -> float | None:
    """About how many seconds cells take here; `None` where that can't be told, of which its cells will say why."""
    try:
        paces = {model: calibrate(model, cells) for model in dict.fromkeys(cell.model for cell in cells)}
    except Exception:  # of a model that can't be opened, or of memory, where a matrix may ask for less of it
        return None
    return sum(paces[cell.model].seconds(cell.work()) for cell in cells)
