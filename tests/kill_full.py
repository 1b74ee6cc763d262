"""Kill a full job at random moments, resume it each time, and compare with an uninterrupted run.

    python tests/kill_full.py train --kills 10 --seed 0 --out FOLDER

`train` is the demonstration, `zoo` a small entry and its clean twin, `table` these two with one seed.
Moments are drawn from all events (see `killing`) of the uninterrupted run. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from pathlib import Path

from killing import Jobs, differences, jobs

ENTRIES = ("digits-small_cnn-badnets", "digits-small_cnn-clean")


def arguments(job: str, out: Path, entries: Path) -> tuple[str, list[str]]:
    """The command and its arguments for a job that writes to `out`; `table` reads zoo entries."""
    if job == "train":
        return "onp.train", ["--threads", "1", "--run-dir", str(out)]
    if job == "zoo":
        return "onp.zoo", ["make", ENTRIES[0], "--threads", "1", "--root", str(out)]
    models = [str(entries / f"{name}-seed0") for name in ENTRIES]
    return "onp.bench table", ["--models", *models, "--seeds", "0", "--threads", "1", "--out", str(out)]


def killed(runner: Jobs, job: str, out: Path, kills: int, seed: int) -> bool:
    """Whether a job that is killed `kills` times ends like one that is not."""
    if job == "table":
        runner.run(*arguments("zoo", out / "entries", out))
    command, whole = arguments(job, out / "whole", out / "entries")
    code, seconds, events = runner.run(command, whole)
    print(f"{command} {' '.join(whole)}\nuninterrupted: exit code {code}, {seconds:.0f} s, {events}", flush=True)
    moments = sorted(random.Random(seed).sample(range(1, events["event"] + 1), kills))
    command, again = arguments(job, out / "killed", out / "entries")
    before, total = 0, 0.0
    for moment in moments:
        died, seconds, _ = runner.run(command, again, ("event", moment - before))
        before, total = moment - 1, total + seconds  # the event that it died at is still to come
        print(f"killed at event {moment} of {events['event']}: exit code {died} after {seconds:.0f} s", flush=True)
        assert died == -signal.SIGKILL
    last, seconds, _ = runner.run(command, again)
    differing = differences(out / "killed", out / "whole")
    print(f"resumed: exit code {last} after {seconds:.0f} s, {total + seconds:.0f} s in all")
    print(f"DIFFERENT: {', '.join(differing)}" if differing or last != code else "equal, file by file")
    return not differing and last == code


def main() -> int:
    """Parse the command line, and kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("train", "zoo", "table"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="new folder for both runs; a temporary one by default")
    options = parser.parse_args()
    out = (options.out or Path(tempfile.mkdtemp())).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with jobs(out) as runner:
        return 0 if killed(runner, options.job, out, options.kills, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
