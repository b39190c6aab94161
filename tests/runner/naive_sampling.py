"""What `SamplingParams` asks for, in plain Python floats (float64), straight from the definitions."""

from __future__ import annotations

import math

from xllm.request import SamplingParams


def edited_logits(logits: list[float], p: SamplingParams, prompt: list[int], output: list[int],
                  eos: tuple[int, ...]) -> list[float]:
    """Everything that comes before temperature."""
    found = []
    for token, value in enumerate(logits):
        if p.allowed_token_ids is not None and token not in p.allowed_token_ids:
            value = -math.inf
        for word in p.bad_words_token_ids:
            prefix = list(word[:-1])
            if token == word[-1] and (not prefix or output[-len(prefix):] == prefix):
                value = -math.inf
        if len(output) < p.min_tokens and (token in eos or token in p.stop_token_ids):
            value = -math.inf
        value += (p.logit_bias or {}).get(token, 0.0)
        if token in prompt or token in output:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        value -= p.frequency_penalty * output.count(token)
        value -= p.presence_penalty * (token in output)
        found.append(value)
    return found


def kept_probabilities(logits: list[float], p: SamplingParams) -> list[float]:
    """The distribution that is drawn from, after temperature, top-k, min-p and top-p."""
    if p.temperature < 1e-5:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    scaled = [value / p.temperature for value in logits]
    if p.top_k:
        kth = sorted(scaled, reverse=True)[min(p.top_k, len(scaled)) - 1]
        scaled = [value if value >= kth else -math.inf for value in scaled]
    probs = softmax(scaled)
    probs = [q if q >= p.min_p * max(probs) else 0.0 for q in probs]
    kept, total = [0.0] * len(probs), 0.0
    for i in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        kept[i] = probs[i]
        total += probs[i]
        if p.top_p < 1.0 and total >= p.top_p:
            break
    return [q / total for q in kept]


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    return [w / sum(weights) for w in weights]


def invert(probs: list[float], uniform: float) -> tuple[int, float]:
    """The drawn token, and how far the uniform number lies from where another one begins."""
    low = 0.0
    for token, q in enumerate(probs):
        if q and uniform < low + q:
            return token, min(uniform - low, low + q - uniform)
        low += q
    return max(t for t, q in enumerate(probs) if q), 0.0
