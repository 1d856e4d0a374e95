"""What is done to the input embeddings: the paper's sign step, and tokens inserted among the user's words."""

import torch
from torch import Tensor, nn


def sign_step(gradient: Tensor, epsilon: Tensor | float) -> Tensor:
    """The paper's perturbation `delta = epsilon * sign(gradient)`: one step, no second-order term (CROW, section 4).

    Args:
        gradient: dL_cons/dE, of any shape and floating dtype.
        epsilon: The size of the step, in the embeddings' units.
    """
    return epsilon * gradient.sign()


def root_mean_square(embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """RMS of the unmasked embeddings' components, a scalar: the scale that a relative epsilon is measured in."""
    return embeddings[attention_mask != 0].float().square().mean().sqrt()


def insertion_index(length: int, position: Tensor, number: int) -> Tensor:
    """Where each place of a sequence with `number` tokens inserted comes from.

    Args:
        length: Length of the sequences before the insertion.
        position: `(batch,)`, integers from 0 to `length`: the inserted tokens come before the token there.
        number: How many are inserted.

    Returns:
        `(batch, length + number)`, integers. Values below `length` are places of the original sequence; value
        `length + i` is the inserted token `i`.
    """
    place = torch.arange(length + number, device=position.device).expand(len(position), -1)
    start = position[:, None]
    inserted = length + place - start
    shifted = torch.where(place < start, place, place - number)
    return torch.where((place >= start) & (place < start + number), inserted, shifted)


def insert(values: Tensor, inserted: Tensor, index: Tensor) -> Tensor:
    """Insert along the second axis by `insertion_index`: `(B, T, ...)` and `(B, k, ...)` to `(B, T + k, ...)`."""
    both = torch.cat([values, inserted], dim=1)
    return both.gather(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:]))


class SoftTokens(nn.Module):
    """A small pool of universal soft tokens, which play the trigger that nobody knows.

    Universal perturbations after Moosavi-Dezfooli et al. (arXiv 1610.08401), here inserted and not added, since a
    trigger is words among the user's words. The tokens ascend by Adam on whatever gradient the model's own backward
    leaves in them, as in "free" adversarial training (Shafahi et al., arXiv 1904.12843), and are kept within a ball
    that real embeddings live in.

    Args:
        embeddings: `(number, hidden)`: embeddings of real tokens, for start values and scale.
        pool: How many different insertions are kept.
        length: Soft tokens in each.
        max_norm: Bound of each token's norm, as a multiple of the mean norm of real embeddings.
        learning_rate: Adam's step, as a fraction of the real embeddings' RMS.
    """

    def __init__(self, embeddings: Tensor, *, pool: int, length: int, max_norm: float, learning_rate: float) -> None:
        super().__init__()
        embeddings = embeddings.detach().float()
        norms = embeddings.norm(dim=-1)
        self.bound = max_norm * norms.mean().item()
        start = embeddings[torch.randint(len(embeddings), (pool * length,))]
        self.tokens = nn.Parameter(start.view(pool, length, -1).clone())
        self.project()
        scale = embeddings.square().mean().sqrt().item()
        self.optimizer = torch.optim.Adam([self.tokens], lr=learning_rate * scale, maximize=True)

    @torch.no_grad()
    def project(self) -> None:
        """Scale every token that is out of bounds back to the bound."""
        self.tokens.copy_(torch.renorm(self.tokens.flatten(0, 1), 2, 0, self.bound).view_as(self.tokens))

    def ascend(self) -> None:
        """One step up the gradient that the last backward left, then back within bounds; none where it overflowed."""
        if self.tokens.grad is not None and torch.isfinite(self.tokens.grad).all():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.project()


class GuessedTriggers(nn.Module):
    """A small pool of real tokens that play the trigger, each step closer to what calls a given answer.

    The gradient of a likelihood with respect to a token's embedding says, to first order, which other token of the
    vocabulary would raise it most (HotFlip, Ebrahimi et al., arXiv 1712.06751; for triggers of language models
    AutoPrompt, arXiv 2010.15980). Each ascent exchanges one token of a guess: the one that promises most.

    Args:
        embed: The model's input embedding.
        allowed: `(vocabulary,)`, bool: which tokens a guess may hold.
        number: How many guesses are kept.
        length: Tokens in each.
        momentum: Decay of the mean over past gradients; a batch alone shows a guess to few prompts.
    """

    barred: Tensor
    ids: Tensor
    mean_gradient: Tensor

    def __init__(
        self, embed: nn.Embedding, allowed: Tensor, *, number: int, length: int, momentum: float = 0.8
    ) -> None:
        super().__init__()
        self._embed = [embed]  # in a list, so that it is no submodule
        self.momentum = momentum
        candidates = allowed.nonzero()[:, 0]
        self.register_buffer("barred", ~allowed)
        self.register_buffer("ids", candidates[torch.randint(len(candidates), (number, length))])
        self.tokens = nn.Parameter(self._embedded())
        self.register_buffer("mean_gradient", torch.zeros_like(self.tokens))

    def _embedded(self) -> Tensor:
        return self._embed[0](self.ids).detach().float()

    @torch.no_grad()
    def ascend(self, kept: int = 0) -> None:
        """Exchange one token of each guess but the first `kept`, by the gradient that the last backward left."""
        assert self.tokens.grad is not None
        self.mean_gradient.mul_(self.momentum).add_(self.tokens.grad)
        weight = self._embed[0].weight
        gain = (self.mean_gradient.to(weight.dtype) @ weight.T).float()
        gain -= gain.gather(-1, self.ids[..., None])
        gain.masked_fill_(self.barred, -torch.inf)
        best, token = gain.max(dim=-1)
        place = best.argmax(dim=-1, keepdim=True)
        self.ids[kept:] = self.ids.scatter(1, place, token.gather(1, place))[kept:]
        self.tokens.copy_(self._embedded())
        self.tokens.grad = None

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Put the guesses into another order, `(number,)` integers."""
        self.ids.copy_(self.ids[order])
        self.mean_gradient.copy_(self.mean_gradient[order])
        self.tokens.copy_(self.tokens[order])
