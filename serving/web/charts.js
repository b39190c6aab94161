// Small charts as SVG. Colours come from the style sheet's classes, so that they follow the theme.

import {svg} from "./dom.js";

/** A filled curve over [time, value] points, oldest first; `span` seconds wide, ending at `now`. */
export class Sparkline {
  constructor(root, label) {
    this.label = label;
    this.area = svg("path", {class: "area"});
    this.curve = svg("path", {class: "curve"});
    this.plot = svg("svg", {class: "plot", viewBox: "0 0 100 30", preserveAspectRatio: "none", role: "img"}, this.area, this.curve);
    root.append(this.plot);
  }

  draw(points, now, span, top) {
    const highest = Math.max(top ?? 0, ...points.map((point) => point[1]), 1e-9);
    const x = (time) => (100 * (1 - (now - time) / span)).toFixed(2);
    const y = (value) => (29 - 28 * value / highest).toFixed(2);
    const line = points.map(([time, value], index) => `${index ? "L" : "M"}${x(time)} ${y(value)}`).join("");
    this.curve.setAttribute("d", line);
    this.area.setAttribute("d", points.length ? `${line}L${x(points.at(-1)[0])} 30L${x(points[0][0])} 30Z` : "");
    const last = points.at(-1)?.[1] ?? 0;
    this.plot.setAttribute("aria-label", `${this.label}: now ${format(last)}, highest ${format(highest)} in the last ${span} seconds`);
  }
}

const LEFT = 44;
const BOTTOM = 18;
const BIN_PX = 4;
const DECADES = [0.1, 1, 10, 100, 1000, 10000, 100000];

/** Step times by when the steps ended, on a logarithmic scale: for each moment the range and the median, of steps that
 *  decoded only and of those that computed prompts. */
export class StepChart {
  constructor(root) {
    this.root = root;
    this.plot = svg("svg", {class: "plot", role: "img", "aria-label": "Step times"});
    root.append(this.plot);
  }

  /** steps: [end_s, seconds, num_tokens, num_seqs]. Whoever decodes wants at most `perSeq` tokens; a step with more
   *  computed prompts. */
  draw(steps, now, span, perSeq) {
    const width = Math.max(200, this.root.clientWidth);
    const height = Math.max(80, this.root.clientHeight);
    this.plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const shown = steps.filter((step) => step[0] > now - span);
    const times = shown.map((step) => step[1] * 1000);
    const low = lower(times.reduce((a, b) => Math.min(a, b), 1));
    const high = upper(times.reduce((a, b) => Math.max(a, b), low * 10));
    const y = (ms) => ((height - BOTTOM - 4) * (1 - Math.log(Math.max(ms, low) / low) / Math.log(high / low)) + 4).toFixed(1);
    const x = (time) => LEFT + (width - LEFT - 4) * (1 - (now - time) / span);
    const parts = axes(width, height, low, high, y, span);
    for (const [moment, kind, values] of bins(shown, span / (width - LEFT) * BIN_PX, perSeq)) {
      const at = x(moment).toFixed(1);
      parts.push(svg("line", {class: `range ${kind}`, x1: at, x2: at, y1: y(Math.min(...values)), y2: y(Math.max(...values))}),
        svg("circle", {class: `point ${kind}`, cx: at, cy: y(quantile(values, 0.5)), r: 1.75}));
    }
    this.plot.replaceChildren(...parts);
    const facts = {count: shown.length, p50: quantile(times, 0.5), p99: quantile(times, 0.99)};
    this.plot.setAttribute("aria-label", `Step times of the last ${span} seconds: ${shown.length} steps, median ${format(facts.p50)} ms, 99th percentile ${format(facts.p99)} ms`);
    return facts;
  }
}

function axes(width, height, low, high, y, span) {
  const parts = [svg("text", {x: LEFT, y: height - 2}, `${span} s ago`), svg("text", {x: width - 2, y: height - 2, "text-anchor": "end"}, "now")];
  for (const tick of DECADES.filter((value) => value >= low && value <= high)) {
    parts.push(svg("line", {class: "grid", x1: LEFT, x2: width, y1: y(tick), y2: y(tick)}),
      svg("text", {x: LEFT - 6, y: Number(y(tick)) + 4, "text-anchor": "end"}, tick < 1000 ? `${tick} ms` : `${tick / 1000} s`));
  }
  return parts;
}

/** [moment, kind, milliseconds of the steps of that moment and kind], oldest first. */
function bins(steps, seconds, perSeq) {
  const found = new Map();
  for (const [end, time, tokens, seqs] of steps) {
    const kind = tokens > seqs * perSeq ? "prefill" : "decode";
    const moment = (Math.floor(end / seconds) + 0.5) * seconds;
    const key = `${moment} ${kind}`;
    if (!found.has(key)) found.set(key, [moment, kind, []]);
    found.get(key)[2].push(time * 1000);
  }
  return found.values();
}

const lower = (ms) => DECADES.findLast((tick) => tick <= ms) ?? DECADES[0];
const upper = (ms) => DECADES.find((tick) => tick >= ms) ?? DECADES.at(-1);

export function quantile(values, share) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** A level from 0 to 1. */
export function meter(share, label) {
  const width = (100 * Math.min(1, Math.max(0, share))).toFixed(2);
  return svg("svg", {class: "meter", viewBox: "0 0 100 6", preserveAspectRatio: "none", role: "img", "aria-label": label},
    svg("rect", {class: "track", width: 100, height: 6, rx: 1}), svg("rect", {class: "fill", width, height: 6, rx: 1}));
}

/** Three or fewer significant digits: 1234 -> "1,234", 12.34 -> "12.3", 0.1234 -> "0.12". */
export function format(value) {
  const size = Math.abs(value);
  if (size >= 100) return Math.round(value).toLocaleString("en");
  if (size >= 10) return value.toFixed(1);
  if (size >= 1) return value.toFixed(size % 1 < 0.005 ? 0 : 1);
  return size < 0.005 ? "0" : value.toFixed(2);
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) {
    count /= 1024;
    at++;
  }
  return `${format(count)} ${units[at]}`;
}
