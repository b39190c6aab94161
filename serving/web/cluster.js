// The cluster view of a master: asks /cluster while it can be seen.

import {ApiError, call} from "./api.js";
import {format, meter} from "./charts.js";
import {byId, make, setText} from "./dom.js";

const INTERVAL_MS = 1000;
const EVENTS_S = 600;
const MAX_DECISIONS = 20;
const MAX_EVENTS = 8;
const DOTS = {active: "ok", connecting: "busy", draining: "busy", "lease lost": "busy"}; // others are bad
const REASONS = {
  prefix: "has the most of the prompt cached", least_cost: "least to do, cached prompts counted", slo: "keeps the targets",
  no_slo: "none keeps the targets; the soonest", session: "had the session before", fewest_open: "fewest open requests",
  turn: "its turn among equals", drawn: "drawn at random", stale: "nothing new is known of any; the idler of two",
  no_memory: "none has memory for it; the best", full: "all are full; the best",
};

export class ClusterView {
  constructor({notice, askKey}) {
    this.notice = notice;
    this.askKey = askKey;
    this.visible = false;
    this.timer = null;
    this.asking = null;
    this.keys = new Map();
    document.addEventListener("visibilitychange", () => this.follow());
  }

  setVisible(visible) {
    this.visible = visible;
    this.follow();
  }

  restart() {
    this.stop();
    this.follow();
  }

  stop() {
    clearTimeout(this.timer);
    this.timer = null;
    this.asking?.abort();
    this.asking = null;
  }

  follow() {
    if (!this.visible || document.hidden) this.stop();
    else if (!this.asking) this.look();
  }

  async look() {
    const asking = this.asking = new AbortController();
    try {
      this.show(await (await call("cluster", {signal: asking.signal})).json());
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error instanceof ApiError && error.status === 401) {
        this.notice("This server needs an API key.");
        return this.askKey();
      }
      if (error instanceof ApiError) setText("f-cluster", error.message);
    }
    if (this.asking === asking) this.timer = setTimeout(() => this.look(), INTERVAL_MS);
  }

  show(state) {
    const {members, totals} = state;
    const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
    setText("k-active", String(members.filter((member) => member.state === "active").length));
    setText("k-active-of", `of ${members.length}`);
    setText("k-open", state.open_requests.toLocaleString("en"));
    setText("k-decisions", sum(totals.decisions).toLocaleString("en"));
    setText("k-recovered", sum(totals.recovered).toLocaleString("en"));
    setText("k-recomputed", totals.recomputed_tokens.toLocaleString("en"));
    setText("k-given-up", totals.given_up.toLocaleString("en"));
    const leads = state.leader === null ? "" : state.is_leader ? " · this master leads" : ` · ${state.leader} leads`;
    setText("f-cluster", `policy ${state.policy}${leads}${state.store === null ? "" : ` · ${state.store}`}`);
    const recent = state.events.filter((event) => Date.now() - Date.parse(event.time) < 1000 * EVENTS_S);
    this.fill("members", members, memberRow);
    this.fill("decisions", state.decisions.slice(0, MAX_DECISIONS), decisionRow);
    this.fill("events", recent.slice(0, MAX_EVENTS), eventLine);
  }

  /** Make the rows anew, but only when something in them changed. */
  fill(id, shown, row) {
    const key = JSON.stringify(shown);
    if (this.keys.get(id) === key) return;
    this.keys.set(id, key);
    byId(`${id}-empty`).hidden = shown.length > 0;
    byId(id).replaceChildren(...shown.map(row));
  }
}

const cell = (name, ...children) => make("td", {class: name}, ...children);

function memberRow(member) {
  const state = [make("span", {class: `dot ${DOTS[member.state] ?? "bad"}`, "aria-hidden": "true"}), member.state];
  if (member.reason) state.push(make("span", {class: "why"}, ` ${member.reason}`));
  const row = make("tr", {"data-name": member.name}, make("td", {title: member.address}, member.name), cell("kind", member.role), cell("of-state", ...state));
  if (member.running === undefined) { // it is not connected
    row.append(...["num", "num", "num", "timeline", "num", "num cached", "num"].map((name) => cell(name)));
    return row;
  }
  const used = `${format(100 * member.kv_usage)} %`;
  row.append(cell("num open", member.sent), cell("num", member.running), cell("num", member.waiting),
    cell("timeline", meter(member.kv_usage, `KV cache of ${member.name}: ${used} in use`)), cell("num", used),
    cell("num cached", member.cached_blocks.toLocaleString("en")),
    cell("num hits", member.hit_rate === null ? "" : `${format(100 * member.hit_rate)} %`));
  return row;
}

function decisionRow(decision) {
  const scores = Object.entries(decision.scores).sort((a, b) => a[1] - b[1]).flatMap(([name, score]) =>
    [make("span", {class: name === decision.instance ? "chosen" : null}, `${name} ${format(score)}`), " "]);
  const lost = decision.instances_lost ? ` (the ${ordinal(decision.instances_lost + 1)} instance that has it)` : "";
  return make("tr", {}, cell("", clock(decision.time)), cell("num", decision.tokens.toLocaleString("en")),
    cell("num", decision.cached_tokens.toLocaleString("en")), cell("instance", decision.instance ?? ""),
    cell("", make("span", {class: "why"}, `${REASONS[decision.reason] ?? decision.reason}${lost}`)), cell("scores", ...scores));
}

function eventLine(event) {
  const words = {joined: "has joined", left: "has left", recovered: "had open requests", turned: "has another role"};
  return make("li", {}, make("time", {datetime: event.time}, clock(event.time)), make("b", {}, event.instance), ` ${words[event.event] ?? event.event}`,
    make("span", {class: "why"}, event.reason ? `: ${event.reason}` : ""));
}

const clock = (time) => new Date(time).toLocaleTimeString("en-GB");

const ordinal = (number) => ({2: "2nd", 3: "3rd"}[number] ?? `${number}th`);
