// The chat view: one conversation, streamed.

import {Answer} from "./answer.js";
import {ApiError, call, events} from "./api.js";
import {byId, make, setText} from "./dom.js";
import {render} from "./markdown.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const SETTINGS = "xllm.settings";
const CONVERSATION = "xllm.conversation";
const BOTTOM_SLACK_PX = 48;

/** The list item of an assistant message; draws at most once a frame. */
class AnswerView {
  constructor(answer, chat) {
    this.answer = answer;
    this.chat = chat;
    this.reasoningText = make("div", {class: "text"});
    this.reasoning = make("details", {class: "reasoning", open: true, hidden: true}, make("summary", {}, "Reasoning"), this.reasoningText);
    this.body = make("div", {class: "body"});
    this.calls = make("div", {class: "calls"});
    this.facts = make("span", {class: "figures"});
    this.actions = make("span", {class: "actions"});
    this.meta = make("p", {class: "meta"}, this.facts, this.actions);
    this.element = make("li", {class: "message assistant streaming"}, make("span", {class: "who"}, "Assistant:"),
      this.reasoning, this.body, this.calls, this.meta);
    this.pending = false;
  }

  update() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.draw();
    });
  }

  draw() {
    const {answer} = this;
    const follow = this.chat.isAtEnd();
    this.reasoning.hidden = !answer.reasoning;
    this.reasoningText.textContent = answer.reasoning;
    render(this.body, answer.content);
    this.drawCalls();
    this.facts.replaceChildren(answer.failure ? make("span", {class: "failure"}, answer.failure) : answer.facts().join(" · "));
    if (follow) this.chat.scrollToEnd();
  }

  drawCalls() {
    this.answer.calls.filter(Boolean).forEach((called, index) => {
      if (!this.calls.children[index]) {
        this.calls.append(make("div", {class: "call"}, make("p", {class: "head"}, "calls ", make("b")), make("pre", {tabindex: "0"})));
      }
      const card = this.calls.children[index];
      card.querySelector("b").textContent = called.function.name;
      card.querySelector("pre").textContent = pretty(called.function.arguments);
    });
  }

  finish() {
    this.element.classList.remove("streaming");
    this.draw();
    const copy = make("button", {type: "button", class: "ghost small", "data-copy": true}, "Copy");
    copy.xllmText = this.answer.content;
    const retry = make("button", {type: "button", class: "ghost small"}, "Retry");
    retry.addEventListener("click", () => this.chat.retry(this));
    this.actions.append(...(this.answer.content ? [copy] : []), retry);
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

export class Chat {
  constructor({notice, askKey}) {
    this.notice = notice;
    this.askKey = askKey;
    this.turns = []; // {message, element, kept: what is shown of an answer beside its message}
    this.running = null; // AbortController of the answer under way
    this.prompt = byId("prompt");
    this.form = byId("settings-form");
    this.loadSettings();
    this.loadConversation();
    this.listen();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.stop();
      else this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.running) this.send();
      }
    });
    this.prompt.addEventListener("input", () => this.fitPrompt());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
      if (byId("settings").classList.contains("open")) this.showSettings(false);
      else if (this.running) this.stop();
    });
    byId("clear-button").addEventListener("click", () => this.clear());
    byId("settings-button").addEventListener("click", () => this.showSettings(!byId("settings").classList.contains("open")));
    byId("settings-close").addEventListener("click", () => this.showSettings(false));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.saveSettings());
    this.form.addEventListener("reset", () => setTimeout(() => this.saveSettings()));
  }

  /** What is served: a base model, maybe under several names, and adapters. */
  setModels(models) {
    const chosen = this.form.elements.model.value;
    this.form.elements.model.replaceChildren(...models.map(({id}) => make("option", {value: id, selected: id === chosen}, id)));
    byId("model-field").hidden = models.length < 2;
    setText("empty-model", models[0].id);
    setText("empty-text", `Up to ${models[0].max_model_len.toLocaleString("en")} tokens, question and answer together.`);
  }

  focus() {
    if (matchMedia("(hover: hover)").matches) this.prompt.focus({preventScroll: true});
  }

  fitPrompt() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight + 2}px`;
  }

  // Settings
  showSettings(open) {
    byId("settings").classList.toggle("open", open);
    byId("settings-button").setAttribute("aria-expanded", String(open));
    (open ? this.form.elements.temperature : byId("settings-button")).focus();
  }

  loadSettings() {
    let stored = {};
    try {
      stored = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
    } catch { /* whatever it was, it was not ours */ }
    for (const name of [...NUMBERS, "system", "tools"]) {
      if (typeof stored[name] === "string") this.form.elements[name].value = stored[name];
    }
  }

  saveSettings() {
    const values = {};
    for (const name of [...NUMBERS, "system", "tools"]) values[name] = this.form.elements[name].value;
    sessionStorage.setItem(SETTINGS, JSON.stringify(values));
    this.readTools();
  }

  readTools() {
    const text = this.form.elements.tools.value.trim();
    setText("tools-error", "");
    if (!text) return [];
    try {
      const tools = JSON.parse(text);
      if (!Array.isArray(tools)) throw new Error("a list of tools is wanted");
      return tools;
    } catch (error) {
      setText("tools-error", `Tools: ${error.message}`);
      return null;
    }
  }

  /** The request's body, or null if a setting is wrong. Empty fields are left to the server. */
  body() {
    const tools = this.readTools();
    if (tools === null || !this.form.checkValidity()) {
      if (matchMedia("(max-width: 60rem)").matches) this.showSettings(true);
      this.form.reportValidity();
      return null;
    }
    const system = this.form.elements.system.value.trim();
    const messages = this.turns.map((turn) => turn.message);
    const body = {model: this.form.elements.model.value || undefined, stream: true, stream_options: {include_usage: true, continuous_usage_stats: true},
      messages: system ? [{role: "system", content: system}, ...messages] : messages};
    for (const name of NUMBERS) {
      if (this.form.elements[name].value !== "") body[name] = Number(this.form.elements[name].value);
    }
    if (tools.length) body.tools = tools;
    return body;
  }

  // The conversation
  isAtEnd() {
    const box = byId("scroller");
    return box.scrollHeight - box.scrollTop - box.clientHeight < BOTTOM_SLACK_PX;
  }

  scrollToEnd() {
    byId("scroller").scrollTop = byId("scroller").scrollHeight;
  }

  append(message, element) {
    byId("empty").hidden = true;
    this.turns.push({message, element});
    byId("log").append(element);
    this.scrollToEnd();
    this.saveConversation();
  }

  appendUser(text) {
    this.append({role: "user", content: text},
      make("li", {class: "message user"}, make("span", {class: "who"}, "You: "), text));
  }

  saveConversation() {
    try {
      sessionStorage.setItem(CONVERSATION, JSON.stringify(this.turns.map(({message, kept}) => ({message, ...kept}))));
    } catch { // there is no room for all of it
      sessionStorage.removeItem(CONVERSATION);
    }
  }

  /** After a reload. A question that got no answer goes back to where it was written. */
  loadConversation() {
    let stored = [];
    try {
      stored = JSON.parse(sessionStorage.getItem(CONVERSATION) ?? "[]");
      while (stored.at(-1)?.message.role === "tool") stored.pop();
      if (stored.at(-1)?.message.role === "user") this.prompt.value = stored.pop().message.content;
      stored.forEach((turn, index) => this.loadTurn(turn, stored.slice(index + 1)));
    } catch { // whatever it was, it was not ours
      this.turns = [];
      byId("log").replaceChildren();
    }
    this.saveConversation();
    this.fitPrompt();
  }

  loadTurn(turn, later) {
    const {message} = turn;
    if (message.role === "user") return this.appendUser(message.content);
    if (message.role === "tool") return this.turns.push({message, element: null});
    const answer = Answer.of(turn), view = new AnswerView(answer, this);
    this.append(message, view.element);
    this.turns.at(-1).kept = answer.kept();
    view.finish();
    if (!message.tool_calls) return;
    const results = later.slice(0, message.tool_calls.length).map((other) => other.message);
    if (results.every(({role}) => role === "tool") && results.length) this.showResults(results, view);
    else this.askResults(message.tool_calls, view);
  }

  showResults(results, view) {
    results.forEach(({content}, index) => view.calls.children[index].append(
      make("form", {}, make("input", {"aria-label": "Result", value: content, disabled: true}))));
  }

  send() {
    const text = this.prompt.value.trim();
    if (!text) return;
    this.appendUser(text);
    const answering = this.answer();
    if (!answering) {
      this.turns.pop().element.remove();
      return this.saveConversation();
    }
    this.prompt.value = "";
    this.fitPrompt();
  }

  /** Ask for an answer to what is there. Returns false if a setting is wrong. */
  answer() {
    const body = this.body();
    if (!body) return false;
    const answer = new Answer(performance.now());
    const view = new AnswerView(answer, this);
    byId("empty").hidden = true;
    byId("log").append(view.element);
    this.scrollToEnd();
    this.setRunning(new AbortController());
    setText("announce", "The model is answering.");
    this.stream(body, answer, view).finally(() => {
      this.setRunning(null);
      this.settle(answer, view);
    });
    return true;
  }

  async stream(body, answer, view) {
    try {
      const response = await call("v1/chat/completions", {body, signal: this.running.signal});
      for await (const chunk of events(response)) {
        answer.take(chunk);
        view.update();
      }
    } catch (error) {
      if (error.name === "AbortError") {
        answer.finish = "stopped";
        return;
      }
      answer.failure = error instanceof ApiError ? error.message : "The connection was lost.";
      if (error.status === 401) this.askKey();
    }
  }

  settle(answer, view) {
    if (!view.element.isConnected) return; // the chat was cleared meanwhile
    const message = answer.message();
    view.finish();
    const {content, tool_calls: calls} = message;
    if (content || calls) this.turns.push({message, element: view.element, kept: answer.kept()});
    this.saveConversation();
    if (calls && !answer.failure && answer.finish !== "stopped") this.askResults(calls, view);
    const end = answer.failure || (answer.finish === "stopped" ? "Stopped." : `Answer complete, ${answer.facts()[0] ?? ""}.`);
    setText("announce", end);
  }

  /** A field per call for its result; when all are there, they go back to the model. */
  askResults(calls, view) {
    const results = new Map();
    calls.forEach((called, index) => {
      const input = make("input", {"aria-label": `Result of ${called.function.name}`, placeholder: "Result for the model"});
      const form = make("form", {}, input, make("button", {type: "submit", class: "ghost"}, "Return"));
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        input.disabled = true;
        form.querySelector("button").disabled = true;
        results.set(index, {role: "tool", tool_call_id: called.id, content: input.value});
        if (results.size === calls.length && !this.running) {
          calls.forEach((_, place) => this.turns.push({message: results.get(place), element: null}));
          this.answer();
        }
      });
      view.calls.children[index].append(form);
    });
  }

  retry(view) {
    if (this.running) return;
    const at = this.turns.findIndex((turn) => turn.element === view.element);
    if (at >= 0) {
      for (const turn of this.turns.splice(at)) turn.element?.remove();
    }
    const later = [...byId("log").children];
    for (const element of later.slice(later.indexOf(view.element))) element.remove();
    this.answer();
    this.focus();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.saveConversation();
    byId("log").replaceChildren();
    byId("empty").hidden = false;
    setText("announce", "New chat.");
    this.focus();
  }

  stop() {
    this.running?.abort();
  }

  setRunning(controller) {
    this.running = controller;
    const button = byId("send-button");
    button.textContent = controller ? "Stop" : "Send";
    button.classList.toggle("stop", Boolean(controller));
    byId("log").setAttribute("aria-busy", String(Boolean(controller)));
  }
}
