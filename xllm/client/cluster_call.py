"""`ClusterCall`: the stream of one call to a cluster, which goes on when the instance that had its requests is lost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from xllm.client.commanding import CommandingClient
from xllm.client.engine_client import Stream
from xllm.request import FinishReason, OutputDelta, Request
from xllm.routing.prompt_marks import PromptMarks


class CallKeeper(Protocol):
    """What a call tells whoever finds its instances."""

    def begun(self, call: ClusterCall, request_id: str) -> None:
        """The first output of a request has come."""

    def left(self, call: ClusterCall, request_ids: Sequence[str]) -> None:
        """Requests have ended, or were given up by their reader."""

    def lost(self, call: ClusterCall, place: str, error: Exception) -> None:
        """The instance `place` has none of its open requests any more, or refuses them."""


@dataclass(slots=True)
class Tries:
    """What instances have said to a call. lost: those that were lost while they had it, and why. busy: those whose
    queue had no room. refused: those that cannot go on with what others have begun, and why. since_s: since when it has
    not been at one that has taken it, on the `time.monotonic()` clock; None: it is."""

    lost: list[tuple[str, str]] = field(default_factory=list)
    busy: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    since_s: float | None = None


class ClusterCall(Stream):
    """All open requests are at one instance, or at none while another one is looked for.

    requests: as they are sent to the first instance. model: the fingerprint of the one that answers them. adapters:
    those that they ask for and that are known, with the digests of their files. place: the name of the instance that
    has them; None: none. The deltas of every instance go straight into this stream, so that passing one on copies its
    tokens and makes no object.
    """

    def __init__(self, requests: Sequence[Request], model: str | None, adapters: Collection[tuple[str, str]],
                 keeper: CallKeeper):
        super().__init__(requests, self._withdraw)
        self.model = model
        self.adapters = frozenset(adapters)
        # Of its prompts, by the size of a block and the id of the prompt's tokens, which the requests hold.
        self.marks: dict[tuple[int, int], PromptMarks] = {}
        self.place: str | None = None
        self.tries = Tries()
        self._requests = {request.request_id: request for request in requests}
        self._token_ids: dict[str, list[int]] = {request.request_id: [] for request in requests}  # passed on
        self._client: CommandingClient | None = None
        self._keeper = keeper
        self._is_moved = False  # to a second instance, or a later one
        self._aborted = set[str]()  # of which the terminal delta has not come
        self._preempted: dict[str, int] = {}  # at its instance, and at those before, by request id: where not 0
        self._preempted_before: dict[str, int] = {}

    @property
    def rest(self) -> list[Request]:
        """The open requests, each behind the tokens that have been passed on."""
        return [replace(request, generated_token_ids=(*request.generated_token_ids, *passed))
                if (passed := self._token_ids[request_id]) else request
                for request_id, request in self._requests.items() if request_id in self.open_ids]

    def send(self, client: CommandingClient, place: str, requests: Sequence[Request]) -> None:
        """Hand the open requests to an instance. Raises EngineDeadError: it takes none."""
        self._client, self.place = client, place
        try:
            client.submit_for(self, requests)
        except BaseException:
            self._client = self.place = None
            raise

    def take_back(self) -> None:
        """Abort the open requests where they are, and go on nowhere until they are sent again. Those that were to be
        aborted anyway have ended then."""
        if self._client is not None:
            self._client.drop(list(self.open_ids))
            self.end_aborted(list(self._aborted))
            self._client = self.place = None
            self._is_moved = True
            for request_id, number in self._preempted.items():
                self._preempted_before[request_id] = self._preempted_before.get(request_id, 0) + number
            self._preempted.clear()

    def end_aborted(self, request_ids: Sequence[str]) -> None:
        """End requests that no instance has as one would: each reader gets a terminal delta."""
        for request_id in request_ids:
            if request_id in self.open_ids:
                self.push(OutputDelta(request_id, [], finish_reason=FinishReason.ABORT))

    def abort_at(self, request_ids: Sequence[str]) -> None:
        """End requests; each gets its terminal delta from where it is."""
        if self._client is None:
            self.end_aborted(request_ids)
        else:
            self._aborted.update(self.open_ids.intersection(request_ids))
            self._client.abort(request_ids)

    def _withdraw(self, request_ids: Sequence[str]) -> None:
        if self._client is not None:
            self._client.drop(request_ids)
        self._keeper.left(self, request_ids)

    # --- for the client of the instance

    def push(self, delta: OutputDelta) -> None:
        """Pass a delta on."""
        request_id = delta.request_id
        passed = self._token_ids[request_id]
        if self._is_moved or delta.num_preemptions:
            self._mend(delta)
        if not passed:
            self._keeper.begun(self, request_id)
        passed += delta.token_ids
        super().push(delta)
        if delta.finish_reason is not None:
            self._keeper.left(self, (request_id,))

    def _mend(self, delta: OutputDelta) -> None:
        """Have the figures of a request that was moved say what they would have said had it stayed."""
        request_id = delta.request_id
        if self._is_moved and self._token_ids[request_id]:  # what was cached to begin with the first one has said
            delta.num_cached_tokens, delta.cached_by_tier = 0, None
        if delta.num_preemptions:
            self._preempted[request_id] = delta.num_preemptions
        delta.num_preemptions += self._preempted_before.get(request_id, 0)

    def admit(self) -> None:
        """See `Stream.admit`."""
        self.tries.since_s = None
        self.tries.busy.clear()
        super().admit()

    def schedule(self, request_id: str, at_s: float) -> None:
        """See `Stream.schedule`. Once it has begun to answer it never counts as waiting again."""
        if not self._token_ids[request_id]:
            super().schedule(request_id, at_s)

    def lose(self, error: Exception) -> None:
        """See `Stream.lose`: another instance may go on."""
        place = self.place
        self.take_back()
        if self.open_ids and place is not None:
            self._keeper.lost(self, place, error)
