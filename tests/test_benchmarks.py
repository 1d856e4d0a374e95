"""What the benchmarks compare is the same step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, scatter_lora
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

from crow.config import PRESETS, CrowConfig
from crow.data import Example, to_dataset
from crow.models import lora_config
from crow.trainer import CrowTrainer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_public_formulation_gives_the_gradients_of_the_preset_paper(
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Example],
    tiny_llama: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from public_formulation import PublicFormulation

    def gradients(trainer_class: type[CrowTrainer], **changes: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), lora_config())
        scatter_lora(model, seed=1)
        settings = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
        config = CrowConfig(str(tmp_path), **settings, **PRESETS["paper"] | changes)
        trainer = trainer_class(model, config, train_dataset=to_dataset(rows[:8]), processing_class=tokenizer)
        trainer.current_gradient_accumulation_steps = 1
        [inputs], items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
        trainer.training_step(trainer.model, inputs, items)
        return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}

    ours, public = gradients(CrowTrainer), gradients(PublicFormulation)
    other = gradients(PublicFormulation, epsilon=0.2)
    assert ours.keys() == public.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(public[name], gradient, rtol=1e-3, atol=1e-5)
    assert not all(torch.allclose(other[name], gradient, rtol=1e-3, atol=1e-5) for name, gradient in ours.items())
