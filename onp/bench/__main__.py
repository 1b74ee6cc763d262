"""`python -m onp.bench engine`, `networks`, `table` or `terms`: benchmarks, each described by its own `--help`."""

from __future__ import annotations

import sys

from onp.commands import run_command

BENCHES = ("engine", "networks", "table", "terms")


def main() -> None:
    """Run the benchmark that the first argument names."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name == "engine":
        from onp.bench.engine import EngineBenchConfig, run_engine_bench  # behind the warning filter of onp.commands

        run_command(EngineBenchConfig, run_engine_bench, "onp.bench engine")
    elif name == "networks":
        from onp.bench.networks import NetworksConfig, run_networks  # likewise

        run_command(NetworksConfig, run_networks, "onp.bench networks")
    elif name == "table":
        from onp.bench.table import TableConfig, run_table  # likewise

        run_command(TableConfig, run_table, "onp.bench table")
    elif name == "terms":
        from onp.bench.terms import TermsConfig, run_terms  # likewise

        run_command(TermsConfig, run_terms, "onp.bench terms")
    else:
        print(f"error: benchmark {name!r}: expected one of {', '.join(BENCHES)}, then its options", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
