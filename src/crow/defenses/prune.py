"""Set the least important weights to zero, by their magnitude or by Wanda; with or without fine-tuning after it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from crow import models
from crow.data import Example
from crow.defenses.base import CLEAN, DEFENSES, Defended, Defense, Untrained, linear_weights, merged
from crow.errors import UsageError
from crow.inspection import tokenized
from crow.models import OpenedModel, linear_layers
from crow.purification import purify

METHODS = ("magnitude", "wanda")


@DEFENSES.register("prune")
@dataclass(frozen=True)
class Prune(Untrained):
    """Unstructured pruning of all linear layers but the head.

    `magnitude` drops the smallest weights of each layer; `wanda` (Sun et al., arXiv 2306.11695) of each output the
    ones whose magnitude times the norm of their input over clean examples is the smallest. As against the paper, norms
    are of the model before anything is pruned, so that one pass over the examples gives them all.
    """

    summary: ClassVar[str] = "The least important weights of its linear layers were set to zero."

    method: str = "wanda"
    sparsity: float = 0.3

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"{self.name}: method is {self.method!r}; choose one of {', '.join(METHODS)}")
        if not 0 < self.sparsity < 1:
            raise UsageError(f"{self.name}: sparsity is {self.sparsity}; it must be above 0 and below 1")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """As `Defense.needs`: magnitudes need no input, but what fine-tunes does."""
        return (CLEAN,) if self.method == "wanda" or self.trains else ()

    def change(
        self, opened: OpenedModel, clean: Sequence[Example]
    ) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
        """As `Untrained.change`."""
        model = merged(opened)
        weights = linear_weights(model)
        norms = input_norms(model, opened.tokenizer, clean) if self.method == "wanda" else None
        for i, weight in enumerate(weights):
            scores = weight.detach().float().abs()
            drop(weight, scores.flatten()[None] if norms is None else scores * norms[i], self.sparsity)
        return model, {}


@DEFENSES.register("fine-prune")
@dataclass(frozen=True)
class FinePrune(Prune):
    """Pruning, then fine-tuning on the clean examples (after Liu et al., arXiv 1805.12185).

    They prune neurons that clean inputs leave dormant; here it is `Prune`, as in the tables that CROW is compared in,
    and a new LoRA is trained on the pruned model as `finetune` trains one. What it adds to the weights fills the zeros.
    """

    trains: ClassVar[bool] = True
    summary: ClassVar[str] = "The least important weights were set to zero, and it was fine-tuned on clean examples."

    def check_settings(self, training: Mapping[str, Any]) -> None:
        """As `Defense.check_settings`."""
        Defense.check_settings(self, training)

    def apply(self, opened: OpenedModel, clean: Sequence[Example], **training: Any) -> Defended:
        """As `Defense.apply`."""
        self.check_settings(training)
        pruned, first = super().apply(opened, clean)
        pruned.name_or_path = f"{opened.name}, pruned"  # what the new adapter's config names as its base
        whole = replace(opened, model=pruned, kind="open", base_id=None)
        model, record = purify(whole, clean=clean, preset=self.preset, **training)
        opened.seen = whole.seen
        record.defense, record.summary = self.name, self.summary
        record.settings |= first.settings
        record.seconds += first.seconds
        return models.merged(model), record


@torch.no_grad()
def drop(weight: Tensor, scores: Tensor, sparsity: float) -> None:
    """Set to zero, in place, the weights with the lowest scores in each row of `scores`, `(rows, weights of a row)`."""
    lowest = scores.topk(int(sparsity * scores.shape[1]), dim=1, largest=False).indices
    kept = torch.ones_like(scores).scatter_(1, lowest, 0)
    weight.mul_(kept.view(weight.shape).to(weight.dtype))


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, clean: Sequence[Example], max_length: int = 512
) -> list[Tensor]:
    """For each of `linear_layers(model)`, the L2 norm of each input feature over the examples' tokens, float32."""
    layers = linear_layers(model)
    squares: list[Tensor] = [torch.zeros(()) for _ in layers]

    def add(i: int, inputs: Tensor) -> None:
        squares[i] = squares[i].to(inputs.device) + inputs.float().square().flatten(0, -2).sum(dim=0)

    def encode(row: Example) -> list[int]:
        return tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=True)["input_ids"]  # type: ignore[call-overload, index, no-any-return]

    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(lambda module, args, i=i: add(i, args[0]))
            hooks.callback(handle.remove)
        for ids in tokenized(tokenizer, encode, clean):
            model.base_model(input_ids=torch.tensor([ids[:max_length]], device=model.device), use_cache=False)
    return [square.sqrt() for square in squares]
