"""What is killed at any moment comes to the same end when it is started again: the benchmark, in small."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "interruptions.py"


def test_killed_and_started_again_all_commands_come_to_the_same_end(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), "--kills", "2", "--stops", "1", "--seed", "1", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    written = json.loads(figures.read_text())
    assert written["kills"] == 8
    assert {report["command"] for report in written["reports"]} == {"purify", "implant", "evaluate", "bench"}
    assert not any(report["problems"] or report["done_again"] for report in written["reports"])
