"""Layer consistency against a formula written out in plain loops."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crow.consistency import aligned_inconsistency, layer_consistency, layer_profile

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def slow_profile(layers: list[Tensor], mask: Tensor | None = None, num_positions: float | None = None) -> list[float]:
    """`1 - cos`, summed over batch and positions in Python floats, for each pair of adjacent layers."""
    profile = []
    for lower, upper in pairwise(layers):
        total, count = 0.0, 0
        for row in range(lower.shape[0]):
            for place in range(lower.shape[1]):
                if mask is not None and mask[row, place] == 0:
                    continue
                a, b = lower[row, place].tolist(), upper[row, place].tolist()
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
                total, count = total + 1 - dot / norms, count + 1
        profile.append(total / (num_positions if num_positions is not None else count))
    return profile


def states(*shape: int, number: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(number)]


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 1, 0, 1]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_profile_equals_the_slow_formula(dtype: torch.dtype, masked: bool, mask: Tensor) -> None:
    hidden, use = states(3, 5, 7, dtype=dtype), mask if masked else None
    profile = layer_profile(hidden, use)
    assert profile.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert profile.tolist() == pytest.approx(slow_profile(hidden, use), abs=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_any_nonzero_mask_value_counts_once(mask_dtype: torch.dtype, mask: Tensor) -> None:
    hidden = states(3, 5, 7)
    torch.testing.assert_close(layer_profile(hidden, (mask * 3).to(mask_dtype)), layer_profile(hidden, mask))


@pytest.mark.parametrize("layers", [slice(1, None), slice(None, None, 2), slice(0, 2), slice(None, None, -1)])
def test_a_slice_selects_layers(layers: slice, mask: Tensor) -> None:
    hidden = states(3, 5, 7, number=5)
    assert layer_profile(hidden, mask, layers=layers).tolist() == pytest.approx(
        slow_profile(hidden[layers], mask), abs=1e-6
    )


@pytest.mark.parametrize("layers", [[0, 1], [0, 2, 4], [2, 0, 1], [-2, -1], [3, 3]])
@pytest.mark.parametrize("container", [list, tuple])
def test_a_list_of_indices_selects_layers_in_its_order(layers: list[int], container: type, mask: Tensor) -> None:
    hidden = container(states(3, 5, 7, number=5))
    expected = slow_profile([hidden[i] for i in layers], mask)
    assert layer_profile(hidden, mask, layers=layers).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("number", [1.0, 7, torch.tensor(13), torch.tensor(2.5)])
def test_num_positions_replaces_the_divisor(number: Tensor | float, mask: Tensor) -> None:
    hidden = states(3, 5, 7)
    expected = slow_profile(hidden, mask, float(number))
    assert layer_profile(hidden, mask, num_positions=number).tolist() == pytest.approx(expected, abs=1e-5)


def test_consistency_is_the_mean_of_the_profile(mask: Tensor) -> None:
    hidden = states(3, 5, 7)
    value = layer_consistency(hidden, mask, layers=[0, 1, 3], num_positions=4)
    assert value.shape == ()
    assert value == layer_profile(hidden, mask, layers=[0, 1, 3], num_positions=4).mean()


def test_microbatches_divided_by_the_total_sum_to_the_whole() -> None:
    hidden, mask = states(4, 6, 5, dtype=torch.float64), torch.ones(4, 6)
    mask[0, 4:] = mask[3, 1:] = 0
    whole = layer_profile(hidden, mask)
    parts = [
        layer_profile([h[rows, :length] for h in hidden], mask[rows, :length], num_positions=mask.sum())
        for rows, length in ((slice(0, 1), 4), (slice(1, 4), 6))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), -3e38, 0.0])
def test_padding_changes_neither_value_nor_gradient(padding: float, mask: Tensor) -> None:
    def run(fill: float | None) -> tuple[Tensor, list[Tensor]]:
        hidden = states(3, 5, 7)
        if fill is not None:
            hidden = [h.masked_fill(mask[..., None] == 0, fill) for h in hidden]
        hidden = [h.requires_grad_() for h in hidden]
        value = layer_consistency(hidden, mask)
        return value.detach(), list(torch.autograd.grad(value, hidden))

    (value, gradients), (expected, expected_gradients) = run(padding), run(None)
    assert value == expected
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert gradient.isfinite().all()
        assert (gradient[mask == 0] == 0).all()
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_gets_a_finite_gradient_of_its_own_dtype(dtype: torch.dtype, mask: Tensor) -> None:
    hidden = [h.mul(1000).requires_grad_() for h in states(3, 5, 7, dtype=dtype)]
    layer_consistency(hidden, mask).backward()
    assert all(h.grad is not None and h.grad.dtype == dtype and h.grad.isfinite().all() for h in hidden)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_equals_finite_differences(masked: bool) -> None:
    hidden = [h.requires_grad_() for h in states(2, 3, 4, number=3, dtype=torch.float64)]
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]) if masked else None
    assert torch.autograd.gradcheck(lambda *layers: layer_consistency(layers, mask), hidden)


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_layers_is_a_value_error(number: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 are needed, got {number}"):
        layer_profile(states(2, 3, 4)[:number])


@pytest.mark.parametrize("layers", [[], [1], slice(3, None), slice(2, 2)])
def test_a_selection_of_fewer_than_two_layers_is_a_value_error(layers: list[int] | slice) -> None:
    with pytest.raises(ValueError, match="at least 2 are needed"):
        layer_consistency(states(2, 3, 4), layers=layers)


def test_a_wholly_masked_batch_gives_zero() -> None:
    assert layer_profile(states(2, 3, 4), torch.zeros(2, 3)).tolist() == [0, 0, 0]


def test_equal_layers_give_zero_orthogonal_one_opposite_two() -> None:
    a, b = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert layer_profile([a, a, b, -b]).tolist() == pytest.approx([0, 1, 2], abs=1e-6)


vectors = st.lists(st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=3, max_size=3)


@given(st.lists(vectors, min_size=2, max_size=5))
@settings(max_examples=100, deadline=None)
def test_values_lie_between_zero_and_two(rows: list[list[float]]) -> None:
    profile = layer_profile([torch.tensor(row).view(1, 1, 3) for row in rows])
    assert ((profile >= -1e-6) & (profile <= 2 + 1e-6)).all()  # to float32 rounding


@given(st.integers(0, 1000), st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_scaling_a_layer_changes_nothing(seed: int, scales: list[float]) -> None:
    hidden = states(2, 3, 5, dtype=torch.float64, seed=seed)
    scaled = [h * s for h, s in zip(hidden, scales, strict=True)]
    torch.testing.assert_close(layer_profile(scaled), layer_profile(hidden))


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_inconsistency_keeps_the_leading_axes(dtype: torch.dtype) -> None:
    a, b = states(2, 3, 4, number=2, dtype=dtype)
    assert aligned_inconsistency(a, b).shape == (2, 3)
