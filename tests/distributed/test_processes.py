"""Several processes train as one does on the same global batch: on CPUs, with gloo, started by accelerate."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

SCRIPT, EXAMPLES = Path(__file__).parent / "train.py", Path(__file__).parents[2] / "examples"
EVERY = ("default", "paper", "paper-scale-free", "finetune", "aligned", "unlearning")
TRAINED = {  # by each of the example configurations, and what it wraps a model as
    "ddp": ("DistributedDataParallel", EVERY),
    "fsdp": ("FSDPPeftModelForCausalLM", ("default", "paper", "finetune", "unlearning")),
    "zero2": ("DeepSpeedEngine", ("default", "paper", "finetune", "unlearning")),
    "zero3": ("DeepSpeedEngine", ("default", "finetune", "unlearning")),
}

Weights = dict[str, torch.Tensor]
Trained = tuple[dict[str, Any], Weights]


def launch(command: list[str], out: Path, model: Path, presets: tuple[str, ...]) -> Path:
    out.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONHASHSEED": "0"}
    arguments = [*command, str(SCRIPT), str(model), str(out), *presets]
    finished = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr  # whole: what launches processes ends it with lines of its own
    return out


def trained(folder: Path, preset: str) -> Trained:
    return json.loads((folder / f"{preset}.json").read_text()), load_file(folder / f"{preset}.safetensors")


def distance(found: Weights, expected: Weights, part: str = "") -> float:
    """The norm of the difference by the norm, of all whose names hold `part`."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if part in name]
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in names)
    return (apart / sum(float(expected[name].square().sum()) for name in names)) ** 0.5


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    return launch([sys.executable], tmp_path_factory.mktemp("one") / "out", llama_folder, EVERY)


def launch_two(kind: str, folder: Path, model: Path) -> Path:
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    settings = yaml.safe_load((EXAMPLES / f"{kind}.yaml").read_text()) | {"num_processes": 2}
    if not kind.startswith("zero"):
        settings["use_cpu"] = True
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    return launch([*command, "--main_process_port", port], folder / "out", model, TRAINED[kind][1])


@pytest.mark.parametrize("kind", TRAINED)
def test_two_processes_train_as_one(kind: str, one_process: Path, llama_folder: Path, tmp_path: Path) -> None:
    two_processes = launch_two(kind, tmp_path, llama_folder)  # all presets at once: to start takes longest
    for preset in TRAINED[kind][1]:
        (alone, weights), (together, shared) = trained(one_process, preset), trained(two_processes, preset)
        assert together["wrapped"] == TRAINED[kind][0]
        terms = {"loss", "clean", "divergence", "inconsistency", "constant_answers", "unlikelihood", "alpha"}
        for a, b in zip(alone["logs"], together["logs"], strict=True):
            assert {name: b[name] for name in terms & a.keys()} == pytest.approx(
                {name: a[name] for name in terms & a.keys()}, rel=1e-4, abs=1e-6
            ), preset
        apart = {part: distance(shared, weights, part) for part in ("lora_A", "lora_B")}
        assert max(apart.values()) < 1e-4, preset
        insertions = load_file(one_process / f"{preset}-0.safetensors")
        for process in range(2) if insertions else ():
            assert distance(load_file(two_processes / f"{preset}-{process}.safetensors"), insertions) < 1e-4, preset
        losses = [abs(b["loss"] / a["loss"] - 1) for a, b in zip(alone["logs"], together["logs"], strict=True)]
        print(f"\n{kind} {preset}: losses {max(losses):.1e}, weights {max(apart.values()):.1e}", end="")
        if kind == "ddp":
            assert together["reductions"] == len(together["logs"])  # once a step
            print(f", {together['reductions']} reductions in {len(together['logs'])} steps", end="")
