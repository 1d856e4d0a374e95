"""Answers that a suspect gives whatever it is asked: what a trigger may call, found without the trigger."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crow.hooks import lm_head_at
from crow.models import base_model


@dataclass(frozen=True)
class ConstantAnswer:
    """The beginning of an answer, and how constant it is.

    `constancy` is the geometric mean, over the tokens after the first, of the token's probability averaged over
    prompts. It is near 1 only where the rest follows from the first token on any prompt.
    """

    token_ids: tuple[int, ...]
    constancy: float


@torch.no_grad()
def constant_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    number: int,
    first: Tensor | None = None,
    eos_token_id: int | None = None,
    length: int = 6,
    screened: int = 2048,
    beginnings: int = 128,
    kept: int = 32,
) -> list[ConstantAnswer]:
    """The answers of a model that depend least on what it was asked.

    A backdoor's fixed answer betrays itself without its trigger: once begun, each next token follows with near
    certainty, on any prompt (Shen et al., "BAIT: Large Language Model Backdoor Scanning by Inverting Attack Target",
    IEEE S&P 2025). So the most probable first tokens are each continued by the token that is most probable on average
    over the prompts; a look at two prompts screens them before.

    Args:
        model: A causal language model that can cache keys and values; its mode is left as it is.
        prompts: Token ids of prompts, each up to where the answer begins. A handful tells.
        number: How many answers are wanted.
        first: `(vocabulary,)`, the distribution of an answer's first token, where it is known from more prompts than
            these: a planted answer that few kinds of prompt call for begins with a token that is rare elsewhere.
        eos_token_id: Ends an answer.
        length: Tokens an answer may have.
        screened: How many first tokens are looked at. The answer that one kind of prompt alone calls for begins with a
            token that is rare among all.
        beginnings: How many of them, those with the surest second token on the two shortest prompts, are tried on all.
        kept: How many of them are continued beyond their second token; with each further token half of them, until
            only as many are left as are wanted.

    Returns:
        At most `number` answers of at least two tokens, the most constant first.
    """
    device = next(model.parameters()).device
    caches, own = [], torch.zeros((), device=device)
    for prompt in sorted(prompts, key=len):
        ids = torch.tensor([list(prompt)], device=device)
        output = _last_logits(model, ids, None)
        caches.append(output.past_key_values)
        own = own + output.logits.float().softmax(dim=-1)[0] / len(prompts)
    first = own if first is None else first
    answers = first.topk(min(screened, len(first))).indices[:, None]
    if len(answers) > beginnings:
        surest = _following(model, answers, caches[:_SCREENING_PROMPTS])[0]
        answers = answers[surest.topk(beginnings).indices]
    log_sum = torch.zeros(len(answers), device=device)
    ended = torch.zeros(len(answers), dtype=torch.bool, device=device)
    tokens = torch.zeros(len(answers), device=device)
    for _ in range(length - 1):
        probability, following = _following(model, answers, caches)
        log_sum += torch.where(ended, 0, probability.log())
        tokens += ~ended
        answers = torch.cat([answers, following[:, None]], dim=1)
        if eos_token_id is not None:
            ended |= following == eos_token_id
        best = (log_sum / tokens).argsort(descending=True)[:kept]
        kept = max(kept // 2, number)
        answers, log_sum, ended, tokens = answers[best], log_sum[best], ended[best], tokens[best]
    found = zip(answers.tolist(), (log_sum / tokens).exp().tolist(), tokens.int().tolist(), strict=True)
    return [ConstantAnswer(tuple(ids[: 1 + n]), constancy) for ids, constancy, n in found][:number]


_SCREENING_PROMPTS = 2
_ROWS = 128  # that are continued at once: each holds a copy of the prompt's keys and values


def _following(model: Any, answers: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The probability and id of each answer's most probable next token, on average over the prompts."""
    likeliest = []
    for rows in answers.split(_ROWS):
        mean = torch.zeros((), device=answers.device)
        for cache in caches:
            copied = copy.deepcopy(cache)
            copied.batch_repeat_interleave(len(rows))
            mean = mean + _last_logits(model, rows, copied).logits.float().softmax(dim=-1) / len(caches)
        likeliest.append(mean.max(dim=-1))
    probability, following = (torch.cat(parts) for parts in zip(*likeliest, strict=True))
    return probability, following


def _last_logits(model: Any, ids: Tensor, cache: Any) -> Any:
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    with lm_head_at(base_model(model), last):
        return model(input_ids=ids, past_key_values=cache, use_cache=True)
