"""Handing out a step's tokens: which of the wanting rows compute how many. Pure functions on arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_EMPTY = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class Share:
    """What some rows get. Aligned int64 arrays; `wanted` tells whether a row reaches its last known token."""

    rows: np.ndarray
    tokens: np.ndarray
    drafts: np.ndarray
    wanted: np.ndarray

    def only(self, mask: np.ndarray) -> Share:
        return Share(self.rows[mask], self.tokens[mask], self.drafts[mask], self.wanted[mask])

    @property
    def cost(self) -> int:
        return int(self.tokens.sum() + self.drafts.sum())


EMPTY_SHARE = Share(_EMPTY, _EMPTY, _EMPTY, _EMPTY)


@dataclass(slots=True)
class TokenBudget:
    """How many tokens a step may compute, and how a row's part of them is limited."""

    max_tokens: int
    max_chunk: int  # longest prefill chunk of one row; 0: no limit
    allow_partial: bool  # chunked prefill
    max_drafts: int
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.max_tokens

    def reset(self) -> None:
        self.left = self.max_tokens

    def share(self, rows: np.ndarray, wanted: np.ndarray, room: np.ndarray, limit: np.ndarray | None = None) -> Share:
        """Give the rows, in their order, what they want as far as the budget goes; takes nothing yet.

        wanted: tokens until the row's last known one. room: tokens it may still produce (> 0). limit: tokens that the
        row may have in this step, 0: none; where prompts are not computed in parts it leaves them alone.
        Drafts go only to rows that want a single token, and never beyond `room`.
        """
        tokens = wanted
        if limit is not None:
            tokens = np.minimum(wanted, limit) if self.allow_partial else np.where(wanted == 1, limit, wanted)
            kept = tokens > 0
            rows, tokens, wanted, room = rows[kept], tokens[kept], wanted[kept], room[kept]
        if self.max_chunk and self.allow_partial:
            tokens = np.minimum(tokens, self.max_chunk)
        if self.max_drafts:
            drafts = np.where(wanted == 1, np.minimum(room - 1, self.max_drafts), 0)
        else:
            drafts = np.zeros(len(rows), dtype=np.int64)
        share = Share(rows, tokens, drafts, wanted)
        return share if share.cost <= self.left else self._trim(share)

    def _trim(self, share: Share) -> Share:
        cost = share.tokens + share.drafts
        left = np.maximum(self.left - (np.cumsum(cost) - cost), 0)
        tokens = np.minimum(share.tokens, left)
        if not self.allow_partial:
            tokens = np.where(tokens < share.wanted, 0, tokens)
        drafts = np.where(tokens == share.wanted, np.minimum(share.drafts, left - tokens), 0)
        return Share(share.rows, tokens, drafts, share.wanted).only(tokens > 0)

    def lower(self, max_tokens: int) -> None:
        """The step at hand may have so many tokens in all; where prompts are not computed in parts that would keep a
        long one out for ever, and nothing changes."""
        if self.allow_partial:
            self.left = min(self.left, max_tokens)

    def take(self, share: Share) -> None:
        self.left -= share.cost
        assert self.left >= 0
