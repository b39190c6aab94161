// The engine view: follows /v1/stats/stream while it can be seen.

import {ApiError, call, events} from "./api.js";
import {bytes, format, meter, Sparkline, StepChart} from "./charts.js";
import {byId, make, setText, svg} from "./dom.js";

const SPAN_S = 60;
const RATE_WINDOW_S = 2; // rates are means over this: the engine reports a few times a second
const INTERVAL_MS = 500;
const RETRY_MS = 2000;
const MAX_ROWS = 240;
const MAX_STEPS = 16384;
const MAX_SHOWN = 20;
const SPARKS = ["gen", "prompt", "running", "waiting", "kv", "hit"];
const SPARK_LABELS = ["Generated tokens per second", "Prompt tokens per second", "Running requests", "Waiting requests", "KV cache in use, percent", "Prefix hits, percent"];
const TIER_NAMES = {device: "Device", host: "Host memory", disk: "Disk"};
const GOOD_ENDS = new Set(["stop", "length", "tool_calls"]);

export class EngineView {
  constructor({notice, askKey}) {
    this.notice = notice;
    this.askKey = askKey;
    this.rows = [];
    this.steps = [];
    this.reading = null;
    this.visible = false;
    this.sparks = SPARKS.map((name, index) => new Sparkline(byId(`s-${name}`), SPARK_LABELS[index]));
    this.stepChart = new StepChart(byId("c-steps"));
    this.rowElements = new Map();
    document.addEventListener("visibilitychange", () => this.follow());
  }

  setVisible(visible) {
    this.visible = visible;
    this.follow();
  }

  restart() {
    this.reading?.abort();
    this.reading = null;
    this.follow();
  }

  /** Read the stream while somebody can see it, and only then. */
  follow() {
    const wanted = this.visible && !document.hidden;
    if (!wanted) {
      this.reading?.abort();
      this.reading = null;
    } else if (!this.reading) {
      this.reading = new AbortController();
      this.read(this.reading);
    }
  }

  async read(controller) {
    this.rows = [];
    this.steps = [];
    try {
      const response = await call(`v1/stats/stream?interval_ms=${INTERVAL_MS}`, {signal: controller.signal});
      for await (const stats of events(response)) this.show(stats);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error instanceof ApiError && error.status === 401) {
        this.notice("This server needs an API key.");
        return this.askKey();
      }
    }
    setTimeout(() => {
      if (this.reading === controller) {
        this.reading = null;
        this.follow();
      }
    }, RETRY_MS);
  }

  show(stats) {
    const {columns, rows} = stats.history;
    const place = Object.fromEntries(columns.map((name, index) => [name, index]));
    this.rows = [...this.rows, ...rows].slice(-MAX_ROWS);
    this.steps = [...this.steps, ...stats.steps.rows].slice(-MAX_STEPS);
    this.showTiles(stats, place);
    this.showSteps(stats);
    this.showTiers(stats.engine, stats.engines);
    this.showGraphs(stats.engine.graphs);
    this.showRequests(stats);
    byId("view-engine").dataset.scope = stats.scope; // "own": the server's figures are not this key's to see
    byId("view-engine").dataset.live = String(stats.engine.engine_steps);
  }

  /** [time, change per second over the last RATE_WINDOW_S] of a total. */
  rates(column) {
    const points = [];
    let start = 0;
    for (let end = 1; end < this.rows.length; end++) {
      while (this.rows[end][0] - this.rows[start][0] > RATE_WINDOW_S && start < end - 1) start++;
      const seconds = this.rows[end][0] - this.rows[start][0];
      points.push([this.rows[end][0], Math.max(0, (this.rows[end][column] - this.rows[start][column]) / Math.max(seconds, 1e-3))]);
    }
    return points;
  }

  gauge(column, factor = 1) {
    return this.rows.map((row) => [row[0], row[column] * factor]);
  }

  /** Share of the looked-up tokens that were found, over a window wide enough to hold some. */
  hitRates(hits, queries) {
    return this.rows.map((row, index) => {
      const start = this.rows[Math.max(0, index - 20)];
      const looked = row[queries] - start[queries];
      return [row[0], looked > 0 ? 100 * (row[hits] - start[hits]) / looked : 0];
    });
  }

  showTiles({engine, server, now_s: now}, place) {
    const series = [
      this.rates(place.generation_tokens), this.rates(place.prompt_tokens),
      this.gauge(place.num_requests_running), this.gauge(place.num_requests_waiting),
      this.gauge(place.kv_cache_usage_perc, 100), this.hitRates(place.prefix_cache_hits, place.prefix_cache_queries),
    ];
    const tops = [10, 10, 4, 4, 100, 100];
    series.forEach((points, index) => this.sparks[index].draw(points.filter((point) => point[0] > now - SPAN_S), now, SPAN_S, tops[index]));
    setText("m-gen", format(series[0].at(-1)?.[1] ?? 0));
    setText("m-prompt", format(series[1].at(-1)?.[1] ?? 0));
    setText("m-running", String(engine.num_requests_running));
    setText("m-running-of", server.max_num_seqs ? `of ${server.max_num_seqs}` : "");
    setText("m-waiting", String(engine.num_requests_waiting));
    setText("m-waiting-age", engine.num_requests_waiting ? `oldest ${format(engine.oldest_waiting_seconds)} s` : "");
    setText("m-kv", format(100 * engine.kv_cache_usage_perc));
    const looked = engine.prefix_cache_queries;
    setText("m-hit", format(looked ? 100 * engine.prefix_cache_hits / looked : 0));
  }

  showSteps({engine, now_s: now, server}) {
    const facts = this.stepChart.draw(this.steps, now, SPAN_S, 1 + (server.num_speculative_tokens ?? 0));
    setText("f-steps", facts.count ? `median ${format(facts.p50)} ms · p99 ${format(facts.p99)} ms · ${engine.engine_steps.toLocaleString("en")} steps` : "no steps in the last minute");
  }

  showTiers(engine, engines) {
    const tiers = Object.entries(engine.kv_tiers ?? {}).map(([name, tier]) => [TIER_NAMES[name] ?? name, tier.num_used, tier.num_blocks]);
    if (!tiers.length) tiers.push(["Device", Math.round(engine.kv_cache_usage_perc * engine.num_kv_blocks), engine.num_kv_blocks]);
    const key = JSON.stringify([tiers, engine.cached_tokens_by_tier, engine.num_preemptions, engines]);
    if (key === this.tierKey) return;
    this.tierKey = key;
    const bars = tiers.map(([name, used, total]) => {
      const text = `${used.toLocaleString("en")} of ${total.toLocaleString("en")} blocks`;
      return make("div", {}, make("dt", {}, name, make("span", {}, text)), make("dd", {}, meter(total ? used / total : 0, `${name}: ${text}`)));
    });
    const found = Object.entries(engine.cached_tokens_by_tier ?? {}).filter(([, count]) => count).map(([name, count]) => `${name.toUpperCase()} ${count.toLocaleString("en")}`);
    const more = [["Tokens found in", found.join(", ") || "none yet"], ["Preemptions", engine.num_preemptions.toLocaleString("en")],
      ...(engines.length > 1 ? engines.map(engineLine) : [])]
      .map(([name, value]) => make("div", {}, make("dt", {}, name, make("span", {}, value))));
    byId("tiers").replaceChildren(...bars, ...more);
  }

  showGraphs(graphs) {
    const key = JSON.stringify(graphs);
    if (key === this.graphKey) return;
    this.graphKey = key;
    if (!graphs) return byId("graphs").replaceChildren(make("dd", {class: "note"}, "This device runs without captured graphs."));
    const rows = [["Captured", graphs.num_graphs], ["Memory", bytes(graphs.num_bytes)], ["Captures", graphs.captures_total], ["Evictions", graphs.evictions_total],
      ...Object.entries(graphs.replays_total).map(([kind, count]) => [`Replays: ${kind}`, count]),
      ...Object.entries(graphs.fallbacks_total).map(([why, count]) => [`Eager: ${why}`, count])];
    byId("graphs").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value.toLocaleString("en"))]));
  }

  showRequests({requests, now_s: now}) {
    const shown = requests.slice(0, MAX_SHOWN);
    byId("requests-empty").hidden = shown.length > 0;
    const longest = Math.max(...shown.map((request) => (request.end_s ?? now) - request.arrival_s), 1e-3);
    const kept = new Map();
    shown.forEach((request, index) => {
      const row = this.rowElements.get(request.number) ?? requestRow(request);
      kept.set(request.number, row);
      fillRow(row, request, now, longest);
      const present = byId("requests").children[index];
      if (present !== row) byId("requests").insertBefore(row, present ?? null);
    });
    for (const [number, row] of this.rowElements) {
      if (!kept.has(number)) row.remove();
    }
    this.rowElements = kept;
  }
}

/** One of several engines: its name and what it does. */
function engineLine(one, number) {
  const busy = `${one.num_requests_running} running, ${one.num_requests_waiting} waiting, KV ${format(100 * one.kv_cache_usage_perc)} %`;
  return [`Engine ${number}`, one.is_up ? busy : "down"];
}

const CELLS = ["num", "kind", "num", "num cached", "num", "timeline", "num", "num tps", "end"];

function requestRow(request) {
  const cells = CELLS.map((name) => make("td", {class: name}));
  cells[0].textContent = request.number;
  cells[1].textContent = request.kind;
  const parts = ["queued", "prefill", "decode"].map((name) => svg("rect", {class: name, y: 0, height: 12}));
  cells[5].append(svg("svg", {class: "lane", viewBox: "0 0 1000 12", preserveAspectRatio: "none", role: "img"}, ...parts));
  return make("tr", {}, ...cells);
}

/** Seconds in each phase; null: it did not get there. */
export function phases(request, now) {
  const end = request.end_s ?? now;
  const queued = (request.scheduled_s ?? end) - request.arrival_s;
  const prefill = request.scheduled_s === null ? null : (request.first_token_s ?? end) - request.scheduled_s;
  const decode = request.first_token_s === null ? null : end - request.first_token_s;
  return [queued, prefill, decode];
}

function fillRow(row, request, now, longest) {
  const seconds = phases(request, now);
  const key = request.end_s === null ? null : longest;
  if (key !== null && row.xllmKey === key) return; // it has ended and the scale is the same
  row.xllmKey = key;
  const [, , prompt, cached, output, lane, total, speed, end] = row.children;
  prompt.textContent = request.num_prompt_tokens;
  cached.textContent = request.num_cached_tokens;
  output.textContent = request.num_generation_tokens;
  let x = 0;
  [...lane.querySelectorAll("rect")].forEach((rect, index) => {
    const width = Math.max(0, 1000 * (seconds[index] ?? 0) / longest);
    rect.setAttribute("x", x.toFixed(1));
    rect.setAttribute("width", width.toFixed(1));
    x += width;
  });
  const names = ["queued", "prefill", "decode"];
  lane.firstElementChild.setAttribute("aria-label", seconds.map((value, index) => value === null ? "" : `${names[index]} ${Math.round(1000 * value)} ms`).filter(Boolean).join(", "));
  total.textContent = Math.round(1000 * ((request.end_s ?? now) - request.arrival_s)).toLocaleString("en");
  speed.textContent = seconds[2] > 0 && request.num_generation_tokens > 1 ? format((request.num_generation_tokens - 1) / seconds[2]) : "";
  end.textContent = request.finish_reason ?? (request.first_token_s === null ? (request.scheduled_s === null ? "queued" : "prefill") : "decode");
  end.className = `end ${request.finish_reason === null ? "live" : GOOD_ENDS.has(request.finish_reason) ? "" : "bad"}`;
}
