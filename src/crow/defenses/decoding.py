"""Defenses that leave the weights as they are and choose the answer's tokens otherwise."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from crow.data import Example
from crow.decoding import Decoding
from crow.defenses.base import DEFENSES, Untrained
from crow.errors import UsageError
from crow.hooks import lm_head_at, position_ids
from crow.models import OpenedModel, base_model, check_vocabulary, open_model


class AtDecoding(Untrained):
    """A defense whose outcome is a `Decoding`, which `apply` leaves in the opened model."""

    summary: ClassVar[str] = "Its weights are the suspect's: the defense is in how answers are decoded."
    needs: ClassVar[tuple[str, ...]] = ()

    def change(
        self, opened: OpenedModel, clean: Sequence[Example]
    ) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
        """As `Untrained.change`."""
        opened.decoding = self.decoding(opened)
        return opened.model, {}

    @abstractmethod
    def decoding(self, opened: OpenedModel) -> Decoding:
        """How answers of this suspect are decoded."""


@DEFENSES.register("decode")
@dataclass(frozen=True)
class Decode(AtDecoding):
    """Sampling with a temperature from the most probable tokens, in place of greedy decoding."""

    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"decode: temperature is {self.temperature}; it must be positive")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"decode: top_p is {self.top_p}; it must be above 0 and at most 1")

    def decoding(self, opened: OpenedModel) -> Decoding:
        """As `AtDecoding.decoding`."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        name = f"temperature {self.temperature}, top_p {self.top_p}, seed {self.seed}"
        return Decoding(name, settings=sampling, seed=self.seed)


@DEFENSES.register("cleangen")
@dataclass(frozen=True)
class CleanGen(AtDecoding):
    """CleanGen (Li et al., EMNLP 2024, arXiv 2406.12257): a clean model's token where the suspect is too sure.

    A token of the suspect's is replaced by the reference's where the suspect gives it at least `threshold` times the
    reference's probability. The paper drafts four tokens before it checks them, which saves calls of the reference and
    leaves greedy answers as they are; here each is checked as it is made.
    """

    needs: ClassVar[tuple[str, ...]] = ("clean reference model",)

    reference: str = ""
    threshold: float = 20.0

    def __post_init__(self) -> None:
        if not 1 <= self.threshold < math.inf:
            raise UsageError(f"cleangen: threshold is {self.threshold}; it must be at least 1")

    def check_settings(self, training: Mapping[str, Any]) -> None:
        """As `Untrained.check_settings`; without a reference there is nothing to compare with."""
        super().check_settings(training)
        if not self.reference:
            raise UsageError("cleangen needs a clean reference model: cleangen:reference=MODEL")

    def decoding(self, opened: OpenedModel) -> Decoding:
        """As `AtDecoding.decoding`.

        Raises:
            Unfit: the reference has another vocabulary.
        """
        reference = open_model(self.reference)
        check_vocabulary(reference, opened)
        reference.model.eval()
        return Decoding(
            f"cleangen of {reference.name} {reference.hashes}, threshold {self.threshold}",
            processor=lambda mask: _Replacing(base_model(reference.model), mask, math.log(self.threshold)),
        )


class _Replacing(LogitsProcessor):
    """Leaves one token to choose where the suspect's is suspicious: the reference's most probable one."""

    def __init__(self, reference: PreTrainedModel, attention_mask: Tensor, bound: float) -> None:
        self.reference, self.mask, self.bound = reference, attention_mask, bound
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        theirs = self._following(input_ids)
        size = min(theirs.shape[-1], scores.shape[-1])  # the embedding of either may be padded
        theirs, ours = (logits[:, :size].float().log_softmax(dim=-1) for logits in (theirs, scores))
        token = ours.argmax(dim=-1, keepdim=True)
        suspicious = ours.gather(1, token) - theirs.gather(1, token) >= self.bound
        only = torch.full_like(scores, -torch.inf).scatter_(1, theirs.argmax(dim=-1, keepdim=True), 0.0)
        return torch.where(suspicious, only, scores)

    def _following(self, ids: Tensor) -> Tensor:
        """The reference's logits of the next token, `(batch, vocabulary)`."""
        self.mask = torch.nn.functional.pad(self.mask, (0, ids.shape[1] - self.mask.shape[1]), value=1)
        new = ids if self.cache is None else ids[:, -1:]
        last = torch.zeros_like(new, dtype=torch.bool)
        last[:, -1] = True
        with lm_head_at(self.reference, last):
            output = self.reference(
                input_ids=new,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **position_ids(self.reference, self.mask, new.shape[1]),
            )
        self.cache = output.past_key_values
        return cast(Tensor, output.logits)
