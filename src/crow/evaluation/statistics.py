"""Counts and means, and what is derived from them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import ClassVar, Self

import numpy as np
from scipy.stats import binomtest, bootstrap, t


@dataclass(frozen=True)
class Count:
    """`hits` of `n`."""

    hits: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= index(self.hits) <= index(self.n):
            raise ValueError(f"{self.hits} of {self.n} is no count")

    @property
    def rate(self) -> float:
        return self.hits / self.n if self.n else float("nan")

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the rate; the whole of [0, 1] where n is 0."""
        if self.n == 0:
            return (0.0, 1.0)
        interval = binomtest(self.hits, self.n).proportion_ci(confidence, method="wilson")
        return (float(interval.low), float(interval.high))

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.hits}/{self.n} ({100 * low:.1f} to {100 * high:.1f}%)"


@dataclass(frozen=True)
class Mean:
    """A mean of `n` values, with their standard deviation."""

    least: ClassVar[float] = -math.inf
    """What no value is below; none is above `most`."""
    most: ClassVar[float] = math.inf

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Of some values; nothing of none."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval of the mean, as far as values can lie; all of that where n is 1."""
        if self.n == 1:
            return (self.least, self.most)
        reach = float(t.ppf((1 + confidence) / 2, self.n - 1)) * self.deviation / math.sqrt(self.n)
        return (max(self.mean - reach, self.least), min(self.mean + reach, self.most))

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.mean:.2f} ({low:.2f} to {high:.2f}, n = {self.n})"


class MeanLength(Mean):
    """Of lengths, none of which is below 0."""

    least = 0.0


class MeanScore(Mean):
    """Of a judge's scores, from 1 to 10."""

    least, most = 1.0, 10.0


@dataclass(frozen=True)
class Paired:
    """How the hits of two models on the same prompts differ."""

    only_before: int
    only_after: int
    n: int
    """Prompts that both answered."""
    p_value: float
    """McNemar's exact test, two-sided: that the models hit equally often."""


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare two models' hits, prompt by prompt.

    Raises:
        ValueError: not of the same length.
    """
    pairs = list(zip(before, after, strict=True))
    only_before, only_after = pairs.count((True, False)), pairs.count((False, True))
    differing = only_before + only_after
    p_value = float(binomtest(only_before, differing).pvalue) if differing else 1.0
    return Paired(only_before, only_after, len(pairs), p_value)


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def perplexity_ratio(before: Sequence[float], after: Sequence[float], tokens: Sequence[int]) -> Ratio | None:
    """The perplexity of one model as a multiple of another's, on the same answers; nothing of fewer than two.

    The interval is the paired bootstrap's (percentiles of 9,999 resamples of the answers, drawn by seed 0).

    Args:
        before: Nats of each answer under the other model.
        after: Under the one.
        tokens: Of each answer.
    """
    if len(tokens) < 2:
        return None

    def ratio(nats: np.ndarray, number: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.exp(nats.sum(axis=axis) / number.sum(axis=axis))

    sample = (np.subtract(after, before), np.asarray(tokens))
    found = bootstrap(sample, ratio, paired=True, method="percentile", rng=np.random.default_rng(0))
    interval = found.confidence_interval
    return Ratio(float(ratio(*sample)), float(interval.low), float(interval.high))


def is_degenerate(answer: str) -> bool:
    """Whether an answer is empty or a loop.

    A loop is a piece that is repeated back to back, at least four times in all, and makes up more than half of the
    answer: of its words, in answers of twelve or more; or, up to eight characters long, of its characters, in answers
    of forty or more.
    """
    words = answer.split()
    return not words or _is_loop(words, shortest=12) or _is_loop("".join(words), shortest=40, longest_piece=8)


def _is_loop(items: Sequence[str], shortest: int, longest_piece: int | None = None) -> bool:
    if len(items) < shortest:
        return False
    numbers: dict[str, int] = {}
    numbered = np.array([numbers.setdefault(item, len(numbers)) for item in items])
    for period in range(1, min(len(items) // 4, longest_piece or len(items)) + 1):
        breaks = np.flatnonzero(numbered[:-period] != numbered[period:])
        longest = np.diff(breaks, prepend=-1, append=len(items) - period).max() - 1
        if longest >= 3 * period and longest + period > len(items) / 2:
            return True
    return False
