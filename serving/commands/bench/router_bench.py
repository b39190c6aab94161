"""`xllm bench router`: what the router of a cluster takes: look-ups, events and memory of its index, and decisions; or,
with --trace, what its policies make of a trace (`router_trace.py`).

Every instance has another share of each text, as if it had evicted the rest, so that a look-up finds as many lengths
as there are instances. Times are those of this one thread.
"""

from __future__ import annotations

import gc
import time
from array import array
from typing import Any

import numpy as np

from serving.commands.bench import report, router_trace
from serving.commands.flags import FlagParser, parse_int
from xllm.errors import ConfigError
from xllm.kv.block import TIERS, block_digests
from xllm.routing.fleet import Fleet
from xllm.routing.global_index import MAX_INSTANCES, GlobalIndex, TierChange, digest_keys
from xllm.routing.policies import POLICIES
from xllm.routing.prompt_marks import PromptMarks, prompt_marks
from xllm.routing.role_plan import plan_roles
from xllm.routing.role_snapshot import RoleState
from xllm.routing.routed_instance import LoadReport

BATCHES = (1, 8, 64, 512)  # blocks of one report. Chosen: from one row that fills a block to long prompts
# The one that the goal is held against. Chosen: what 256 decoding rows and some prefill store in a step.
GOAL_BATCH = 64
ROUNDS = 200  # look-ups that are timed. Chosen: a 99th percentile of two
DECIDING_INSTANCES, DECIDING_TEXTS = 64, 32  # as many as an index has room for, and texts of which each has a share
KV_TOKEN_BYTES = 131_072  # of a model with 32 layers and 8 heads of 128 for K and V, in bf16
OPEN_REQUESTS = 8  # of each instance while it is decided; half of them have begun
INDEX_FLAGS = ("blocks", "prompt_tokens", "block_size", "events")
TRACE_FLAGS = ("policy", "cache_tokens", "prefill_speed", "processes", "requests", "speed_up", "shrink",
               "cost_profile")
GOALS = {"decision_ms": 0.5, "lookup_ms": 1.0, "events_per_s": 2e5, "bytes_per_block": 120.0}


def main(argv: list[str]) -> int:
    parser = FlagParser(prog="xllm bench router", description="What the router of a cluster takes; or, with --trace, "
                        "what its policies make of a trace")
    parser.add_argument("--blocks", type=parse_int, default=1_000_000, help="different blocks in the index")
    parser.add_argument("--instances", type=parse_int, default=16, help="instances that have them, or that "
                        "serve the trace")
    parser.add_argument("--prompt-tokens", type=parse_int, default=32_768, help="length of the texts and prompts")
    parser.add_argument("--block-size", type=parse_int, default=16, help="tokens of a block")
    parser.add_argument("--events", type=parse_int, default=100_000, help="block events that are timed, in each size "
                        "of reports")
    router_trace.add_flags(parser)
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    report.check(args.json, args.trace, args.cost_profile)
    if not 1 <= args.instances <= MAX_INSTANCES:
        raise ConfigError(f"--instances must be in 1 to {MAX_INSTANCES}, got {args.instances}")
    for name in INDEX_FLAGS if args.trace is not None else TRACE_FLAGS:
        if getattr(args, name) != parser.get_default(name):
            flag, how = name.replace("_", "-"), "with" if args.trace else "without"
            raise ConfigError(f"--{flag} has no meaning {how} --trace")
    if args.trace is not None:
        result = router_trace.measure(args)
        report.write(result, args.json)
        return int(any(found.get("failed") for found in result["policies"].values()))
    if args.block_size < 1 or args.prompt_tokens < args.block_size:
        raise ConfigError("--prompt-tokens must be at least one block of --block-size")
    num_texts = args.blocks // (args.prompt_tokens // args.block_size)
    if num_texts < 2:
        raise ConfigError("--blocks must be those of two prompts at least")
    if args.events < 1:
        raise ConfigError(f"--events must be at least 1, got {args.events}")
    report.write(measure(num_texts, args.instances, args.prompt_tokens, args.block_size, args.events), args.json)
    return 0


def measure(num_texts: int, num_instances: int, num_tokens: int, block_size: int,
            num_events: int) -> dict[str, Any]:
    resident = _resident_bytes()
    index = GlobalIndex(num_texts * (num_tokens // block_size))
    names = [f"instance-{number}" for number in range(num_instances)]
    report.note(f"filling the index with {num_texts} texts of {num_tokens} tokens")
    fill_s = _fill(index, names, num_texts, num_tokens, block_size)
    gc.collect()
    details = {"blocks": len(index), "evicted": index.num_evicted, "instances": num_instances,
               "prompt_blocks": num_tokens // block_size, "fill_blocks_per_s": fill_s}
    memory = {"bytes_per_block": round(index.num_bytes / len(index), 1),
              "resident_bytes_per_block": round((_resident_bytes() - resident) / len(index), 1)}
    lookup = _lookups(index, num_texts, num_tokens, block_size)
    events = {str(size): _events_per_s(index, names, size, num_events) for size in BATCHES}
    forget_us, clear_ms = _forget(index, names[0])
    del index
    decisions = {policy: _decisions(policy, num_tokens, block_size) for policy in POLICIES}
    pairs = _decisions("cache_aware", num_tokens, block_size, with_roles=True)
    slowest = max([*decisions.values(), pairs], key=lambda one: one["decision"]["p50"])["decision"]
    return {"decision_ms": slowest["p50"], "decision_p99_ms": slowest["p99"],
            "lookup_ms": lookup["marks_and_index"]["p50"], "events_per_s": events[str(GOAL_BATCH)], **memory,
            "details": {**details, "lookup_ms": lookup, "events_per_s_by_batch": events,
                        "decision_ms_by_policy": decisions, "pair_decision_ms": pairs,
                        "deciding_instances": DECIDING_INSTANCES, "forget_instance_us": forget_us,
                        "clear_instance_ms": clear_ms},
            "goals": GOALS}


def _text(number: int, num_tokens: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 128_000, num_tokens, dtype=np.int32)


def _fill(index: GlobalIndex, names: list[str], num_texts: int, num_tokens: int, block_size: int) -> float:
    """Blocks stored per second, all instances together, the digests' time left out."""
    for name in names:
        index.forget(name)
    num_stored, took_s = 0, 0.0
    for number in range(num_texts):
        keys = digest_keys(b"".join(block_digests(_text(number, num_tokens), block_size)))
        began = time.perf_counter()
        for place, name in enumerate(names):
            share = keys[: -(-len(keys) * (place + 1) // len(names))]
            index.change(name, [TierChange((number + place) % len(TIERS), share)])
            num_stored += len(share)
        took_s += time.perf_counter() - began
    return round(num_stored / took_s)


def _lookups(index: GlobalIndex, num_texts: int, num_tokens: int, block_size: int) -> dict[str, dict[str, float]]:
    """Of a prompt that some instance has whole. marks_and_index: from its tokens to an answer, to the nearest mark
    below; every_block: the look-up alone, of the keys of all its blocks."""
    marked, whole = [], []
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        token_ids = _text(int(rng.integers(num_texts)), num_tokens)
        prompt, all_keys = array("i", token_ids.tobytes()), digest_keys(b"".join(block_digests(token_ids, block_size)))
        began = time.perf_counter()
        marks = prompt_marks(prompt, block_size)
        found = index.match(digest_keys(b"".join(marks.digests)))
        marked.append(1000 * (time.perf_counter() - began))
        assert found.blocks_TI.max() == len(marks.digests)
        began = time.perf_counter()
        found = index.match(all_keys)
        whole.append(1000 * (time.perf_counter() - began))
        assert found.blocks_TI.max() == len(all_keys)
    return {"marks_and_index": report.quantiles(marked), "every_block": report.quantiles(whole)}


def _events_per_s(index: GlobalIndex, names: list[str], batch: int, num_events: int) -> int:
    """Blocks stored and removed per second: in each report an instance stores so many new ones, and removes those that
    it stored a while ago."""
    rng, num_rounds = np.random.default_rng(batch), max(len(names), num_events // batch // 2)
    keys = rng.integers(1, 2**64, size=(num_rounds, batch), dtype=np.uint64)
    began = time.perf_counter()
    for number in range(num_rounds):
        gone = keys[number - len(names)] if number >= len(names) else keys[0, :0]
        index.change(names[number % len(names)], [TierChange(0, keys[number], gone)])
    took_s = time.perf_counter() - began
    for number in range(max(0, num_rounds - len(names)), num_rounds):
        index.change(names[number % len(names)], [TierChange(0, keys[0, :0], keys[number])])
    return round((2 * num_rounds - len(names)) * batch / took_s)


def _forget(index: GlobalIndex, name: str) -> tuple[float, float]:
    """Until an instance's blocks are out of every look-up, in us; and what clearing its bits takes in all, in ms."""
    began = time.perf_counter()
    index.forget(name)
    forgotten = time.perf_counter()
    while index.is_clearing:
        index.change(name, [])
    return round(1e6 * (forgotten - began), 1), round(1e3 * (time.perf_counter() - forgotten), 2)


def _decisions(policy: str, num_tokens: int, block_size: int, *,
               with_roles: bool = False) -> dict[str, dict[str, float]]:
    """decision: of a call whose prompt each instance has another share of, given its marks; from_tokens: with marking
    it. Between two decisions the last one's request is sent, another one begins, and an instance reports. with_roles:
    every third instance computes prompts, the others go on, and the decision is of a pair; role_plan: beside each, of
    which roles change."""
    fleet, names = Fleet(policy), [f"instance-{number}" for number in range(DECIDING_INSTANCES)]
    prompts: list[array[int]] = []
    marks = list[PromptMarks]()
    for place, name in enumerate(names):
        role = "DEFAULT" if not with_roles else "DECODE" if place % 3 else "PREFILL"
        fleet.join(name, role=role, block_size=block_size, max_waiting=10**6, max_open=10**6, num_blocks=10**6,
                   kv_token_bytes=KV_TOKEN_BYTES)
    for number in range(DECIDING_TEXTS):
        token_ids = _text(number, num_tokens)
        digests = block_digests(token_ids, block_size)
        prompts.append(array("i", token_ids.tobytes()))
        marks.append(prompt_marks(prompts[-1], block_size))
        for place, name in enumerate(names):
            share = b"".join(digests[: len(digests) * (place + 1) // len(names)])
            fleet.changed(name, (number + place) % len(TIERS), share, b"")
    for place, name in enumerate(names):
        for number in range(OPEN_REQUESTS):
            fleet.sent(name, str(number), 500, marks[(place + number) % len(marks)])
            if number % 2:
                fleet.begun(name, str(number))
    decided, whole, planned, state = [], [], [], RoleState()
    for number in range(ROUNDS):
        now_s, which = 0.01 * number, number % len(marks)
        heard = LoadReport(num_waiting=4, num_running=4, num_free_blocks=10**5,
                           steps=[(now_s, 0.02 + 0.001 * step, 8 + 64 * step, 8) for step in range(16)])
        for name in names if not number % 50 else names[number % len(names) :][:1]:
            fleet.heard(name, heard, now_s)
        began = time.perf_counter()
        own = prompt_marks(prompts[which], block_size)
        marked = time.perf_counter()
        decision = fleet.decide_pair([own], num_tokens, 1, now_s)
        ended = time.perf_counter()
        decided.append(1000 * (ended - marked))
        whole.append(1000 * (ended - began))
        if with_roles:
            began = time.perf_counter()
            state = plan_roles(fleet.roles(now_s, {}), state).state
            planned.append(1000 * (time.perf_counter() - began))
        assert decision.first is not None
        fleet.sent(decision.first, f"new-{number}", 500, own)
        fleet.begun(decision.first, f"new-{number - 1}")
    return {"decision": report.quantiles(decided), "from_tokens": report.quantiles(whole),
            **({"role_plan": report.quantiles(planned)} if with_roles else {})}


def _resident_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
