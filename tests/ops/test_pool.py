"""The pool of threads of the compiled operators: every item once, and no hang, whatever the callers do."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import pytest
import torch

from backends.cpu.build import load_kernels
from xllm import env

RANGE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
LIMIT_S = 60

FORKS = """
import ctypes, os, sys, threading, time
from backends.cpu.build import load_kernels
from xllm import env
RANGE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
share_out = load_kernels(env.cache_dir()).xllm_share_out
share_out.argtypes, share_out.restype = [RANGE, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int], None
def total(num_threads):
    parts = []
    share_out(RANGE(lambda context, begin, end: parts.append(sum(range(begin, end)))), None, 100, 3, num_threads)
    return sum(parts)
assert total(3) == 4950
inside, go_on = threading.Event(), threading.Event()
def wait_inside(context, begin, end):
    inside.set()
    go_on.wait()
callback = RANGE(wait_inside)
holder = threading.Thread(target=share_out, args=(callback, None, 8, 1, 3))
for is_taken in (False, True):  # by another thread, which the child does not have
    if is_taken:
        holder.start()
        inside.wait()
    child = os.fork()
    if not child:
        os._exit(0 if [total(3) for _ in range(50)] == [4950] * 50 else 1)
    assert os.waitpid(child, 0)[1] == 0
go_on.set()
holder.join()
assert total(3) == 4950
"""


@pytest.fixture(scope="module")
def library() -> Any:
    found = load_kernels(env.cache_dir())
    if found is None:
        pytest.skip("no C compiler here")
    found.xllm_share_out.restype = None
    found.xllm_share_out.argtypes = [RANGE, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    return found


def within_limit(*works: Any) -> None:
    """Run each in a thread of its own."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "the pool hangs"


@pytest.mark.parametrize(("n", "chunk", "num_threads"), [(0, 1, 2), (1, 1, 4), (7, 1, 2), (100, 7, 3), (100, 200, 3),
                                                         (9, 2, 0), (5, 1, 300)])
def test_every_item_is_done_once(library: Any, n: int, chunk: int, num_threads: int) -> None:
    done: list[int] = []
    work = RANGE(lambda context, begin, end: done.extend(range(begin, end)))
    within_limit(lambda: library.xllm_share_out(work, None, n, chunk, num_threads))
    assert sorted(done) == list(range(n))


def test_many_short_jobs_at_changing_numbers_of_threads(library: Any) -> None:
    rows, vocab = 8, 9000
    logits = torch.randn(rows, vocab)
    expected, ids = logits.argmax(dim=1), torch.empty(rows, dtype=torch.int64)
    argmax = library.xllm_argmax
    argmax.restype, argmax.argtypes = None, [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_int]
    wrong: list[int] = []

    def run() -> None:
        for turn in range(5000):
            ids.fill_(-1)
            argmax(logits.data_ptr(), ids.data_ptr(), rows, vocab, turn % 4 + 1)
            if not torch.equal(ids, expected):
                wrong.append(turn)

    within_limit(run)
    assert not wrong


def test_nested_use_and_several_callers(library: Any) -> None:
    """Whoever does not get the pool does his range alone; a part that shares out again does, too."""
    done: Counter[tuple[str, int, int]] = Counter()

    def caller(name: str) -> Any:
        def outer(context: object, begin: int, end: int) -> None:
            for i in range(begin, end):
                inner = RANGE(lambda context, a, b, i=i: done.update((name, i, j) for j in range(a, b)))
                library.xllm_share_out(inner, None, 5, 1, 3)

        def run() -> None:
            for _ in range(20):
                library.xllm_share_out(RANGE(outer), None, 6, 1, 3)

        return run

    within_limit(caller("a"), caller("b"), caller("c"))
    assert done == Counter({(name, i, j): 20 for name in "abc" for i in range(6) for j in range(5)})


def test_an_exception_in_a_part_leaves_the_pool_usable(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: raised.append(hook.exc_type))

    def fails(context: object, begin: int, end: int) -> None:
        raise ValueError(begin)

    within_limit(lambda: library.xllm_share_out(RANGE(fails), None, 8, 1, 3))
    assert raised == [ValueError] * 8
    test_every_item_is_done_once(library, 100, 7, 3)


def test_a_forked_child_has_a_pool_of_its_own(library: Any) -> None:
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=LIMIT_S)
