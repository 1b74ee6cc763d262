"""Which code made a result: what is kept of one's work, another must not go on with."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("agents", "baselines_rnp", "envs", "onp")


@cache
def sources_sha256() -> str:
    """Hexadecimal SHA-256 of the sources of `PACKAGES`, and of what they calibrate by."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
