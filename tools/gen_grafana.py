"""Write docs/grafana/xllm.json, the Grafana dashboard; with --check say whether it is stale.

`tests/serving/test_grafana.py` holds each of its queries against the `/metrics` of a real server.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "docs" / "grafana" / "xllm.json"
PICK = 'model_name=~"$model_name",engine=~"$engine"'
WINDOW = "$__rate_interval"
COLUMNS = 24
Query = tuple[str, str]  # PromQL, legend


def metric(name: str, *more: str) -> str:
    return f"xllm:{name}{{{','.join((PICK, *more))}}}"


def rate(name: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric(name)}[{WINDOW}]))"


def quantiles(name: str, *shares: float) -> list[Query]:
    return [(f"histogram_quantile({share}, sum by (le) (rate({metric(name + '_bucket')}[{WINDOW}])))",
             f"p{share * 100:g}") for share in shares]


def mean(name: str) -> str:
    return f"{rate(name + '_sum')} / {rate(name + '_count')}"


def share(part: str, whole: str) -> str:
    return f"{rate(part)} / {rate(whole)}"


# Title, queries, unit, description; a row per list. Stats are one number, the others are curves.
STATS: list[tuple[str, str, str, str]] = [
    ("Generated", rate("generation_tokens_total"), "short", "Tokens per second"),
    ("Running", f"sum({metric('num_requests_running')})", "short", "Sequences that run"),
    ("Waiting", f"sum({metric('num_requests_waiting')})", "short", "Sequences in the queue"),
    ("TTFT p95", quantiles("time_to_first_token_seconds", 0.95)[0][0], "s", "Arrival to first token"),
    ("ITL p95", quantiles("inter_token_latency_seconds", 0.95)[0][0], "s", "Between two tokens of a request"),
    ("KV cache", f"max({metric('kv_cache_usage_perc')})", "percentunit", "Share of the device's KV blocks in use"),
    ("Prefix hits", share("prefix_cache_hits_total", "prefix_cache_queries_total"), "percentunit",
     "Share of the tokens looked up that were found"),
    ("Engine", f"min({metric('engine_up')})", "short", "1 while the engine lives"),
]
ROWS: list[tuple[str, list[tuple[str, list[Query], str, str]]]] = [
    ("Throughput", [
        ("Tokens per second", [(rate("generation_tokens_total"), "generated"), (rate("prompt_tokens_total"), "prompt"),
                               (rate("prompt_tokens_cached_total"), "prompt, cached")], "short", ""),
        ("Requests per second", [(rate("request_success_total", "finished_reason"), "{{finished_reason}}"),
                                 (rate("admission_rejections_total", "reason"), "turned away: {{reason}}")], "reqps",
         "By how they ended, or why they did not begin"),
        ("Sequences", [(f"sum({metric('num_requests_running')})", "running"),
                       (f"sum by (reason) ({metric('num_requests_waiting_by_reason')})", "waiting: {{reason}}")],
         "short", ""),
    ]),
    ("Latency", [
        ("Time to first token", quantiles("time_to_first_token_seconds", 0.5, 0.95, 0.99), "s", ""),
        ("Inter-token latency", quantiles("inter_token_latency_seconds", 0.5, 0.95, 0.99), "s", ""),
        ("End to end", quantiles("e2e_request_latency_seconds", 0.5, 0.95, 0.99), "s", ""),
        ("Where the time goes, mean", [(mean(f"request_{phase}_time_seconds"), phase)
                                       for phase in ("queue", "prefill", "decode")], "s", "Mean seconds a request"),
        ("Queue", quantiles("request_queue_time_seconds", 0.5, 0.95, 0.99), "s", ""),
        ("Time per output token", quantiles("request_time_per_output_token_seconds", 0.5, 0.95, 0.99), "s",
         "Of whole requests"),
    ]),
    ("KV store", [
        ("Blocks in use, by tier", [(f"sum by (tier) ({metric('kv_tier_used_blocks')}) / "
                                     f"sum by (tier) ({metric('kv_tier_blocks')})", "{{tier}}"),
                                    (f"max({metric('kv_cache_usage_perc')})", "held by requests")], "percentunit",
         "Tiers: with host memory or disk below the device only"),
        ("Tokens found, by tier", [(rate("kv_tier_hit_tokens_total", "tier"), "{{tier}}")], "short",
         "l1, l2: device, l3: host memory, l4: disk, l5: shared store; tokens per second"),
        ("Prompt tokens, by source", [(rate("prompt_tokens_by_source_total", "source"), "{{source}}")], "short", ""),
        ("Moves between tiers", [(rate("kv_lane_bytes_total", "lane"), "{{lane}}")], "Bps", ""),
        ("Evictions", [(rate("kv_tier_evicted_blocks_total", "tier"), "{{tier}}"),
                       (rate("kv_tier_unsaved_blocks_total", "tier"), "{{tier}}, not copied down before")], "short",
         "Blocks per second"),
        ("Preemptions", [(rate("num_preemptions_total"), "preemptions"), (rate("num_swaps_total"), "of them swapped")],
         "short", "Per second; many mean that the KV cache is too small for the load"),
    ]),
    ("Steps", [
        ("Step duration", quantiles("engine_step_duration_seconds", 0.5, 0.95, 0.99), "s", ""),
        ("Step duration, predicted", [(f"max({metric('step_time_seconds')})", "last step"),
                                      (f"max({metric('step_time_predicted_seconds')})", "predicted")], "s",
         "The last step, and what the cost model says of one like it"),
        ("Cost model error", [(f"max by (quantile) ({metric('step_cost_error_ratio')})", "quantile {{quantile}}")],
         "percentunit", "How far predictions were off the last 256 steps, each made before the step was learnt"),
        ("Tokens per step", [*quantiles("iteration_tokens_total", 0.5, 0.95), (mean("iteration_tokens_total"), "mean")],
         "short", ""),
        ("Graphs: replays and eager steps", [(rate("graph_replays_total", "kind"), "replay: {{kind}}"),
                                             (rate("graph_fallbacks_total", "reason"), "eager: {{reason}}")], "short",
         "Steps per second, on devices with a graph mode"),
        ("CPU threads", [(f"sum({metric('cpu_threads')})", "compute"),
                         (f"sum({metric('cpu_threads_max')})", "at most")], "short",
         "Fewer while other processes keep the cores busy"),
        ("Graph cache", [(f"sum({metric('graphs')})", "graphs"),
                         (rate("graph_changes_total", "change"), "{{change}} per second")], "short", ""),
        ("Drafts accepted", [(share("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total"),
                              "accepted")], "percentunit", "Speculative decoding"),
        ("Drafts accepted, by position", [(rate("spec_decode_num_accepted_tokens_per_pos_total", "position"),
                                           "{{position}}")], "short",
         "Tokens per second; where it falls off, longer drafts are wasted"),
        ("Sequences, by engine", [(f"sum by (engine) ({metric('num_requests_running')})", "running: {{engine}}"),
                                  (f"sum by (engine) ({metric('num_requests_waiting')})", "waiting: {{engine}}")],
         "short", "Of a server with --data-parallel-size"),
        ("Tokens found, by engine", [(f"sum by (engine) (rate({metric('prefix_cache_hits_total')}[{WINDOW}])) / "
                                      f"sum by (engine) (rate({metric('prefix_cache_queries_total')}[{WINDOW}]))",
                                      "{{engine}}")], "percentunit", "Share of the tokens looked up"),
        ("Engines up", [(f"max by (engine) ({metric('engine_up')})", "{{engine}}")], "short",
         "1 while it takes requests"),
        ("Silence", [(f"max({metric('engine_silent_seconds')})", "since the last progress"),
                     (f"max({metric('oldest_waiting_seconds')})", "oldest in the queue")], "s",
         "A stuck engine shows here first"),
    ]),
    ("Requests", [
        ("Prompt length", quantiles("request_prompt_tokens", 0.5, 0.95), "short", "Tokens"),
        ("Output length", quantiles("request_generation_tokens", 0.5, 0.95), "short", "Tokens"),
        ("Prompt tokens computed", quantiles("request_prefill_kv_computed_tokens", 0.5, 0.95), "short",
         "What no cache had, per request"),
    ]),
    ("Callers and state", [
        ("Turned away", [(rate("admission_rejections_total", "reason, key_class"), "{{reason}}, {{key_class}}")],
         "reqps", "By reason and by class of key: quota (429), queue_full, overload, unavailable (503)"),
        ("Sleep state", [(f"max by (sleep_state) ({metric('engine_sleep_state')})", "{{sleep_state}}")], "short",
         "1: the state that the engine is in"),
        ("Adapters", [(f"max by (running_lora_adapters) ({metric('lora_requests_info')}) > bool 0",
                       "running: {{running_lora_adapters}}"),
                      (f"max by (waiting_lora_adapters) ({metric('lora_requests_info')}) > bool 0",
                       "waiting: {{waiting_lora_adapters}}")], "short", "LoRA adapters of open requests"),
    ]),
]


class Layout:
    """Places panels on Grafana's grid of 24 columns, left to right."""

    def __init__(self) -> None:
        self.panels: list[dict[str, Any]] = []
        self._x = self._y = self._row_height = 0

    def add(self, width: int, height: int, **panel: Any) -> None:
        if self._x + width > COLUMNS:
            self.end_row()
        place = {"x": self._x, "y": self._y, "w": width, "h": height}
        self.panels.append({"id": len(self.panels) + 1, "gridPos": place, **panel})
        self._x += width
        self._row_height = max(self._row_height, height)

    def end_row(self) -> None:
        self._x, self._y, self._row_height = 0, self._y + self._row_height, 0


SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panel(kind: str, title: str, queries: list[Query], unit: str, description: str) -> dict[str, Any]:
    targets = [{"refId": chr(65 + index), "expr": expr, "legendFormat": legend, "datasource": SOURCE}
               for index, (expr, legend) in enumerate(queries)]
    return {"type": kind, "title": title, "description": description, "datasource": SOURCE, "targets": targets,
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []}}


def variable(name: str, label: str, source: str) -> dict[str, Any]:
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE, "query": source, "refresh": 2,
            "multi": True, "includeAll": True, "current": {"text": "All", "value": "$__all"}}


def dashboard() -> dict[str, Any]:
    layout = Layout()
    for title, expr, unit, description in STATS:
        layout.add(COLUMNS // len(STATS), 4, **panel("stat", title, [(expr, title)], unit, description))
    for title, panels in ROWS:
        layout.end_row()
        layout.add(COLUMNS, 1, type="row", title=title, collapsed=False, panels=[])
        layout.end_row()
        for each in panels:
            layout.add(COLUMNS // 3, 8, **panel("timeseries", *each))
    return {
        "title": "xLLM", "uid": "xllm-engine", "schemaVersion": 39, "version": 1, "editable": True,
        "tags": ["llm", "xllm"], "refresh": "10s", "time": {"from": "now-30m", "to": "now"}, "timezone": "browser",
        "graphTooltip": 1,
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
            variable("model_name", "Model", "label_values(xllm:num_requests_running, model_name)"),
            variable("engine", "Engine", "label_values(xllm:num_requests_running, engine)"),
        ]},
        "panels": layout.panels,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is stale")
    text = json.dumps(dashboard(), indent=1) + "\n"
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.name} is stale: run python tools/gen_grafana.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
