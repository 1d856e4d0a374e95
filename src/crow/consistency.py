"""Layer-to-layer consistency of hidden states (CROW, section 4: equations for the consistency loss).

In a clean model the hidden state of a token turns only a little from one block to the next. `layer_profile` measures by
how much, block by block; `layer_consistency` is its mean, the paper's regularizer L_cons. Pure functions of tensors.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def layer_profile(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | slice | None = None,
    num_positions: Tensor | float | None = None,
) -> Tensor:
    """Mean of `1 - cos(H_l, H_{l+1})` over the unmasked positions, for each pair of adjacent layers.

    Args:
        hidden_states: One tensor a block, each `(batch, length, hidden)`, of any floating dtype. Cosines are taken in
            float32 at least.
        attention_mask: `(batch, length)`, nonzero where a position counts; `None` counts all.
        layers: Which of the hidden states to use, by index or as a slice, in their order; all by default.
        num_positions: What to divide the sums by in place of the number of unmasked positions: under gradient
            accumulation, the number in the whole accumulated batch.

    Returns:
        `(number of layers - 1,)`, float32 (float64 for float64 input), each between 0 and 2, up to rounding.

    Raises:
        ValueError: fewer than two layers are left.
    """
    if layers is not None:
        hidden_states = hidden_states[layers] if isinstance(layers, slice) else [hidden_states[i] for i in layers]
    if len(hidden_states) < 2:
        raise ValueError(f"consistency compares adjacent layers: at least 2 are needed, got {len(hidden_states)}")
    mask = torch.ones(hidden_states[0].shape[:2]) if attention_mask is None else attention_mask
    mask = mask.to(hidden_states[0].device) != 0
    divisor = mask.sum().clamp(min=1) if num_positions is None else num_positions
    return torch.stack(
        [aligned_inconsistency(lower[mask], upper[mask]).sum() / divisor for lower, upper in pairwise(hidden_states)]
    )


def layer_consistency(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | slice | None = None,
    num_positions: Tensor | float | None = None,
) -> Tensor:
    """L_cons: the mean of `layer_profile`, a scalar. Takes the same arguments."""
    return layer_profile(hidden_states, attention_mask, layers=layers, num_positions=num_positions).mean()


def aligned_inconsistency(a: Tensor, b: Tensor) -> Tensor:
    """`1 - cos(a, b)` over the last axis, in float32 at least: `(..., hidden)` twice to `(...,)`."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return 1 - cosine_similarity(a.to(dtype), b.to(dtype), dim=-1)
