// One assistant message, as it streams and as it was kept.

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Turns a stream's chunks into one assistant message, with what it cost. */
export class Answer {
  constructor(startedMs) {
    this.startedMs = startedMs;
    this.firstMs = null;
    this.lastMs = null;
    this.firstTokens = 0;
    this.content = "";
    this.reasoning = "";
    this.calls = [];
    this.usage = null;
    this.finish = null;
    this.failure = "";
    this.keptFacts = null; // of an answer that was read back
  }

  /** One that was kept, with what `kept` gave. */
  static of({message, reasoning, facts}) {
    const answer = new Answer(0);
    answer.content = message.content;
    answer.calls = message.tool_calls ?? [];
    answer.reasoning = reasoning;
    answer.keptFacts = facts;
    return answer;
  }

  /** What is shown of it beside its message. */
  kept() {
    return {reasoning: this.reasoning, facts: this.facts()};
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const delta = choice.delta ?? {};
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
    if (delta.content || reasoning || delta.tool_calls?.length) {
      this.lastMs = performance.now();
      if (this.firstMs === null) {
        this.firstMs = this.lastMs;
        this.firstTokens = this.usage?.completion_tokens ?? 1; // a parser may have held back the first ones
      }
    }
    this.content += delta.content ?? "";
    this.reasoning += reasoning;
    for (const part of delta.tool_calls ?? []) this.takeCall(part);
    this.finish = choice.finish_reason ?? this.finish;
  }

  takeCall(part) {
    const index = part.index ?? this.calls.length;
    const found = (this.calls[index] ??= {id: "", type: "function", function: {name: "", arguments: ""}});
    found.id ||= part.id ?? `call_${index}`;
    found.function.name += part.function?.name ?? "";
    found.function.arguments += part.function?.arguments ?? "";
  }

  message() {
    const message = {role: "assistant", content: this.content};
    const calls = this.calls.filter(Boolean);
    if (calls.length) message.tool_calls = calls;
    return message;
  }

  /** One line of figures. While it streams, tokens are those of the running usage. */
  facts() {
    if (this.keptFacts) return this.keptFacts;
    const facts = this.finish === "stopped" ? ["stopped"] : [];
    const tokens = this.usage?.completion_tokens;
    if (tokens !== undefined) facts.push(plural(tokens, "token"));
    const later = tokens - this.firstTokens;
    if (later > 0 && this.lastMs > this.firstMs) facts.push(`${(later / (this.lastMs - this.firstMs) * 1000).toFixed(1)} tokens/s`);
    if (this.firstMs !== null) facts.push(`first after ${Math.round(this.firstMs - this.startedMs)} ms`);
    if (this.usage) {
      const cached = this.usage.prompt_tokens_details?.cached_tokens ?? 0;
      facts.push(`prompt ${this.usage.prompt_tokens}${cached ? ` (${cached} cached)` : ""}`);
    }
    if (this.finish === "length") facts.push("cut at max tokens");
    return facts;
  }
}
