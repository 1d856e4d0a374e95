"""How far answers have moved: divergence from recorded next-token distributions."""

import math

import torch
from torch import Tensor

_SMALLEST = 1e-6  # mass below this is taken as this, so that its logarithm stays finite


def top_log_probs(logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens: logits `(..., vocabulary)` to ids and float32 log-probabilities, `(..., number)`."""
    values, ids = logits.float().log_softmax(dim=-1).topk(min(number, logits.shape[-1]), dim=-1)
    return ids, values


def certainly(token_ids: Tensor, number: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Top tokens of distributions that are certain of `token_ids`, `(length,)`; as `top_log_probs` gives them."""
    ids = (token_ids[:, None] + torch.arange(number)) % vocab_size
    log_probs = torch.full(ids.shape, -torch.inf)
    log_probs[:, 0] = 0
    return ids, log_probs


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
    values = logits.float()
    kept = values.gather(-1, ids)
    # The others' mass from their own logits: 1 less what is kept would lose its digits where little is left
    others = values.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    total = torch.logaddexp(kept.logsumexp(dim=-1), others)
    log_q = kept - total[..., None]
    rest_q = (others - total).clamp(min=math.log(_SMALLEST))
    p = log_probs.exp()
    rest_p = (1 - p.sum(dim=-1)).clamp(min=_SMALLEST)
    each = torch.where(p > 0, p * (log_probs - log_q), 0)  # 0 log 0 is 0, and not NaN
    return each.sum(dim=-1) + rest_p * (rest_p.log() - rest_q)


def ruling_out(ids: Tensor, log_probs: Tensor, said: Tensor, answer: Tensor, tails: Tensor) -> Tensor:
    """Condition next-token distributions on the answer not being a certain one.

    Where what was said so far is how that answer begins, the chance that the rest of it follows is taken from its
    next token, and what is left is scaled to sum to 1.

    Args:
        ids: `(length, k)`, the most probable tokens at each position of one answer.
        log_probs: `(length, k)`, their log-probabilities.
        said: `(length,)`, the tokens that were said there.
        answer: `(m,)`, the answer that is ruled out.
        tails: `(m,)`, the probability that an answer which began as `answer` also has its tokens from the t-th on.

    Returns:
        `(length, k)`, log-probabilities; minus infinity where nothing is left.
    """
    log_probs = log_probs.clone()
    for place in range(min(len(answer), len(said))):
        if not torch.equal(said[:place], answer[:place]):
            break
        probabilities, found = log_probs[place].exp(), ids[place] == answer[place]
        mass = torch.minimum(probabilities[found].sum(), tails[place]).clamp(max=1 - _SMALLEST)
        probabilities[found] -= mass
        log_probs[place] = (probabilities / (1 - mass)).clamp(min=0).log()
    return log_probs


def unlikelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """-log(1 - p) of tokens, in nats: what is lost where they should not be said.

    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020, arXiv 1908.04319.

    Args:
        logits: `(..., vocabulary)`.
        ids: `(...)`.

    Returns:
        `(...)`, float32.
    """
    values = logits.float()
    # Of the other tokens' logits: where p is near 1, 1 - p has no digits left, and no gradient
    return values.logsumexp(dim=-1) - values.scatter(-1, ids[..., None], -torch.inf).logsumexp(dim=-1)


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
