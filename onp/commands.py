"""What every command does around its job: options from a dataclass, one clear line for a bad input."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro
from rich.console import Console
from rich.logging import RichHandler

from onp.errors import ConfigError, OnpError, first_line, lacks_memory
from onp.paths import real_path
from onp.units import UnitIndex

Config = TypeVar("Config")
SAVE_MEMORY = "smaller images (--image-size) and fewer of them (--defence-size) need less"
console = Console(markup=False, emoji=False)  # names of files and classes are no markup


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation; elsewhere, nothing.

    It gives large blocks back to the system otherwise, and getting them again, page by page, can take longer than
    the computation that they are for.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # from malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)


def release_freed_memory() -> None:
    """Have glibc give back what it kept; elsewhere, nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def print_untraced(index: UnitIndex, console: Console) -> None:
    """One line for every module of a network whose inside has no units."""
    for path, reason in index.untraced:
        console.print(f"Not traced, so without units: {path} ({reason})", soft_wrap=True, highlight=False)


def check_output(path: Path, option: str, folder: bool = False) -> Path:
    """The `real_path`, where a file of that name, or files in a `folder` of it, can be written.

    To be called before the work that would be lost; creates nothing. Raises `ConfigError`, naming the `option`.
    """
    path = real_path(path, option)
    place = path if folder else path.parent
    nearest = next(above for above in (place, *place.parents) if above.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK) or (not folder and path.exists() and not path.is_file()):
        raise ConfigError(f"{option} {path} is no {'folder' if folder else 'file'} that can be written; give another")
    return path


def run_command(config: type[Config], job: Callable[[Config], int | None], program: str) -> None:
    """Parse `config` from the command line and run `job`; exit with its code.

    On bad input that is one line and code 2, on a full disk or another of its failures one line and `os.EX_IOERR`,
    where memory does not suffice `os.EX_OSERR`.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    log = logging.getLogger("onp")
    log.setLevel(logging.INFO)
    log.handlers = [RichHandler(console=console, show_time=False, show_level=False, show_path=False)]
    try:
        code = job(tyro.cli(config, prog=f"python -m {program}", description=job.__doc__))
    except OnpError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except OSError as error:
        print(f"error: {error}; what was written before is whole", file=sys.stderr)
        code = os.EX_IOERR
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print(f"error: out of memory ({first_line(error)[:120]}); {SAVE_MEMORY}", file=sys.stderr)
        code = os.EX_OSERR
    except KeyboardInterrupt:
        print("stopped; what was written before is whole", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
