"""A base in 4 bits: purified through an adapter that the whole model takes too, and never merged into."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import SHORT, Run, clean, fails, run  # noqa: F401, fixtures
from transformers import PreTrainedTokenizerFast

import crow
from crow.data import Example
from crow.errors import UsageError
from crow.models import open_model, save_model
from crow.planning import plan

bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.usefixtures("float32")


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_linear_layers_but_the_head_are_held_in_4_bits(llama_folder: Path) -> None:
    opened, whole = open_model(llama_folder, load_in_4bit=True), open_model(llama_folder)
    assert len(layers(opened.model)) == 4 * 7
    assert (opened.dtype, whole.dtype) == ("nf4", "float32")
    assert opened.causal_lm.get_output_embeddings().weight.dtype == torch.float32
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        near, exact = opened.model(ids).logits, whole.model(ids).logits
    assert 0 < (near - exact).norm() / exact.norm() < 0.5


@pytest.mark.parametrize("form", [{"preset": "default", "soft_token_warmup": 1}, {"preset": "paper"}])
def test_purifying_trains_an_adapter_that_the_whole_model_takes(
    llama_folder: Path, rows: list[Example], tmp_path: Path, form: dict[str, Any]
) -> None:
    opened = open_model(llama_folder, load_in_4bit=True)
    before = [layer.weight.detach().clone() for layer in layers(opened.model)]
    model, record = crow.purify(opened, clean=rows, max_steps=2, **form)
    assert record.provenance["dtype"] == "nf4"
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, layers(model), strict=True))
    save_model(model, opened.tokenizer, tmp_path / "purified")
    again = open_model(tmp_path / "purified")
    assert again.dtype == "float32"
    saved, trained = (m.get_parameter(NAME) for m in (again.model, model))
    assert trained.any()
    torch.testing.assert_close(saved.detach(), trained.detach(), check_dtype=False)


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
def test_gradients_are_those_of_the_rounded_weights_even_after_an_evaluation(llama_folder: Path) -> None:
    model: Any = open_model(llama_folder, load_in_4bit=True).model

    def gradient() -> torch.Tensor:
        embeddings = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.train()(inputs_embeds=embeddings).logits.square().sum().backward()
        assert embeddings.grad is not None
        return embeddings.grad

    with torch.no_grad():
        model.eval()(torch.arange(3, 40)[None])
    quantized = gradient()
    model.dequantize()
    assert not layers(model)
    torch.testing.assert_close(quantized, gradient(), rtol=1e-3, atol=1e-3)


NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"


def test_a_suspect_adapter_is_continued_on_4_bits(adapter_folder: Path, rows: list[Example]) -> None:
    opened = open_model(adapter_folder, load_in_4bit=True)
    assert len(layers(opened.causal_lm)) == 4 * 7
    before = opened.model.get_parameter(NAME).detach().clone()
    model, _ = crow.purify(opened, clean=rows, preset="finetune", max_steps=1)
    assert not torch.equal(model.get_parameter(NAME), before)


def test_nothing_is_merged_into_4_bits(
    adapter_folder: Path, rows: list[Example], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    opened = open_model(adapter_folder, load_in_4bit=True)
    with pytest.raises(UsageError, match="rounded away: write the adapter"):
        save_model(opened.model, tokenizer, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UsageError, match="rounded away"):
        crow.purify(opened, clean=rows, lora="fresh", max_steps=1)


def test_the_command(run: Run, clean: Path, llama_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    done = run("purify", llama_folder, "--clean", clean, "--load-in-4bit", "--preset", "finetune", *SHORT)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "purified" / "adapter_model.safetensors").is_file()
    fails(run("purify", llama_folder, "--load-in-4bit", "--merge", "--out", "m"), 2, "leave it out")
    fails(run("purify", llama_folder, "--load-in-4bit", "--defense", "prune", "--out", "m"), 2, "changes the weights")
    fails(run("purify", "--load-in-4bit", "--out", "m"), 2, "GGUF file, which is opened whole")


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"pip install 'crow-llm\[defenses\]'"):
        open_model(llama_folder, load_in_4bit=True)


def test_a_plan_has_the_bytes_of_4_bits(llama_folder: Path) -> None:
    opened = open_model(llama_folder, load_in_4bit=True)
    trained = [p for p in crow.purify(opened, preset="finetune", max_steps=1)[0].parameters() if p.requires_grad]
    held = sum(p.nbytes for p in opened.causal_lm.parameters()) - sum(p.nbytes for p in trained)
    for layer in layers(opened.causal_lm):
        state = layer.weight.quant_state
        held += state.absmax.nbytes + state.state2.absmax.nbytes
    told = plan(llama_folder, load_in_4bit=True, tokens=64, preset="finetune", tflops=1.0)
    assert told.weight_bytes == pytest.approx(held, rel=0.01)
    assert told.training_bytes == 4 * sum(p.nbytes for p in trained)
    with pytest.raises(UsageError, match="GGUF file, which is opened whole"):
        plan(load_in_4bit=True)
