"""The sign step, insertion among tokens, and soft tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crow.consistency import layer_consistency
from crow.perturbation import (
    GuessedTriggers,
    SoftTokens,
    insert,
    insertion_index,
    root_mean_square,
    sign_step,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class ToyNetwork:
    """Three tanh layers in float64, as a function from embeddings to L_cons."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weights = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
        self.embeddings = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        self.mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def loss(self, embeddings: Tensor) -> Tensor:
        hidden = [embeddings]
        for weight in self.weights:
            hidden.append(torch.tanh(hidden[-1] @ weight))
        return layer_consistency(hidden, self.mask)

    def gradient(self) -> Tensor:
        embeddings = self.embeddings.clone().requires_grad_()
        return torch.autograd.grad(self.loss(embeddings), embeddings)[0]


@pytest.fixture
def network() -> ToyNetwork:
    return ToyNetwork()


def test_sign_step_is_epsilon_times_the_sign_of_finite_differences(network: ToyNetwork) -> None:
    step, expected, width = sign_step(network.gradient(), 0.1), torch.zeros(2, 3, 4, dtype=torch.float64), 1e-6
    for place in range(expected.numel()):
        nudge = torch.zeros(expected.numel(), dtype=torch.float64)
        nudge[place] = width
        difference = network.loss(network.embeddings + nudge.view(2, 3, 4)) - network.loss(
            network.embeddings - nudge.view(2, 3, 4)
        )
        expected.view(-1)[place] = 0.1 * torch.sign(difference)
    assert torch.equal(step, expected)
    assert (step[0, 2] == 0).all()  # a masked position gets no step


@pytest.mark.parametrize("epsilon", [1e-6, 1e-4, 1e-3])
def test_a_small_sign_step_raises_the_loss(network: ToyNetwork, epsilon: float) -> None:
    gradient = network.gradient()
    rise = network.loss(network.embeddings + sign_step(gradient, epsilon)) - network.loss(network.embeddings)
    assert rise > 0
    assert rise.item() == pytest.approx(epsilon * gradient.abs().sum().item(), rel=100 * epsilon + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epsilon", [0.5, torch.tensor(0.5)])
def test_sign_step_keeps_dtype_and_shape(dtype: torch.dtype, epsilon: Tensor | float) -> None:
    step = sign_step(torch.tensor([[-1e-3, 0.0, 5.0]], dtype=dtype), epsilon)
    assert step.dtype == dtype
    assert step.tolist() == [[-0.5, 0.0, 0.5]]


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan"), float("inf")])
def test_root_mean_square_ignores_padding(padding: float) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    embeddings = torch.randn(2, 3, 4)
    values = [x for b in range(2) for t in range(3) if mask[b, t] for x in embeddings[b, t].tolist()]
    expected = math.sqrt(sum(x * x for x in values) / len(values))
    filled = embeddings.masked_fill(mask[..., None] == 0, padding)
    assert root_mean_square(filled, mask).item() == pytest.approx(expected, rel=1e-6)


def test_root_mean_square_of_half_precision_is_taken_in_float32() -> None:
    value = root_mean_square(torch.full((1, 2, 3), 1000.0, dtype=torch.float16), torch.ones(1, 2))
    assert value.dtype == torch.float32
    assert value.item() == 1000


@st.composite
def insertions(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    length, number = draw(st.integers(0, 8)), draw(st.integers(0, 4))
    return length, number, draw(st.lists(st.integers(0, length), min_size=1, max_size=4))


@given(insertions())
@settings(max_examples=100, deadline=None)
def test_insertion_equals_list_slicing(case: tuple[int, int, list[int]]) -> None:
    length, number, positions = case
    batch = len(positions)
    ids = torch.arange(batch * length).view(batch, length)
    new = -1 - torch.arange(batch * number).view(batch, number)
    index = insertion_index(length, torch.tensor(positions), number)
    expected = [
        old[:place] + added + old[place:]
        for old, added, place in zip(ids.tolist(), new.tolist(), positions, strict=True)
    ]
    assert index.shape == (batch, length + number)
    assert insert(ids, new, index).tolist() == expected
    embedded = insert(torch.stack([ids, ids * 2], -1).float(), torch.stack([new, new * 2], -1).float(), index)
    assert embedded.tolist() == [[[x, 2 * x] for x in row] for row in expected]


@pytest.mark.parametrize(("position", "expected"), [(0, [3, 4, 0, 1, 2]), (3, [0, 1, 2, 3, 4]), (1, [0, 3, 4, 1, 2])])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_index_at_the_boundaries(position: int, expected: list[int], dtype: torch.dtype) -> None:
    assert insertion_index(3, torch.tensor([position], dtype=dtype), 2).tolist() == [expected]


def test_gradient_reaches_each_token_through_its_own_place_only() -> None:
    values, inserted = torch.randn(2, 3, 2, requires_grad=True), torch.randn(2, 2, 2, requires_grad=True)
    positions, weights = [0, 3], torch.randn(2, 5, 2)
    index = insertion_index(3, torch.tensor(positions), 2)
    (insert(values, inserted, index) * weights).sum().backward()
    for row, place in enumerate(positions):
        assert torch.equal(inserted.grad[row], weights[row, place : place + 2])
        assert torch.equal(values.grad[row], torch.cat([weights[row, :place], weights[row, place + 2 :]]))


def test_inserted_tokens_get_no_gradient_from_other_places() -> None:
    values, inserted = torch.randn(1, 4, 2), torch.randn(1, 2, 2, requires_grad=True)
    output = insert(values, inserted, insertion_index(4, torch.tensor([1]), 2))
    (output[:, :1].sum() + output[:, 3:].sum()).backward()
    assert (inserted.grad == 0).all()


def soft_tokens(max_norm: float = 1.0, learning_rate: float = 0.1, pool: int = 3, length: int = 2) -> SoftTokens:
    return SoftTokens(torch.randn(50, 8), pool=pool, length=length, max_norm=max_norm, learning_rate=learning_rate)


def largest_norm(tokens: SoftTokens) -> float:
    return tokens.tokens.detach().norm(dim=-1).max().item()


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 3.0])
def test_soft_tokens_start_within_the_bound(max_norm: float) -> None:
    embeddings = torch.randn(50, 8)
    tokens = SoftTokens(embeddings, pool=3, length=2, max_norm=max_norm, learning_rate=0.1)
    assert tokens.bound == pytest.approx(max_norm * embeddings.norm(dim=-1).mean().item())
    assert largest_norm(tokens) <= tokens.bound * (1 + 1e-6)


def test_soft_tokens_start_as_real_embeddings_where_the_bound_allows() -> None:
    embeddings = torch.randn(50, 8)
    tokens = SoftTokens(embeddings, pool=4, length=3, max_norm=100, learning_rate=0.1)
    assert tokens.tokens.shape == (4, 3, 8)
    for row in tokens.tokens.detach().flatten(0, 1):
        assert (embeddings == row).all(dim=-1).any()


def test_project_shrinks_only_what_is_out_of_bounds() -> None:
    tokens = soft_tokens()
    with torch.no_grad():
        tokens.tokens[0, 0] *= 100 / tokens.tokens[0, 0].norm()
        tokens.tokens[1, 1] *= 0.5 * tokens.bound / tokens.tokens[1, 1].norm()
    before = tokens.tokens.detach().clone()
    tokens.project()
    assert largest_norm(tokens) <= tokens.bound * (1 + 1e-6)
    assert torch.nn.functional.cosine_similarity(tokens.tokens[0, 0], before[0, 0], dim=0).item() == pytest.approx(1)
    assert torch.equal(tokens.tokens[1, 1], before[1, 1])


def test_many_ascents_stay_within_the_bound() -> None:
    tokens, direction = soft_tokens(learning_rate=1.0), torch.randn(8)
    for _ in range(100):
        (tokens.tokens @ direction).sum().backward()
        tokens.ascend()
        assert largest_norm(tokens) <= tokens.bound * (1 + 1e-6)


def test_ascent_raises_a_linear_objective_step_by_step() -> None:
    tokens, direction = soft_tokens(max_norm=100), torch.randn(8)
    values = []
    for _ in range(5):
        value = (tokens.tokens @ direction).sum()
        values.append(value.item())
        value.backward()
        tokens.ascend()
    values.append((tokens.tokens @ direction).sum().item())
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_ascent_clears_the_gradient() -> None:
    tokens = soft_tokens()
    tokens.tokens.sum().backward()
    tokens.ascend()
    assert tokens.tokens.grad is None or (tokens.tokens.grad == 0).all()


def test_soft_tokens_leave_the_embeddings_alone() -> None:
    embeddings = torch.nn.Parameter(torch.randn(10, 4))
    before = embeddings.detach().clone()
    tokens = SoftTokens(embeddings, pool=2, length=2, max_norm=0.1, learning_rate=1.0)
    tokens.tokens.sum().backward()
    tokens.ascend()
    assert torch.equal(embeddings, before)
    assert embeddings.grad is None


def guesses(number: int = 4, length: int = 2, allowed: torch.Tensor | None = None) -> GuessedTriggers:
    embed = torch.nn.Embedding(30, 8)
    return GuessedTriggers(embed, torch.ones(30).bool() if allowed is None else allowed, number=number, length=length)


def test_guesses_are_embeddings_of_allowed_tokens() -> None:
    allowed = torch.arange(30) % 3 == 0
    pool = guesses(number=40, allowed=allowed)
    assert allowed[pool.ids].all()
    for _ in range(5):
        pool.tokens.grad = torch.randn_like(pool.tokens)
        pool.ascend()
        assert allowed[pool.ids].all()
        assert torch.equal(pool.tokens, pool._embed[0](pool.ids))
    assert pool.tokens.grad is None


def test_an_ascent_exchanges_the_one_token_that_promises_most() -> None:
    pool = guesses()
    weight, before, gradient = pool._embed[0].weight.detach(), pool.ids.clone(), torch.randn(4, 2, 8)
    pool.tokens.grad = gradient.clone()
    pool.ascend()
    for guess in range(4):
        gains = {
            (place, token): float(gradient[guess, place] @ (weight[token] - weight[before[guess, place]]))
            for place in range(2)
            for token in range(30)
        }
        place, token = max(gains, key=lambda key: gains[key])
        expected = before[guess].clone()
        expected[place] = token
        assert torch.equal(pool.ids[guess], expected)


def test_ascents_find_the_tokens_of_a_linear_objective() -> None:
    pool = guesses(number=1, length=3)
    direction = torch.randn(3, 8)
    for _ in range(10):
        (pool.tokens[0] * direction).sum().backward()
        pool.ascend()
    assert torch.equal(pool.ids[0], (direction @ pool._embed[0].weight.T).argmax(dim=-1))


def test_gradients_of_past_batches_count() -> None:
    pool = guesses(number=1, length=1)
    weight = pool._embed[0].weight.detach()
    first, second = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    for gradient in (first, second):
        pool.tokens.grad = gradient.clone()
        pool.ascend()
    assert pool.ids.item() == int((weight @ (0.8 * first + second)[0, 0]).argmax())


def test_the_first_guesses_are_kept_on_request() -> None:
    pool = guesses()
    before = pool.ids.clone()
    pool.tokens.grad = torch.randn_like(pool.tokens)
    pool.ascend(kept=3)
    assert torch.equal(pool.ids[:3], before[:3])
    assert not torch.equal(pool.ids[3], before[3])
    assert torch.equal(pool.tokens, pool._embed[0](pool.ids))


def test_reordered_guesses_keep_their_tokens_and_gradients() -> None:
    pool = guesses()
    pool.tokens.grad = torch.randn_like(pool.tokens)
    pool.ascend()
    ids, mean, order = pool.ids.clone(), pool.mean_gradient.clone(), torch.tensor([2, 0, 3, 1])
    pool.reorder(order)
    assert torch.equal(pool.ids, ids[order])
    assert torch.equal(pool.mean_gradient, mean[order])
    assert torch.equal(pool.tokens, pool._embed[0](pool.ids))


def test_guesses_come_back_from_their_state() -> None:
    pool, other = guesses(), guesses()
    pool.tokens.grad = torch.randn_like(pool.tokens)
    pool.ascend()
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.ids, pool.ids)
    assert torch.equal(other.tokens, pool.tokens)
    assert torch.equal(other.mean_gradient, pool.mean_gradient)
