"""`Way`: the connection of one rank to one rank of another instance, over which KV blocks are sent."""

from __future__ import annotations

import numpy as np

from xllm.kv_layout import KVLayout
from xllm.kv_offer import KVOffer, RankWindow
from xllm.transfer.relay import Relay
from xllm.transfer.transport import Peer
from xllm.transfer.transports import connect


class Way:
    """Made and used by one thread. layout: of the sending rank, in the number format of the window's. Raises
    TransferError if the two do not fit together."""

    def __init__(self, layout: KVLayout, window: RankWindow):
        self.layout, self.window = layout, window
        self.relay = Relay(layout, window.layout)
        self._peer: Peer | None = None
        self._begun = set[int]()  # offers for which something was put

    def put(self, offer: KVOffer, first: int, layer: int, layer_BX: np.ndarray) -> None:
        """Write one layer of blocks first, first + 1, ... of the path to where they belong there."""
        placed, counts = [], np.zeros(len(offer.slots), dtype=np.int32)
        for piece in self.relay.pieces(layer, first, layer_BX):
            block = piece.block - offer.first_block
            if 0 <= block < len(offer.slots):
                placed.append((offer.slots[block] * self.window.block_bytes + piece.offset, piece.data))
                counts[block] += len(piece.data)
        blocks = np.flatnonzero(counts)
        note = np.stack((blocks + offer.first_block, counts[blocks]), axis=1).astype(np.int32).tobytes()
        if placed:
            self._put(offer, placed, note)

    def _put(self, offer: KVOffer, placed: list[tuple[int, memoryview]], note: bytes) -> None:
        self.peer.put(offer.number, offer.key, placed, note)
        self._begun.add(offer.number)

    def finish(self, offer: KVOffer) -> None:
        """Say that no more comes for this offer, and wait until all of it has arrived. Raises TransferError."""
        if offer.number not in self._begun:
            self._put(offer, [], b"")
        self._begun.discard(offer.number)
        self.peer.finish(offer.number)

    def connect(self) -> None:
        """Connect, if that has not been done. Raises TransferError."""
        if self._peer is None:
            self._peer = connect(self.window.addresses, num_senders=self.relay.num_peers)

    @property
    def peer(self) -> Peer:
        """Connects at the first use. Raises TransferError."""
        self.connect()
        assert self._peer is not None
        return self._peer

    def close(self) -> None:
        """End the connection; the next use makes another one."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None
            self._begun.clear()
