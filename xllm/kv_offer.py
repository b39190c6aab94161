"""`KVOffer`: what an instance says to another that is to send it KV: where to, which blocks, and how they lie there."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.kv_layout import KVLayout

NOTHING_MISSING = "nothing is missing"  # why there is no offer: the request had best begin where it was to be sent


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWindow:
    """The memory of one rank that may be written to. addresses: ways to it, the best first
    (`xllm/transfer/transports.py`). block_bytes: from one slot to the next."""

    addresses: tuple[str, ...]
    layout: KVLayout
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVOffer:
    """One request's KV is expected. number: of the grant, in this life of the receiver. key: what a sender shows to be
    let in. first_block: of the request's full blocks (of the receiver's size) the first that is missing there; block
    first_block + i belongs in slot slots[i] of each window. lease_s: from when the offer was made."""

    number: int
    key: bytes
    first_block: int
    slots: tuple[int, ...]
    lease_s: float
    windows: tuple[RankWindow, ...]

    @property
    def block_size(self) -> int:
        """Positions of a block at the receiver."""
        return self.windows[0].layout.block_size
