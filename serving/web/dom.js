// Elements are made by these two functions only: text is always a text node, never markup.

/** make("p", {class: "hint", "aria-live": "polite"}, "text", otherElement) */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

const shown = new Map();

/** Set an element's text, but only when it changed: less work, and nothing is announced twice. */
export function setText(id, text) {
  if (shown.get(id) !== text) {
    shown.set(id, text);
    byId(id).textContent = text;
  }
}
