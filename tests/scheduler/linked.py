"""Two simulated engines, one of which sends KV to the other: what the workers and the network do, as dice say."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from tests.kv.manual_lanes import ManualLanes
from tests.scheduler.harness import EOS, expected
from tests.scheduler.tiered import MemoryMover, TieredSimulation
from xllm.kv.block import block_digests
from xllm.kv.landing import Lander
from xllm.kv.moves import LAND, NO_TICKET, TRANSFERS, Move, MoveDone, MoveError
from xllm.kv.outbox import Outbox
from xllm.kv.tickets import TicketBoard
from xllm.kv_layout import KVLayout
from xllm.kv_offer import KVOffer, RankWindow
from xllm.request import FinishReason, Request, SamplingParams

LEASE_S = 10.0


@dataclass
class Grant:
    """What may be written at the receiver. tokens: which of a block's have come, for each half of it (its "layers")."""

    move: Move
    tokens: np.ndarray
    is_over: bool = False


@dataclass
class LinkedLanes(ManualLanes):
    """Lanes of one engine, with those to and from the other one."""

    performer: object
    rng: random.Random
    mover: MemoryMover
    board: TicketBoard
    peer: LinkedLanes | None = None
    num_faults: int = 0
    fault_rate: float = 0.0
    grants: dict[int, Grant] = field(default_factory=dict)
    sending: deque[Move] = field(default_factory=deque)

    def __init__(self, lanes: ManualLanes, rng: random.Random, mover: MemoryMover, fault_rate: float):
        super().__init__(lanes.performer, rng, lanes.eagerness)
        self.rng, self.mover, self.board, self.fault_rate = rng, mover, TicketBoard(), fault_rate
        self.peer, self.num_faults, self.grants, self.sending = None, 0, {}, deque()

    def send(self, move: Move) -> None:
        if move.lane not in TRANSFERS:
            super().send(move)
        elif move.lane == LAND:
            size = self.mover.host.shape[1]
            self.grants[move.number] = Grant(move, np.zeros((len(move.targets), size), dtype=bool))
        else:
            if move.ticket != NO_TICKET and move.ticket not in self.board:
                self.board.open(move.ticket, self.mover.num_layers)
            self.sending.append(move)

    def receive(self, timeout_s: float) -> list[MoveDone]:
        while self.sending and (timeout_s > 0.0 or self.rng.random() < self.eagerness) and self._publish():
            pass
        if self.grants and self.rng.random() < self.fault_rate / 4:
            self.end(self.rng.choice(list(self.grants)), "the sender is lost")
        return super().receive(timeout_s)

    def _publish(self) -> bool:
        """Send the oldest move if its step has been computed."""
        move = self.sending[0]
        if move.ticket in self.board:
            return False
        self.sending.popleft()
        error = None
        if self.rng.random() < self.fault_rate:
            self.num_faults += 1
            error = MoveError("peer", "the way is broken")
        elif move.offer is not None and self.peer is not None:
            self.peer.take(move, self)
            if move.is_last:
                self.peer.end(move.offer.number, "")
        self._done.append((move, MoveDone(move.number, 0 if error else len(move.sources), 1e-3, 1e-3, error)))
        return True

    def take(self, move: Move, sender: LinkedLanes) -> None:
        """Write what the sender has in its blocks now, token by token: blocks may be of another size there."""
        grant = self.grants.get(move.offer.number)
        if grant is None:
            return
        ours, theirs = self.mover.host.shape[1], sender.mover.host.shape[1]
        device = sender.mover._device()
        first = int(grant.move.sources[0])
        for block, place in zip(move.sources.tolist(), move.targets.tolist()):
            for at in range(theirs):
                position = place * theirs + at
                index = position // ours - first
                if 0 <= index < len(grant.move.targets):
                    slot = int(grant.move.targets[index])
                    self.mover.host[slot, position % ours] = device[block, at]
                    grant.tokens[index, position % ours] = True

    def end_landing(self, number: int) -> None:
        self.end(number, "it was revoked")

    def end(self, number: int, reason: str) -> None:
        """No more comes under this number."""
        grant = self.grants.pop(number, None)
        if grant is None:
            return
        whole = grant.tokens.all(axis=1)
        num_done = len(whole) if whole.all() else int(whole.argmin())
        error = MoveError("peer", reason) if reason else None
        self._done.append((grant.move, MoveDone(number, num_done, 1e-3, 1e-3, error)))


class LinkedSimulation(TieredSimulation):
    """An engine that can send and take KV."""

    def __init__(self, rng: random.Random, *, fault_rate: float, **settings):
        super().__init__(rng, **settings)
        self.links = LinkedLanes(self.lanes, rng, self.mover, fault_rate)
        self.lanes = self.tiers.moves._link = self.links
        self.tiers.moves.stats |= {lane: type(next(iter(self.tiers.moves.stats.values())))() for lane in TRANSFERS}
        layout = KVLayout(format="fp32.1", block_size=self.config.cache.block_size, runs=())
        windows = (RankWindow(addresses=("here",), layout=layout, block_bytes=self.mover.payload_bytes),)
        self.lander = self.scheduler.promotions.lander = Lander(self.tiers, windows)
        self.scheduler.departures.outbox = Outbox(self.scheduler.kv.pool, self.tiers.moves)
        runner = self.loop.steps.runner
        run = runner.run

        def run_and_publish(plan):
            result = run(plan)
            if plan.publish_ticket:
                ticket = self.links.board[plan.publish_ticket]
                ticket.finish()
                self.links.board.close(ticket)
            return result

        runner.run = run_and_publish

    def submit(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []

    def expect(self, tokens: list[int]) -> KVOffer | str:
        return self.lander.expect(block_digests(np.array(tokens, dtype=np.int32), self.config.cache.block_size),
                                  LEASE_S, 0.0)


class Pair:
    """A request begins at `prefill`, and goes on at `decode` when it is handed over, whatever has landed by then."""

    def __init__(self, rng: random.Random, prefill: LinkedSimulation, decode: LinkedSimulation):
        self.rng, self.prefill, self.decode = rng, prefill, decode
        prefill.links.peer = decode.links
        self.requests: dict[str, Request] = {}
        self.moving: dict[str, Request] = {}  # handed over, and at the receiver's gate
        self.num_handed = self.num_offers = 0

    def add(self, name: str, prompt: list[int], **params) -> None:
        request = Request(request_id=name, prompt_token_ids=prompt, eos_token_ids=(EOS,),
                          sampling=SamplingParams(**{"seed": len(self.requests), **params}))
        self.requests[name] = request
        offer = self.decode.expect(prompt)
        self.num_offers += isinstance(offer, KVOffer)
        self.prefill.submit(replace(request, offer=offer if isinstance(offer, KVOffer) else None))

    @property
    def has_work(self) -> bool:
        return bool(self.moving) or self.prefill.loop.has_work() or self.decode.loop.has_work()

    def step(self) -> None:
        for delta in self.prefill.step():
            if delta.finish_reason is FinishReason.HANDED_OVER:
                self._hand_over(delta.request_id)
        self._pass_gate()
        if self.decode.loop.has_work():
            self.decode.step()
        else:
            self.decode.scheduler.promotions.poll()

    def _hand_over(self, name: str) -> None:
        self.num_handed += 1
        done = self.prefill.outputs[name]
        assert done, "it was handed over before its first token"
        begun = self.prefill.requests[name]
        self.moving[name] = replace(self.requests[name], generated_token_ids=tuple(done),
                                    landing=begun.offer.number)

    def _pass_gate(self) -> None:
        for name, request in list(self.moving.items()):
            if not self.decode.lander.is_landing(request.landing, 0.0) or self.rng.random() < 0.05:
                del self.moving[name]
                self.decode.submit(request)

    def outputs(self, name: str) -> list[int]:
        return self.prefill.outputs[name] + self.decode.outputs.get(name, [])

    def check(self) -> None:
        """Every request has ended once, with the tokens that one engine gives; nothing is left behind."""
        for name, request in self.requests.items():
            last = self.decode.finished.get(name) or self.prefill.finished[name]
            if last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert (self.outputs(name), last.finish_reason) == expected(request, self.prefill.config), name
            else:
                assert last.finish_reason is FinishReason.ABORT
        for number in list(self.decode.links.grants):  # of what was not handed over: the lease ends it
            self.decode.links.end(number, "the lease is over")
        self.decode.scheduler.promotions.poll()
        self.decode.lander.expire(LEASE_S + 1)
        assert not len(self.decode.lander) and not len(self.prefill.scheduler.departures)
        for engine in (self.prefill, self.decode):
            engine.check_idle()
            assert not engine.tiers.host.num_held, "slots are held though nothing moves"
            assert not engine.scheduler.kv.pool.num_pending
