"""Streams with one owner each, though torch_npu hands them out from a ring."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from backends.npu_graphs import NpuCapturer
from backends.streams import RING_SIZE, CopyStreams, own_stream
from tests.npu.device import npu


def in_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def streams_of(capturer: NpuCapturer) -> set[int]:
    return {capturer._stream.npu_stream, capturer._update_stream.npu_stream}


def test_the_wheel_hands_out_a_ring() -> None:
    """Otherwise the tests below prove nothing."""
    made = [torch.npu.Stream(npu().device).npu_stream for _ in range(2 * RING_SIZE)]
    assert len(set(made)) == RING_SIZE and made[:RING_SIZE] == made[RING_SIZE:]


def test_no_thread_copies_on_the_stream_that_captures() -> None:
    copies, found = CopyStreams(torch.npu, npu().device), []
    for _ in range(2 * RING_SIZE):  # one after another: each gives its stream back
        in_a_thread(lambda: found.append(copies.current().npu_stream))
    capturer = npu().capturer
    assert isinstance(capturer, NpuCapturer) and len(streams_of(capturer)) == 2
    assert not streams_of(capturer) & set(found)
    assert len(set(found)) > RING_SIZE // 2


def test_no_capturer_takes_the_stream_of_a_copy() -> None:
    copies = CopyStreams(torch.npu, npu().device)
    copied = copies.current().npu_stream
    for _ in range(RING_SIZE):
        assert copied not in streams_of(NpuCapturer(npu().device))
    assert copies.current().npu_stream == copied


def test_threads_that_copy_at_once_have_streams_of_their_own() -> None:
    copies, found = CopyStreams(torch.npu, npu().device), []
    together = threading.Barrier(4)

    def copy() -> None:
        stream = copies.current()
        for _ in range(RING_SIZE - 1):  # whoever asks next would get the same
            torch.npu.Stream(npu().device)
        found.append(stream.npu_stream)
        together.wait(timeout=10)

    threads = [threading.Thread(target=copy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 4


def test_more_owners_than_streams_share() -> None:
    owned = [own_stream(torch.npu, npu().device) for _ in range(RING_SIZE + 1)]
    assert len({stream.npu_stream for stream in owned}) < len(owned)
