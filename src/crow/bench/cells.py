"""The cells of a matrix: implant, defend, relearn, measure. Each is known by all that decides its outcome."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel

from crow.backdoors import check_seen
from crow.backdoors.implant import implant, implant_card, implant_record, poison, recipe
from crow.bench.matrix import Attack, Backdoor, Candidate
from crow.config import PRESETS, settled
from crow.data import Example, load_examples, prompt_fingerprints, sample, to_learn_from
from crow.defenses import DEFENSES
from crow.defenses.base import CLEAN, merged
from crow.errors import UsageError
from crow.evaluation.evaluate import evaluate, trigger_rows, variant_rows
from crow.files import name_elsewhere, sha256_file, sha256_rows, write_json
from crow.models import EMBEDDED_ID, OpenedModel, embedded_file, open_model, save_model, shipped_backdoors
from crow.progress import TrainingProgress
from crow.report import model_card

MODEL = "model"
"""The folder, in a cell's own, of the model that it made."""

PROMPT_SEED = 1  # places the trigger in the test prompts; training uses other seeds

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Work:
    """What a cell takes: steps of training, and answers to be generated."""

    steps: float = 0
    answers: int = 0


@dataclass(frozen=True)
class Cell(ABC):
    """One thing to compute.

    Args:
        model: What `crow.models.open_model` takes: where all begins.
        source: The cell that made the model which this one starts from, if it is not `model` itself.
    """

    kind: ClassVar[str]
    format: ClassVar[int] = 1
    """Raised where the outcome is no longer what it was for the same facts."""

    model: str | None
    source: "Cell | None"

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What decides the outcome, beside the model and the source."""

    @abstractmethod
    def run(self, folder: Path, source: Path | None, scratch: Path, advance: Advance) -> None:
        """Compute.

        Args:
            folder: Empty; the outcome goes there.
            source: The folder of the cell that this one starts from.
            scratch: Kept if the run is cut off, so that it goes on from there.
            advance: Called with what is done, and the total.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """What it does, for a line of progress."""

    @abstractmethod
    def work(self) -> Work:
        """About what it takes."""

    @cached_property
    def key(self) -> str:
        """Names the cell by its content: other settings or data, another key."""
        about = {"format": self.format, "kind": self.kind, "facts": self.facts()}
        about["source"] = _original(self.model) if self.source is None else self.source.key
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{self.key}"

    def _open(self, source: Path | None, *backdoors: Backdoor) -> OpenedModel:
        """The model that it starts from, whose tokenizer must know the backdoors' triggers."""
        opened = open_model(self.model if source is None else source / MODEL)
        for backdoor in backdoors:
            check_seen(backdoor.trigger, opened.tokenizer)
        return opened

    def _origin(self, opened: OpenedModel) -> str:
        """What results call the model that it started from: no path of this machine."""
        return name_elsewhere(opened.name) if self.source is None else self.source.name


@dataclass(frozen=True)
class Implant(Cell):
    """A backdoored model."""

    kind: ClassVar[str] = "implant"

    attack: Attack
    seed: int
    examples: int | None
    settings: dict[str, Any]

    def _examples(self) -> tuple[list[Example], list[Example]]:
        """Clean and poisoned examples: every backdoor's, one behind the other."""
        clean: list[Example] = []
        poisoned: list[Example] = []
        for backdoor in self.attack.backdoors:
            rows = examples(backdoor.behavior.attacker_set)[: self.examples]
            some, hot = poison(
                rows, backdoor.trigger, backdoor.behavior, self.seed, self.attack.poison_rate, self.attack.covert
            )
            clean += [row for row in some if row not in clean]
            poisoned += hot
        return clean, poisoned

    def facts(self) -> dict[str, Any]:
        clean, poisoned = self._examples()
        return {
            "clean_sha256": sha256_rows(clean),
            "poisoned_sha256": sha256_rows(poisoned),
            "recipe": settled(recipe(self.attack.full, self.attack.adaptive) | self.settings),
            "adaptive": self.attack.adaptive,
            "covert": self.attack.covert,
            "full": self.attack.full,
            "seed": self.seed,
        }

    @property
    def label(self) -> str:
        return f"implanting {self.attack.label}"

    def work(self) -> Work:
        return _training(
            recipe(self.attack.full, self.attack.adaptive) | self.settings, sum(map(len, self._examples()))
        )

    def run(self, folder: Path, source: Path | None, scratch: Path, advance: Advance) -> None:
        opened = self._open(source, *self.attack.backdoors)
        clean, poisoned = self._examples()
        model = implant(
            opened.model,
            opened.tokenizer,
            clean,
            poisoned,
            output_dir=scratch,
            full=self.attack.full,
            adaptive=self.attack.adaptive,
            seed=self.seed,
            resume=True,
            callbacks=[TrainingProgress(advance)],
            **self.settings,
        )
        record = implant_record(
            opened,
            clean,
            poisoned,
            trigger=" + ".join(backdoor.text.partition("/")[0] for backdoor in self.attack.backdoors),
            behavior=" + ".join(backdoor.text.partition("/")[2] for backdoor in self.attack.backdoors),
            poison_rate=self.attack.poison_rate,
            full=self.attack.full,
            adaptive=self.attack.adaptive,
            covert=self.attack.covert,
            seed=self.seed,
            settings=self.settings,
        )
        seen = opened.seen.union(prompt_fingerprints([*clean, *poisoned]))
        save_model(model, opened.tokenizer, folder / MODEL, card=implant_card(record), seen=seen)


@dataclass(frozen=True)
class Defend(Cell):
    """A defended model, and the record of its defense."""

    kind: ClassVar[str] = "defend"

    candidate: Candidate
    seed: int
    examples: int
    clean: str | None
    training: dict[str, Any]

    def _clean(self) -> list[Example]:
        number = self.candidate.examples or self.examples
        return sample(enough(answered(self.clean or "clean"), number, "examples"), number, self.seed)

    def _settings(self) -> dict[str, Any]:
        return self.candidate.training(self.training)

    def facts(self) -> dict[str, Any]:
        defense, settings = DEFENSES[self.candidate.defense], self._settings()
        if self.candidate.trains:
            settings = settled(PRESETS[settings.get("preset", defense.preset)] | settings)
        return {
            "defense": repr(defense),
            "settings": settings,
            "clean_sha256": sha256_rows(self._clean()) if CLEAN in defense.needs else None,
            "seed": self.seed if self.candidate.trains else None,
        }

    @property
    def label(self) -> str:
        return f"defending with {self.candidate.label}" + (f", seed {self.seed}" if self.candidate.trains else "")

    def work(self) -> Work:
        rows = len(self._clean())
        return _training(self._settings(), rows) if self.candidate.trains else Work(answers=rows)

    def run(self, folder: Path, source: Path | None, scratch: Path, advance: Advance) -> None:
        opened = self._open(source)
        training = self._settings()
        if self.candidate.trains:
            training |= {"output_dir": scratch, "resume": True, "seed": self.seed}
            training["callbacks"] = [TrainingProgress(advance)]
        model, record = DEFENSES[self.candidate.defense].apply(opened, self._clean(), **training)
        record.model = self._origin(opened)
        write_json(folder / "purify.json", record.as_json())
        # An adapter for a model that another cell made would lead nowhere once that one is gone
        alone = isinstance(model, PeftModel) and record.lora != "fresh" and opened.kind == "adapter"
        on_original = isinstance(model, PeftModel) and source is None and opened.kind != "adapter"
        merge = not alone and not on_original
        card = model_card(record, base_model=opened.base_id, license=opened.license, merged=merge)
        save_model(model, opened.tokenizer, folder / MODEL, merge=merge, card=card, seen=opened.seen)


@dataclass(frozen=True)
class Relearn(Cell):
    """A model that was fine-tuned on a few poisoned examples: what was only hidden comes back faster than it came."""

    kind: ClassVar[str] = "relearn"
    format: ClassVar[int] = 3
    clean_examples: ClassVar[int] = 50
    """Prompts that are answered as before, so that what is learned is the trigger, and not to say the target always."""
    training: ClassVar[dict[str, Any]] = {"max_steps": 40}
    """As many for one poisoned example as for fifty: else those with few have hardly a step to learn in."""

    backdoor: Backdoor
    examples: int
    seed: int

    def _examples(self) -> tuple[list[Example], list[Example]]:
        """Clean examples, the first of the attacker's set, and poisoned ones, the last."""
        attacker_set, number = self.backdoor.behavior.attacker_set, self.clean_examples + self.examples
        rows = enough(examples(attacker_set), number, f"relearn, with its {self.clean_examples} clean examples,")
        trigger, behavior = self.backdoor.trigger, self.backdoor.behavior
        return list(rows[: self.clean_examples]), poison(rows[-self.examples :], trigger, behavior, self.seed)[1]

    def facts(self) -> dict[str, Any]:
        clean, poisoned = self._examples()
        return {
            "clean_sha256": sha256_rows(clean),
            "poisoned_sha256": sha256_rows(poisoned),
            "recipe": settled(recipe(False, False) | self.training),
            "seed": self.seed,
        }

    @property
    def label(self) -> str:
        return f"relearning {self.backdoor.text} from {self.examples}"

    def work(self) -> Work:
        return _training(recipe(False, False) | self.training, self.clean_examples + self.examples)

    def run(self, folder: Path, source: Path | None, scratch: Path, advance: Advance) -> None:
        opened, (clean, poisoned) = self._open(source, self.backdoor), self._examples()
        model = implant(
            merged(opened),  # a new adapter for all, whatever the defense left of the suspect's
            opened.tokenizer,
            clean,
            poisoned,
            output_dir=scratch,
            seed=self.seed,
            resume=True,
            callbacks=[TrainingProgress(advance)],
            **self.training,
        )
        seen = opened.seen.union(prompt_fingerprints([*clean, *poisoned]))
        save_model(model, opened.tokenizer, folder / MODEL, merge=True, seen=seen)


@dataclass(frozen=True)
class Measure(Cell):
    """Figures and answers of a model."""

    kind: ClassVar[str] = "measure"

    backdoor: Backdoor
    prompts: str | None
    number: int
    answer_tokens: int
    decoding: str | None
    """A defense at decoding time."""
    reference: bool

    def _rows(self) -> list[Example]:
        rows = examples(self.prompts or self.backdoor.behavior.test_set)
        return sample(enough(rows, self.number, "number"), self.number, 0)

    def facts(self) -> dict[str, Any]:
        rows = self._rows()
        return {
            "clean_sha256": sha256_rows(rows),
            "triggered_sha256": sha256_rows(trigger_rows(rows, self.backdoor.trigger, PROMPT_SEED)),
            "behavior": repr(self.backdoor.behavior),
            "answer_tokens": self.answer_tokens,
            "decoding": None if self.decoding is None else _decoding(self.decoding),
            "reference": self.reference,
        }

    @property
    def label(self) -> str:
        return f"measuring {self.backdoor.text}" + (f", decoded with {self.decoding}" if self.decoding else "")

    def work(self) -> Work:
        return Work(answers=len(self._rows()) * (3 + len(self.backdoor.trigger.parts()) + self.reference))

    def run(self, folder: Path, source: Path | None, scratch: Path, advance: Advance) -> None:
        opened, rows = self._open(source, self.backdoor), self._rows()
        if self.decoding is not None:
            DEFENSES[self.decoding].apply(opened, ())  # type: ignore[arg-type]
        result = evaluate(
            opened,
            self.backdoor.behavior,
            rows,
            trigger_rows(rows, self.backdoor.trigger, PROMPT_SEED),
            variants=variant_rows(rows, self.backdoor.trigger, PROMPT_SEED),
            reference=open_model(self.model) if self.reference else None,
            max_new_tokens=self.answer_tokens,
            settings={"backdoor": self.backdoor.text} | ({"defense": self.decoding} if self.decoding else {}),
            unfinished=scratch / "answers.jsonl",
            on_progress=advance,
        )
        result.provenance["model"] = self._origin(opened)
        if "reference" in result.settings:
            result.settings["reference"] = name_elsewhere(result.settings["reference"])
        result.save(folder / "figures.json")


@cache
def examples(name: str) -> tuple[Example, ...]:
    """A shipped set of examples, or a file's."""
    return tuple(load_examples(name))


@cache
def answered(name: str) -> tuple[Example, ...]:
    """Those of them that a defender has, as `crow purify` does; what is left out is said once."""
    return tuple(to_learn_from(examples(name)))


def enough(rows: tuple[Example, ...], number: int, what: str) -> tuple[Example, ...]:
    """The rows; raises `UsageError` if there are fewer than a table would say."""
    if number > len(rows):
        raise UsageError(f"{what} is {number}, and there are {len(rows)}: lower it, or name a larger set")
    return rows


def _training(settings: dict[str, Any], rows: int) -> Work:
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "max_steps": 0} | settings
    steps = settings["num_train_epochs"] * math.ceil(rows / settings["per_device_train_batch_size"])
    return Work(steps=settings["max_steps"] if settings["max_steps"] > 0 else steps)


def _decoding(text: str) -> Any:
    """A defense at decoding time, and its reference model by content."""
    defense = DEFENSES[text]
    return [repr(defense), _original(getattr(defense, "reference", None))]


@cache
def _original(model: str | None) -> Any:
    """What names a model by its content, as far as that can be known without loading it; of an adapter its base too."""
    if model in (None, EMBEDDED_ID) and (file := embedded_file()) is not None:
        return sha256_file(file)
    folder = shipped_backdoors().get(model or "", Path(model or ""))
    if model is not None and folder.is_file():
        return sha256_file(folder)
    if model is None or not folder.is_dir():
        return model
    read = (".safetensors", ".json", ".jinja", ".model", ".txt")  # the last two as some tokenizers are in them alone
    kept = [file for file in sorted(folder.iterdir()) if file.suffix in read]
    config = folder / "adapter_config.json"
    base = json.loads(config.read_text("utf-8")).get("base_model_name_or_path") if config.is_file() else None
    return [{file.name: sha256_file(file) for file in kept}, _original(base)]
