"""`LandingGate`: keeps requests whose KV is on its way from another instance until it is there, or will not come."""

from __future__ import annotations

from xllm.engine.gates import Held
from xllm.errors import RequestError
from xllm.kv.landing import Lander
from xllm.request import Request
from xllm.scheduler.kv_waits import Promotions


class LandingGate(Held):
    """A `Gate`. What a request finds cached when it passes is a matter of the prefix match: nothing is lost where
    nothing came."""

    reason = "transfer"

    def __init__(self, lander: Lander | None, promotions: Promotions):
        super().__init__()
        self._lander, self._promotions = lander, promotions

    @property
    def has_work(self) -> bool:
        return bool(self._held or self._ended)

    def hold(self, request: Request) -> bool:
        """Keep the request while blocks may come for it. Raises RequestError if its id is in use here."""
        if request.request_id in self._held:
            raise RequestError(f"request id {request.request_id!r} is in use", field="request_id")
        if not self._is_landing(request):
            return False
        self._held[request.request_id] = request
        return True

    def _is_landing(self, request: Request) -> bool:
        return (self._lander is not None and request.landing is not None
                and self._lander.is_landing(request.landing, self._promotions.now_s))

    def abort(self, request_id: str) -> bool:
        """See `Gate.abort`. What has come for it stays cached for others; nothing more comes, unless another request
        waits for the same KV."""
        request = self._held.get(request_id)
        is_held = super().abort(request_id)
        if (request is not None and request.landing is not None and self._lander is not None
                and not any(other.landing == request.landing for other in self._held.values())):
            self._lander.revoke(request.landing)
        return is_held

    def hear(self) -> None:
        """Take in what has landed."""
        if self._held:
            self._promotions.poll()

    def take_passed(self) -> list[Request]:
        """Return the requests whose KV is there, or will not come."""
        passed = [request for request in self._held.values() if not self._is_landing(request)]
        for request in passed:
            del self._held[request.request_id]
        return passed
