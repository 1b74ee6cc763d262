"""`python -m onp.bench NAME`: what is fast, what purifies, predicts, detects or comes back, on known networks."""

from __future__ import annotations

import sys
from importlib import import_module

from onp.commands import run_command

BENCHES = {
    "engine": ("EngineBenchConfig", "run_engine_bench"),
    "networks": ("NetworksConfig", "run_networks"),
    "table": ("TableConfig", "run_table"),
    "terms": ("TermsConfig", "run_terms"),
    "samples": ("SamplesConfig", "run_samples"),
    "detect": ("DetectBenchConfig", "run_detect_bench"),
    "relearn": ("RelearnConfig", "run_relearn"),
    "calibrate": ("CalibrateConfig", "run_calibrate"),
}
"""by name, which is also that of the module: its options, and what runs it"""


def main() -> None:
    """Run the benchmark that the first argument names."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(f"usage: python -m onp.bench NAME [OPTIONS]; NAME is one of {', '.join(BENCHES)}, each with a --help")
        return
    if name not in BENCHES:
        print(f"error: benchmark {name!r}: expected one of {', '.join(BENCHES)}, then its options", file=sys.stderr)
        sys.exit(2)
    module = import_module(f"onp.bench.{name}")
    options, run = (getattr(module, member) for member in BENCHES[name])
    run_command(options, run, f"onp.bench {name}")


if __name__ == "__main__":
    main()
