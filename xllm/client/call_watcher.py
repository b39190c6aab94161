"""`CallWatcher`: hears which instance of a cluster has which request, and says what goes there with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from xllm.request import Request


class CallWatcher(Protocol):
    """Is told of each try to have a request answered, in this order: `sent`, then `lost` and `sent` again or not, and
    `left` at its end."""

    def sent(self, request: Request, place: str, reason: str) -> Request:
        """A request goes to the instance `place`, which was chosen for that reason. Returns it as it goes there."""

    def lost(self, request_ids: Iterable[str], cause: str, error: str) -> None:
        """Requests are not where they were sent any more, and have not ended. cause: lost, drained (the instance shuts
        down), busy (it had no room) or refused. error: what it says of a loss; else empty."""

    def left(self, request_ids: Iterable[str]) -> None:
        """Requests have ended. Some may have been sent nowhere."""


class NoCallWatcher:
    """Lets requests go as they are."""

    def sent(self, request: Request, place: str, reason: str) -> Request:
        """See `CallWatcher`."""
        return request

    def lost(self, request_ids: Iterable[str], cause: str, error: str) -> None:
        """See `CallWatcher`."""

    def left(self, request_ids: Iterable[str]) -> None:
        """See `CallWatcher`."""
