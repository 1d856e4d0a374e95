"""Named choices that are given on the command line, with their parameters: `name` or `name:key=value,key=value`.

A comma with a space behind it belongs to a value, so that a sentence can be one; so does any comma where there is one
parameter alone.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar, cast

from crow.errors import UsageError

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

_KINDS: dict[Any, str] = {int: "INTEGER", float: "NUMBER"}


class Registry(Generic[T]):
    """Classes by name, made from a text.

    Args:
        kind: What the entries are, for error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[Any]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that files a dataclass, whose fields are the parameters, under `name`, which it then has."""

        def add(cls: C) -> C:
            self._classes[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __getitem__(self, text: str) -> T:
        """Make an entry from `name` or `name:key=value,...`; a field that is a number is read as one.

        Raises:
            UsageError: an unknown name or parameter (it names the known ones), or a value that is no number.
        """
        name, _, rest = text.partition(":")
        if name not in self._classes:
            raise UsageError(f"unknown {self.kind} {name!r}; known are {', '.join(self._classes)}")
        cls = self._classes[name]
        types = {f.name: f.type for f in fields(cls)} if is_dataclass(cls) else {}
        parameters: dict[str, Any] = {}
        for part in filter(None, [rest] if len(types) == 1 else re.split(r",(?!\s)", rest)):
            key, equals, value = part.partition("=")
            if key not in types or not equals or not value:
                takes = ", ".join(f"{key}={_KINDS.get(kind, 'TEXT')}" for key, kind in types.items()) or "no parameters"
                raise UsageError(f"{self.kind} {name!r} takes {takes}; not {part!r}")
            parameters[key] = self._typed(name, key, value, types[key])
        try:
            return cast(T, cls(**parameters))
        except RecursionError as error:
            raise UsageError(f"{self.kind} {name!r} holds itself too often") from error

    def _typed(self, name: str, key: str, text: str, wanted: Any) -> Any:
        if wanted not in (int, float):
            return text
        try:
            return wanted(text)
        except ValueError as error:
            kind = "whole number" if wanted is int else "number"
            raise UsageError(f"{self.kind} {name!r}: {key} is {text!r}, which is no {kind}") from error
