"""`python -m onp.bench engine`: the evaluation engine against plain forward passes."""

from __future__ import annotations

import sys

from onp.commands import run_command

BENCHES = ("engine",)


def main() -> None:
    """Run the benchmark that the first argument names."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in BENCHES:
        print(f"error: benchmark {name!r}: expected one of {', '.join(BENCHES)}, then its options", file=sys.stderr)
        sys.exit(2)
    from onp.bench.engine import EngineBenchConfig, run_engine_bench  # behind the warning filter of onp.commands

    run_command(EngineBenchConfig, run_engine_bench, f"onp.bench {name}")


if __name__ == "__main__":
    main()
