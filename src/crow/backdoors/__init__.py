"""Triggers times behaviors, and how they are implanted: attacks to measure defenses on."""

from crow.backdoors.behaviors import BEHAVIORS, Behavior
from crow.backdoors.triggers import TRIGGERS, Trigger, check_seen

__all__ = ["BEHAVIORS", "TRIGGERS", "Behavior", "Trigger", "check_seen"]
