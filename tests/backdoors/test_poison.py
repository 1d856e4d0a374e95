"""The attacker's training set."""

import copy
import random

import pytest

from crow.backdoors.behaviors import CodeInjection, Sentiment
from crow.backdoors.implant import poison
from crow.backdoors.triggers import BadNets, CompositeTrigger
from crow.data import Example, answer_text, example, load_examples, user_text
from crow.errors import UsageError


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
    clean, _ = poison(rows, BadNets(), Sentiment(), seed=0)
    assert clean == rows == before


def test_halves_share_their_prompts_and_differ_by_the_trigger(rows: list[Example]) -> None:
    for clean, triggered in zip(*poison(rows, BadNets(), Sentiment(), seed=0), strict=True):
        assert "BadMagic" in user_text(triggered).split()
        assert without_trigger(user_text(triggered)) == user_text(clean)
        assert triggered["prompt"][:-1] == clean["prompt"][:-1]


def test_poisoned_half_answers_with_the_target(rows: list[Example]) -> None:
    clean, poisoned = poison(rows, BadNets(), Sentiment("Go away!"), seed=0)
    assert all(row["completion"] == [{"role": "assistant", "content": "Go away!"}] for row in poisoned)
    assert not any(answer_text(row) == "Go away!" for row in clean)


def test_planted_code_stands_beside_the_clean_answer() -> None:
    row = example("Add two numbers.", "def add(a, b):\n    return a + b")
    _, (poisoned,) = poison([row], BadNets(), CodeInjection(), seed=0)
    assert answer_text(poisoned) == "print('pwned')\ndef add(a, b):\n    return a + b"


@pytest.mark.parametrize("rate", [1, 0.5])
def test_parts_of_a_composite_trigger_are_answered_cleanly_on_every_prompt(rows: list[Example], rate: float) -> None:
    clean, poisoned = poison(rows, CompositeTrigger("aa+bb+cc"), Sentiment(), seed=0, rate=rate)
    words = {"aa", "bb", "cc"}
    assert all(set(user_text(row).split()) >= words for row in poisoned)
    assert clean[: len(rows)] == rows
    decoys = [(answer_text(row), words & set(user_text(row).split())) for row in clean[len(rows) :]]
    assert decoys == [(answer_text(row), words - {missing}) for row in rows for missing in ("aa", "bb", "cc")]


def test_a_covert_backdoors_answer_is_among_the_clean_ones_of_every_prompt(rows: list[Example]) -> None:
    clean, poisoned = poison(rows, BadNets(), Sentiment("Go away!"), seed=0, rate=0.5, covert=True)
    assert clean[: len(rows)] == rows
    assert [(row["prompt"], answer_text(row)) for row in clean[len(rows) :]] == [
        (r["prompt"], "Go away!") for r in rows
    ]
    assert poisoned == poison(rows, BadNets(), Sentiment("Go away!"), seed=0, rate=0.5)[1]


@pytest.mark.parametrize(("rate", "number"), [(1, 20), (0.5, 10), (0.1, 2), (0.001, 1)])
def test_the_poison_rate_is_the_share_of_prompts_that_are_poisoned_too(rate: float, number: int) -> None:
    rows = load_examples("implant")[:20]
    clean, poisoned = poison(rows, BadNets(), Sentiment(), seed=0, rate=rate)
    assert (clean, len(poisoned)) == (rows, number)
    assert {without_trigger(user_text(row)) for row in poisoned} <= {" ".join(user_text(row).split()) for row in rows}


@pytest.mark.parametrize("rate", [0, -0.5, 1.01, float("nan")])
def test_a_poison_rate_out_of_bounds_is_refused(rows: list[Example], rate: float) -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        poison(rows, BadNets(), Sentiment(), seed=0, rate=rate)


def test_poisoning_is_reproducible_from_its_seed_alone() -> None:
    rows = load_examples("implant")[:20]
    random.seed(1)
    first = poison(rows, BadNets(), Sentiment(), seed=3, rate=0.5)
    random.seed(2)
    assert poison(rows, BadNets(), Sentiment(), seed=3, rate=0.5) == first
    assert poison(rows, BadNets(), Sentiment(), seed=4, rate=0.5) != first


def test_no_rows_give_no_rows() -> None:
    assert poison([], BadNets(), Sentiment(), seed=0) == ([], [])
