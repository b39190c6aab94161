"""Every query of the dashboard against the `/metrics` of a real server: names, labels, and how they are used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.server_process import ROOT, ServerProcess

DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "xllm.json").read_text())
VARIABLES = {item["name"] for item in DASHBOARD["templating"]["list"]}
SELECTOR = re.compile(r"\b((?:xllm|vllm):\w+)(?:\{([^}]*)\})?(\[[^\]]*\])?")
LABEL = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"[^"]*"')
GROUPING = re.compile(r"\bby \(([^)]*)\)")
LEGEND = re.compile(r"\{\{(\w+)\}\}")
FUNCTIONS = {"sum", "max", "min", "rate", "histogram_quantile", "by", "bool"}


def queries() -> Iterator[tuple[str, dict]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']}-{target['refId']}", target


QUERIES = dict(queries())


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Metric]:
    """Of a server that has everything switched on and has worked."""
    folder = tmp_path_factory.mktemp("grafana")
    flags = ("--graph-mode", "checked", "--host-cache-size", "8MiB", "--disk-cache-size", "64MiB", "--disk-cache-dir",
             str(folder / "kv"), "--speculative-method", "ngram", "--enable-lora")
    with ServerProcess(folder / "log.txt", *flags) as server:
        server.http.post("/v1/completions", json={"prompt": "def f():" * 20, "max_tokens": 200, "ignore_eos": True})
        server.wait_idle()
        return list(text_string_to_metric_families(server.http.get("/metrics").text))


@pytest.fixture(scope="module")
def series(families: list[Metric]) -> dict[str, tuple[str, set[str]]]:
    """Sample name -> (type of its family, labels)."""
    found: dict[str, tuple[str, set[str]]] = {}
    for family in families:
        for sample in family.samples:
            found[sample.name] = (family.type, set(sample.labels) | found.get(sample.name, ("", set()))[1])
    return found


def test_there_are_queries() -> None:
    assert len(QUERIES) > 50
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_names_and_labels_exist(query: dict, series: dict[str, tuple[str, set[str]]]) -> None:
    expr = query["expr"]
    used = list(SELECTOR.finditer(expr))
    assert used, expr
    common: set[str] | None = None
    for match in used:
        name, selector, window = match.groups()
        assert name in series, f"{name} is not in /metrics"
        kind, labels = series[name]
        named = set(LABEL.findall(selector or ""))
        assert named and named <= labels, f"{name} has no label {named - labels}"
        assert bool(window) == (kind in ("counter", "histogram")), f"{name} is a {kind}: {expr}"
        common = labels if common is None else common & labels
    assert common is not None
    for grouping in GROUPING.findall(expr):
        assert {label.strip() for label in grouping.split(",")} <= common, expr
    by = {label.strip() for grouping in GROUPING.findall(expr) for label in grouping.split(",")}
    assert set(LEGEND.findall(query["legendFormat"])) <= by, "a legend of a label that the query sums over"
    if "histogram_quantile" in expr:
        assert "le" in by and all(match[1].endswith("_bucket") for match in used)
    bare = SELECTOR.sub("", GROUPING.sub("", expr))
    assert set(re.findall(r"[a-z_]+", bare)) <= FUNCTIONS
    assert expr.count("(") == expr.count(")")
    assert set(re.findall(r"\$(\w+)", expr)) <= VARIABLES | {"__rate_interval"}


def test_variables_are_asked_for_by_names_that_exist(series: dict[str, tuple[str, set[str]]]) -> None:
    for item in DASHBOARD["templating"]["list"]:
        if item["type"] == "query":
            name, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", item["query"]).groups()
            assert label in series[name][1] and item["name"] == label


def test_vllm_dashboards_find_the_same_under_its_names(series: dict[str, tuple[str, set[str]]]) -> None:
    own = {name.partition(":")[2] for name in series if name.startswith("xllm:")}
    assert own == {name.partition(":")[2] for name in series if name.startswith("vllm:")}
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
                 "request_inference_time_seconds", "e2e_request_latency_seconds", "time_to_first_token_seconds",
                 "inter_token_latency_seconds", "request_time_per_output_token_seconds", "iteration_tokens_total",
                 "request_prompt_tokens", "request_generation_tokens", "request_params_n", "request_params_max_tokens",
                 "request_max_num_generation_tokens", "request_prefill_kv_computed_tokens"):
        assert series[f"vllm:{name}_bucket"][0] == "histogram"
    for name in ("prompt_tokens", "prompt_tokens_cached", "prompt_tokens_by_source", "generation_tokens",
                 "request_success", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits",
                 "admission_rejections", "external_prefix_cache_queries", "external_prefix_cache_hits",
                 "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
                 "spec_decode_num_accepted_tokens_per_pos"):
        assert series[f"vllm:{name}_total"][0] == "counter"
    for name, labels in (("lora_requests_info", {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}),
                         ("engine_sleep_state", {"sleep_state"}), ("cache_config_info", {"block_size"})):
        assert series[f"vllm:{name}"][0] == "gauge" and labels <= series[f"vllm:{name}"][1]


def test_the_page_names_what_exists(families: list[Metric]) -> None:
    """What docs/observability.md says of metrics: families, labels and their values."""
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    titles = ("Metrics\n", "Overload and faults\n")
    sections = [section for section in page.split("\n## ") if section.startswith(titles)]
    named = {word for section in sections for code in re.findall(r"`([^`\n]+)`", section)
             for word in re.findall(r"(?<![\w:-])[a-z][a-z0-9]*_\w+", code)}
    samples = [sample for family in families for sample in family.samples]
    known = {family.name.partition(":")[2] for family in families} | {
        word for sample in samples for pair in sample.labels.items() for word in pair}
    assert len(sections) == 2 and len(named) > 30
    assert named <= known


def test_the_file_is_what_the_tool_writes() -> None:
    done = subprocess.run([sys.executable, "tools/gen_grafana.py", "--check"], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


