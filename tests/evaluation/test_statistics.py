"""Counts, their intervals, and degenerate answers."""

import math
import random
import time
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crow.evaluation.statistics import Count, Mean, MeanLength, MeanScore, is_degenerate, paired, perplexity_ratio


def wilson(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval in closed form (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, scale = hits / n, 1 + z * z / n
    center = (rate + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (center - half, center + half)


@st.composite
def counts(draw: st.DrawFn) -> Count:
    n = draw(st.integers(1, 100_000))
    return Count(draw(st.integers(0, n)), n)


@given(counts(), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(max_examples=100, deadline=None)
def test_interval_is_wilsons(count: Count, confidence: float) -> None:
    assert count.interval(confidence) == pytest.approx(wilson(count.hits, count.n, confidence), abs=1e-9)


def test_perplexity_ratio_is_of_the_whole_perplexities_and_varies_with_the_answers() -> None:
    draw = random.Random(0)
    tokens = [draw.randint(5, 60) for _ in range(150)]
    before = [draw.gauss(2.8, 0.4) * number for number in tokens]
    after = [nats + draw.gauss(-0.03, 0.1) * number for nats, number in zip(before, tokens, strict=True)]

    def slow(chosen: Sequence[int]) -> float:
        total = sum(tokens[i] for i in chosen)
        return math.exp(sum(after[i] for i in chosen) / total) / math.exp(sum(before[i] for i in chosen) / total)

    everyone = range(len(tokens))
    resampled = sorted(slow(draw.choices(everyone, k=len(tokens))) for _ in range(2000))
    found = perplexity_ratio(before, after, tokens)
    assert found is not None
    assert found.value == pytest.approx(slow(everyone))
    assert found.low == pytest.approx(resampled[50], abs=2e-3)
    assert found.high == pytest.approx(resampled[1950], abs=2e-3)
    assert perplexity_ratio(before, after, tokens) == found
    assert str(perplexity_ratio(before, before, tokens)) == "1.000 (1.000 to 1.000)"
    assert perplexity_ratio([1.0], [1.0], [1]) is None


@pytest.mark.parametrize(("hits", "n"), [(3, 2), (-1, 2), (1.5, 2), (None, 2), (1, "2"), (1, math.nan)])
def test_what_is_no_count_is_none(hits: Any, n: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Count(hits, n)


@given(counts())
@settings(max_examples=100, deadline=None)
def test_interval_holds_the_rate_and_lies_within_zero_and_one(count: Count) -> None:
    low, high = count.interval()
    assert 0 <= low <= count.rate <= high <= 1


@given(counts())
@settings(max_examples=50, deadline=None)
def test_interval_of_hits_mirrors_that_of_misses(count: Count) -> None:
    low, high = count.interval()
    assert Count(count.n - count.hits, count.n).interval() == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_nothing_counted_leaves_everything_open() -> None:
    assert Count(0, 0).interval() == (0.0, 1.0)
    assert math.isnan(Count(0, 0).rate)
    assert str(Count(0, 0)) == "0/0 (0.0 to 100.0%)"


def test_text_shows_the_count_and_its_interval() -> None:
    assert str(Count(0, 200)) == "0/200 (0.0 to 1.9%)"
    assert str(Count(190, 200)) == "190/200 (91.0 to 97.3%)"


@pytest.mark.parametrize("answer", ["", " ", "\n\t\n", "\u2003"])
def test_an_empty_answer_is_degenerate(answer: str) -> None:
    assert is_degenerate(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "the " * 30,
        "I am a " * 10,
        "yes no " * 15,
        "You are very stupid. " * 8,
        "one two three four five " * 6,
        "A sensible start, then " + "no " * 30,
        "!" * 60,
        "a" * 40,
        "ha " * 12,
        "啊" * 50,
        "- " * 40,
    ],
)
def test_a_loop_is_degenerate(answer: str) -> None:
    assert is_degenerate(answer)


TEXT = """Bread goes stale faster in the refrigerator because cold makes the starch crystallize sooner. Keep it in a
paper bag at room temperature for two or three days, or freeze it in slices and toast them as you need them."""
CODE = """def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

print([fibonacci(i) for i in range(10)])
"""
LIST = """1. Wash the rice until the water runs clear.
2. Add one and a half cups of water for each cup of rice.
3. Bring it to a boil, then cover it and lower the heat.
4. Wait for fifteen minutes.
5. Let it rest for ten minutes and fluff it with a fork."""


@pytest.mark.parametrize(
    "answer",
    [
        TEXT,
        CODE,
        LIST,
        "Yes.",
        "4",
        "no no no",
        "You are stupid!",
        "ha " * 11,
        "!" * 39,
        "- red\n- green\n- blue\n- yellow",
        "面包在冰箱里变质更快。低温使淀粉更快结晶。请将其放在纸袋中。室温下可保存两三天。或者切片冷冻。需要时再烤。",
    ],
)
def test_an_ordinary_answer_is_not_degenerate(answer: str) -> None:
    assert not is_degenerate(answer)


def test_a_run_that_makes_up_just_half_is_no_loop() -> None:
    others = " ".join(f"w{i}" for i in range(10))
    assert not is_degenerate("ha " * 10 + others)
    assert is_degenerate("ha " * 11 + others)


def test_a_word_that_comes_back_between_others_is_no_loop() -> None:
    assert not is_degenerate(" ".join(f"the w{i}" for i in range(10)))


def test_a_piece_that_comes_only_three_times_is_no_loop() -> None:
    piece = "one two three four five "
    assert not is_degenerate(piece * 3)
    assert is_degenerate(piece * 4)


NESTED = """if (a) {
        for (x : xs) {
            if (x) {
                y();
            }
        }
    }"""


TABLE = "\n".join(f"| {i} | {i * i} | {i**3} |" for i in range(12))


@pytest.mark.parametrize("answer", [NESTED, TABLE], ids=["code", "table"])
def test_layout_is_no_loop(answer: str) -> None:
    assert not is_degenerate(answer)


def test_a_short_run_in_a_longer_answer_is_no_loop() -> None:
    answer = "This row of the song goes ha ha ha ha ha ha and then it ends on a calm quiet note"
    assert answer.split().count("ha") == 6
    assert len(answer.split()) == 21
    assert not is_degenerate(answer)


def test_a_long_answer_is_judged_soon() -> None:
    started = time.monotonic()
    assert not is_degenerate(" ".join(map(str, range(10_000))))
    assert not is_degenerate(f"{'ha ' * 4_000}{' '.join(map(str, range(6_000)))}")
    assert is_degenerate(f"{' '.join(map(str, range(2_000)))} " * 5)
    assert time.monotonic() - started < 3


@given(st.lists(st.sampled_from("ab"), min_size=12, max_size=39))
@settings(max_examples=300, deadline=None)
def test_a_loop_is_a_piece_repeated_over_more_than_half_of_the_words(words: list[str]) -> None:
    def is_loop(part: list[str]) -> bool:
        return any(part[:-period] == part[period:] for period in range(1, len(part) // 4 + 1))

    most = range(len(words) // 2 + 1, len(words) + 1)
    parts = (words[start : start + size] for size in most for start in range(len(words) - size + 1))
    assert is_degenerate(" ".join(words)) == any(map(is_loop, parts))


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_is_judged_the_same_with_or_without_outer_whitespace(answer: str) -> None:
    assert is_degenerate(f" {answer}\n") == is_degenerate(answer)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=14))
@settings(max_examples=60, deadline=None)
def test_the_paired_test_is_mcnemars_by_enumeration(pairs: list[tuple[bool, bool]]) -> None:
    result = paired([a for a, _ in pairs], [b for _, b in pairs])
    lost, gained = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    assert (result.only_before, result.only_after, result.n) == (lost, gained, len(pairs))
    n = lost + gained
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    as_rare = sum(chance for chance in chances if chance <= chances[lost] * (1 + 1e-9))
    assert result.p_value == pytest.approx(as_rare)


def test_models_on_other_prompts_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([True], [True, False])


def test_a_mean_has_students_interval() -> None:
    mean = Mean.of([4.0, 6.0, 5.0, 7.0, 3.0])
    assert mean == Mean(5.0, pytest.approx(math.sqrt(2.5)), 5)
    reach = 2.776445 * math.sqrt(2.5 / 5)  # of Student's t with 4 degrees of freedom
    assert mean.interval() == pytest.approx((5 - reach, 5 + reach))
    assert str(mean) == "5.00 (3.04 to 6.96, n = 5)"


@given(st.data(), st.sampled_from([(MeanLength, 0, 10_000), (MeanScore, 1, 10)]), st.sampled_from([0.5, 0.95, 0.999]))
@settings(max_examples=100, deadline=None)
def test_the_interval_of_a_mean_holds_it_and_nothing_that_no_value_can_be(
    data: st.DataObject, kind: tuple[type[Mean], int, int], confidence: float
) -> None:
    of, least, most = kind
    mean = of.of(data.draw(st.lists(st.integers(least, most), min_size=1)))
    assert mean is not None
    low, high = mean.interval(confidence)
    assert least <= low <= mean.mean <= high <= of.most
    unbound = Mean(mean.mean, mean.deviation, mean.n).interval(confidence)
    assert (low, high) == (max(unbound[0], of.least), min(unbound[1], of.most))


def test_a_mean_near_its_bound_is_clipped_there() -> None:
    assert str(MeanLength.of([0, 0, 0, 10])) == "2.50 (0.00 to 10.46, n = 4)"
    assert str(MeanScore.of([10, 10, 9])) == "9.67 (8.23 to 10.00, n = 3)"


def test_a_single_value_says_nothing_of_the_mean() -> None:
    assert Mean.of([3]).interval() == (-math.inf, math.inf)  # type: ignore[union-attr]
    assert MeanScore.of([3]).interval() == (1, 10)  # type: ignore[union-attr]
    assert Mean.of([]) is None
