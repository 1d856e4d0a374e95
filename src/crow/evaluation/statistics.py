"""Counts and what is derived from them."""

from collections import Counter
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Count:
    """`hits` of `n`."""

    hits: int
    n: int

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


def is_degenerate(answer: str) -> bool:
    """Whether an answer is empty or a loop.

    A loop is a single word, or a group of four words, that makes up more than half of an answer of twenty words or more;
    or a single character that makes up more than half of an answer of forty characters or more.
    """
    text = answer.strip()
    if not text:
        return True
    words = text.split()
    if len(words) >= 20:
        for size in (1, 4):
            groups = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
            if groups.most_common(1)[0][1] * size > len(words) / 2:
                return True
    return len(text) >= 40 and Counter(text).most_common(1)[0][1] > len(text) / 2
