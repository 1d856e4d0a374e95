"""Defenses by a short fine-tune, all with one trainer and one budget: CROW, and what its terms are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from crow.data import Example
from crow.defenses.base import DEFENSES, Defended, Defense
from crow.models import OpenedModel
from crow.purification import purify


class Trained(Defense):
    """`crow.purify` with a preset of `crow.config.PRESETS`."""

    def apply(self, opened: OpenedModel, clean: Sequence[Example], **training: Any) -> Defended:
        """As `Defense.apply`."""
        self.check_settings(training)
        model, record = purify(opened, clean=clean, **{"preset": self.preset} | training)
        record.defense = self.name
        return model, record


@DEFENSES.register("crow")
@dataclass(frozen=True)
class Crow(Trained):
    """CROW's default: answers are held while trained insertions try to throw them off."""

    preset: ClassVar[str] = "default"
    own_settings: ClassVar[frozenset[str]] = frozenset()  # its other presets are forms of it


@DEFENSES.register("crow-paper")
@dataclass(frozen=True)
class CrowPaper(Trained):
    """CROW as published (arXiv 2411.12768, section 4)."""

    preset: ClassVar[str] = "paper"


@DEFENSES.register("finetune")
@dataclass(frozen=True)
class FineTune(Trained):
    """Supervised fine-tuning on the clean examples: the same trainer with every term of CROW off."""


@DEFENSES.register("random-tokens")
@dataclass(frozen=True)
class RandomTokens(Trained):
    """CROW's default with random tokens inserted: the control for what its adversaries learn."""

    preset: ClassVar[str] = "random-tokens"
