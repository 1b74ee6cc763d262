"""What every command does around its job: options from a dataclass, one clear line for a bad input."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import tyro
from rich.console import Console

from onp.errors import OnpError

Config = TypeVar("Config")
console = Console()
# PyTorch Geometric compiles a few functions by a deprecated way; nothing that a user could act on.
warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)


def run_command(config: type[Config], job: Callable[[Config], int | None], program: str) -> None:
    """Parse `config` from the command line and run `job`; exit with its code, or with 2 and one line on bad input."""
    try:
        code = job(tyro.cli(config, prog=f"python -m {program}", description=job.__doc__))
    except OnpError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
