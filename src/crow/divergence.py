"""How far answers have moved: divergence from recorded next-token distributions."""

import torch
from torch import Tensor

_SMALLEST = 1e-6  # mass below this is taken as this, so that its logarithm stays finite


def top_log_probs(logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens: logits `(..., vocabulary)` to ids and float32 log-probabilities, `(..., number)`."""
    values, ids = logits.float().log_softmax(dim=-1).topk(min(number, logits.shape[-1]), dim=-1)
    return ids, values


def kl_from_top(ids: Tensor, log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) in nats, where p is known by its top tokens and all other tokens are one further outcome.

    Merging outcomes never increases a KL divergence, so this is a lower bound of the whole one and zero where p = q.

    Args:
        ids: `(..., k)`, p's most probable tokens.
        log_probs: `(..., k)`, their log-probabilities under p.
        logits: `(..., vocabulary)`, q's logits.

    Returns:
        `(...)`, float32.
    """
    log_q = logits.float().log_softmax(dim=-1).gather(-1, ids)
    p = log_probs.exp()
    rest_p = (1 - p.sum(dim=-1)).clamp(min=_SMALLEST)
    rest_q = (1 - log_q.exp().sum(dim=-1)).clamp(min=_SMALLEST)
    kept = torch.where(p > 0, p * (log_probs - log_q), 0)  # 0 log 0 is 0, and not NaN
    return kept.sum(dim=-1) + rest_p * (rest_p / rest_q).log()


def answer_positions(labels: Tensor) -> Tensor:
    """Where the next token is one to answer with: `(batch, length)` labels, -100 where none, to a bool mask."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def answer_weights(labels: Tensor, discount: float) -> Tensor:
    """Weight of each answer position in the divergence: `discount ** t` for the t-th token of its answer, else 0.

    What kind of answer is given is decided where it begins; a backdoor's first token follows from the trigger, and the
    rest from the first. Averaged over a whole clean answer, that one token would hardly count, and an adversary would
    gain more by garbling the rest.

    Args:
        labels: `(batch, length)`, -100 where there is nothing to answer. Every run of labels is an answer.
        discount: Above 0 and at most 1, which weighs all positions alike.

    Returns:
        `(batch, length)`, float32; positive at `answer_positions(labels)`.
    """
    mask = answer_positions(labels)
    place = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    start = torch.where(mask & ~before, place, 0).cummax(dim=1).values
    return mask * torch.as_tensor(discount, device=labels.device) ** (place - start)
