"""A forward pass is seen and steered from outside, whatever the architecture."""

import pytest
import torch
from conftest import MakeModel, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from crow.errors import UsageError
from crow.hooks import decoder_layers, hidden_states, lm_head_at, record


@pytest.fixture
def model(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_model(architecture, len(tokenizer))


@pytest.fixture
def inputs(tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    return dict(tokenizer(["How do I bake bread?", "Hi"], padding=True, return_tensors="pt", padding_side="right"))


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_recording_is_what_the_model_itself_reports(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad(), record(model) as recording:
        output = model(**inputs, output_hidden_states=True)
    assert recording.embeddings is not None
    assert torch.equal(recording.embeddings, model.get_input_embeddings()(inputs["input_ids"]))
    assert len(recording.hidden_states) == model.config.num_hidden_layers == 4
    # The model's own list starts with the first block's input and ends with the last block's output after the norm
    for recorded, own in zip(recording.hidden_states[:-1], output.hidden_states[1:-1], strict=True):
        assert torch.equal(recorded, own)
    assert not torch.equal(recording.hidden_states[-1], output.hidden_states[-1])


def test_last_hidden_state_is_the_one_before_the_final_norm(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    seen: list[Tensor] = []
    handle = decoder_layers(model)[-1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    recording = hidden_states(model, **inputs)
    handle.remove()
    assert torch.equal(recording.hidden_states[-1], seen[0])
    (norm,) = [
        m
        for name, m in model.base_model.named_modules()
        if name.rsplit(".", 1)[-1] in ("norm", "ln_f", "final_layer_norm", "final_layernorm")
        and not name.removeprefix("decoder.").startswith(("layers.", "h."))
    ]
    with torch.no_grad():
        own = model(**inputs, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(norm(recording.hidden_states[-1]), own)


def test_recording_leaves_the_output_alone(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        plain = model(**inputs).logits
        with record(model, embeddings_require_grad=False):
            assert torch.equal(model(**inputs).logits, plain)


def test_hidden_states_can_be_left_out(tiny_llama: MakeModel, inputs: dict[str, Tensor]) -> None:
    model = tiny_llama()
    with torch.no_grad(), record(model, hidden=False) as recording:
        model(**inputs)
    assert recording.hidden_states == []
    assert recording.embeddings is not None


def test_embeddings_can_be_asked_for_their_gradient(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with record(model, embeddings_require_grad=True) as recording:
        model(**inputs)
    assert recording.embeddings is not None
    (gradient,) = torch.autograd.grad(recording.hidden_states[-1].square().sum(), recording.embeddings)
    assert gradient.shape == (*inputs["input_ids"].shape, 64)
    assert gradient.abs().sum() > 0


def test_head_projects_only_the_positions_asked_for(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    positions = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    positions[0, 2:5] = positions[1, 0] = True
    with torch.no_grad():
        full = model(**inputs).logits
        with lm_head_at(model, positions):
            some = model(**inputs).logits
    assert some.shape == (4, full.shape[-1])
    torch.testing.assert_close(some, full[positions])


def test_head_is_not_paid_for_at_no_position(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad(), lm_head_at(model, torch.zeros_like(inputs["input_ids"], dtype=torch.bool)):
        assert model(**inputs).logits.shape[0] == 0


def test_hooks_are_gone_afterwards(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    before = hooks_of(model)
    with record(model), lm_head_at(model, inputs["attention_mask"].bool()):
        assert hooks_of(model) == before + 6
        model(**inputs)
    assert hooks_of(model) == before


def test_hooks_are_gone_after_an_exception(model: PreTrainedModel) -> None:
    before = hooks_of(model)
    with (
        pytest.raises(IndexError),
        record(model),
        lm_head_at(model, torch.ones(1, 1, dtype=torch.bool)),
    ):
        model(input_ids=torch.tensor([[10**6]]))
    assert hooks_of(model) == before


def test_hidden_states_takes_no_gradients_and_no_head(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    rows: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
    recording = hidden_states(model, **inputs)
    handle.remove()
    assert rows == [0]
    assert len(recording.hidden_states) == 4
    assert not recording.hidden_states[0].requires_grad


def test_a_model_without_its_list_of_layers_is_refused(tiny_llama: MakeModel) -> None:
    model = tiny_llama()
    model.config.num_hidden_layers = 5
    with pytest.raises(UsageError, match="has no list of 5 decoder layers"):
        decoder_layers(model)


def test_a_refused_model_is_left_without_hooks(tiny_llama: MakeModel) -> None:
    model = tiny_llama()
    model.config.num_hidden_layers = 5
    with pytest.raises(UsageError), record(model):
        pytest.fail("the block must not run")
    assert hooks_of(model) == 0


def test_a_model_without_a_head_is_refused(tiny_llama: MakeModel) -> None:
    body = tiny_llama().base_model
    with pytest.raises(UsageError, match="no language-model head"), lm_head_at(body, torch.ones(1, 1).bool()):
        pytest.fail("the block must not run")
