"""`xllm bench router --trace`: a trace of requests on modelled instances, with the router of a cluster before them.

The router is the product's (`xllm/routing/fleet.py`); what it decides about is modelled (`modelled_engine.py`), in
simulated time. Instances report every half second, as they do; all else is known at once. With --processes instances,
master and time are real (`router_processes.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serving.commands.bench import report, router_processes
from serving.commands.bench.modelled_engine import EngineSpeed, ModelledEngine, TracedRequest
from serving.commands.flags import parse_int
from xllm.client.gate_wire import BEAT_S
from xllm.errors import ConfigError
from xllm.kv.block import DIGEST_BYTES
from xllm.routing.fleet import Fleet
from xllm.routing.global_index import GlobalIndex
from xllm.routing.policies import POLICIES
from xllm.routing.prompt_marks import PromptMarks
from xllm.routing.routed_instance import LoadReport

GOALS = {"hit_rate_ratio": 1.5, "imbalance": 1.3}
MOONCAKE_BLOCK = 512  # tokens that an id of its traces stands for
# A prompt's marks beyond so many tokens, and how far apart they then are: as `prompt_marks` with blocks of 16.
MARKED_TOKENS, MARK_STEP = 8192, 1024
# Of a modelled instance, beside --prefill-speed. Chosen: a model of some billion parameters on one accelerator; all
# policies have the same.
STEP_S, SEQUENCE_S = 0.01, 0.0002
PREFILL_SPEED = 8000  # tokens a second. Chosen with them
MOST = 10**9  # of a figure that is given. Chosen: what no machine computes in a second
ENDLESS = 10**9  # requests that an instance takes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a replay."""
    parser.add_argument("--trace", type=Path, help="replay this trace, JSON lines with hash_ids, on modelled instances")
    parser.add_argument("--processes", action="store_true", help="with --trace: on real instances without a model, "
                        "behind a real master, in real time")
    parser.add_argument("--requests", type=parse_int, help="with --trace: only so many, the first ones")
    parser.add_argument("--speed-up", type=float, default=1.0, help="with --trace: requests come and prompts are "
                        "computed so many times as fast, and answers are so many times as short")
    parser.add_argument("--shrink", type=parse_int, default=1, help="with --trace: prompts, their blocks and the KV "
                        "caches are so many times as small, and take as long")
    parser.add_argument("--cost-profile", type=Path, help="with --processes: file of `xllm profile --json` with what "
                        "steps cost, instead of --prefill-speed")
    parser.add_argument("--policy", default="all", help=f"of the router, with --trace: {', '.join(POLICIES)}, or all")
    parser.add_argument("--cache-tokens", type=parse_int, default=1_500_000, help="KV cache of a modelled instance")
    parser.add_argument("--prefill-speed", type=parse_int, default=PREFILL_SPEED, help="prompt tokens that an "
                        "instance computes in a second")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Replay `args.trace` with each policy asked for. Raises ConfigError."""
    _check(args)
    requests = read_requests(args.trace)[: args.requests]
    if args.cache_tokens < requests[0].block_size:
        raise ConfigError(f"--cache-tokens must be a block of {requests[0].block_size} at least")
    requests = scaled(requests, args.speed_up, args.shrink)
    speed = EngineSpeed(step_s=STEP_S, token_s=args.shrink / args.speed_up / args.prefill_speed, sequence_s=SEQUENCE_S)
    result: dict[str, Any] = {
        "trace": args.trace.name, "requests": len(requests), "instances": args.instances,
        "processes": args.processes, "speed_up": args.speed_up, "shrink": args.shrink,
        "prompt_tokens": sum(request.num_tokens for request in requests), "cache_tokens": args.cache_tokens,
        "prefill_tokens_per_s": args.prefill_speed, "step_s": STEP_S, "sequence_s": SEQUENCE_S, "policies": {}}
    prices = router_processes.prices_of(speed)
    if args.cost_profile:
        prices = router_processes.measured_prices(args.cost_profile, args.speed_up, args.shrink)
        result |= {"cost_profile": args.cost_profile.name, **dict.fromkeys(("prefill_tokens_per_s", "step_s",
                                                                           "sequence_s"))}
    if args.processes:
        router_processes.check_blocks(requests)
        result["prices"] = prices._asdict()
    for policy in POLICIES if args.policy == "all" else (args.policy,):
        num_tokens = args.cache_tokens // args.shrink
        found = None if args.cost_profile else replay(requests, policy, args.instances, num_tokens, speed)
        if args.processes:
            found = {**router_processes.replay(requests, policy, args.instances, num_tokens, prices),
                     "modelled": found}
        assert found is not None, "one of the two"
        result["policies"][policy] = found
        report.note(f"{policy:12} {found['hit_rate_pct']:6.2f} % cached, first token {found['ttft_p50_s']:.2f} s, "
                    f"p99 {found['ttft_p99_s']:.1f} s, most over mean {found['imbalance']:.2f}")
    if {"cache_aware", "round_robin"} <= result["policies"].keys():
        aware, blind = (result["policies"][name] for name in ("cache_aware", "round_robin"))
        rate = blind["hit_rate_pct"]
        result["hit_rate_ratio"] = round(aware["hit_rate_pct"] / rate, 2) if rate else None
        result["imbalance"] = aware["imbalance"]
    return {**result, "goals": GOALS}


def _check(args: argparse.Namespace) -> None:
    if args.policy != "all" and args.policy not in POLICIES:
        raise ConfigError(f"unknown --policy {args.policy!r}; known are {', '.join(POLICIES)}, all")
    for name in ("prefill_speed", "speed_up", "shrink", "requests"):
        if (given := getattr(args, name)) is not None and not 1 <= given <= MOST:
            raise ConfigError(f"--{name.replace('_', '-')} must be in 1 to {MOST}, got {given}")
    if args.cost_profile and not args.processes:
        raise ConfigError("--cost-profile has no meaning without --processes")
    if args.cost_profile and args.prefill_speed != PREFILL_SPEED:
        raise ConfigError("--prefill-speed has no meaning with --cost-profile")


def scaled(requests: Sequence[TracedRequest], speed_up: float, shrink: int) -> list[TracedRequest]:
    """The same requests so many times as fast, with answers that much shorter, and prompts in blocks so many times as
    small. Raises ConfigError if those would not be whole."""
    if any(request.block_size % shrink for request in requests):
        raise ConfigError(f"--shrink must divide the trace's blocks of {requests[0].block_size} tokens, got {shrink}")
    return [dataclasses.replace(
        request, at_s=request.at_s / speed_up, num_tokens=max(1, request.num_tokens // shrink),
        num_output_tokens=max(1, round(request.num_output_tokens / speed_up)),
        block_size=request.block_size // shrink) for request in requests]


def read_requests(path: Path) -> list[TracedRequest]:
    """In the order in which they come. ConfigError names a wrong line.

    A line is a request as Mooncake writes them (timestamp in ms, input_length, output_length, hash_ids of blocks of 512
    tokens), or a session of an agent (block_size, requests of t in s, in, out, hash_ids, which may nest).
    """
    found = list[TracedRequest]()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found += _requests_of(json.loads(line), number)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f"{path.name}, line {number}: neither a request with timestamp, input_length, "
                                  "output_length and hash_ids nor a session of such") from None
    if not found:
        raise ConfigError(f"{path.name} has no requests")
    return sorted(found, key=lambda request: request.at_s)


def _requests_of(entry: dict[str, Any], line: int) -> Iterator[TracedRequest]:
    if "requests" not in entry:
        yield _request(str(line), entry["timestamp"] / 1000, entry["input_length"], entry["output_length"],
                       MOONCAKE_BLOCK, entry["hash_ids"], "", None)
        return
    stack, count = [(0.0, inner) for inner in entry["requests"]], 0
    while stack:
        at_s, inner = stack.pop(0)
        at_s += inner.get("t", 0.0)
        if "hash_ids" in inner:
            count += 1
            yield _request(f"{line}-{count}", at_s, inner["in"], inner["out"], entry["block_size"], inner["hash_ids"],
                           f"{line}:", str(line))
        stack += [(at_s, nested) for nested in inner.get("requests", ())]


def _request(request_id: str, at_s: float, num_tokens: int, num_output_tokens: int, block_size: int,
             ids: Sequence[int], scope: str, session: str | None) -> TracedRequest:
    whole = ids[: num_tokens // block_size]
    return TracedRequest(request_id=request_id, at_s=float(at_s), num_tokens=max(1, int(num_tokens)),
                         num_output_tokens=max(1, int(num_output_tokens)), block_size=block_size,
                         blocks=[_name(f"{scope}{number}") for number in whole], session=session)


def _name(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def marks_of(request: TracedRequest) -> PromptMarks:
    """What a front would mark of its prompt."""
    ends = [(number + 1) * request.block_size for number in range(len(request.blocks))]
    kept = [place for place, end in enumerate(ends)
            if end <= MARKED_TOKENS or end // MARK_STEP != (end - request.block_size) // MARK_STEP]
    return PromptMarks([request.blocks[place] for place in kept], [ends[place] for place in kept])


def replay(requests: Sequence[TracedRequest], policy: str, num_instances: int, num_tokens: int,
           speed: EngineSpeed) -> dict[str, Any]:
    """What comes of a trace. num_tokens: of each instance's KV cache."""
    block_size = requests[0].block_size
    num_blocks = num_tokens // block_size
    fleet = Fleet(policy, index=GlobalIndex(2 * num_instances * num_blocks))
    engines = {str(number): _joined(fleet, str(number), num_blocks, block_size, speed)
               for number in range(num_instances)}
    reasons, beat_s = dict[str, int](), 0.0
    for request in requests:
        while beat_s <= request.at_s:
            _advance(fleet, engines, beat_s)
            beat_s += BEAT_S
        for engine in engines.values():
            engine.advance(request.at_s)
        marks = marks_of(request)
        decision = fleet.decide([marks], request.num_tokens, 1, request.at_s, session=request.session)
        assert decision.name is not None
        reasons[decision.reason] = reasons.get(decision.reason, 0) + 1
        fleet.sent(decision.name, request.request_id, request.num_tokens - decision.matched_tokens[0], marks)
        engines[decision.name].submit(request)
    for engine in engines.values():
        engine.advance(float("inf"))
    return {**_summary(engines), "reasons": dict(sorted(reasons.items()))}


def _joined(fleet: Fleet, name: str, num_blocks: int, block_size: int, speed: EngineSpeed) -> ModelledEngine:
    fleet.join(name, block_size=block_size, max_waiting=ENDLESS, max_open=ENDLESS, num_blocks=num_blocks)
    return ModelledEngine(num_blocks, speed, on_begun=lambda request_id: fleet.begun(name, request_id),
                          on_left=lambda request_id: fleet.left(name, request_id),
                          on_cache=lambda stored, removed: fleet.changed(name, 0, stored, removed))


def _advance(fleet: Fleet, engines: dict[str, ModelledEngine], until_s: float) -> None:
    for name, engine in engines.items():
        engine.advance(until_s)
        fleet.heard(name, LoadReport(num_waiting=engine.num_waiting, num_running=engine.num_running,
                                     num_free_blocks=engine.num_free_blocks, steps=engine.timings), until_s)
        engine.timings = []


def _summary(engines: dict[str, ModelledEngine]) -> dict[str, Any]:
    totals = [engine.totals for engine in engines.values()]
    computed = [one.num_computed for one in totals]
    ttft_s = report.quantiles([seconds for one in totals for seconds in one.ttft_s])
    return {"hit_rate_pct": round(100 * sum(one.num_cached for one in totals)
                                  / sum(one.num_prompt_tokens for one in totals), 2),
            "ttft_p50_s": round(ttft_s["p50"], 3), "ttft_p99_s": round(ttft_s["p99"], 3),
            "imbalance": round(max(computed) / (sum(computed) / len(computed)), 3)}
