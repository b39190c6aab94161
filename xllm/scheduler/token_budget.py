"""Handing out a step's tokens: which of the wanting rows compute how many. Pure functions on arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_EMPTY = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class Share:
    """What some rows get of a step: int64 arrays of one length. tokens: known tokens to compute; drafts: draft tokens
    besides; wanted: what the row wants: where `tokens == wanted` it reaches its last known token and samples."""

    rows: np.ndarray
    tokens: np.ndarray
    drafts: np.ndarray
    wanted: np.ndarray

    def only(self, mask: np.ndarray) -> Share:
        """The share of the rows where `mask` (bool) is true."""
        return Share(self.rows[mask], self.tokens[mask], self.drafts[mask], self.wanted[mask])

    @property
    def cost(self) -> int:
        """Tokens of the step's budget that it takes."""
        return int(self.tokens.sum() + self.drafts.sum())


EMPTY_SHARE = Share(_EMPTY, _EMPTY, _EMPTY, _EMPTY)


@dataclass(slots=True)
class TokenBudget:
    """The tokens that a step may still compute (`left`), and the limits on one row's part of them."""

    max_tokens: int
    max_chunk: int  # longest prefill chunk of one row; 0: no limit
    allow_partial: bool  # chunked prefill
    max_drafts: int
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.max_tokens

    def reset(self) -> None:
        """Begin a new step: `left` is `max_tokens` again."""
        self.left = self.max_tokens

    def share(self, rows: np.ndarray, wanted: np.ndarray, room: np.ndarray, limit: np.ndarray | None = None) -> Share:
        """Share the budget out to the rows in their order: each gets what it wants while the budget lasts. Takes
        nothing from the budget yet (`take`).

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
        """Lower `left` to `max_tokens`. Without chunked prefill nothing changes: a prompt longer than that would never
        be admitted."""
        if self.allow_partial:
            self.left = min(self.left, max_tokens)

    def take(self, share: Share) -> None:
        """Subtract a share's cost from `left`."""
        self.left -= share.cost
        assert self.left >= 0
