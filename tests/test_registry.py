"""Named choices with parameters."""

from dataclasses import dataclass

import pytest

from crow.errors import CrowError, UsageError
from crow.registry import Registry


@pytest.fixture
def birds() -> Registry[object]:
    registry: Registry[object] = Registry("bird")

    @registry.register("crow")
    @dataclass(frozen=True)
    class Crow:
        call: str = "caw"
        color: str = "black"

    @registry.register("egg")
    class Egg:
        pass

    return registry


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("crow", ("caw", "black")),
        ("crow:", ("caw", "black")),
        ("crow:call=kraa", ("kraa", "black")),
        ("crow:color=gray,call=kraa", ("kraa", "gray")),
        ("crow:call=a=b:c d", ("a=b:c d", "black")),
        ("crow:call=żółć 🐦", ("żółć 🐦", "black")),
        ("crow:call=kraa,", ("kraa", "black")),
        ("crow:call=I'm sorry, but no,color=gray", ("I'm sorry, but no", "gray")),
    ],
)
def test_text_gives_an_entry_with_its_parameters(birds: Registry[object], text: str, expected: tuple[str, str]) -> None:
    crow = birds[text]
    assert (crow.call, crow.color) == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["dodo", "", "Crow", " crow", ":call=caw", "dodo:call=caw"])
def test_unknown_name_lists_the_known(birds: Registry[object], text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown bird .*; known are crow, egg"):
        birds[text]


@pytest.mark.parametrize("part", ["wings=2", "call", "call=", "=caw", "CALL=caw"])
def test_unknown_or_broken_parameter_names_itself_and_the_known(birds: Registry[object], part: str) -> None:
    with pytest.raises(UsageError, match=rf"'crow' takes call=TEXT, color=TEXT; not '{part}'"):
        birds[f"crow:color=gray,{part}"]


def test_entry_without_parameters_takes_none(birds: Registry[object]) -> None:
    assert type(birds["egg"]).__name__ == "Egg"
    with pytest.raises(UsageError, match="'size=1'"):
        birds["egg:size=1"]


def test_one_parameter_alone_takes_every_comma() -> None:
    registry: Registry[object] = Registry("egg")

    @registry.register("egg")
    @dataclass(frozen=True)
    class Egg:
        marks: str = ""

    assert registry["egg:marks=a,b=c, d"] == Egg("a,b=c, d")


def test_names_are_iterated_in_order_of_registration(birds: Registry[object]) -> None:
    assert list(birds) == ["crow", "egg"]


def test_register_returns_the_class_itself(birds: Registry[object]) -> None:
    class Owl:
        pass

    assert birds.register("owl")(Owl) is Owl
    assert isinstance(birds["owl"], Owl)


def test_usage_errors_are_crow_errors_with_another_exit_code() -> None:
    assert issubclass(UsageError, CrowError)
    assert issubclass(UsageError, ValueError)
    assert (CrowError.exit_code, UsageError.exit_code) == (1, 2)
