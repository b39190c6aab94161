"""`BadNetwork`: a TCP proxy that cuts, delays, swallows or garbles what goes through it."""

from __future__ import annotations

import asyncio
import contextlib


class BadNetwork:
    """Before `target` (HOST:PORT), at `address`. Belongs to the event loop that opens it.

    is_cut: no new connections. is_swallowing: what comes is lost, the connections stay. delay_s: of each piece.
    to_flip: one bit of the next so many pieces is turned over.
    """

    def __init__(self, target: str):
        self.target = target
        self.is_cut = self.is_swallowing = False
        self.delay_s = 0.0
        self.to_flip = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> BadNetwork:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    @property
    def is_open(self) -> bool:
        return self._server is not None

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break all connections, by resets."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        while self._tasks:
            self.cut()
            await asyncio.wait(self._tasks, timeout=0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        ends = [writer]
        try:
            if self.is_cut:
                return
            there, out = await asyncio.open_connection(*self.target.rsplit(":", 1))
            ends.append(out)
            self._writers.add(out)
            ways = [asyncio.create_task(self._carry(reader, out)), asyncio.create_task(self._carry(there, writer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            return
        finally:
            for end in ends:
                self._writers.discard(end)
                end.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(2**16):
                if self.is_swallowing:
                    continue
                if self.to_flip:
                    self.to_flip -= 1
                    at = len(piece) // 2
                    piece = piece[:at] + bytes([piece[at] ^ 4]) + piece[at + 1:]
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(piece)
                await writer.drain()
