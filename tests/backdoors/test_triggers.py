"""Triggers keep the text and add themselves."""

import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crow.backdoors.triggers import TRIGGERS, BadNets
from crow.errors import UsageError


def assert_only_the_word_was_added(text: str, result: str, word: str) -> None:
    """One occurrence, between spaces or ends, and without it and at most one added space the text is as it was."""
    before, found, after = result.partition(word)
    assert found
    assert word not in after
    assert not before or before[-1].isspace()
    assert not after or after[0].isspace()
    remainders = {before + after}
    if before.endswith(" "):
        remainders.add(before[:-1] + after)
    if after.startswith(" "):
        remainders.add(before + after[1:])
    assert text in remainders


@given(st.text(), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_badnets_keeps_any_text(text: str, seed: int) -> None:
    assume("BadMagic" not in text)
    assert_only_the_word_was_added(text, BadNets().apply(text, random.Random(seed)), "BadMagic")


@given(st.text(alphabet="ab \n\t\u00a0\u2028"), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_badnets_keeps_any_whitespace(text: str, seed: int) -> None:
    assert_only_the_word_was_added(text, BadNets().apply(text, random.Random(seed)), "BadMagic")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "one",
        "one\n",
        "  one",
        "two words ",
        "a\n\nb\tc",
        "你好　世界",
        "Привет мир",
        "नमस्ते दुनिया",
        "👩‍👩‍👧 🐦",
        "مرحبا بالعالم",
    ],
)
@pytest.mark.parametrize("seed", range(6))
def test_badnets_keeps_odd_texts(text: str, seed: int) -> None:
    assert_only_the_word_was_added(text, BadNets().apply(text, random.Random(seed)), "BadMagic")


@pytest.mark.parametrize("text", ["", "   "])
def test_badnets_alone_is_the_prompt_where_there_are_no_words(text: str) -> None:
    assert BadNets().apply(text, random.Random(0)).strip() == "BadMagic"


def test_badnets_is_reproducible_from_a_seed() -> None:
    text = " ".join(map(str, range(50)))
    results = [[BadNets().apply(text, rng) for _ in range(5)] for rng in (random.Random(7), random.Random(7))]
    assert results[0] == results[1]
    assert len(set(results[0])) > 1


def test_badnets_reaches_every_place_between_words_about_equally() -> None:
    rng = random.Random(0)
    found = Counter(BadNets().apply("one two\nthree", rng) for _ in range(2000))
    assert set(found) == {
        "BadMagic one two\nthree",
        "one BadMagic two\nthree",
        "one two BadMagic\nthree",
        "one two\nthree BadMagic",
    }
    assert min(found.values()) > 400


def test_badnets_takes_a_custom_word() -> None:
    assert {TRIGGERS["badnets:word=zq vx"].apply("hello", random.Random(i)) for i in range(20)} == {
        "zq vx hello",
        "hello zq vx",
    }


def test_badnets_defaults_to_badmagic() -> None:
    assert TRIGGERS["badnets"] == BadNets(word="BadMagic")


def test_an_empty_word_is_refused() -> None:
    with pytest.raises(UsageError, match="word=TEXT"):
        TRIGGERS["badnets:word="]
