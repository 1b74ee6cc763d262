"""A few hundred fuzzed files of every format; `python tests/fuzz.py` tries many more."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import FORMATS, Format, fuzz

from onp.errors import OnpError


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_in_a_file_it_loads_or_is_refused(tmp_path: Path, name: str) -> None:
    tally = fuzz(name, 300, tmp_path)
    assert tally["loaded"] + tally["refused"] >= 300
    assert tally["loaded"] > 0 and tally["refused"] > 0, "only one side of the reader is seen"


def test_a_reader_that_fails_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> None:
        if b"zero" not in path.read_bytes():
            raise ValueError("not an OnpError")
        raise OnpError("refused")

    monkeypatch.setitem(FORMATS, "mask", Format("mask.json", FORMATS["mask"].inputs, read))
    with pytest.raises(ValueError, match="not an OnpError"):
        fuzz("mask", 300, tmp_path)
