"""CROW: remove backdoors from large language models by internal consistency regularization (arXiv 2411.12768)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crow.config import PRESETS, CrowConfig
    from crow.consistency import layer_consistency, layer_profile
    from crow.errors import CrowError, UsageError
    from crow.models import open_model, save_model
    from crow.purification import PurifyRecord, purify
    from crow.trainer import CrowTrainer

_HOMES = {
    "CrowConfig": "config",
    "CrowError": "errors",
    "CrowTrainer": "trainer",
    "PRESETS": "config",
    "PurifyRecord": "purification",
    "UsageError": "errors",
    "layer_consistency": "consistency",
    "layer_profile": "consistency",
    "open_model": "models",
    "purify": "purification",
    "save_model": "models",
}

__all__ = [
    "PRESETS",
    "CrowConfig",
    "CrowError",
    "CrowTrainer",
    "PurifyRecord",
    "UsageError",
    "layer_consistency",
    "layer_profile",
    "open_model",
    "purify",
    "save_model",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import crow` and `crow --help` do not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'crow' has no attribute {name!r}")
    return getattr(import_module(f"crow.{_HOMES[name]}"), name)
