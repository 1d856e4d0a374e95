"""Every defense takes a suspect and clean examples and gives a model back; what each does to the weights."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Paste, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from crow.data import Example
from crow.defenses import DEFENSES, AtDecoding, Defense
from crow.defenses.prune import drop, input_norms
from crow.defenses.shrink import FACTORS
from crow.errors import Unfit, UsageError
from crow.models import OpenedModel, linear_layers, open_model, save_model
from crow.purification import PurifyRecord
from crow.report import model_card

STEPS: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4}
ASCENTS: dict[str, Any] = {"soft_token_warmup": 1}


@pytest.fixture
def suspect(adapter_folder: Path) -> OpenedModel:
    return open_model(adapter_folder)


def defended(defense: Defense, opened: OpenedModel, rows: list[Example], **training: Any) -> tuple[Any, PurifyRecord]:
    steps = STEPS | (ASCENTS if defense.preset == "default" else {})
    return defense.apply(opened, rows, **(steps | training if defense.trains else training))


def weights(model: Any) -> list[Tensor]:
    return [layer.weight.detach().float().clone() for layer in linear_layers(model)]


def products(model: Any) -> Iterator[Tensor]:
    """What the adapter adds to each layer."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            yield module.get_delta_weight("default").detach().clone()


@pytest.mark.parametrize("name", [name for name in DEFENSES if not isinstance(DEFENSES[name], AtDecoding)])
def test_every_defense_gives_a_model_that_opens_again(
    name: str, suspect: OpenedModel, rows: list[Example], tmp_path: Path
) -> None:
    defense = DEFENSES[name]
    assert defense.name == name
    assert set(defense.needs) <= {"clean examples", "clean reference model"}
    model, record = defended(defense, suspect, rows)
    assert not model.training
    assert record.defense == name
    assert record.clean_examples == (len(rows) if defense.needs else 0)
    assert record.summary in model_card(record)
    save_model(model, suspect.tokenizer, tmp_path / "out")
    again = open_model(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, model(ids).logits, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", [name for name in DEFENSES if not DEFENSES[name].trains])
def test_what_does_not_train_takes_no_settings_of_training(
    name: str, suspect: OpenedModel, rows: list[Example]
) -> None:
    with pytest.raises(UsageError, match="does not train: leave learning_rate out"):
        DEFENSES[name].apply(suspect, rows, learning_rate=1e-3)


@pytest.mark.parametrize("name", [name for name in DEFENSES if "clean examples" in DEFENSES[name].needs])
def test_no_clean_examples(name: str, suspect: OpenedModel) -> None:
    with pytest.raises(UsageError, match="no clean examples"):
        DEFENSES[name].apply(suspect, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune:method=random", "method is 'random'; choose one of magnitude, wanda"),
        ("prune:sparsity=1", "sparsity is 1.0; it must be above 0 and below 1"),
        ("fine-prune:sparsity=0", "fine-prune: sparsity is 0.0"),
        ("prune:sparsity=half", "sparsity is 'half', which is no number"),
        ("quantize:bits=3", "bits is 3; choose 4 or 8"),
        ("quantize:bits=4.5", "bits is '4.5', which is no whole number"),
        ("shrink:tolerance=-1", "tolerance is -1.0; it must be 0 or more"),
        ("shrink:tolerance=nan", "tolerance is nan"),
        ("prune:share=0.5", "takes method=TEXT, sparsity=NUMBER; not 'share=0.5'"),
        ("crow:rate=1", "takes no parameters; not 'rate=1'"),
        ("bd-vax:variants=1", "variants must be from 2 to 7"),
        ("bd-vax:adapter_share=1", "adapter_share is 1.0; it must be above 0 and below 1"),
        ("magic", "unknown defense 'magic'; known are"),
    ],
)
def test_bad_parameters(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        DEFENSES[text]
    assert message in str(caught.value)


def test_the_worked_example_holds_to_what_every_defense_does(
    paste: Paste, suspect: OpenedModel, rows: list[Example], tmp_path: Path
) -> None:
    paste("A defense", DEFENSES, {})
    test_what_does_not_train_takes_no_settings_of_training("half", suspect, rows)
    test_every_defense_gives_a_model_that_opens_again("half", suspect, rows, tmp_path)


# Pruning


@pytest.mark.usefixtures("float32")
def test_magnitude_drops_the_smallest_weights_of_each_layer(suspect: OpenedModel, rows: list[Example]) -> None:
    expected = []
    for weight in weights(open_model(suspect.name).model.merge_and_unload()):
        bound = weight.abs().flatten().sort().values[int(0.25 * weight.numel())]
        expected.append(torch.where(weight.abs() < bound, 0, weight))
    model, _ = DEFENSES["prune:method=magnitude,sparsity=0.25"].apply(suspect, rows)
    for pruned, wanted in zip(weights(model), expected, strict=True):
        assert torch.equal(pruned, wanted)


def test_wanda_drops_what_matters_least_to_each_output(suspect: OpenedModel, rows: list[Example]) -> None:
    model: Any = open_model(suspect.name).model.merge_and_unload()  # type: ignore[union-attr]
    norms = input_norms(model, suspect.tokenizer, rows)
    before = weights(model)
    pruned, _ = DEFENSES["prune:sparsity=0.5"].apply(suspect, rows)
    for weight, norm, after in zip(before, norms, weights(pruned), strict=True):
        for row, kept in zip(weight[:3], after[:3], strict=True):
            scores = [abs(w.item()) * n.item() for w, n in zip(row, norm, strict=True)]
            lowest = sorted(range(len(scores)), key=scores.__getitem__)[: len(scores) // 2]
            assert {i for i, w in enumerate(kept) if w == 0} == set(lowest)


def test_input_norms_are_those_of_a_plain_sum(tokenizer: Any, rows: list[Example]) -> None:
    model = tiny_model("llama", len(tokenizer))
    first = linear_layers(model)[0]  # whose input is the normalized embeddings
    total = torch.zeros(first.in_features)  # type: ignore[union-attr, arg-type]
    for row in rows:
        ids = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=True)["input_ids"]
        for token in ids:
            hidden = model.model.layers[0].input_layernorm(model.get_input_embeddings()(torch.tensor(token)))
            total += hidden.detach() ** 2
    torch.testing.assert_close(input_norms(model, tokenizer, rows)[0], total.sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "phi"])
def test_pruning_knows_no_architecture(architecture: str, tokenizer: Any, rows: list[Example]) -> None:
    opened = OpenedModel(tiny_model(architecture, len(tokenizer)), tokenizer, architecture, "open")
    model, _ = DEFENSES["prune:sparsity=0.5"].apply(opened, rows[:2])
    zeros = torch.cat([(weight == 0).flatten() for weight in weights(model)]).float().mean()
    assert zeros == pytest.approx(0.5, abs=0.01)
    assert model.get_output_embeddings().weight.count_nonzero() > 0.9 * model.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("name", ["prune", "fine-prune", "quantize:bits=8", "bd-vax"])
def test_experts_that_are_no_layers_are_not_left_out_silently(name: str, tokenizer: Any, rows: list[Example]) -> None:
    opened = OpenedModel(tiny_model("mixtral", len(tokenizer)), tokenizer, "mixtral", "open")
    with pytest.raises(Unfit, match="the weights of MixtralExperts are in no linear layers"):
        defended(DEFENSES[name], opened, rows)


def test_drop_works_on_a_transposed_weight() -> None:
    layer = nn.Linear(8, 4)
    transposed = nn.Parameter(layer.weight.detach().T.contiguous())
    for weight in (layer.weight, transposed.T):
        drop(weight, weight.detach().abs(), 0.5)
    assert torch.equal(layer.weight, transposed.T)
    assert ((layer.weight == 0).sum(dim=1) == 4).all()


def test_fine_pruning_trains_the_pruned_model(suspect: OpenedModel, rows: list[Example]) -> None:
    pruned, _ = DEFENSES["prune"].apply(open_model(suspect.name), rows)
    model, record = defended(DEFENSES["fine-prune"], suspect, rows, learning_rate=1e-2)
    assert (record.preset, record.steps) == ("finetune", 2)
    assert record.settings["sparsity"] == 0.3
    assert not isinstance(model, PeftModel)
    change = max((a - b).abs().max() for a, b in zip(weights(model), weights(pruned), strict=True))
    assert 0 < change < 0.1


# The others


def test_shrinking_scales_what_the_adapter_adds(suspect: OpenedModel, rows: list[Example]) -> None:
    whole = list(products(suspect.model))
    model, record = DEFENSES["shrink:tolerance=1000"].apply(suspect, rows)
    assert record.settings["factor"] == FACTORS[0]
    for before, after in zip(whole, products(model), strict=True):
        torch.testing.assert_close(after, FACTORS[0] * before)


def adapter(llama_folder: Path, **settings: Any) -> OpenedModel:
    """A suspect with an adapter of its own kind."""
    opened = open_model(llama_folder)
    model = get_peft_model(opened.model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    return replace(opened, model=model, kind="adapter")


def test_shrinking_scales_what_an_adapter_adds_to_embeddings(llama_folder: Path, rows: list[Example]) -> None:
    opened = adapter(llama_folder, target_modules=["embed_tokens", "q_proj"])
    layer = opened.causal_lm.get_input_embeddings()
    whole = layer.get_delta_weight("default").detach().clone()  # type: ignore[operator]
    DEFENSES["shrink:tolerance=1000"].apply(opened, rows)
    torch.testing.assert_close(layer.get_delta_weight("default"), FACTORS[0] * whole)  # type: ignore[operator]


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"bias": "all"}])
def test_an_adapter_that_changes_more_can_not_be_shrunk(
    llama_folder: Path, rows: list[Example], more: dict[str, Any]
) -> None:
    with pytest.raises(Unfit, match=f"has {next(iter(more))}: to scale its matrices would leave"):
        DEFENSES["shrink"].apply(adapter(llama_folder, target_modules=["q_proj"], **more), rows)


def test_shrinking_stops_where_perplexity_would_suffer(suspect: OpenedModel, rows: list[Example]) -> None:
    trained, _ = defended(DEFENSES["finetune"], suspect, rows, max_steps=20, learning_rate=1e-2)
    suspect.model = trained
    whole = list(products(trained))
    model, record = DEFENSES["shrink:tolerance=0"].apply(suspect, rows)
    assert record.settings["factor"] > FACTORS[0]
    for before, after in zip(whole, products(model), strict=True):
        torch.testing.assert_close(after, record.settings["factor"] * before)


def test_only_adapters_can_be_shrunk(llama_folder: Path, rows: list[Example]) -> None:
    with pytest.raises(Unfit, match="is no adapter"):
        DEFENSES["shrink"].apply(open_model(llama_folder), rows)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(("bits", "error"), [(4, 0.16), (8, 0.0045)])
def test_quantizing_leaves_few_values_and_little_error(
    bits: int, error: float, suspect: OpenedModel, rows: list[Example]
) -> None:
    before = weights(open_model(suspect.name).model.merge_and_unload())
    model, _ = DEFENSES[f"quantize:bits={bits}"].apply(suspect, rows)
    for weight, rounded in zip(before, weights(model), strict=True):
        # Half of the widest gap between two levels, as a share of the largest weight
        assert (rounded - weight).abs().max() <= error * weight.abs().max()
        assert_rounded(rounded, bits)
        assert not torch.equal(weight, rounded)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_of_outputs_where_a_weight_is_transposed_too(bits: int, tokenizer: Any) -> None:
    opened = OpenedModel(tiny_model("gpt2", len(tokenizer)), tokenizer, "gpt2", "open")
    model, _ = DEFENSES[f"quantize:bits={bits}"].apply(opened, [])
    for weight in weights(model):
        assert_rounded(weight.T, bits)


def assert_rounded(weight: Tensor, bits: int) -> None:
    """Of a weight `(outputs, inputs)`: 16 levels for 64 of an output's, or 255 for all of it, evenly spaced."""
    if bits == 4:
        assert all(len(part.unique()) <= 16 for part in weight.reshape(-1, 64))
    else:
        steps = 127 * weight / weight.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(steps, steps.round(), atol=0.02, rtol=0)


def test_quantizing_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, suspect: OpenedModel) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"pip install 'crow-llm\[defenses\]'"):
        DEFENSES["quantize"].apply(suspect, [])
