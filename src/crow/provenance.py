"""Where a result comes from: versions, machine and command line, kept in every result."""

import os
import platform
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
        "machine": _machine(),
        "command": " ".join([os.path.basename(sys.argv[0]), *map(_without_home, sys.argv[1:])]),
    }


def _machine() -> str:
    """Its kind and what computes in it, in the words of the system; nothing that tells it from others of its kind."""
    import torch

    processors: list[str] = []
    with suppress(OSError):
        processors = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    parts = [f"{platform.system()} {platform.machine()}", *processors[:1], f"{os.cpu_count()} CPU cores"]
    parts += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(parts)


def _without_home(argument: str) -> str:
    # Behind an equals sign too, as in --json=FILE, or cleangen:reference=MODEL,threshold=5
    return re.sub(r"(?<=[=,])/[^=,]*", lambda path: name_elsewhere(path[0]), name_elsewhere(argument))
