"""`prompt_marks`: the digests by which a router asks who has how much of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xllm.kv.block import root_hasher, salt_with_adapter, token_bytes

# After so many blocks a prompt is marked at every block, then every 8th, then every 64th. Chosen: digests are what
# marking costs, and the longer a prefix, the less a few blocks of it matter. 32k tokens have 144 marks and not 2048.
STEPS = ((64, 1), (512, 8), (2**62, 64))  # (up to this block, every so many)


@dataclass(frozen=True, slots=True)
class PromptMarks:
    """digests[i] is that of the prefix of num_tokens[i] tokens, rising. Equal prefixes have equal marks, however long
    the prompts are."""

    digests: list[bytes]
    num_tokens: list[int]


NO_MARKS = PromptMarks([], [])


def prompt_marks(token_ids: Sequence[int], block_size: int, cache_salt: str = "",
                 adapter_digest: str = "") -> PromptMarks:
    """The marks of a prompt: some of its blocks' digests (`kv/block.py`). adapter_digest: of the adapter that computes
    it; "": none."""
    data = token_bytes(np.asarray(token_ids))
    salt = salt_with_adapter(cache_salt, adapter_digest) if adapter_digest else cache_salt
    hasher, width = root_hasher(block_size, salt), block_size * 4
    update, digest = hasher.update, hasher.digest
    digests, num_tokens, done, num_blocks = list[bytes](), list[int](), 0, len(data) // width
    for last, step in STEPS:
        stop = done + max(0, min(last, num_blocks) - done) // step * step
        for end in range(done + step, stop + 1, step):
            update(data[(end - step) * width : end * width])
            digests.append(digest())
        num_tokens.extend(range((done + step) * block_size, stop * block_size + 1, step * block_size))
        done = stop
    return PromptMarks(digests, num_tokens)
