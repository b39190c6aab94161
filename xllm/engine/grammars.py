"""`GrammarGate`: keeps requests until every worker has compiled their grammar, so that no step waits for a compiler."""

from __future__ import annotations

from collections import OrderedDict

from xllm.engine.gates import Held
from xllm.errors import RequestError
from xllm.request import Request
from xllm.structured.spec import StructuredOutput
from xllm.worker.link import WorkerLink
from xllm.worker.messages import GrammarDone, PutGrammar

MAX_KNOWN = 64  # grammars whose result is remembered: as many as workers keep (`structured/store.py: MAX_GRAMMARS`)


class GrammarGate(Held):
    """A `Gate`. has_tokenizer: without one no grammar can be compiled, and requests with one are refused."""

    reason = "grammar"

    def __init__(self, link: WorkerLink, *, has_tokenizer: bool):
        super().__init__()
        self._link, self._has_tokenizer = link, has_tokenizer
        self._num_asked = 0  # answers of the workers that are to come
        self._known: OrderedDict[StructuredOutput, str | None] = OrderedDict()  # why it cannot be compiled; None: it is
        self._passed: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self._held or self._passed or self._ended)

    def hold(self, request: Request) -> bool:
        """Have the request's grammar compiled, and keep the request until it is. Raises RequestError if it cannot be
        compiled."""
        spec = request.sampling.structured
        if spec is None:
            return False
        if not self._has_tokenizer:
            raise RequestError("structured outputs need a tokenizer, and skip_tokenizer_init is set",
                               field="structured")
        if request.request_id in self._held:
            raise RequestError(f"request id {request.request_id!r} is in use", field="request_id")
        self._link.send(PutGrammar(spec))  # the workers keep those that were asked for last: a known one as well
        self._num_asked += 1
        if spec in self._known:
            self._known.move_to_end(spec)
            if (error := self._known[spec]) is not None:
                raise _cannot_compile(error)
            return False
        self._held[request.request_id] = request
        return True

    def hear(self) -> None:
        """Take in which grammars the workers have compiled, and which they cannot."""
        for answer in self._link.take(GrammarDone) if self._num_asked else ():
            self._num_asked -= 1
            self._known[answer.spec] = answer.error
            self._known.move_to_end(answer.spec)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
            waiting = [request for request in self._held.values() if request.sampling.structured == answer.spec]
            for request in waiting:
                del self._held[request.request_id]
                if answer.error is None:
                    self._passed.append(request)
                else:
                    self.refuse(request, _cannot_compile(answer.error))

    def take_passed(self) -> list[Request]:
        """Return the requests whose grammar every worker has compiled."""
        passed, self._passed = self._passed, []
        return passed


def _cannot_compile(error: str) -> RequestError:
    return RequestError(f"structured: {error}", field="structured")
