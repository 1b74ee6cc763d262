"""`python -m onp.bench NAME`: what is fast, what purifies, what predicts, what detects, on networks of known truth."""

from __future__ import annotations

import sys

from onp.commands import run_command

BENCHES = ("engine", "table", "terms", "detect", "calibrate")


def main() -> None:
    """Run the benchmark that the first argument names."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name == "engine":
        from onp.bench.engine import EngineBenchConfig, run_engine_bench  # behind the warning filter of onp.commands

        run_command(EngineBenchConfig, run_engine_bench, "onp.bench engine")
    elif name == "table":
        from onp.bench.table import TableConfig, run_table  # likewise

        run_command(TableConfig, run_table, "onp.bench table")
    elif name == "terms":
        from onp.bench.terms import TermsConfig, run_terms  # likewise

        run_command(TermsConfig, run_terms, "onp.bench terms")
    elif name == "detect":
        from onp.bench.detect import DetectBenchConfig, run_detect_bench  # likewise

        run_command(DetectBenchConfig, run_detect_bench, "onp.bench detect")
    elif name == "calibrate":
        from onp.bench.calibrate import CalibrateConfig, run_calibrate  # likewise

        run_command(CalibrateConfig, run_calibrate, "onp.bench calibrate")
    else:
        print(f"error: benchmark {name!r}: expected one of {', '.join(BENCHES)}, then its options", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
