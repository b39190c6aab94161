"""`Successor`: requests at an instance that has not taken them yet, while another one goes on with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from xllm.client.commanding import CommandingClient
from xllm.client.engine_client import EngineBusyError, Stream
from xllm.request import OutputDelta, Request

# For an instance to take what it is asked to. Chosen: many times the way there and back; what its readers are to get
# meanwhile is held back.
TAKES_S = 2.0


class Successor(Stream):
    """After `send` either on_taken() or on_failed(error) is called once, unless it is closed before."""

    def __init__(self, requests: Sequence[Request], client: CommandingClient, place: str,
                 on_taken: Callable[[], None], on_failed: Callable[[Exception], None]):
        super().__init__(requests, client.drop)
        self.client, self.place, self._requests = client, place, requests
        self._on_taken, self._on_failed = on_taken, on_failed
        late = EngineBusyError(f"not taken within {TAKES_S:g} s")
        self._timer = asyncio.get_running_loop().call_later(TAKES_S, self.lose, late)

    def send(self) -> None:
        """Ask the instance. Raises EngineDeadError: it takes none; nothing is called then."""
        try:
            self.client.submit_for(self, self._requests)
        except BaseException:
            self._timer.cancel()
            raise

    def admit(self) -> None:
        """See `Stream.admit`."""
        self._timer.cancel()
        self._on_taken()

    def lose(self, error: Exception) -> None:
        """See `Stream.lose`."""
        on_failed = self._on_failed
        self.close()
        on_failed(error)

    def give_to(self, stream: Stream) -> list[OutputDelta]:
        """Have what comes from now on go to another stream, of whose requests these are; drop those that ended. What
        has come before they were all taken is returned."""
        self._timer.cancel()
        self._on_taken = stream.admit
        self.client.drop(list(self.open_ids - stream.open_ids))
        self.client.redirect(self.open_ids & stream.open_ids, stream)
        return [delta for delta in self.take() if delta.request_id in stream.open_ids]

    def _leave(self, request_ids: Sequence[str]) -> None:
        super()._leave(request_ids)
        if not self.open_ids:
            self._timer.cancel()
            self._on_taken, self._on_failed = lambda: None, lambda error: None
