"""See and steer a forward pass of any decoder-only model from outside, with no code for any one architecture."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from crow.errors import UsageError


@dataclass
class Recording:
    """What one forward pass went through.

    `embeddings` is `(batch, length, hidden)`, the output of the input embedding; `hidden_states` holds the output of
    each block, `(batch, length, hidden)`, before any final norm.
    """

    embeddings: Tensor | None = None
    hidden_states: list[Tensor] = field(default_factory=list)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks: the one list of modules that is as long as the config says.

    Raises:
        UsageError: no such list is found.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UsageError(f"{type(model).__name__} has no list of {depth} decoder layers: CROW needs a decoder-only model")


@contextmanager
def record(
    model: PreTrainedModel, *, hidden: bool = True, embeddings_require_grad: bool = False
) -> Iterator[Recording]:
    """Collect embeddings and hidden states of the forward that runs in the block.

    Args:
        model: The model itself, not its distributed wrapper.
        hidden: Keep the hidden states; without them only the embeddings are kept.
        embeddings_require_grad: Make the embeddings require a gradient, so that it can be asked for after the pass.
    """
    recording = Recording()

    def keep_embeddings(module: nn.Module, args: Any, output: Tensor) -> None:
        if embeddings_require_grad and not output.requires_grad:
            output.requires_grad_()
        recording.embeddings = output

    def keep_hidden(module: nn.Module, args: Any, output: Any) -> None:
        recording.hidden_states.append(output[0] if isinstance(output, tuple) else output)

    layers: Iterable[nn.Module] = decoder_layers(model) if hidden else ()
    handles = [model.get_input_embeddings().register_forward_hook(keep_embeddings)]
    handles += [layer.register_forward_hook(keep_hidden) for layer in layers]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def lm_head_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Project only the given positions to the vocabulary: the logits come out as `(number of positions, vocabulary)`.

    Args:
        model: The model itself, not its distributed wrapper.
        positions: `(batch, length)`, bool. None true: the head is not paid for at all.
    """

    def select(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][positions.to(args[0].device)],)

    head = model.get_output_embeddings()
    if head is None:
        raise UsageError(f"{type(model).__name__} has no language-model head")
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def contiguous_lm_head(model: PreTrainedModel) -> Iterator[None]:
    """Give the head contiguous input: for a slice, as of the last position, PyTorch copies its weight for every row.

    Args:
        model: The model itself, not its distributed wrapper.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def hidden_states(model: PreTrainedModel, **inputs: Tensor) -> Recording:
    """Embeddings and hidden states of a plain forward without gradients; takes the model's own inputs."""
    with record(model) as recording, lm_head_at(model, torch.zeros_like(inputs["input_ids"], dtype=torch.bool)):
        model(**inputs, use_cache=False)
    return recording


def position_ids(model: PreTrainedModel, attention_mask: Tensor, new: int) -> dict[str, Tensor]:
    """For a pass over left-padded rows: the argument that tells the model where its last `new` tokens stand.

    Nothing for a model that takes no positions, and so counts by the mask. Others count padding, if left to themselves.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new:]}
