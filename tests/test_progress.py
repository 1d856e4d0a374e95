"""What long commands say while they run."""

import io

import pytest
from rich.console import Console

from crow import progress


@pytest.mark.parametrize(
    ("silence", "terminal", "told"), [(0.0, False, True), (3600.0, False, False), (0.0, True, False)]
)
def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, silence: float, terminal: bool, told: bool
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=said, force_terminal=terminal, width=100))
    monkeypatch.setattr(progress, "SILENCE", silence)
    with progress.progress_bar("Training [red]") as advance:
        for done in (1, 2, 3):
            advance(done, 4)
    assert ("Training [red]: 3 of 4" in said.getvalue()) is told


def test_what_is_told_of_does_nothing_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=said, width=200))
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    with progress.progress_bar("implanting badnets:word=\x1b]0;pwned\x07\x1b[2J\u202eX") as advance:
        advance(1, 2)
    assert said.getvalue().count("pwned") == 2, "the line and the bar"
    assert not set(said.getvalue()) & {"\x1b", "\u202e", "\x07"}
