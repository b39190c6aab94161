"""`Histogram`: a histogram that the HTTP process fills itself."""

from __future__ import annotations

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.engine.step_log import Buckets


class Histogram:
    """Counts per bucket. Not thread-safe; the event loop owns it."""

    def __init__(self, help: str, bounds: tuple[float, ...]):
        self.help, self.bounds = help, bounds
        self._buckets = Buckets([0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        self._buckets.observe(value, self.bounds)

    @property
    def count(self) -> int:
        return sum(self._buckets.counts)

    def family(self, make: Families, name: str) -> Metric:
        return make.histogram(name, self.help, self._buckets, self.bounds)
