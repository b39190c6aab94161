"""`LastWord`: the step that a rank has begun last, in a file that outlives the rank's process.

An exchange of different sizes ends a process at once, and with it what its socket had not sent: the step that it had
begun, which tells that it was different. What is in a file by then can be read by whoever asks why the process ended.
"""

from __future__ import annotations

import os
from pathlib import Path

from xllm.worker.message_codec import decode, encode
from xllm.worker.messages import StepBegun


class LastWord:
    """Of one rank, written by it, in the folder where the ranks of an engine meet."""

    def __init__(self, folder: Path, rank: int):
        self._file = os.open(_path(folder, rank), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    def put(self, begun: StepBegun) -> None:
        """Replace the word by another. One call to the system: a process that is ended by its own doing has either
        written all of it or nothing."""
        frame = encode(begun)
        os.pwrite(self._file, len(frame).to_bytes(4, "little") + frame, 0)

    def close(self) -> None:
        os.close(self._file)


def last_word(folder: Path, rank: int) -> StepBegun | None:
    """What a rank has begun last; None: nothing, or it cannot be read."""
    try:
        data = _path(folder, rank).read_bytes()
        begun = decode(data[4 : 4 + int.from_bytes(data[:4], "little")])
    except (OSError, ValueError, IndexError):
        return None
    return begun if isinstance(begun, StepBegun) else None


def _path(folder: Path, rank: int) -> Path:
    return folder / f"begun-{rank}"
