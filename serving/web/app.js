// The frame: views, theme, key, and what the server says about itself.

import {ApiError, call, onKeyChange, readKey, saveKey} from "./api.js";
import {Chat} from "./chat.js";
import {ClusterView} from "./cluster.js";
import {byId, setText} from "./dom.js";
import {EngineView} from "./engine.js";

const THEMES = ["system", "light", "dark"];
const POLL_MS = 2000;
const TITLES = {chat: "xLLM", engine: "Engine · xLLM", cluster: "Cluster · xLLM"};

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText("theme-label", `Theme: ${theme}`);
  byId("theme-button").title = `Theme: ${theme}`;
}

function readTheme() {
  const stored = localStorage.getItem("xllm.theme");
  return THEMES.includes(stored) ? stored : "system";
}

byId("theme-button").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(readTheme()) + 1) % THEMES.length];
  localStorage.setItem("xllm.theme", next);
  showTheme(next);
});
showTheme(readTheme());

// What the server says about itself
function showState(kind, text) {
  byId("state-dot").className = `dot ${kind}`;
  setText("state-text", text);
}

function notice(text) {
  byId("notice").hidden = !text;
  setText("notice", text);
}

const chat = new Chat({notice, askKey: openKeyDialog});
const engine = new EngineView({notice, askKey: openKeyDialog});
const cluster = new ClusterView({notice, askKey: openKeyDialog});

let model = null;

async function poll() {
  try {
    const health = await (await fetch("health", {cache: "no-store", credentials: "omit"})).json();
    showCluster(health.is_master === true);
    if (health.status === "starting") showState("busy", `Loading (${String(health.reason).replace("phase: ", "")})`);
    else if (health.status === "ok") await showModel();
    else showState("bad", health.reason ? `${health.status}: ${health.reason}` : health.status);
  } catch {
    model = null;
    showState("bad", "The server does not answer");
  }
}

async function showModel() {
  if (model === null) {
    try {
      const models = await (await call("v1/models")).json();
      model = models.data[0];
      chat.setModels(models.data);
      notice("");
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status !== 401) return showState("bad", error.message);
      notice(readKey() ? "The server does not know this API key." : "This server needs an API key.");
      showState("busy", "Waiting for an API key");
      return;
    }
  }
  showState("ok", model.id);
}

onKeyChange(() => {
  model = null;
  poll();
  engine.restart();
  cluster.restart();
});

// The key
function openKeyDialog() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key-input").value = readKey();
  dialog.showModal();
  byId("key-input").select();
}

byId("key-button").addEventListener("click", openKeyDialog);
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-forget").addEventListener("click", () => {
  byId("key-dialog").close();
  saveKey("");
});
byId("key-form").addEventListener("submit", () => saveKey(byId("key-input").value.trim()));

// Views
function viewLink(name) {
  return document.querySelector(`[data-view="${name}"]`);
}

/** The cluster's view is there where the server is a cluster's master. */
function showCluster(isMaster) {
  if (viewLink("cluster").hidden !== isMaster) return;
  viewLink("cluster").hidden = !isMaster;
  showView();
}

function showView() {
  const asked = location.hash.slice(1);
  const wanted = Object.hasOwn(TITLES, asked) && !viewLink(asked).hidden ? asked : "chat";
  for (const name of Object.keys(TITLES)) {
    byId(`view-${name}`).hidden = name !== wanted;
    const link = viewLink(name);
    if (name === wanted) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = TITLES[wanted];
  engine.setVisible(wanted === "engine");
  cluster.setVisible(wanted === "cluster");
  if (wanted === "chat") chat.focus();
}

addEventListener("hashchange", showView);
document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (!button) return;
  const text = button.closest(".codeblock")?.querySelector("code").textContent ?? button.xllmText ?? "";
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});

showView();
poll();
setInterval(poll, POLL_MS);
