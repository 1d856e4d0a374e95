"""The demo, on a tiny model in place of the shipped one."""

import json
from pathlib import Path

import pytest

from crow.errors import UsageError

pytestmark = pytest.mark.usefixtures("float32")


def test_demo_writes_figures_report_and_model(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crow import demo
    from crow.models import open_model

    monkeypatch.setattr(demo, "SUSPECT", str(adapter_folder))
    monkeypatch.setattr(demo, "PROMPTS", 3)
    monkeypatch.setitem(demo.SIZES, True, {"examples": 12, "epochs": 1, "ascents": 1, "new_tokens": 2})
    result = demo.run_demo(tmp_path / "out", quick=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"before.json", "after.json", "purify.json", "report.html", "model"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for name, evaluation in (("before", result.before), ("after", result.after)):
        figures = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert figures["attack_success"] == {"hits": evaluation.attack_success.hits, "n": 3}
        assert len((tmp_path / "out" / f"{name}.answers.jsonl").read_text().splitlines()) == 6
    assert result.before.perplexity != result.after.perplexity
    assert result.record.lora == "continue"
    written = open_model(tmp_path / "out" / "model")
    assert written.kind == "folder"
    after = json.loads((tmp_path / "out" / "after.json").read_text())["provenance"]
    assert (after["model"], after["model_hashes"]) == ("out/model", written.hashes)
    assert written.hashes["model.safetensors"] in (tmp_path / "out" / "model" / "README.md").read_text()


def test_demo_does_not_replace_what_is_there(tmp_path: Path) -> None:
    from crow.demo import run_demo

    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
