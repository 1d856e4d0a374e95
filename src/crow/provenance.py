"""Where a result comes from: versions, machine and command line, kept in every result."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from crow.files import name_elsewhere

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
    # Behind an equals sign too, as in --json=FILE, or cleangen:reference=MODEL,threshold=5
    return re.sub(r"(?<=[=,])/[^=,]*", lambda path: name_elsewhere(path[0]), name_elsewhere(argument))
