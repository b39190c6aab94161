"""What the feature matrix does with the engines behind an `LLM`."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tests.engine.paired_core import PairedCore
from xllm import LLM
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore


@contextlib.contextmanager
def split(llm: LLM, settings: Mapping[str, Any]) -> Iterator[None]:
    """Have another engine, with the same settings, go on with what this one has begun."""
    with tempfile.TemporaryDirectory() as folder:
        if "disk_cache_dir" in settings:
            settings = {**settings, "disk_cache_dir": folder}
        first, second = llm._core, EngineCore(EngineConfig.from_flat(**settings))
        llm._core = llm._engine.core = PairedCore(first, second)
        try:
            yield
        finally:
            llm._core = llm._engine.core = first
            second.shutdown()


def settle(llm: LLM) -> None:
    """Let the moves between the tiers end."""
    for core in getattr(llm._core, "cores", (llm._core,)):
        while len(core.scheduler.kv.source.moves):
            time.sleep(0.001)
            core.tick()


def hear_from_ranks(llm: LLM) -> None:
    """What a rank counts comes with its signs of life; the next may be from before the last step."""
    for _ in range(2):
        heard = llm._core.link.stats()
        while llm._core.link.stats() is heard:
            time.sleep(0.01)
            llm._core.tick()


def leave_only_the_lower_tiers(llm: LLM, *, keep_host: bool) -> None:
    """The next request finds nothing on the device: only in host memory, or only on disk."""
    settle(llm)
    for core in getattr(llm._core, "cores", (llm._core,)):
        kv = core.scheduler.kv
        kv.pool.drop_cached()
        if not keep_host:
            kv.source.clear()
        kv.check_integrity()
