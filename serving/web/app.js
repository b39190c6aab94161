// The frame: views, theme, key, and what the server says about itself.

import {ApiError, call, onKeyChange, readKey, saveKey} from "./api.js";
import {Chat} from "./chat.js";
import {byId, setText} from "./dom.js";
import {EngineView} from "./engine.js";

const THEMES = ["system", "light", "dark"];
const POLL_MS = 2000;

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

let model = null;

async function poll() {
  try {
    const health = await (await fetch("health", {cache: "no-store", credentials: "omit"})).json();
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
function showView() {
  const wanted = location.hash === "#engine" ? "engine" : "chat";
  for (const name of ["chat", "engine"]) {
    byId(`view-${name}`).hidden = name !== wanted;
    const link = document.querySelector(`[data-view="${name}"]`);
    if (name === wanted) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = wanted === "engine" ? "Engine · xLLM" : "xLLM";
  engine.setVisible(wanted === "engine");
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
