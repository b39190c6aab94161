"""`xllm top`: what a running server does, live in a terminal. It follows `/v1/stats/stream`."""

from __future__ import annotations

import argparse
import http.client
import json
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from serving.commands.cluster_table import cluster_head, cluster_table
from xllm.errors import ConfigError, EngineDeadError

BLOCKS = " ▁▂▃▄▅▆▇█"
SPARK_CHARS = 40  # the width of a curve
GAUGE_CHARS = 46  # of name, figure and unit beside a curve, with gaps
RATE_WINDOW_S = 2.0  # over which rates are averaged. Chosen: steady enough to read
MAX_SAMPLES = 240  # as `observe/engine_history.py` keeps: two minutes
MAX_STEPS = 4096  # steps that are kept; more than the screen shows
BAR_CHARS = 24  # the width of a bar
LANE_CHARS = 32  # the width of a request's bar on a wide screen
MIN_LANE_CHARS = 4  # the least width at which that bar still says something
FRAME_CHARS, PADDING_CHARS = 4, 2  # of the panel, and of each column in it
COLUMNS = {"#": 5, "kind": 10, "prompt": 6, "cached": 6, "output": 6, "time": LANE_CHARS, "ms": 7, "tok/s": 6, "end": 8}
# Of each wait for the server, on top of the interval at which it speaks. Chosen: a server that is silent for longer is
# taken for gone.
TIMEOUT_S = 10.0
Row = list[float]


class View:
    """Takes snapshots of `/v1/stats` in, in their order, and makes what is shown."""

    def __init__(self, url: str):
        self._url = url
        self._rows: deque[Row] = deque(maxlen=MAX_SAMPLES)
        self._steps: deque[Row] = deque(maxlen=MAX_STEPS)
        self._stats: dict[str, Any] = {}
        self._place: dict[str, int] = {}
        self._cluster: dict[str, Any] | None = None

    def take(self, stats: dict[str, Any], cluster: dict[str, Any] | None = None) -> None:
        """cluster: what `/cluster` says; None: the server is no master, or does not tell this key."""
        self._stats, self._cluster = stats, cluster
        self._place = {name: index for index, name in enumerate(stats["history"]["columns"])}
        self._rows.extend(stats["history"]["rows"])
        self._steps.extend(stats["steps"]["rows"])

    @property
    def num_cluster_lines(self) -> int:
        """Lines of the screen that the instances take."""
        return 0 if self._cluster is None else 4 + len(self._cluster["members"])

    def rates(self, name: str) -> list[float]:
        """Change per second of a total, at each sample, over the last `RATE_WINDOW_S`."""
        rows, column, found, start = list(self._rows), self._place[name], [], 0
        for end in range(1, len(rows)):
            while rows[end][0] - rows[start][0] > RATE_WINDOW_S and start < end - 1:
                start += 1
            seconds = max(rows[end][0] - rows[start][0], 1e-3)
            found.append(max(0.0, (rows[end][column] - rows[start][column]) / seconds))
        return found

    def gauge(self, name: str) -> list[float]:
        return [row[self._place[name]] for row in self._rows]

    def render(self, num_requests: int = 12, width: int = 80) -> Group:
        """The whole screen, `width` characters wide. After the first `take`."""
        parts: list[RenderableType] = [self._head(), self._gauges(width), self._tiers()]
        if self._cluster is not None:
            parts += [Text(""), cluster_head(self._cluster), cluster_table(self._cluster["members"]), Text("")]
        return Group(*parts, self._requests(num_requests, width))

    def _head(self) -> Text:
        server = self._stats["server"]
        style = "green" if server["ok"] else "red"
        head = Text.assemble(("xLLM ", "bold"), f"{server.get('model') or '-'}  ", (server["status"], style),
                             f"  {self._url}", overflow="ellipsis", no_wrap=True)
        if self._stats["scope"] == "own":
            head.append("  this key's own requests only", "yellow")
        if server["reason"]:
            head.append(f"  {server['reason']}", style)
        return head

    def _gauges(self, width: int) -> Table:
        engine, server = self._stats["engine"], self._stats["server"]
        queries = engine["prefix_cache_queries"]
        hit = 100 * engine["prefix_cache_hits"] / queries if queries else 0.0
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "right", "left", "left"):
            table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
        generated, prompt = self.rates("generation_tokens"), self.rates("prompt_tokens")
        waited = f"oldest {engine['oldest_waiting_seconds']:.1f} s" if engine["num_requests_waiting"] else ""
        rows: list[tuple[str, str, str, list[float]]] = [
            ("generated", _figure(generated[-1] if generated else 0.0), "tokens/s", generated),
            ("prompt", _figure(prompt[-1] if prompt else 0.0), "tokens/s", prompt),
            ("running", str(engine["num_requests_running"]), f"of {server.get('max_num_seqs', '-')}",
             self.gauge("num_requests_running")),
            ("waiting", str(engine["num_requests_waiting"]), waited, self.gauge("num_requests_waiting")),
            ("prefix hits", f"{hit:.1f}", "% of prompt", []),
            ("step", *self._step_figures()),
        ]
        if (threads := engine["threads"]) is not None:
            busy = "" if threads["num_threads"] == threads["max_threads"] else ", others use the cores"
            rows.append(("threads", str(threads["num_threads"]), f"of {threads['max_threads']}{busy}", []))
        if error := engine["step_cost_error"]:
            rows.append(("predicted", f"{100 * error['0.5']:.1f}", "% off, median step", []))
        engines = self._stats["engines"]
        for number, one in enumerate(engines if len(engines) > 1 else ()):
            rest = f"running, {one['num_requests_waiting']} waiting, KV {one['kv_cache_usage_perc']:.0%}"
            rows.append((f"engine {number}", str(one["num_requests_running"]) if one["is_up"] else "down",
                         rest if one["is_up"] else "", []))
        chars = max(1, min(SPARK_CHARS, width - GAUGE_CHARS))
        for name, value, unit, values in rows:
            table.add_row(Text(name, "dim"), Text(value, "bold"), Text(unit, "dim"),
                          Text(sparkline(values, chars), "blue"))
        return table

    def _step_figures(self) -> tuple[str, str, list[float]]:
        recent = [step for step in self._steps if step[0] > self._stats["now_s"] - 30.0]
        if not recent:
            return "-", "ms", []
        times_ms = sorted(1000 * step[1] for step in recent)
        p99 = times_ms[min(len(times_ms) - 1, int(0.99 * len(times_ms)))]
        last = [1000 * step[1] for step in recent[-SPARK_CHARS:]]
        return _figure(times_ms[len(times_ms) // 2]), f"ms median, p99 {_figure(p99)}", last

    def _tiers(self) -> Table:
        engine = self._stats["engine"]
        table = Table.grid(padding=(0, 2))
        tiers = {name: (tier["num_used"], tier["num_blocks"]) for name, tier in engine["kv_tiers"].items()}
        blocks = engine["num_kv_blocks"]
        tiers = tiers or {"device": (round(engine["kv_cache_usage_perc"] * blocks), blocks)}
        for name, (used, total) in tiers.items():
            share = used / total if total else 0.0
            table.add_row(Text(f"KV {name}", "dim"), Text(bar(share), "blue"), f"{share:6.1%}",
                          Text(f"{used:,} of {total:,} blocks", "dim"))
        if found := [f"{name.upper()} {count:,}" for name, count in engine["cached_tokens_by_tier"].items() if count]:
            table.add_row(Text("found in", "dim"), "", "", Text(f"{', '.join(found)} tokens", "dim"))
        if (graphs := engine["graphs"]) is not None:
            replays, eager = sum(graphs["replays_total"].values()), sum(graphs["fallbacks_total"].values())
            table.add_row(Text("graphs", "dim"), f"{graphs['num_graphs']}", "",
                          Text(f"{replays:,} replays, {eager:,} eager, {graphs['num_bytes'] / 2**20:.1f} MiB", "dim"))
        return table

    def _requests(self, limit: int, width: int) -> Panel:
        table, columns = Table(box=None, padding=(0, 1)), columns_within(width)
        for name, chars in columns.items():
            table.add_column(name, justify="left" if name in ("kind", "time", "end") else "right", no_wrap=True,
                             header_style="dim", min_width=chars, overflow="crop" if name == "time" else "ellipsis")
        now, shown = self._stats["now_s"], self._stats["requests"][:limit]
        longest = max([(r["end_s"] or now) - r["arrival_s"] for r in shown], default=1.0)
        for request in shown:
            phases = phases_of(request, now)
            total = sum(phases)
            speed = (request["num_generation_tokens"] - 1) / phases[2] if phases[2] > 0 else 0.0
            state = request["finish_reason"] or ("decode" if request["first_token_s"] is not None else
                                                 "prefill" if request["scheduled_s"] is not None else "queued")
            cells = {"#": str(request["number"]), "kind": request["kind"], "prompt": str(request["num_prompt_tokens"]),
                     "cached": str(request["num_cached_tokens"]), "output": str(request["num_generation_tokens"]),
                     "time": lane(phases, longest, columns.get("time", 0)), "ms": f"{1000 * total:,.0f}",
                     "tok/s": _figure(speed) if speed > 0 else "",
                     "end": Text(state, "" if request["finish_reason"] else "green")}
            table.add_row(*(cells[name] for name in columns))
        title = Text.assemble("requests  ", ("█ ", "dim"), "queued ", ("█ ", "yellow"), "prefill ", ("█ ", "blue"),
                              "decode")
        return Panel(table if shown else Text("none yet", "dim"), title=title, title_align="left", border_style="dim")


def phases_of(request: dict[str, Any], now_s: float) -> tuple[float, float, float]:
    """Seconds in the queue, until the first token, and after it; 0 for what it has not reached."""
    end = request["end_s"] if request["end_s"] is not None else now_s
    scheduled = request["scheduled_s"] if request["scheduled_s"] is not None else end
    first = request["first_token_s"] if request["first_token_s"] is not None else end
    return max(0.0, scheduled - request["arrival_s"]), max(0.0, first - scheduled), max(0.0, end - first)


def columns_within(width: int) -> dict[str, int]:
    """The columns of the requests, with their characters, that fit into so many: the bars give way first."""
    columns = dict(COLUMNS)
    for name in ("time", "kind", "cached", "#"):
        spare = width - FRAME_CHARS - sum(chars + PADDING_CHARS for chars in columns.values())
        if spare >= 0:
            break
        if name == "time" and columns[name] + spare >= MIN_LANE_CHARS:
            columns[name] += spare
            break
        del columns[name]
    return columns


def lane(phases: tuple[float, float, float], longest_s: float, chars: int = LANE_CHARS) -> Text:
    text, done, drawn = Text(), 0.0, 0
    for seconds, style in zip(phases, ("dim", "yellow", "blue"), strict=True):
        done += seconds
        upto = round(chars * done / longest_s) if longest_s > 0 else 0
        text.append("█" * (upto - drawn), style)
        drawn = upto
    return text


def sparkline(values: list[float], chars: int = SPARK_CHARS) -> str:
    """The last `chars` values, the highest of them as a full block."""
    last = values[-chars:]
    highest = max(last, default=0.0)
    if highest <= 0:
        return BLOCKS[1] * len(last)
    return "".join(BLOCKS[max(1, round(8 * value / highest))] for value in last)


def bar(share: float) -> str:
    full = round(BAR_CHARS * min(1.0, max(0.0, share)))
    return "█" * full + "░" * (BAR_CHARS - full)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def follow(url: str, key: str | None, interval_ms: int) -> Iterator[dict[str, Any]]:
    """Snapshots as they come. Raises ConfigError for a server that refuses, EngineDeadError for none."""
    try:
        request = _request(f"{url}/v1/stats/stream?interval_ms={interval_ms}", key)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S + interval_ms / 1000) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
    except ValueError as error:
        raise ConfigError(f"url: {error}") from None
    except urllib.error.HTTPError as error:
        hint = "; --api-key gives one" if error.code == 401 else ""
        raise ConfigError(f"{url} answered {error.code} {error.reason}{hint}") from None
    except urllib.error.URLError as error:
        raise EngineDeadError(f"no answer from {url}: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise EngineDeadError(f"{url} stopped answering: {error or type(error).__name__}") from None


def cluster_of(url: str, key: str | None) -> dict[str, Any] | None:
    """What a cluster's master says of it now; None: the server is none, or does not tell this key, or does not answer
    in time."""
    try:
        with urllib.request.urlopen(_request(f"{url}/cluster", key), timeout=TIMEOUT_S) as response:
            found: dict[str, Any] = json.load(response)
            return found
    except (OSError, http.client.HTTPException, ValueError):  # urllib's errors are OSErrors
        return None


def _request(address: str, key: str | None) -> urllib.request.Request:
    return urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})


def run(flags: argparse.Namespace, console: Console | None = None) -> int:
    """Show until Ctrl-C, the end of the server, or with `--once` once. Returns the exit code."""
    if not 0.1 <= flags.interval <= 60:
        raise ConfigError(f"interval must be in 0.1 to 60 seconds, got {flags.interval}")
    console = console or Console()
    url = flags.url.rstrip("/").removesuffix("/v1")
    view, snapshots = View(url), follow(url, flags.api_key, round(1000 * flags.interval))
    if flags.once:
        view.take(next(snapshots), cluster_of(url, flags.api_key))
        console.print(view.render(width=console.width))
        return 0
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        is_master = cluster_of(url, flags.api_key) is not None
        for stats in snapshots:
            view.take(stats, cluster_of(url, flags.api_key) if is_master else None)
            num_rows = console.height - 16 - view.num_cluster_lines
            live.update(view.render(max(3, num_rows), console.width), refresh=True)
    console.print(f"{url} ended the stream at {time.strftime('%H:%M:%S')}")
    return 0
