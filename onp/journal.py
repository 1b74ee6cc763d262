"""A journal: what a long job has computed so far, so that after a kill it need not compute it again.

A job is a deterministic function of its options and of a few costly computations. So it is not its state that is kept
but the results of those computations: begun anew, the job asks for the same ones in the same order, is answered from
the file, and comes in little time to where it was killed, with the same random numbers on the way.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

Values = dict[str, Tensor]
"""what one computation gives; names and tensors"""
_SECONDS = "seconds taken"  # no weight has a name like this
_DIGEST = hashlib.sha256().digest_size
_HEAD = 8 + 2 * _DIGEST  # of a record: length of its values, digest of all of it, digest of its name


class Journal:
    """Results of computations, with a `path` in a file that grows record by record.

    `subject` says what all of them depend on. A record is a safetensors block and the SHA-256 of subject, name and
    block. The file is read up to the first record that does not fit: a torn one, a damaged one, or one of another
    subject. What follows is cut off, and computed again. Raises `OSError` where the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None, subject: str = "") -> None:
        self.path, self.subject = path, subject
        self.seconds = 0.0
        """what the results that were answered from the file once took"""
        self._known: dict[bytes, bytes] = {}
        if path is not None and path.exists():
            self._read(path)

    def recall(self, name: str | bytes, compute: Callable[[], Values]) -> Values:
        """The result that the journal holds under `name`, or else that of `compute`, which is then written down."""
        if self.path is None:
            return compute()
        key = hashlib.sha256(name.encode() if isinstance(name, str) else name).digest()
        if (block := self._known.get(key)) is not None:
            values = safetensors.torch.load(block)
            self.seconds += float(values.pop(_SECONDS))
            return values
        start = time.perf_counter()
        values = compute()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        block = safetensors.torch.save({**values, _SECONDS: seconds})
        self._append(self.path, len(block).to_bytes(8, "little") + self._digest(key, block) + key + block)
        return values

    def _digest(self, key: bytes, block: bytes) -> bytes:
        return hashlib.sha256(self.subject.encode() + key + block).digest()

    def _append(self, path: Path, record: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("ab") as file:
                file.write(record)
        except OSError as error:
            error.filename = str(path)
            raise

    def _read(self, path: Path) -> None:
        content, place = path.read_bytes(), 0
        while place + _HEAD <= len(content):
            behind = place + _HEAD + int.from_bytes(content[place : place + 8], "little")
            digest, key = content[place + 8 : place + 8 + _DIGEST], content[place + 8 + _DIGEST : place + _HEAD]
            block = content[place + _HEAD : behind]
            if behind > len(content) or digest != self._digest(key, block):
                break
            self._known[key], place = block, behind
        if place < len(content):
            with path.open("r+b") as file:
                file.truncate(place)
