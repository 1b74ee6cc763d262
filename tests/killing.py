"""Jobs that are killed at chosen moments, and whether what they leave equals what an uninterrupted one leaves.

A process that has imported the commands forks a child for every run, so that killing many costs little. All that a kill
leaves is files, and these change at two kinds of events: a temporary file is renamed, or a journal gets a record. So a
moment is the number of an event: the job dies before the renaming, or with half of the record written.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Kill = tuple[str, float] | None
"""("event", n), ("renaming", n), ("record", n): at the n-th; ("seconds", s): after a time; None: not at all.

("size", n) kills nothing: no file may grow beyond n bytes, as if the disk were full then."""


class Jobs:
    """Runs the project's commands in `folder`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, command: str, arguments: list[str], kill: Kill = None) -> tuple[int, float, dict[str, int]]:
        """Exit code (negative: signal), seconds, and events by kind where the job was not killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([command, arguments, kill]) + "\n")
        self.process.stdin.flush()
        code, seconds, events = json.loads(self.process.stdout.readline())
        return code, seconds, events


@contextmanager
def jobs(folder: Path) -> Iterator[Jobs]:
    """A process that runs commands in `folder` on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, __file__], cwd=folder, env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        yield Jobs(process)
        assert process.stdin is not None
        process.stdin.close()


def differences(run: Path, reference: Path) -> list[str]:
    """Files that differ, less seconds: what a journal saves of them is told, but the time of a kill is lost."""
    names = {
        str(path.relative_to(folder))
        for folder in (run, reference)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".md", ".zip") and "tfevents" not in path.name and path.name[0] != "."
    }
    return sorted(name for name in names if _content(run / name) != _content(reference / name))


def _content(path: Path) -> Any:
    if not path.is_file():
        return None
    return _timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def _timeless(content: Any) -> Any:
    """JSON without seconds."""
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key != "seconds"}
    return [_timeless(item) for item in content] if isinstance(content, list) else content


# --- the process that runs the jobs -------------------------------------------------------------------------------


def _child(command: str, arguments: list[str], kill: Kill, done: int) -> None:
    from onp.bench.table import TableConfig, run_table
    from onp.commands import run_command
    from onp.journal import Journal
    from onp.train import TrainConfig, train
    from onp.zoo import ZooConfig, zoo

    commands: dict[str, tuple[Any, Any]] = {
        "onp.train": (TrainConfig, train),
        "onp.bench table": (TableConfig, run_table),
        "onp.zoo": (ZooConfig, zoo),
    }
    events = {"event": 0, "renaming": 0, "record": 0}
    replace, append = os.replace, Journal._append

    def due(kind: str) -> bool:
        events["event"] += 1
        events[kind] += 1
        return kill is not None and kill[0] in ("event", kind) and kill[1] == events[kill[0]]

    def renaming(source: Any, target: Any) -> None:
        if due("renaming"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def recording(self: Journal, path: Path, record: bytes) -> None:
        if due("record"):
            append(self, path, record[: len(record) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, path, record)

    if kill is not None and kill[0] == "size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(kill[1]), resource.RLIM_INFINITY))
    os.replace = renaming  # type: ignore[assignment]
    Journal._append = recording  # type: ignore[method-assign]
    sys.argv = [command, *arguments]
    sys.stdout = sys.stderr
    try:
        run_command(*commands[command], command)
    except SystemExit as stop:
        os.write(done, json.dumps(events).encode())
        os._exit(int(stop.code or 0))
    finally:
        os._exit(99)


def _serve() -> None:
    for line in sys.stdin:
        command, arguments, kill = json.loads(line)
        start, (told, done) = time.perf_counter(), os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(command, arguments, kill, done)
        os.close(done)
        if kill and kill[0] == "seconds":
            time.sleep(kill[1])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(told) as file:
            events = json.loads(file.read() or "{}")
        print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start, events]), flush=True)


if __name__ == "__main__":
    import onp.bench.table
    import onp.train
    import onp.zoo  # noqa: F401 (once, for all children)

    _serve()
