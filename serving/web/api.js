// Everything that is said to the server: relative addresses only, the key as a bearer token.

const KEY = "xllm.key";
const listeners = [];

export const readKey = () => sessionStorage.getItem(KEY) ?? "";

export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  for (const listener of listeners) listener();
}

export const onKeyChange = (listener) => listeners.push(listener);

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function call(path, {body, signal} = {}) {
  const headers = {};
  const key = readKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST", headers, signal, credentials: "omit", cache: "no-store",
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) throw new ApiError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  try {
    const content = await response.json();
    return String(content.error?.message ?? content.reason ?? response.statusText);
  } catch {
    return `HTTP ${response.status}`;
  }
}

/** The JSON events of a server-sent stream. Throws ApiError for an error event. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return; // a stream that is left early shows up as a failed request
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") continue;
        const content = JSON.parse(data);
        if (content.error) throw new ApiError(content.error.code ?? 500, String(content.error.message));
        yield content;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
