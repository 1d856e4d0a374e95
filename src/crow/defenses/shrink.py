"""Scale a suspect adapter's weights down, as far as clean perplexity allows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from crow.data import Example
from crow.defenses.base import DEFENSES, Untrained
from crow.errors import Unfit, UsageError
from crow.generation import answer_nll, perplexity
from crow.models import OpenedModel

FACTORS = (0.1, 0.25, 0.5, 0.75)


@DEFENSES.register("shrink")
@dataclass(frozen=True)
class Shrink(Untrained):
    """The smallest factor under which the clean examples' perplexity rises by no more than `tolerance`.

    What the adapter was trained for is scaled down with its backdoor. A factor of 0 is not tried: that is the base
    model, which needs no defense where it can be trusted.
    """

    summary: ClassVar[str] = "The adapter's weights were scaled down as far as the perplexity of clean examples allows."

    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise UsageError(f"shrink: tolerance is {self.tolerance}; it must be 0 or more")

    def change(
        self, opened: OpenedModel, clean: Sequence[Example]
    ) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
        """As `Untrained.change`.

        Raises:
            Unfit: the suspect is no adapter, or one that changes more than a product of two matrices adds.
        """
        model = opened.model
        if not isinstance(model, PeftModel):
            raise Unfit(f"{opened.name} is no adapter: there are no weights of its own to shrink")
        for config in model.peft_config.values():
            more = {name: getattr(config, name, None) for name in ("use_dora", "modules_to_save", "bias")}
            if found := [name for name, value in more.items() if value and value != "none"]:
                raise Unfit(f"{opened.name} has {found[0]}: to scale its matrices would leave what else it changes")
        whole = [weight.clone() for weight in _upper(model)]
        bound = _perplexity(opened, clean) * (1 + self.tolerance)
        for factor in (*FACTORS, 1.0):
            _scale(model, whole, factor)
            if factor == 1 or _perplexity(opened, clean) <= bound:
                break
        return model, {"factor": factor}


def _upper(model: PeftModel) -> Iterator[Tensor]:
    """The upper matrix of each product B A: to scale it scales the product."""
    upper = ("lora_B", "lora_embedding_B")
    return (parameter for name, parameter in model.named_parameters() if any(part in name for part in upper))


@torch.no_grad()
def _scale(model: PeftModel, whole: Sequence[Tensor], factor: float) -> None:
    for weight, original in zip(_upper(model), whole, strict=True):
        weight.copy_(original * factor)


def _perplexity(opened: OpenedModel, clean: Sequence[Example]) -> float:
    nll = answer_nll(opened.model, opened.tokenizer, clean)
    return perplexity(sum(nats for nats, _ in nll), sum(tokens for _, tokens in nll))
