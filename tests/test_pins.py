"""What is installed: the versions in constraints.txt, and in requirements.txt the same with hashes."""

import re
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins(file: str, form: str) -> dict[str, str]:
    found = re.findall(form, (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_every_pinned_version_but_torchs_has_hashes() -> None:
    pinned = pins("constraints.txt", r"^([\w.-]+)==(\S+)$")
    del pinned["torch"]  # whose builds differ from index to index
    assert pins("requirements.txt", r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}") == pinned
