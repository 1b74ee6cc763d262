"""Paths as options and suites give them."""

from __future__ import annotations

from pathlib import Path

from onp.errors import ConfigError


def real_path(path: str | Path, option: str) -> Path:
    """The absolute path, with `~` written out and links followed; raises `ConfigError`, naming the `option`."""
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a loop of links, characters no name has
        raise ConfigError(f"{option} {str(path)!r} is no path ({error}); give another") from error
