"""`GraphKey` and the rules that find one: which shapes are captured, and how a step is padded to one of them.

Letters: T tokens, S rows. A padded step has the bucket's T and S; every padding token belongs to a padding row, because
some kernels want the last offset of `query_start_S1` to be T, and every padding row has at least one token, because
some cannot have an empty one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

DECODE, VERIFY, MIXED = "decode", "verify", "mixed"
FINE = (1, 2, 4, 8, 16)  # buckets up to 16, powers of two: padding stays below a factor of two where a step is short


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphKey:
    """What determines the launches of a step, and nothing else: everything else lies in static buffers.

    kind: "decode" (one token a row), "verify" (up to 1 + draft_length tokens a row), "mixed" (any).
    num_tokens, num_seqs: the bucket. layout: how the KV blocks of a row are found. ends_with: what is computed last.
    lora: each token has an adapter. What layout and ends_with may say is the runner's (`xllm/runner/graphs.py`).
    """

    kind: str
    num_tokens: int
    num_seqs: int
    draft_length: int = 0
    layout: str = ""
    ends_with: str = ""
    lora: bool = False

    @property
    def name(self) -> str:
        """Without the sizes, as metrics show it: "decode-table-tokens", with "-lora" behind it."""
        return "-".join(part for part in (self.kind, self.layout, self.ends_with, "lora" if self.lora else "") if part)

    @property
    def max_query_len(self) -> int:
        """The most tokens that a row of such a step may have."""
        return {DECODE: 1, VERIFY: 1 + self.draft_length}.get(self.kind, self.num_tokens)


def bucket_sizes(limit: int, step: int = 16) -> tuple[int, ...]:
    """Powers of two to 16, then multiples of `step`, none above `limit`, which is a bucket itself.

    Fine steps keep padding below a factor of two where a step is short and below `step` rows elsewhere.
    """
    return (*(size for size in (*FINE, *range(16 + step, limit, step)) if size < limit), limit)


def power_sizes(limit: int) -> tuple[int, ...]:
    """Powers of two below `limit`, and `limit`; nothing for 0."""
    return (*(2**i for i in range(limit.bit_length()) if 2**i < limit), limit) if limit else ()


def at_least(sizes: tuple[int, ...], size: int) -> int | None:
    """The smallest of rising `sizes` that is not below `size`."""
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRules:
    """Which keys exist.

    max_seqs: rows of the longest step that is captured. draft_length: the most drafts of a row (0: no speculation).
    max_mixed_tokens: steps with longer chunks are captured up to that many tokens (0: none). step: of the buckets.
    """

    max_seqs: int
    draft_length: int = 0
    max_mixed_tokens: int = 0
    step: int = 16

    def find(self, num_tokens: int, num_seqs: int, longest: int) -> GraphKey | None:
        """The smallest key that a step fits: `num_seqs` rows with `num_tokens` tokens in all, `longest` at most."""
        if num_seqs > self.max_seqs:
            return None
        if longest == 1:
            size = at_least(self._seq_sizes(), num_seqs)
            return None if size is None else GraphKey(kind=DECODE, num_tokens=size, num_seqs=size)
        if longest <= 1 + self.draft_length:
            kind, token_sizes, draft_length = VERIFY, self._verify_sizes(), self.draft_length
        else:
            kind, token_sizes, draft_length = MIXED, power_sizes(self.max_mixed_tokens), 0
        found = self._fit(num_tokens, num_seqs, token_sizes, 1 + draft_length if draft_length else None)
        if found is None:
            return None
        return GraphKey(kind=kind, num_tokens=found[0], num_seqs=found[1], draft_length=draft_length)

    def decode_keys(self, num_seqs: int) -> list[GraphKey]:
        """The keys of decode steps of up to so many rows, the smallest first."""
        sizes = self._seq_sizes()
        end = at_least(sizes, min(num_seqs, self.max_seqs)) if num_seqs else 0
        return [GraphKey(kind=DECODE, num_tokens=size, num_seqs=size)
                for size in sizes if end is not None and size <= end]

    def _fit(self, num_tokens: int, num_seqs: int, token_sizes: tuple[int, ...],
             most: int | None) -> tuple[int, int] | None:
        """(T, S) with the smallest T, then the smallest S, whose padding rows can take the padding tokens, one to
        `most` each (None: any number)."""
        seq_sizes = self._ragged_seq_sizes()
        for size in token_sizes[bisect_left(token_sizes, num_tokens):]:
            padding = size - num_tokens
            fewest_rows = -(-padding // (most or max(1, padding)))
            rows = at_least(seq_sizes, num_seqs + fewest_rows)
            if rows is not None and rows <= num_seqs + padding:
                return size, rows
        return None

    def _seq_sizes(self) -> tuple[int, ...]:
        return bucket_sizes(self.max_seqs, self.step)

    def _ragged_seq_sizes(self) -> tuple[int, ...]:
        """Beyond max_seqs there is room for padding rows, also when every row is in use."""
        return bucket_sizes(self.max_num_seqs, self.step)

    def _verify_sizes(self) -> tuple[int, ...]:
        return bucket_sizes(self.max_seqs * (1 + self.draft_length) + self.step, self.step) if self.draft_length else ()

    @property
    def max_num_seqs(self) -> int:
        """The largest S of any key."""
        return self.max_seqs + self.step if self.draft_length or self.max_mixed_tokens else self.max_seqs

    @property
    def max_num_tokens(self) -> int:
        """The largest T of any key."""
        return max(self.max_seqs, self.max_mixed_tokens, *self._verify_sizes(), 1)


def padding_lengths(key: GraphKey, num_tokens: int, num_seqs: int) -> np.ndarray:
    """Tokens of each padding row, as even as can be: int32 [key.num_seqs - num_seqs].

    Such a row is a sequence of just these tokens, at positions 0, 1, ... It has that many positions to attend to, all
    of them readable (`Capturer.pad_block`), rather than none: kernels divide by the sum of the weights, and some of
    them refuse an empty sequence.
    """
    rows, tokens = key.num_seqs - num_seqs, key.num_tokens - num_tokens
    if not rows:
        assert not tokens, "padding tokens without a row"
        return np.zeros(0, dtype=np.int32)
    assert rows <= tokens <= rows * key.max_query_len, "the step does not fit its key"
    lengths = np.full(rows, tokens // rows, dtype=np.int32)
    lengths[: tokens % rows] += 1
    return lengths
