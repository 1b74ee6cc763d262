"""Images out of tar archives."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

SAFE: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4


def extract(archive: Path, folder: Path, part: str) -> None:
    """Unpack into `folder` the members of `archive` whose path holds `part`."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, [member for member in tar if part in member.name], **SAFE)
