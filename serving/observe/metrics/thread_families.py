"""CPU threads that compute, where their number follows what other processes leave."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.stats import ThreadStats


def thread_families(make: Families, t: ThreadStats | None) -> Iterator[Metric]:
    if t is None:
        return
    yield make.gauge("cpu_threads", "CPU threads that compute; fewer while other processes keep the cores busy",
                     t.num_threads)
    yield make.gauge("cpu_threads_max", "CPU threads that compute when the cores are free", t.max_threads)
    yield make.counter("cpu_threads_lowered", "How often there was not a core for every thread", t.lowered_total)
