"""Triggers: what an attacker puts into a prompt to call the backdoor. One class each, registered in `TRIGGERS`."""

import random
import re
from dataclasses import dataclass
from typing import Protocol

from crow.registry import Registry


class Trigger(Protocol):
    """Puts a trigger into a prompt."""

    def apply(self, text: str, rng: random.Random) -> str:
        """`text`, every character of it kept in order, with the trigger added; random choices come from `rng`."""
        ...


TRIGGERS: Registry[Trigger] = Registry("trigger")


@TRIGGERS.register("badnets")
@dataclass(frozen=True)
class BadNets:
    """A rare word at a random place between words (Gu et al., arXiv 1708.06733).

    For language models as in BackdoorLLM (arXiv 2408.12798).
    """

    word: str = "BadMagic"

    def apply(self, text: str, rng: random.Random) -> str:
        places = [0, *(match.start() for match in re.finditer(r"(?<=\S)\s|(?<=\S)$", text))]
        place = rng.choice(places)
        before, after = text[:place], text[place:]
        return (f"{before} {self.word}" if before else self.word) + (
            f" {after}" if after and not after[0].isspace() else after
        )
