"""Adapters, as autoscalers and gateways for vLLM read them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from serving.observe.request_log import RequestRecord
from xllm.config import LoraSettings


def lora_families(make: Families, settings: LoraSettings, requests: Iterable[RequestRecord]) -> Iterator[Metric]:
    """One series whose value is the present, in Unix seconds: readers take the newest of those that they find.

    requests: the open ones. No family without adapters.
    """
    if not settings.is_on:
        return
    running: set[str] = set()
    waiting: set[str] = set()
    for record in requests:
        if record.adapter:
            (waiting if record.scheduled_s is None else running).add(record.adapter)
    yield make.info("lora_requests_info", "Adapters of open requests, as labels; the value is the time", {
        "max_lora": str(settings.max_loras), "running_lora_adapters": ",".join(sorted(running)),
        "waiting_lora_adapters": ",".join(sorted(waiting))}, time.time())
