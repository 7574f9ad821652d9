"""The commands that a page of the documentation tells people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def documented(path: Path) -> list[list[str]]:
    """Every command of a page's shell blocks, split into words."""
    blocks = re.findall(r"^```(?:ba)?sh\n(.*?)^```", path.read_text(), re.M | re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
