"""What a result says of where it comes from."""

import sys

import pytest

from crow.provenance import environment


def test_a_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "/home/me/suspect",
        "./here",
        "--json=/home/me/a.json",
        "--defense",
        "cleangen:reference=/home/me/b,x=1",
    ]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/crow", "evaluate", *arguments, "--endpoint=http://host/v1"])
    assert environment()["command"] == (
        "crow evaluate suspect ./here --json=a.json --defense cleangen:reference=b,x=1 --endpoint=http://host/v1"
    )
