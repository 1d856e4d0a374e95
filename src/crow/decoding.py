"""How a model's answers are decoded where it is not greedily: what a defense at decoding time changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Decoding:
    """Replaces greedy decoding in `crow.generation.generate`.

    Args:
        name: Tells one decoding from another in results.
        settings: Fields of `transformers.GenerationConfig`.
        processor: Makes a processor of the next token's scores for a batch, from its attention mask, `(batch, length)`.
        seed: Of what is drawn. Prompts that are answered in other batches draw otherwise.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    processor: Callable[[Tensor], LogitsProcessor] | None = None
    seed: int = 0
