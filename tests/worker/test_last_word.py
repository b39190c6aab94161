"""What a rank has begun is known after its end, also where its socket had not sent it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xllm.errors import WorkerError
from xllm.worker.gather import compare_begun
from xllm.worker.last_word import LastWord, last_word
from xllm.worker.messages import StepBegun

BEGUN = StepBegun(5, 2, 9, "decode", 7)
ENDS = """
import os, sys
from pathlib import Path
from xllm.worker.last_word import LastWord
from xllm.worker.messages import StepBegun
word = LastWord(Path(sys.argv[1]), 1)
word.put(StepBegun(4, 200, 900, "a longer key of a graph", 2**32 - 1))
word.put(StepBegun(5, 3, 9, "decode", 7))
os.abort()
"""


def test_it_outlives_a_process_that_was_aborted(tmp_path: Path) -> None:
    LastWord(tmp_path, 0).put(BEGUN)
    ended = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], stderr=subprocess.DEVNULL, timeout=60)
    assert ended.returncode == -signal.SIGABRT
    words = {rank: word for rank in range(2) if (word := last_word(tmp_path, rank)) is not None}
    assert words == {0: BEGUN, 1: StepBegun(5, 3, 9, "decode", 7)}
    with pytest.raises(WorkerError, match=r"rank 1 has begun step 5 with other num_rows \(3\) than rank 0 \(2\)"):
        compare_begun(words)


@pytest.mark.parametrize("data", [b"", b"\x05\0\0\0", b"\x05\0\0\0\xff\xff\xff\xff\xff", bytes(range(64))])
def test_what_cannot_be_read_is_nothing(tmp_path: Path, data: bytes) -> None:
    LastWord(tmp_path, 0).put(BEGUN)
    (tmp_path / "begun-0").write_bytes(data)
    assert last_word(tmp_path, 0) is None
    assert last_word(tmp_path, 1) is None
