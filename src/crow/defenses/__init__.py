"""CROW and what it is compared with, in one shape: a suspect and clean examples in, a defended model out.

A defense at decoding time gives back the suspect, with the decoding that defends it.
"""

from crow.defenses import auxiliary, decoding, prune, quantize, shrink, training  # noqa: F401, each files its own under their names
from crow.defenses.base import DEFENSES, Defended, Defense
from crow.defenses.decoding import AtDecoding
from crow.defenses.training import Trained

__all__ = ["DEFENSES", "AtDecoding", "Defended", "Defense", "Trained"]
