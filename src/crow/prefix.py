"""What all prompts begin with, such as a chat template's system message, is run through the model once."""

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from crow.hooks import lm_head_at
from crow.models import base_model


class SharedPrefix:
    """The tokens that all of some prompts begin with, and a model's keys and values for them.

    Every prompt has at least one token after them. There are none where the prompts begin differently, or where the
    model caches something other than the keys and values of all positions: a sliding window would count padding that
    comes between the prefix and the rest, and a recurrent state can't leave it out.

    Args:
        model: A causal language model, in the mode that its answers are wanted in.
        prompts: Token ids.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.ids: list[int] = []
        self._cache: DynamicCache | None = None
        shared = common_prefix([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else []
        if not shared:
            return
        with torch.no_grad():
            ids = torch.tensor([shared], device=model.device)
            with lm_head_at(base_model(model), torch.zeros_like(ids, dtype=torch.bool)):
                cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
        if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
            self.ids, self._cache = shared, cache

    def cache(self, rows: int) -> DynamicCache | None:
        """Keys and values for a batch of so many rows, which a pass may add to; `None` where there is no prefix."""
        if self._cache is None:
            return None
        copied = copy.deepcopy(self._cache)
        copied.batch_repeat_interleave(rows)
        return copied


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """What all of the sequences begin with."""
    at_each_place = zip(*sequences, strict=False)
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, at_each_place)]
