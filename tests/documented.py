"""Which fields of a JSON record its section of docs/files.md does not name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parents[1] / "docs" / "files.md").read_text()
KEYED_BY_DATA = {"outliers", "pruned", "measures", "recovered"}
"""fields that map kinds, layers, measures or sources to values"""


def undocumented(section: str, record: dict[str, Any]) -> set[str]:
    """Names of fields, at any depth."""
    _, found, rest = PAGE.partition(f"\n## {section}\n")
    assert found, section
    return set(_fields(record)) - set(re.findall(r"`(\w+)`", rest.partition("\n## ")[0]))


def _fields(value: Any, named: bool = True) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if named:
                yield key
            yield from _fields(inner, key not in KEYED_BY_DATA)
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner)
