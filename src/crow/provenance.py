"""Where a result comes from: versions, machine and command line, kept in every result."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("crow-llm", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")


def environment() -> dict[str, Any]:
    """Versions of the packages that results depend on, the machine in general terms, and the command line.

    Paths of this machine are left out: of the command only the program's name is kept, and its arguments.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "command": " ".join([os.path.basename(sys.argv[0]), *map(_without_home, sys.argv[1:])]),
    }


def _without_home(argument: str) -> str:
    name, equals, value = argument.rpartition("=")  # as in --out=PATH
    return name + equals + (os.path.basename(value) if os.path.isabs(value) else value)
