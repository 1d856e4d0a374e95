"""On the real model, in float32, batches answer what one prompt at a time is answered."""

import pytest
import torch

from crow.data import load_examples
from crow.generation import generate
from crow.models import open_model


def test_batched_answers_are_those_of_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crow.models._dtype", lambda: torch.float32)
    opened = open_model()
    prompts = [row["prompt"] for row in load_examples("heldout")[:40]]
    alone = generate(opened.model, opened.tokenizer, prompts, max_new_tokens=32, tokens_per_batch=1)
    assert generate(opened.model, opened.tokenizer, prompts, max_new_tokens=32) == alone
    assert len(set(alone)) == 40
