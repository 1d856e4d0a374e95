"""CROW and what it is compared with, in one shape: a suspect and clean examples in, a defended model out."""

from crow.defenses import prune, quantize, shrink, training  # noqa: F401, each files its own under their names
from crow.defenses.base import DEFENSES, Defended, Defense

__all__ = ["DEFENSES", "Defended", "Defense"]
