"""How much of moving KV from the engine that computes a prompt to the one that answers is hidden behind the computing:
`python -m benchmarks.disaggregation`.

Two engines of this process, shared memory between them, and a way that takes as long as is asked for: what is put is
put, and then the sender sleeps as if a network of that bandwidth had carried it. Per prompt length: the time of the
prefill alone, and for each share of it that the transfer takes (`--shares`): the time from the prefill's end until all
KV is there, what of the transfer was hidden, and the time to the first token over that without a transfer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from serving.commands.bench.report import environment
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.kv_offer import KVOffer
from xllm.request import FinishReason, Request, SamplingParams
from xllm.transfer.transport import Peer
from xllm.transfer.transports import connect

CHUNK_TOKENS = 256  # of a step. Chosen: several chunks a prompt, as a server has them
LEASE_S = 120.0


class SlowPeer:
    """A `Peer` of so many bytes a second."""

    bytes_per_s = float("inf")  # of all of them

    def __init__(self, peer: Peer):
        self._peer = peer
        self._free_s = 0.0  # when what was put before has been carried

    def put(self, number: int, key: bytes, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        """See `Peer.put`."""
        now_s = max(time.perf_counter(), self._free_s)
        self._free_s = now_s + sum(len(data) for _, data in pieces) / self.bytes_per_s
        time.sleep(max(0.0, self._free_s - time.perf_counter()))
        self._peer.put(number, key, pieces, note)

    def finish(self, number: int) -> None:
        """See `Peer.finish`."""
        self._peer.finish(number)

    def close(self) -> None:
        """See `Peer.close`."""
        self._peer.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", help="a folder; none: the bundled model")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--shares", default="0.8,2.0", help="what the transfer takes over the prefill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    settings = {"enable_disagg_pd": True, "host_blocks_factor": 1.0, "max_num_batched_tokens": CHUNK_TOKENS,
                "num_threads": 1, "num_kv_blocks": 2 * arguments.tokens // 16 + 64}
    config = EngineConfig.from_flat(model=arguments.model, **settings)
    with mock.patch("xllm.transfer.way.connect", lambda *a, **o: SlowPeer(connect(*a, **o))):
        sender, receiver = EngineCore(config), EngineCore(config)
        try:
            found = _measure(sender, receiver, arguments)
        finally:
            for core in (sender, receiver):
                core.shutdown()
    text = json.dumps({**found, "environment": environment()}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


def _measure(sender: EngineCore, receiver: EngineCore, arguments: argparse.Namespace) -> dict[str, object]:
    run = _Runs(sender, receiver, arguments.tokens)
    run.once(None)  # warms up
    alone_s = statistics.median(run.once(None).first_token_s for _ in range(arguments.rounds))
    rows = []
    for share in map(float, arguments.shares.split(",")):
        SlowPeer.bytes_per_s = run.num_bytes / (share * alone_s)
        rounds = [run.once(LEASE_S) for _ in range(arguments.rounds)]
        first_s = statistics.median(each.first_token_s for each in rounds)
        left_s = statistics.median(each.all_there_s - each.first_token_s for each in rounds)
        rows.append({"transfer_over_prefill": share, "transfer_s": round(share * alone_s, 4),
                     "left_after_prefill_s": round(left_s, 4),
                     "hidden": round(1.0 - left_s / (share * alone_s), 3),
                     "left_over_transfer_less_prefill": round(left_s / ((share - 1.0) * alone_s), 3)
                     if share > 1.0 else None,
                     "ttft_over_none": round(first_s / alone_s, 3)})
    return {"tokens": arguments.tokens, "kv_bytes": run.num_bytes, "prefill_alone_s": round(alone_s, 4), "rows": rows}


@dataclasses.dataclass(frozen=True)
class _Times:
    """From when the request was added."""

    first_token_s: float
    all_there_s: float


class _Runs:
    def __init__(self, sender: EngineCore, receiver: EngineCore, num_tokens: int):
        self._sender, self._receiver, self._num_tokens = sender, receiver, num_tokens
        self._count = 0
        facts = sender._loaded.tiers
        assert facts is not None
        self.num_bytes = num_tokens // 16 * facts.payload_bytes

    def once(self, lease_s: float | None) -> _Times:
        """One prompt that is cached nowhere; with a lease it is handed over."""
        self._count += 1
        prompt = [(self._count * 131 + 7 * place) % 900 + 3 for place in range(self._num_tokens)]
        request = Request(request_id=f"r{self._count}", prompt_token_ids=prompt,
                          sampling=SamplingParams(temperature=0, max_tokens=400 if lease_s else 1, ignore_eos=True))
        if lease_s:
            offer = self._receiver.expect(request, lease_s)
            assert isinstance(offer, KVOffer), offer
            request = dataclasses.replace(request, offer=offer)
        began_s, first_s = time.perf_counter(), 0.0
        self._sender.add(request)
        while self._sender.has_work():
            for delta in self._sender.step():
                first_s = first_s or (time.perf_counter() - began_s if delta.token_ids else 0.0)
                if lease_s and delta.finish_reason is not None:
                    assert delta.finish_reason is FinishReason.HANDED_OVER, delta
        all_there_s = time.perf_counter() - began_s
        if request.offer is not None:
            lander = self._receiver.scheduler.promotions.lander
            assert lander is not None
            while lander.is_landing(request.offer.number, 0.0):
                self._receiver.tick()
            lander.give_up(request.offer.number)  # nobody asks for it: else it would be kept until its lease is over
        return _Times(first_s, all_there_s)


if __name__ == "__main__":
    raise SystemExit(main())
