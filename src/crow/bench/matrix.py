"""What is to be compared: a YAML file that names models, attacks, defenses and seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from crow.backdoors import BEHAVIORS, TRIGGERS, Behavior, Trigger
from crow.backdoors.implant import ImplantConfig, implant_config, recipe
from crow.config import CHOSEN, PRESETS, CrowConfig, unread
from crow.defenses import DEFENSES, AtDecoding
from crow.errors import UsageError
from crow.inspection import one_line, read_yaml

CONFIGS = {Path(file.name).stem: file for file in files("crow.bench").joinpath("configs").iterdir()}
"""The matrices that ship with the project."""

# A matrix may come from a stranger: none of it tells others of a run, or reads a file that it names
_CHOSEN = CHOSEN | {"report_to", "chat_template_path"}
_SETTINGS = {f.name for f in fields(CrowConfig)} - _CHOSEN | {"preset", "lora"}
_IMPLANT_SETTINGS = {f.name for f in fields(ImplantConfig)} - _CHOSEN
_FLAGS = ("adaptive", "covert", "full")


@dataclass(frozen=True)
class Backdoor:
    """`TRIGGER/BEHAVIOR`, each as its registry reads it."""

    text: str

    def __post_init__(self) -> None:
        if "/" not in self.text:
            raise UsageError(f"{self.text!r} is no backdoor: write TRIGGER/BEHAVIOR, such as badnets/sentiment")
        _ = self.trigger, self.behavior

    @property
    def trigger(self) -> Trigger:
        return TRIGGERS[self.text.partition("/")[0]]

    @property
    def behavior(self) -> Behavior:
        return BEHAVIORS[self.text.partition("/")[2]]


@dataclass(frozen=True)
class Attack:
    """What is done to a model before it is defended: nothing, one backdoor, or several at once."""

    backdoors: tuple[Backdoor, ...]
    poison_rate: float = 1.0
    adaptive: bool = False
    covert: bool = False
    full: bool = False

    @classmethod
    def read(cls, entry: Any) -> "Attack":
        """From `none`, `TRIGGER/BEHAVIOR`, or a mapping of this class's fields."""
        if entry in ("none", None):
            return cls(())
        values = {"backdoors": [entry]} if isinstance(entry, str) else _mapping(entry, cls, "attack")
        texts = values.pop("backdoors", None)
        if not isinstance(texts, list) or not texts:
            raise UsageError(f"attack {entry!r}: backdoors is to be a list of TRIGGER/BEHAVIOR")
        for name in _FLAGS:
            _flag(f"attack {entry!r}: {name}", values.get(name, False))
        attack = cls(tuple(Backdoor(str(text)) for text in texts), **values)
        if not isinstance(attack.poison_rate, int | float) or not 0 < attack.poison_rate <= 1:
            raise UsageError(f"attack {entry!r}: poison_rate is {attack.poison_rate}; it must be above 0 and at most 1")
        return attack

    @property
    def label(self) -> str:
        """How tables name it."""
        what = " + ".join(backdoor.text for backdoor in self.backdoors) or "no backdoor"
        if self.poison_rate != 1:
            what += f", {100 * self.poison_rate:g}% poisoned"
        flags = [name for name in _FLAGS if getattr(self, name)]
        return ", ".join([what, *flags])

    @property
    def measured(self) -> tuple[Backdoor, ...]:
        """What it is measured with; a model without a backdoor with one that it does not have."""
        return self.backdoors or (Backdoor("badnets/sentiment"),)

    def unread(self, shared: dict[str, Any]) -> dict[str, str]:
        """Which settings its implanting never reads, of its own and those that all attacks share, with the reasons."""
        return unread(recipe(self.full, self.adaptive) | shared)

    def training(self, shared: dict[str, Any]) -> dict[str, Any]:
        """Of the settings that all attacks share the ones that its implanting reads."""
        idle = self.unread(shared)
        return {name: value for name, value in shared.items() if name not in idle}


@dataclass(frozen=True)
class Candidate:
    """A defense with its settings, or `none`."""

    defense: str
    settings: dict[str, Any] = field(default_factory=dict)
    examples: int | None = None
    """How many clean examples it gets, if not the matrix's number."""

    @classmethod
    def read(cls, entry: Any) -> "Candidate":
        """From a name as `crow defenses` has it, or a mapping: `defense`, `examples`, and settings of training."""
        values = {"defense": entry} if isinstance(entry, str) else entry
        if not isinstance(values, dict) or not isinstance(values.get("defense"), str):
            raise UsageError(f"{entry!r} is no defense: give its name, or a mapping with one under 'defense'")
        settings = {k: v for k, v in values.items() if k not in ("defense", "examples")}
        candidate = cls(values["defense"], settings, values.get("examples"))
        if settings and not candidate.trains:
            raise UsageError(f"defense {candidate.defense!r} does not train: leave {_listed(settings)} out")
        if unknown := settings.keys() - _SETTINGS:
            raise UsageError(f"defense {candidate.defense!r}: no such setting: {_listed(unknown)}")
        if candidate.examples is not None:
            _positive(f"defense {candidate.defense!r}: examples", candidate.examples)
        return candidate

    @property
    def label(self) -> str:
        """How tables name it."""
        given = self.settings | ({} if self.examples is None else {"examples": self.examples})
        return ", ".join([self.defense, *(f"{key} {value}" for key, value in given.items())])

    def training(self, shared: dict[str, Any]) -> dict[str, Any]:
        """Its settings, and of those that all defenses share the ones that it reads; none, if it does not train."""
        if not self.trains:
            return {}
        own = {"preset": DEFENSES[self.defense].preset} | shared | self.settings
        idle = unread(PRESETS.get(str(own["preset"]), {}) | own)
        return {name: value for name, value in shared.items() if name not in idle} | self.settings

    @property
    def trains(self) -> bool:
        """Whether its outcome depends on a seed of training."""
        return self.defense != "none" and DEFENSES[self.defense].trains

    @property
    def decodes(self) -> bool:
        """Whether it leaves the weights and answers otherwise."""
        return self.defense != "none" and isinstance(DEFENSES[self.defense], AtDecoding)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the defender must have beside the suspect."""
        return () if self.defense == "none" else DEFENSES[self.defense].needs


@dataclass(frozen=True)
class Matrix:
    """All cells of a comparison.

    Raises:
        UsageError: a field is missing, unknown or out of range; the message names it.
    """

    attacks: tuple[Attack, ...]
    defenses: tuple[Candidate, ...]
    models: tuple[str | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    number: int = 200
    """Prompts of each kind that are measured on."""
    examples: int = 100
    """Clean examples of the defender."""
    clean: str | None = None
    """Where these come from, if not from the shipped set."""
    prompts: str | None = None
    """What is measured on, if not the shipped held-out set for what the backdoor does; `validation` is for choosing."""
    attacker_examples: int | None = None
    """How many prompts a backdoor is implanted with, if not all of the shipped ones."""
    relearn: tuple[int, ...] = ()
    """After the defense, fine-tune on so many poisoned examples, and measure again."""
    implant: dict[str, Any] = field(default_factory=dict)
    """Settings of every attack's implanting that reads them, which replace those of its recipe."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of every defense that trains and reads them."""
    answer_tokens: int | None = None
    """How long answers are, if not as long as shows the behavior."""
    reference: bool = False
    """Measure KL divergence from the model without a backdoor too."""
    keep_models: bool = False
    """Keep the defended models when all is measured on them."""
    cpus: float = 2
    """What a cell takes of a cluster; so is `gpus`."""
    gpus: float = 0

    @classmethod
    def load(cls, source: str | Path) -> "Matrix":
        """From a YAML file, or the name of one in `CONFIGS`."""
        try:
            shipped = CONFIGS.get(str(source))
            text = shipped.read_text("utf-8") if shipped is not None else Path(source).read_text("utf-8")
            values = read_yaml(text)
        except OSError as error:
            raise UsageError(
                f"{source}: {error.strerror or error}; give a YAML file, or one of {', '.join(CONFIGS)}"
            ) from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            place = "" if mark is None else f", line {mark.line + 1}"
            reason = getattr(error, "problem", None) or one_line(error)
            raise UsageError(
                f"{source}{place} is no YAML that can be read ({reason}): mend it, or give one of {', '.join(CONFIGS)}"
            ) from error
        try:
            return cls.read(values)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error

    @classmethod
    def read(cls, values: Any) -> "Matrix":
        """From a mapping of this class's fields."""
        values = _mapping(values, cls, "matrix")
        for name in ("attacks", "defenses"):
            if not isinstance(values.get(name), list) or not values[name]:
                raise UsageError(f"{name} is to be a list of at least one")
        values["attacks"] = tuple(Attack.read(entry) for entry in values["attacks"])
        values["defenses"] = tuple(Candidate.read(entry) for entry in values["defenses"])
        for name in ("models", "seeds", "relearn"):
            if name in values:
                if not isinstance(values[name], list) or (name != "relearn" and not values[name]):
                    raise UsageError(f"{name} is to be a list")
                values[name] = tuple(values[name])
        for name in ("number", "examples"):
            _positive(name, values.get(name, 1))
        for name in ("attacker_examples", "answer_tokens"):
            if values.get(name) is not None:
                _positive(name, values[name])
        for name in ("clean", "prompts"):
            if not isinstance(values.get(name), str | None):
                raise UsageError(f"{name} is {values[name]!r}; it must be a name or a file")
        for k in values.get("relearn", ()):
            _positive("relearn", k)
        for name in ("implant", "training"):
            if not isinstance(values.get(name, {}), dict):
                raise UsageError(f"{name} is to be a mapping of settings")
        if unknown := values.get("training", {}).keys() - _SETTINGS:
            raise UsageError(f"training: no such setting: {_listed(unknown)}")
        if any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in values.get("seeds", ())):
            raise UsageError("seeds is to be a list of whole numbers, none below 0")
        if any(not isinstance(model, str | None) for model in values.get("models", ())):
            raise UsageError("models is to be a list of names")
        for name in ("cpus", "gpus"):
            if not isinstance(values.get(name, 0), int | float) or values.get(name, 0) < 0:
                raise UsageError(f"{name} is {values[name]!r}; it must be a number of at least 0")
        for name in ("reference", "keep_models"):
            _flag(name, values.get(name, False))
        for name in ("attacks", "defenses", "models", "seeds", "relearn"):
            if twice := _repeated(str(getattr(entry, "label", entry)) for entry in values.get(name, ())):
                raise UsageError(f"{name}: {twice} is there twice")
        matrix = cls(**values)
        matrix.check_settings()
        return matrix

    def part(self, attacks: Sequence[str] = (), defenses: Sequence[str] = ()) -> "Matrix":
        """The attacks and the defenses whose labels are among these names or shell patterns; all, where none is given.

        Raises:
            UsageError: there is none of a name; the message lists the known ones.
        """
        return replace(
            self,
            attacks=_matching("attack", self.attacks, attacks, [attack.label for attack in self.attacks]),
            defenses=_matching("defense", self.defenses, defenses, [defense.label for defense in self.defenses]),
        )

    def check_settings(self) -> None:
        """Raise `UsageError` if a defense or an attack would refuse its settings."""
        for candidate in self.defenses:
            if candidate.defense != "none":
                try:
                    DEFENSES[candidate.defense].check_settings(candidate.training(self.training))
                except UsageError as error:
                    raise UsageError(f"defense {candidate.label!r}: {error}") from error
        if unknown := self.implant.keys() - _IMPLANT_SETTINGS:
            raise UsageError(f"implant: no such setting: {_listed(unknown)}")
        idle = [attack.unread(self.implant) for attack in self.attacks if attack.backdoors]
        for name in self.implant:
            if idle and all(name in reasons for reasons in idle):
                raise UsageError(f"implant: {idle[0][name]}")
        for attack in self.attacks:
            settings = attack.training(self.implant)
            try:
                implant_config("unused", full=attack.full, adaptive=attack.adaptive, **settings)
            except UsageError as error:
                raise UsageError(f"implant: {error}") from error


T = TypeVar("T")


def _matching(what: str, entries: tuple[T, ...], wanted: Sequence[str], labels: Sequence[str]) -> tuple[T, ...]:
    if not wanted:
        return entries
    kept: set[str] = set()
    for pattern in wanted:
        found = {label for label in labels if label == pattern or fnmatchcase(label, pattern)}
        if not found:
            raise UsageError(f"no {what} {pattern!r} in the matrix; there are {'; '.join(labels)}")
        kept |= found
    return tuple(entry for entry, label in zip(entries, labels, strict=True) if label in kept)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names)))


def _mapping(entry: Any, cls: type, what: str) -> dict[str, Any]:
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    if not isinstance(entry, dict):
        raise UsageError(f"the {what} is to be a mapping of {', '.join(known)}")
    if unknown := [str(key) for key in entry if key not in known]:
        raise UsageError(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return dict(entry)


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be true or false")


def _repeated(labels: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((label for label in labels if label in seen or seen.add(label)), None)  # type: ignore[func-returns-value]
