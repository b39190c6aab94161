"""`ClusterCall`: the stream of one call to a cluster, which goes on when the instance that had its requests is lost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from xllm.client.commanding import CommandingClient
from xllm.client.engine_client import Stream
from xllm.client.successor import Successor
from xllm.kv_offer import KVOffer
from xllm.request import FinishReason, OutputDelta, Request
from xllm.routing.prompt_marks import PromptMarks
from xllm.routing.recovery import TRIAL_OUTPUTS, is_suspect


class CallKeeper(Protocol):
    """What a call tells whoever finds its instances."""

    def begun(self, call: ClusterCall, request_id: str) -> None:
        """The first output of a request has come from where it is."""

    def proven(self, call: ClusterCall) -> None:
        """Its instance has outlived the first steps of all its requests."""

    def left(self, call: ClusterCall, request_ids: Sequence[str]) -> None:
        """Requests have ended, or were given up by their reader."""

    def lost(self, call: ClusterCall, place: str, error: Exception) -> None:
        """The instance `place` has none of its open requests any more, or refuses them."""

    def stays(self, call: ClusterCall, request_id: str) -> None:
        """The KV of a request cannot be sent to another instance."""

    def handed_over(self, call: ClusterCall, place: str) -> None:
        """The instance `place` has sent the KV of all its open requests to another one, and has them no more."""

    def moved(self, call: ClusterCall, place: str) -> None:
        """Its open requests are at its successor, and at `place` no more."""

    def not_taken(self, call: ClusterCall, place: str, error: Exception) -> None:
        """The instance `place`, which was to be its successor, has not taken it."""


@dataclass(slots=True)
class Loss:
    """An instance that was lost under a call. life: its incarnation; None: that lives on. was_taken: it had taken the
    call. counts: it may have died of the call."""

    place: str
    life: str | None
    reason: str
    was_taken: bool
    counts: bool = False


@dataclass(slots=True)
class Tries:
    """What instances have said to a call. lost: those that were lost while they had it. busy: those whose queue had no
    room. refused: those that cannot go on with what others have begun, and why. since_s: since when it has not been at
    one that has taken it, on the `time.monotonic()` clock; None: it is."""

    lost: list[Loss] = field(default_factory=list)
    busy: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    since_s: float | None = None

    @property
    def num_counted(self) -> int:
        """Instances that may have died of it."""
        return sum(loss.counts for loss in self.lost)


class ClusterCall(Stream):
    """All open requests are at one instance, or at none while another one is looked for.

    requests: as they are sent to the first instance. model: the fingerprint of the one that answers them. adapters:
    those that they ask for and that are known, with the digests of their files. place: the name of the instance that
    has them; None: none. has_taken: it has said that it has taken them. The deltas of every instance go straight into
    this stream, so that passing one on copies its tokens and makes no object.
    """

    def __init__(self, requests: Sequence[Request], model: str | None, adapters: Collection[tuple[str, str]],
                 keeper: CallKeeper):
        super().__init__(requests, None)  # no method of its own: what holds itself waits for the garbage collector
        self.model = model
        self.adapters = frozenset(adapters)
        # Of its prompts, by the size of a block and the id of the prompt's tokens, which the requests hold.
        self.marks: dict[tuple[int, int], PromptMarks] = {}
        self.place: str | None = None
        self.has_taken = False
        self.tries = Tries()
        self._requests = {request.request_id: request for request in requests}
        self._token_ids: dict[str, list[int]] = {request.request_id: [] for request in requests}  # passed on
        self._client: CommandingClient | None = None
        self._keeper = keeper
        self._is_moved = False  # to a second instance, or a later one
        self._aborted = set[str]()  # of which the terminal delta has not come
        self._preempted: dict[str, int] = {}  # at its instance, and at those before, by request id: where not 0
        self._preempted_before: dict[str, int] = {}
        self._young: dict[str, int] = {}  # how many outputs have come from where it is, by request id: where so few
        self._successor: Successor | None = None
        self._offered = set[str]()  # requests of which the KV is to go elsewhere: one of each prompt
        self._handed = set[str]()  # requests that its instance has handed over
        self._held: list[OutputDelta] = []  # what has come since the successor was asked, which computes it again

    @property
    def is_aborted(self) -> bool:
        """All that is open is to be aborted."""
        return self.open_ids <= self._aborted

    @property
    def unaborted(self) -> list[Request]:
        """Of `rest` what is not to be aborted."""
        return [request for request in self.rest if request.request_id not in self._aborted]

    @property
    def on_trial(self) -> bool:
        """It may be what instances died of, and its instance has not outlived its first steps, or had not."""
        return is_suspect(self.tries.num_counted) and not self._young.keys().isdisjoint(self.open_ids)

    @property
    def has_output(self) -> bool:
        """Whether anything of any of its requests has come."""
        return any(request.generated_token_ids for request in self.rest)

    @property
    def next_place(self) -> str | None:
        """The name of the instance that was asked to take it from the one that has it."""
        return None if self._successor is None else self._successor.place

    @property
    def rest(self) -> list[Request]:
        """The open requests, each behind the tokens that have been passed on."""
        return [replace(request, generated_token_ids=(*request.generated_token_ids, *passed))
                if (passed := self._token_ids[request_id]) else request
                for request_id, request in self._requests.items() if request_id in self.open_ids]

    def send(self, client: CommandingClient, place: str, requests: Sequence[Request]) -> None:
        """Hand the open requests to an instance. Raises EngineDeadError: it takes none."""
        self._begin(client, place)
        self._offered = {request.request_id for request in requests if request.offer is not None}
        try:
            client.submit_for(self, requests)
        except BaseException:
            self._client = self.place = None
            raise

    def _begin(self, client: CommandingClient, place: str) -> None:
        self._client, self.place, self.has_taken = client, place, False
        self._young = dict.fromkeys(self.open_ids, 0)

    def take_back(self) -> None:
        """Abort the open requests where they are, and go on nowhere until they are sent again. Those that were to be
        aborted anyway have ended then."""
        if self._client is not None:
            self._client.drop(list(self.open_ids))
            self.end_aborted(list(self._aborted))
            self._client = self.place = None
            self._is_moved = True
            self._handed.clear()
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

    def depart(self, request_id: str, offer: KVOffer) -> None:
        """Have the instance send the KV of a request to another one, where the call goes on then."""
        if self._client is not None:
            self._offered.add(request_id)
            self._client.depart(request_id, offer)

    def _withdraw(self, request_ids: Sequence[str]) -> None:
        """See `Stream._withdraw`."""
        if self._client is not None:
            self._client.drop(request_ids)
        self._keeper.left(self, request_ids)
        self._forget_next(request_ids)

    # --- going over from an instance that ends in order

    def hand_over(self, client: CommandingClient, place: str, requests: Sequence[Request]) -> None:
        """Ask another instance to go on with the open requests. The one that has them goes on until that has taken
        them; what comes from it meanwhile is held back, and passed on only if the other one does not take them: it
        would compute the same again. Raises EngineDeadError: it takes none."""
        self._successor = successor = Successor(requests, client, place, self._go_over, self._stay)
        try:
            successor.send()
        except BaseException:
            self._successor = None
            raise

    def _go_over(self) -> None:
        self._move()
        self.admit()

    def _move(self) -> None:
        """The open requests are the successor's from now on."""
        successor, client, place = self._successor, self._client, self.place
        assert successor is not None and client is not None and place is not None
        client.drop(list(self.open_ids))
        self.end_aborted(list(self._aborted))
        self._successor, self._held = None, []
        self.take_back()
        early = successor.give_to(self)
        if self.open_ids:
            self._begin(successor.client, successor.place)
            self._keeper.moved(self, place)
        for delta in early:
            self.push(delta)

    def _stay(self, error: Exception) -> None:
        successor, self._successor = self._successor, None
        held, self._held = self._held, []
        for delta in held:
            self.push(delta)
        if successor is not None and self.open_ids:
            self._keeper.not_taken(self, successor.place, error)
        self._look_at_handed()

    def _is_held(self, delta: OutputDelta) -> bool:
        """Keep a delta back; False: it is to be passed on, since it is the request's end. What was held of that has
        been passed on then."""
        if delta.finish_reason is None:
            self._held.append(delta)
            return True
        request_id, (successor, self._successor) = delta.request_id, (self._successor, None)
        mine = [held for held in self._held if held.request_id == request_id]
        self._held = [held for held in self._held if held.request_id != request_id]
        for held in mine:
            self.push(held)
        self._successor = successor
        return False

    def _forget_next(self, request_ids: Sequence[str]) -> None:
        """Requests have ended that the successor was asked to take, too."""
        if self._successor is not None:
            self._held = [delta for delta in self._held if delta.request_id not in request_ids]
            for request_id in request_ids:
                self._successor.abort(request_id)
            if not self._successor.open_ids:
                self._successor = None

    # --- for the client of the instance

    def push(self, delta: OutputDelta) -> None:
        """Pass a delta on."""
        if delta.finish_reason is FinishReason.HANDED_OVER:
            self._handed.add(delta.request_id)
            self._look_at_handed()
            return
        if self._successor is not None and self._is_held(delta):
            return
        request_id = delta.request_id
        if self._is_moved or delta.num_preemptions:
            self._mend(delta)
        if self._young:
            self._grow(request_id, is_end=delta.finish_reason is not None)
        self._token_ids[request_id] += delta.token_ids
        super().push(delta)
        if delta.finish_reason is not None:
            self._keeper.left(self, (request_id,))
            self._forget_next((request_id,))
            self._look_at_handed()

    def stay(self, request_id: str) -> None:
        """See `Stream.stay`. Where others of the call have been handed over it goes on with them, without its KV."""
        self._offered.discard(request_id)
        self._keeper.stays(self, request_id)
        self._look_at_handed()

    def _look_at_handed(self) -> None:
        """Go on elsewhere once all requests were handed over that had an offer: with them goes the KV of every prompt.
        If a successor was asked that goes on instead."""
        place = self.place
        is_enough = self._handed and self.open_ids & self._offered <= self._handed
        if self._successor is None and place is not None and is_enough:
            self.take_back()
            if self.open_ids:
                self._keeper.handed_over(self, place)

    def _grow(self, request_id: str, *, is_end: bool) -> None:
        """Count the first outputs from where it is."""
        if (number := self._young.pop(request_id, None)) is None:
            return
        if not number:
            self._keeper.begun(self, request_id)
        if number + 1 < TRIAL_OUTPUTS and not is_end:
            self._young[request_id] = number + 1
        elif not self._young:
            self._keeper.proven(self)

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
        self.has_taken = True
        self.tries.since_s = None
        self.tries.busy.clear()
        super().admit()

    def schedule(self, request_id: str, at_s: float) -> None:
        """See `Stream.schedule`. Once it has begun to answer it never counts as waiting again."""
        if not self._token_ids[request_id]:
            super().schedule(request_id, at_s)

    def lose(self, error: Exception) -> None:
        """See `Stream.lose`: another instance may go on."""
        if self._successor is not None:
            self._move()
            return
        place = self.place
        self.take_back()
        if self.open_ids and place is not None:
            self._keeper.lost(self, place, error)
