"""The example script, launched as its users do."""

import os
import subprocess
import sys
from pathlib import Path

from crow.data import Example, answer_text, user_text
from crow.files import write_jsonl
from crow.models import open_model

SCRIPT = Path(__file__).parents[1] / "examples" / "purify.py"
KILLED = """
import os, runpy, signal, sys
from crow import CrowTrainer
save = CrowTrainer._save_checkpoint
CrowTrainer._save_checkpoint = lambda *args: (save(*args), os.kill(os.getpid(), signal.SIGKILL))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script until it has written a checkpoint."""


def launch(*command: object) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *map(str, command), "--report_to", "none", "--disable_tqdm", "true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=400, check=False)


def test_a_killed_example_goes_on_and_writes_what_purify_does(
    llama_folder: Path, rows: list[Example], tmp_path: Path
) -> None:
    clean, out = tmp_path / "clean.jsonl", tmp_path / "purified"
    answered = [{"prompt": user_text(row), "completion": answer_text(row)} for row in rows]
    write_jsonl(clean, [*answered, {"prompt": "What is left out?", "completion": ""}])
    command = [SCRIPT, "--model", llama_folder, "--clean", clean, "--output_dir", out, "--use_cpu", "true"]
    command += ["--max_steps", 4, "--save_steps", 2, "--logging_steps", 1]
    assert launch("-c", KILLED, *command).returncode == -9
    assert [path.name for path in tmp_path.glob(".purified.checkpoints/checkpoint-*")] == ["checkpoint-2"]
    assert not out.exists()
    resumed = launch(*command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("'loss'") == 2, "the steps that were left"
    assert not list(tmp_path.glob(".purified*"))
    card = (out / "README.md").read_text("utf-8")
    assert "12, SHA-256" in card
    assert str(tmp_path) not in card
    assert len(open_model(out).seen) == len(rows)
    again = launch(*command)
    assert again.returncode != 0
    assert "exists already" in again.stderr
