// A safe subset of Markdown, built as DOM nodes. What a model writes is never parsed as HTML.

import {make} from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,32})/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s{0,12})([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}(?:-{3,}|\*{3,}|_{3,})\s*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_LINE = /^\s*\|.*\|\s*$/;
const TABLE_RULE = /^\s*\|(?:\s*:?-+:?\s*\|)+\s*$/;
const MAX_LINK = 2000;

/** Split text into blocks {kind, lines, info}. One pass over the lines. */
export function blocksOf(text) {
  const lines = text.split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [block, next] = readBlock(lines, at);
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function readBlock(lines, at) {
  const fence = FENCE.exec(lines[at]);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(lines[at]);
  if (heading) return [{kind: "heading", level: heading[1].length, lines: [heading[2]]}, at + 1];
  if (RULE.test(lines[at])) return [{kind: "rule", lines: []}, at + 1];
  if (TABLE_LINE.test(lines[at]) && TABLE_RULE.test(lines[at + 1] ?? "")) return readWhile(lines, at, "table", (line) => TABLE_LINE.test(line));
  if (ITEM.test(lines[at])) return readWhile(lines, at, "list", (line) => ITEM.test(line) || /^\s+\S/.test(line));
  if (QUOTE.test(lines[at])) return readWhile(lines, at, "quote", (line) => QUOTE.test(line));
  return readWhile(lines, at, "paragraph", (line, first) => first || !startsBlock(line));
}

const startsBlock = (line) => !line.trim() || FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || QUOTE.test(line) || RULE.test(line);

function readWhile(lines, at, kind, belongs) {
  const start = at;
  while (at < lines.length && lines[at].trim() && belongs(lines[at], at === start)) at++;
  return [{kind, lines: lines.slice(start, at)}, at];
}

function readFence(lines, at, [, mark, info]) {
  const end = new RegExp(`^ {0,3}[${mark[0]}]{${mark.length},}\\s*$`);
  const start = ++at;
  while (at < lines.length && !end.test(lines[at])) at++;
  return [{kind: "code", info, lines: lines.slice(start, at)}, at + 1];
}

/** Show `text` in `root`. Blocks that did not change keep their nodes, and with them the reader's selection. */
export function render(root, text) {
  const blocks = blocksOf(text);
  const old = [...root.children];
  blocks.forEach((block, index) => {
    const key = JSON.stringify(block);
    const present = old[index];
    if (present?.xllmKey === key) return;
    if (block.kind === "code" && present?.xllmKind === "code" && present.xllmInfo === block.info) {
      present.querySelector("code").textContent = block.lines.join("\n");
      present.xllmKey = key;
      return;
    }
    const element = build(block);
    Object.assign(element, {xllmKey: key, xllmKind: block.kind, xllmInfo: block.info});
    if (present) present.replaceWith(element);
    else root.append(element);
  });
  for (const extra of old.slice(blocks.length)) extra.remove();
}

function build(block) {
  switch (block.kind) {
    case "code": return codeBlock(block);
    case "heading": return make(`h${Math.min(5, block.level + 2)}`, {}, ...inline(block.lines[0]));
    case "rule": return make("hr");
    case "table": return table(block.lines);
    case "list": return list(block.lines);
    case "quote": return make("blockquote", {}, ...inline(block.lines.map((line) => QUOTE.exec(line)[1]).join("\n")));
    default: return make("p", {}, ...inline(block.lines.join("\n")));
  }
}

function codeBlock(block) {
  const copy = make("button", {type: "button", class: "ghost small", "data-copy": true}, "Copy");
  return make("div", {class: "codeblock"},
    make("div", {class: "head"}, make("span", {}, block.info || "text"), copy),
    make("pre", {tabindex: "0"}, make("code", {}, block.lines.join("\n"))));
}

function list(lines) {
  const root = make(/^\s*\d/.test(lines[0]) ? "ol" : "ul");
  const first = /^\s*(\d+)/.exec(lines[0]);
  if (first && first[1] !== "1") root.setAttribute("start", first[1]);
  const open = [{indent: ITEM.exec(lines[0])[1].length, list: root}];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (!item) {
      const last = open.at(-1).list.lastElementChild;
      last.append("\n", ...inline(line.trim()));
      continue;
    }
    const indent = item[1].length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    if (indent > open.at(-1).indent + 1) {
      const nested = make(/\d/.test(item[2]) ? "ol" : "ul");
      open.at(-1).list.lastElementChild.append(nested);
      open.push({indent, list: nested});
    }
    open.at(-1).list.append(make("li", {}, ...inline(item[3])));
  }
  return root;
}

function table(lines) {
  const cells = (line) => line.trim().slice(1, -1).split("|").map((cell) => cell.trim());
  const row = (line, tag) => make("tr", {}, ...cells(line).map((cell) => make(tag, {}, ...inline(cell))));
  return make("table", {}, make("thead", {}, row(lines[0], "th")), make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td"))));
}

/** Inline marks: `code`, **bold**, *italic*, [text](http...). Marks without an end stay text; each kind is looked for
 *  once more at most after it was not found, so the time is linear. */
export function inline(text) {
  const nodes = [];
  const missing = new Set();
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  for (let at = 0; at < text.length;) {
    const found = mark(text, at, missing);
    if (found) {
      flush();
      nodes.push(found.node);
      at = found.end;
    } else {
      plain += text[at++];
    }
  }
  flush();
  return nodes;
}

function mark(text, at, missing) {
  const char = text[at];
  if (char === "`") return spanned(text, at, "`", "code", missing);
  if (char === "*") return text[at + 1] === "*" ? spanned(text, at, "**", "strong", missing) : spanned(text, at, "*", "em", missing);
  if (char === "[" && !missing.has("](")) return link(text, at, missing);
  return null;
}

function spanned(text, at, sign, tag, missing) {
  if (missing.has(sign)) return null;
  const start = at + sign.length;
  const end = text.indexOf(sign, start + 1);
  if (end < 0) {
    missing.add(sign);
    return null;
  }
  const inner = text.slice(start, end);
  if (tag !== "code" && (/^\s|\s$/.test(inner) || inner.includes("\n\n"))) return null;
  return {node: make(tag, {}, inner), end: end + sign.length};
}

function link(text, at, missing) {
  const middle = text.indexOf("](", at);
  if (middle < 0) missing.add("](");
  if (middle < 0 || middle - at > MAX_LINK) return null;
  const end = text.slice(middle, middle + MAX_LINK).indexOf(")");
  if (end < 0) return null;
  const href = safeUrl(text.slice(middle + 2, middle + end));
  if (!href) return null;
  return {node: make("a", {href, target: "_blank", rel: "noopener noreferrer nofollow"}, text.slice(at + 1, middle)), end: middle + end + 1};
}

/** The address if it is an absolute http(s) one, else null. */
export function safeUrl(address) {
  if (!/^https?:\/\//i.test(address)) return null;
  try {
    const url = new URL(address);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}
