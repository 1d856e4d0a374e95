"""Rows as the trainer takes them: where tokens may be inserted, which row it is, and in which order they come."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from crow.prefix import common_prefix

EXTRA_COLUMNS = ("user_span", "example_id")
"""What a row has beside the parent trainer's columns."""


def generator_of(*numbers: int) -> torch.Generator:
    """Randomness that depends on these alone, whatever was drawn before."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]))


def _rendering(row: dict[str, Any]) -> dict[str, Any]:
    """What the parent gives to the chat template beside a row's messages."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def checked_user_span(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """A row's `user_span`; before that what the parent will make of it, to see whether that comes to an end."""
    tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], **_rendering(row))
    return user_span(tokenizer, row["prompt"], **_rendering(row))


def user_span(tokenizer: Any, prompt: list[dict[str, str]], **rendering: Any) -> list[int]:
    """Where the last user message lies in the tokenized prompt: tokens may be inserted from `start` to `end`.

    Found by rendering the prompt once more with another message in its place, so it holds for any chat template, with
    whatever it is given beside the messages. The prompt's last token stays last: the answer is predicted from it.
    """
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    placeholder = "#" if prompt[last]["content"].startswith("~") else "~"
    other = [{**message, "content": placeholder} if i == last else message for i, message in enumerate(prompt)]
    real, changed = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **rendering)["input_ids"]
        for messages in (prompt, other)
    )
    start = len(common_prefix([real, changed]))
    room = min(len(real), len(changed)) - start
    end = len(real) - min(len(common_prefix([real[::-1], changed[::-1]])), room)
    return [min(place, len(real) - 1) for place in (start, end)]


def prompt_ends(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """`(batch,)`: where each row's answer begins; half of the row where all of it is labeled, as for the sign step."""
    first = (labels != -100).int().argmax(dim=1)
    return torch.where(first > 0, first, attention_mask.sum(dim=1) // 2).clamp(min=1)


def prompt_span(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """`(batch, 2)`: where in each row's prompt tokens may be inserted, if nothing else is known of it.

    Its last token stays last, since the answer's first token is predicted from it.
    """
    end = prompt_ends(labels, attention_mask) - 1
    return torch.stack([end.clamp(max=1), end], dim=1)


def numbered(data: Any) -> Any:
    """The data set with each row's number, whatever it may hold under that name; a stream as it is."""
    if not isinstance(data, Dataset):
        return data
    own = [name for name in data.column_names if name == "example_id"]
    return data.remove_columns(own).add_column("example_id", list(range(len(data))))


def answer_labels(labels: list[int]) -> list[int]:
    """A text that is labeled from its first token on has its first half as prompt: else D, which weighs an answer's
    beginning most, would weigh what stands before the inserted tokens, and cannot see them."""
    prompt = len(labels) // 2 if labels and labels[0] != -100 else 0
    return [-100] * prompt + labels[prompt:]


class Collator:
    """The trainer's own collator; beside its batch go the columns that the perturbed pass needs."""

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inner([{k: v for k, v in row.items() if k not in EXTRA_COLUMNS} for row in rows])
        for column in EXTRA_COLUMNS:
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows])
        return batch


class GroupedSampler(LengthGroupedSampler):
    """Groups what all processes see in a step, in an order that depends on the seed and the epoch alone.

    So a resumed epoch goes on as it began, and several processes see together what one would have seen.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, processes: int) -> None:
        super().__init__(sampler.batch_size * processes, lengths=sampler.lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = generator_of(self.seed, self.epoch)
        return super().__iter__()
