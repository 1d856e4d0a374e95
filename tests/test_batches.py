"""Batches under a token budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crow.generation import token_batches

lengths_of_rows = st.lists(st.integers(1, 500), max_size=60)


@given(lengths_of_rows, st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_every_index_comes_once(lengths: list[int], budget: int) -> None:
    batches = list(token_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)


@given(lengths_of_rows, st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_budget_holds_but_for_single_rows(lengths: list[int], budget: int) -> None:
    for batch in token_batches(lengths, budget):
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@given(lengths_of_rows, st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_rows_come_longest_first(lengths: list[int], budget: int) -> None:
    order = [lengths[i] for batch in token_batches(lengths, budget) for i in batch]
    assert order == sorted(lengths, reverse=True)


@given(lengths_of_rows, st.integers(1, 3000))
@settings(max_examples=50, deadline=None)
def test_no_batch_but_the_last_has_room_for_another_row(lengths: list[int], budget: int) -> None:
    for batch in list(token_batches(lengths, budget))[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_equal_lengths_keep_their_order() -> None:
    assert list(token_batches([5] * 5, 10)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("lengths", "budget", "batches"),
    [([], 10, []), ([100], 10, [[0]]), ([3, 9, 4, 1], 10, [[1], [2, 0], [3]]), ([7, 7], 0, [[0], [1]])],
)
def test_small_cases(lengths: list[int], budget: int, batches: list[list[int]]) -> None:
    assert list(token_batches(lengths, budget)) == batches
