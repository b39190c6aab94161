"""`FrameNetwork`: a TCP proxy that takes out, repeats or exchanges messages of zmq's protocol (ZMTP 3.1), without a
look into them: they are encrypted."""

from __future__ import annotations

import asyncio
import random
import struct

from tests.cluster.chaos.bad_network import BadNetwork

_GREETING_BYTES, _LONG = 64, 2  # of a connection's first piece; the flag of a frame whose size has 8 bytes
_SEALED = b"\x07MESSAGE"  # how a frame begins that CURVE has sealed


class FrameNetwork(BadNetwork):
    """It harms what comes from the target. to_harm: what it does to the next sealed messages, one after the other:
    "drop", "repeat", "exchange" (with the one behind it). rate: the share of others that is harmed in one of these
    ways. harmed: how often it did each."""

    def __init__(self, target: str, seed: int = 0):
        super().__init__(target)
        self.to_harm: list[str] = []
        self.rate = 0.0
        self.harmed = {"drop": 0, "repeat": 0, "exchange": 0}
        self._rng = random.Random(seed)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if peer is None or f"{peer[0]}:{peer[1]}" == self.target:
            await super()._carry(reader, writer)
            return
        held = b""
        try:
            left = _GREETING_BYTES  # which goes to and fro in parts
            while left:
                piece = await reader.read(left)
                if not piece:
                    return
                writer.write(piece)
                left -= len(piece)
            while True:
                frame = await _frame(reader)
                pieces, held, way = [frame, held] if held else [frame], b"", ""
                if len(pieces) == 1 and _body(frame).startswith(_SEALED):
                    way = self._way()
                if way:
                    self.harmed[way] += 1
                if way == "drop":
                    pieces = []
                elif way == "repeat":
                    pieces = [frame, frame]
                elif way == "exchange":
                    pieces, held = [], frame
                writer.write(b"".join(pieces))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            return

    def _way(self) -> str:
        if self.to_harm:
            return self.to_harm.pop(0)
        return self._rng.choice(list(self.harmed)) if self._rng.random() < self.rate else ""


async def _frame(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(1)
    size = await reader.readexactly(8 if head[0] & _LONG else 1)
    body = await reader.readexactly(struct.unpack(">Q", size)[0] if len(size) == 8 else size[0])
    return head + size + body


def _body(frame: bytes) -> bytes:
    return frame[9:] if frame[0] & _LONG else frame[2:]
