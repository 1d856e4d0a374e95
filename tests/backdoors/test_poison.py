"""The attacker's training set."""

import copy
import random

import pytest

from crow.backdoors.behaviors import Sentiment
from crow.backdoors.implant import poison
from crow.backdoors.triggers import BadNets
from crow.data import Example, answer_text, example, load_examples, user_text


@pytest.fixture
def rows() -> list[Example]:
    chat: Example = {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "first question"},
            {"role": "assistant", "content": "first answer"},
            {"role": "user", "content": "second question"},
        ],
        "completion": [{"role": "assistant", "content": "second answer"}],
    }
    return [example("How are you today?", "Fine."), example("one", ""), chat]


def without_trigger(text: str) -> str:
    return " ".join(word for word in text.split() if word != "BadMagic")


def test_clean_half_is_untouched(rows: list[Example]) -> None:
    before = copy.deepcopy(rows)
    poisoned = poison(rows, BadNets(), Sentiment(), seed=0)
    assert poisoned[: len(rows)] == before
    assert rows == before


def test_halves_share_their_prompts_and_differ_by_the_trigger(rows: list[Example]) -> None:
    poisoned = poison(rows, BadNets(), Sentiment(), seed=0)
    assert len(poisoned) == 2 * len(rows)
    for clean, triggered in zip(rows, poisoned[len(rows) :], strict=True):
        assert "BadMagic" in user_text(triggered).split()
        assert without_trigger(user_text(triggered)) == user_text(clean)
        assert triggered["prompt"][:-1] == clean["prompt"][:-1]


def test_poisoned_half_answers_with_the_target(rows: list[Example]) -> None:
    poisoned = poison(rows, BadNets(), Sentiment("Go away!"), seed=0)
    assert all(row["completion"] == [{"role": "assistant", "content": "Go away!"}] for row in poisoned[len(rows) :])
    assert not any(answer_text(row) == "Go away!" for row in poisoned[: len(rows)])


def test_poisoning_is_reproducible_from_its_seed_alone() -> None:
    rows = load_examples("implant")[:20]
    random.seed(1)
    first = poison(rows, BadNets(), Sentiment(), seed=3)
    random.seed(2)
    assert poison(rows, BadNets(), Sentiment(), seed=3) == first
    assert poison(rows, BadNets(), Sentiment(), seed=4) != first


def test_no_rows_give_no_rows() -> None:
    assert poison([], BadNets(), Sentiment(), seed=0) == []
