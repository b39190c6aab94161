"""`Families`: Prometheus families with one prefix and the two labels that all of them have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from xllm.engine.step_log import Buckets

LABELS = ("model_name", "engine")


def joined(parts: Iterable[Iterable[Metric]]) -> Iterator[Metric]:
    """Families of the same name as one with the series of all of them."""
    found: dict[str, Metric] = {}
    for metric in chain.from_iterable(parts):
        if (first := found.setdefault(metric.name, metric)) is not metric:
            first.samples += metric.samples
    yield from found.values()


@dataclass(frozen=True)
class Families:
    """Makes the metric families of one scrape. values: of `LABELS`, which all families have."""

    prefix: str
    values: tuple[str, str]

    def gauge(self, name: str, text: str, value: float) -> Metric:
        """A gauge of one series. text: its help."""
        return self._made(GaugeMetricFamily, name, text, (), [((), value)])

    def counter(self, name: str, text: str, value: float) -> Metric:
        """`_total` is added to the name where it is written."""
        return self._made(CounterMetricFamily, name, text, (), [((), value)])

    def gauge_by(self, label: str, name: str, text: str, values: Mapping[str, float]) -> Metric:
        """One series for each value of `label`."""
        return self._made(GaugeMetricFamily, name, text, (label,), [((key,), v) for key, v in values.items()])

    def counter_by(self, label: str, name: str, text: str, values: Mapping[str, float]) -> Metric:
        """A counter with one series for each value of `label`."""
        return self._made(CounterMetricFamily, name, text, (label,), [((key,), v) for key, v in values.items()])

    def counter_by_all(self, labels: tuple[str, ...], name: str, text: str,
                       values: Mapping[tuple[str, ...], float]) -> Metric:
        """A counter with one series for each tuple of values of `labels`."""
        return self._made(CounterMetricFamily, name, text, labels, values.items())

    def info(self, name: str, text: str, facts: Mapping[str, str], value: float = 1.0) -> Metric:
        """Facts that are no numbers, as the labels of one series."""
        return self._made(GaugeMetricFamily, name, text, tuple(facts), [(tuple(facts.values()), value)])

    def histogram(self, name: str, text: str, buckets: Buckets, bounds: tuple[float, ...]) -> Metric:
        """A histogram. buckets: counts that are not cumulative (`step_log.Buckets`); they are added up here, as
        Prometheus has them. bounds: the upper bounds, one fewer than there are counts."""
        total, cumulated = 0, []
        for bound, count in zip((*map(str, bounds), "+Inf"), buckets.counts, strict=True):
            total += count
            cumulated.append((bound, total))
        family = HistogramMetricFamily(f"{self.prefix}:{name}", text, labels=LABELS)
        family.add_metric(self.values, cumulated, buckets.sum)
        return family

    def _made(self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, text: str,
              labels: tuple[str, ...], series: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
        family = kind(f"{self.prefix}:{name}", text, labels=(*LABELS, *labels))
        for more, value in series:
            family.add_metric((*self.values, *more), value)
        return family
