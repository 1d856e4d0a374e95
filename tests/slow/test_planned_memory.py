"""What is planned of memory is what trainings take, on three measured points."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from crow.models import open_model, save_model
from crow.planning import plan

TRAINING = """
import json, resource, sys
import psutil
from crow import purify
from crow.data import answer_text, example, load_examples, user_text

folder, settings = sys.argv[1], json.loads(sys.argv[2])
rows = load_examples("clean")[: settings["per_device_train_batch_size"]]
rows = [example(user_text(row), answer_text(row) * settings["max_length"]) for row in rows]
before = psutil.Process().memory_info().rss
purify(folder, clean=rows, max_steps=2, **settings)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""
PROMPT_TOKENS = 45  # about, with the chat template's own; answers fill the rest of each row


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model, and one of 30M parameters with random weights, as folders."""
    root = tmp_path_factory.mktemp("models")
    opened = open_model()
    save_model(opened.model, opened.tokenizer, root / "embedded")
    small = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=49152, tie_word_embeddings=True, pad_token_id=2, eos_token_id=2, **small)
    LlamaForCausalLM(config).save_pretrained(root / "small")
    AutoTokenizer.from_pretrained(root / "embedded").save_pretrained(root / "small")
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.parametrize(
    ("name", "rows", "tokens", "settings"),
    [
        ("embedded", 8, 128, {"soft_token_warmup": 1}),
        ("embedded", 2, 512, {"preset": "paper", "gradient_checkpointing": True}),
        ("small", 8, 256, {"preset": "finetune"}),
    ],
)
def test_planned_memory_is_that_of_a_training(
    folders: dict[str, Path], name: str, rows: int, tokens: int, settings: dict[str, Any]
) -> None:
    settings = settings | {"per_device_train_batch_size": rows}
    command = [sys.executable, "-c", TRAINING, folders[name], json.dumps(settings | {"max_length": tokens})]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # so that what is freed does not count
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    measured = int(done.stdout.split()[-1])
    planned = plan(
        folders[name], tokens=tokens, answer_tokens=tokens - PROMPT_TOKENS, examples=rows, tflops=1.0, **settings
    )
    print(f"{name} {rows} x {tokens}: planned {planned.peak_bytes}, measured {measured}")
    assert planned.peak_bytes == pytest.approx(measured, rel=0.25)
