"""`warm_up_chunks`: which prompts are computed before the first request, so that its kernels exist."""

from __future__ import annotations

from typing import NamedTuple

USUAL_TOKENS = 512  # Chosen: a usual prompt.
# Chosen: more than any operator takes for decoding, and on a GPU too few to be worth another form than that.
FEW_TOKENS = 64


class WarmUpChunk(NamedTuple):
    """So many tokens of a prompt, behind so many others."""

    num_tokens: int
    num_past: int = 0


def warm_up_chunks(*, longest: int, max_len: int, varies: bool) -> list[WarmUpChunk]:
    """longest: tokens of a step at most. max_len: of a sequence. varies: `ModelConfig.attention_varies`: then few
    tokens as well, and as many as there can be, behind as many, which is when another form is worth most."""
    longest = min(longest, max_len)
    chunks = [WarmUpChunk(min(USUAL_TOKENS, longest))]
    if varies:
        chunks += [WarmUpChunk(min(FEW_TOKENS, longest)), WarmUpChunk(longest, min(longest, max_len - longest))]
    return list(dict.fromkeys(chunks))
