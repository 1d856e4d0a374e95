"""Divergence from recorded top log-probabilities against formulas in plain loops."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crow.divergence import (
    answer_positions,
    answer_weights,
    certainly,
    kl_from_top,
    ruling_out,
    top_log_probs,
    unlikelihood,
)

logits = st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=6)


def log_softmax(values: list[float]) -> list[float]:
    total = math.log(sum(math.exp(v) for v in values))
    return [v - total for v in values]


def slow_kl(p_logits: list[float], q_logits: list[float], number: int | None = None) -> float:
    """KL(p || q), with all outcomes but p's `number` most probable ones merged."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    top = sorted(range(len(p)), key=lambda i: -p[i])[:number]
    value, rest_p, rest_q = 0.0, 1.0, 1.0
    for i in top:
        value += math.exp(p[i]) * (p[i] - q[i])
        rest_p, rest_q = rest_p - math.exp(p[i]), rest_q - math.exp(q[i])
    return value + (rest_p * math.log(rest_p / rest_q) if number is not None else 0.0)


def kl(p: list[float], q: list[float], number: int) -> float:
    return kl_from_top(*top_log_probs(torch.tensor(p), number), torch.tensor(q)).item()


@given(logits, st.integers(0, 5), st.integers(1, 6))
def test_divergence_from_certainty_is_cross_entropy(q: list[float], token: int, number: int) -> None:
    targets = certainly(torch.tensor([token]), number, vocab_size=6)
    assert targets[0].shape == (1, number)
    (divergence,) = kl_from_top(*targets, torch.tensor([q])).tolist()
    assert divergence == pytest.approx(-log_softmax(q)[token], abs=1e-3)


@given(st.lists(st.floats(-40, 40, width=32), min_size=6, max_size=6), st.integers(0, 5))
@example([40.0, 0, 0, 0, 0, 0], 0)  # a probability of 1, as far as float32 can tell
def test_unlikelihood_holds_where_a_token_is_certain(values: list[float], token: int) -> None:
    exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    others = torch.cat([exact[:token], exact[token + 1 :]])
    expected = exact.exp().sum().log() - others.exp().sum().log()
    given = torch.tensor([values], requires_grad=True)
    (found,) = unlikelihood(given, torch.tensor([token]))
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
    (gradient,) = torch.autograd.grad(found, given)
    (slow,) = torch.autograd.grad(expected, exact)
    assert gradient[0].tolist() == pytest.approx(slow.tolist(), abs=1e-4)


def test_top_log_probs_are_the_largest_in_order() -> None:
    values = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    ids, log_probs = top_log_probs(values, 4)
    assert ids.shape == log_probs.shape == (2, 3, 4)
    for row in range(2):
        for place in range(3):
            expected = log_softmax(values[row, place].tolist())
            order = sorted(range(9), key=lambda i: -expected[i])[:4]
            assert ids[row, place].tolist() == order
            assert log_probs[row, place].tolist() == pytest.approx([expected[i] for i in order], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_probs_are_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    assert top_log_probs(torch.zeros(3, 5, dtype=dtype), 2)[1].dtype == torch.float32


def test_asking_for_more_than_the_vocabulary_gives_the_vocabulary() -> None:
    ids, log_probs = top_log_probs(torch.tensor([0.0, 2.0, 1.0]), 64)
    assert ids.tolist() == [1, 2, 0]
    assert log_probs.exp().sum().item() == pytest.approx(1)


@given(logits, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_divergence_from_itself_is_zero(p: list[float], number: int) -> None:
    assert kl(p, p, number) == pytest.approx(0, abs=1e-6)


@given(logits, logits, st.integers(1, 6))
@example(p=[0.0] * 6, q=[0.0, -4.0, 1.0, 0.0, 0.0, 0.0], number=5)  # little of q is left
@settings(max_examples=100, deadline=None)
def test_divergence_is_nonnegative_and_bounded_by_the_full_one(p: list[float], q: list[float], number: int) -> None:
    full = slow_kl(p, q)
    assert -5e-6 <= kl(p, q, number) <= full + 5e-6 * (1 + full)


@given(logits, logits)
@settings(max_examples=60, deadline=None)
def test_whole_vocabulary_gives_the_full_divergence(p: list[float], q: list[float]) -> None:
    assert kl(p, q, 6) == pytest.approx(slow_kl(p, q), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("number", [1, 2, 5, 11])
def test_divergence_equals_the_slow_formula(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    p, q = (torch.randn(2, 3, 12, generator=generator) * 2 for _ in range(2))
    result = kl_from_top(*top_log_probs(p, number), q)
    assert result.shape == (2, 3)
    assert result.dtype == torch.float32
    for row in range(2):
        for place in range(3):
            expected = slow_kl(p[row, place].tolist(), q[row, place].tolist(), number)
            assert result[row, place].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    p, q = [0.0, 1.0, 2.0, -1.0], [1.0, 0.0, 0.5, 0.5]
    assert kl(p, [x + 50 for x in q], 2) == pytest.approx(kl(p, q, 2), abs=1e-5)


def test_a_certain_distribution_gives_a_finite_value_and_gradient() -> None:
    q = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    value = kl_from_top(*top_log_probs(torch.tensor([200.0, 0.0, -200.0]), 2), q)
    value.backward()
    assert value.item() == pytest.approx(400, rel=1e-4)
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("number", [1, 3, 7])
def test_gradient_equals_central_differences(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    recorded = top_log_probs(torch.randn(2, 7, generator=generator), number)
    q = torch.randn(2, 7, generator=generator, requires_grad=True)

    def value(at: Tensor) -> Tensor:
        return kl_from_top(*recorded, at).sum()

    (gradient,) = torch.autograd.grad(value(q), q)
    width = 0.02
    for place in range(q.numel()):
        nudge = torch.zeros(q.numel()).index_fill(0, torch.tensor(place), width).view_as(q)
        difference = (value(q.detach() + nudge) - value(q.detach() - nudge)).item() / (2 * width)
        assert gradient.view(-1)[place].item() == pytest.approx(difference, abs=2e-3)


def test_gradient_vanishes_where_the_distributions_agree() -> None:
    values = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    recorded = top_log_probs(values.detach(), 3)
    kl_from_top(*recorded, values).sum().backward()
    assert values.grad.abs().max().item() < 1e-5


def test_answer_positions_are_those_before_each_label() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [7, -100, -100, -100, 8], [-100] * 5])
    mask = answer_positions(labels)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [
        [False, True, True, False, False],
        [False, False, False, True, False],
        [False] * 5,
    ]


@pytest.mark.parametrize("length", [0, 1])
def test_too_short_a_sequence_has_no_answer_position(length: int) -> None:
    assert not answer_positions(torch.ones(2, length, dtype=torch.int64)).any()


def slow_weights(labels: list[int], discount: float) -> list[float]:
    weights, place = [], 0
    for i in range(len(labels)):
        scored = i + 1 < len(labels) and labels[i + 1] != -100
        weights.append(discount**place if scored else 0.0)
        place = place + 1 if scored else 0
    return weights


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from([-100, 0, 7]), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    st.sampled_from([1.0, 0.5, 0.9, 0.01]),
)
@settings(max_examples=100, deadline=None)
def test_answer_weights_fall_from_the_start_of_every_answer(labels: list[list[int]], discount: float) -> None:
    weights = answer_weights(torch.tensor(labels), discount)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([slow_weights(row, discount) for row in labels]))


def test_without_discount_all_answer_positions_weigh_alike() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 7], [1, 2, -100, -100, -100]])
    assert torch.equal(answer_weights(labels, 1.0), answer_positions(labels).float())


@given(st.integers(0, 10**6), st.integers(0, 4))
def test_ruling_an_answer_out_is_conditioning_on_its_complement(seed: int, shared: int) -> None:
    """Against a language of two letters and answers of four, in which every answer's probability is known."""
    generator = torch.Generator().manual_seed(seed)
    weights = {a: float(torch.rand((), generator=generator)) + 0.01 for a in itertools.product((0, 1), repeat=4)}
    answer = tuple(torch.randint(2, (4,), generator=generator).tolist())
    said = (*answer[:shared], *(1 - a for a in answer[shared:]))

    def following(beginning: tuple[int, ...], left: dict[tuple[int, ...], float]) -> list[float]:
        mass = [sum(w for a, w in left.items() if a[: len(beginning) + 1] == (*beginning, x)) for x in (0, 1)]
        return [m / sum(mass) for m in mass]

    log_probs = torch.tensor([following(said[:t], weights) for t in range(4)]).log()
    tails = [weights[answer] / sum(w for a, w in weights.items() if a[:t] == answer[:t]) for t in range(4)]
    ids = torch.tensor([[0, 1]]).expand(4, -1)
    got = ruling_out(ids, log_probs, torch.tensor(said), torch.tensor(answer), torch.tensor(tails)).exp()
    left = {a: w for a, w in weights.items() if a != answer}
    for t in range(4):
        if any(a[:t] == said[:t] for a in left):  # else the answer was all that could follow
            assert got[t].tolist() == pytest.approx(following(said[:t], left), abs=1e-4)
