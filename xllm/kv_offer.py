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

    def __post_init__(self) -> None:
        if self.layout.block_size < 1 or not 0 < self.block_bytes < 2**63:
            raise ValueError(f"no window has blocks of {self.layout.block_size} tokens and {self.block_bytes} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVOffer:
    """One request's KV is expected. number: of the grant, in this life of the receiver. key: what a sender shows to be
    let in. first_block: of the request's full blocks (of the receiver's size) the first that is missing there; block
    first_block + i belongs in slot slots[i] of each window. lease_s: from when the offer was made.

    Raises ValueError for what no receiver says: it comes from another machine."""

    number: int
    key: bytes
    first_block: int
    slots: tuple[int, ...]
    lease_s: float
    windows: tuple[RankWindow, ...]

    def __post_init__(self) -> None:
        if len({window.layout.block_size for window in self.windows}) != 1:
            raise ValueError("an offer has windows, and their blocks are of one size")
        if not (0 <= self.number < 2**63 and 0 <= self.first_block < 2**31 and self.key):
            raise ValueError(f"no offer has number {self.number}, block {self.first_block} or an empty key")
        if not all(0 <= slot < 2**31 for slot in self.slots):
            raise ValueError("the slots of an offer are 0 and more")

    @property
    def block_size(self) -> int:
        """Positions of a block at the receiver."""
        return self.windows[0].layout.block_size
