"""Round the weights to few bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from crow.data import Example
from crow.defenses.base import DEFENSES, Untrained, linear_weights, merged
from crow.errors import UsageError
from crow.models import OpenedModel


@DEFENSES.register("quantize")
@dataclass(frozen=True)
class Quantize(Untrained):
    """Weights of all linear layers but the head, rounded by bitsandbytes to NF4 (4 bits) or by rows to int8.

    They are written out again in the model's own dtype, so that anything opens the folder: what is measured is what
    rounding does to a backdoor, and not its speed. NF4 is QLoRA's (Dettmers et al., arXiv 2305.14314), with a scale for
    64 weights; int8 is LLM.int8()'s (arXiv 2208.07339) without its float16 outliers, with a scale for a row.
    """

    summary: ClassVar[str] = "The weights of its linear layers were rounded to few bits."
    needs: ClassVar[tuple[str, ...]] = ()

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"quantize: bits is {self.bits}; choose 4 or 8")

    def change(
        self, opened: OpenedModel, clean: Sequence[Example]
    ) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
        """As `Untrained.change`.

        Raises:
            UsageError: bitsandbytes is not installed.
        """
        try:
            from bitsandbytes import functional
        except ImportError as error:
            raise UsageError("defense 'quantize' needs bitsandbytes: pip install 'crow-llm[defenses]'") from error

        def rounded(weight: Tensor) -> Tensor:
            if self.bits == 4:
                return functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
            whole, scale, _ = functional.int8_vectorwise_quant(weight.half())
            return functional.int8_vectorwise_dequant(whole, scale)

        model = merged(opened)
        with torch.no_grad():
            for weight in linear_weights(model):
                weight.copy_(rounded(weight.contiguous()))
        return model, {}
