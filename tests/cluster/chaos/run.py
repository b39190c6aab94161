"""Traffic on a cluster under faults, and what is wrong with the answers and with what is left."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable
from pathlib import Path
from random import Random
from typing import Any

import psutil

from tests.cluster.chaos.cluster import ChaosCluster, Process, until
from tests.cluster.chaos.faults import Faults
from tests.cluster.chaos.requests import LONGEST
from tests.cluster.chaos.role_faults import RoleFaults
from tests.cluster.chaos.totals import Totals
from tests.cluster.chaos.traffic import Traffic, references
from xllm.routing.roles import ROLES

REST_S = 30.0
SETTLE_S = 1.0  # of traffic before and behind the faults
MAX_NOT_PLAYED = 0.25  # of all faults: a run that says nothing is no success
MAX_SHOWN = 20
# Of requests that were answered, where instances have roles: one master in three knows none, some have nothing new to
# be sent, and while no instance of a role is left nobody hands over.
LEAST_MOVED = 0.15
# Processes that compile grammars, two at most, start when they are needed, threads of an event loop's pool do, and
# connections are kept open.
COUNT_GROWTH = {"processes": 2, "threads": 12, "files": 16}


# --- what is left

async def counts(cluster: ChaosCluster) -> dict[str, dict[str, int]]:
    """Threads and open files of each process, and its children."""
    found: dict[str, dict[str, int]] = {}
    for process in cluster.processes:
        family = process.family()
        found[process.log_path.stem] = {"processes": len(family), "threads": sum(one.num_threads() for one in family),
                                        "files": sum(one.num_fds() for one in family)}
    return found


async def held(process: Process) -> dict[str, float]:
    """What an idle server says of itself: all of it should be 0."""
    found = {"running": await process.gauge("num_requests_running"),
             "waiting": await process.gauge("num_requests_waiting"),
             "kv_blocks": await process.gauge("num_kv_blocks") - await process.gauge("num_free_kv_blocks"),
             # Room for KV of other instances is held in host memory, and a move is under way while they may send.
             "tier_blocks": await process.gauge("kv_tier_held_blocks", 0.0),
             "moves": await process.gauge("kv_lane_queued_jobs", 0.0),
             "open_calls": float((await process.get().get("/load", timeout=10)).json()["server_load"])}
    if "master" in process.log_path.stem:
        found["open_requests"] = (await process.get().get("/cluster", timeout=10)).json()["open_requests"]
    return found


async def left_over(cluster: ChaosCluster, before: dict[str, dict[str, int]]) -> list[str]:
    """What is wrong once the traffic has ended, in words."""
    problems = []
    try:
        await cluster.await_whole()
    except AssertionError as error:
        return [f"{error}: {[(await master.get().get('/cluster')).text[:2000] for master in cluster.masters]}"]
    for process in cluster.processes:
        async def is_idle(process: Process = process) -> bool:
            return not any((await held(process)).values())

        try:
            await until(is_idle, REST_S, "rest")
        except AssertionError:
            problems.append(f"{process.log_path.stem} holds {await held(process)}")
        if (number := process.log_path.read_text(errors="replace").count("Traceback")):
            problems.append(f"{process.log_path.stem}: {number} tracebacks in its log")
    after = await counts(cluster)
    for name, found in after.items():
        for what, number in found.items():
            if number > before[name][what] + COUNT_GROWTH.get(what, 0):
                problems.append(f"{name}: {what} grew from {before[name][what]} to {number}")
    living = {one.pid for process in cluster.processes for one in process.family()}
    for instance in cluster.instances:
        problems += [f"{instance.name}: process {child.pid} of an earlier life lives" for child in instance.children
                     if child.pid not in living and lives(child)]
    keys = set((await asyncio.to_thread(cluster.etcd.ctl, "get", "XLLM:", "--prefix", "--keys-only")).split())
    registered = {key for key in keys if key.startswith(tuple(f"XLLM:{role}:" for role in ROLES))}
    if registered != {one.key for one in cluster.instances}:
        problems.append(f"registered are {registered}")
    return problems


def lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


# --- the run

def judged(traffic: Traffic, faults: Faults) -> list[str]:
    """Problems with requests and faults."""
    problems = [f"fault {one.kind} of {one.target}: {one.problem}" for one in faults.happened if one.problem]
    for one in traffic.ended:
        was_away, was_dead = (any(begun_s - 1 <= one.ended_s and one.begun_s <= ended_s for begun_s, ended_s in
                                  times[one.master]) for times in (faults.away_s, faults.dead_s))
        is_error = one.outcome == "unavailable" or (one.outcome == "lost" and "no instance takes" in one.why)
        is_expected = (is_error and was_away) or (one.outcome in ("broken", "unavailable") and was_dead)
        if one.outcome not in ("right", "left") and not is_expected:
            with_s = [f"{f.kind} of {f.target} ({f.begun_s - one.begun_s:+.1f} s)" for f in faults.happened
                      if f.begun_s <= one.ended_s and (f.ended_s or one.ended_s) >= one.begun_s]
            problems.append(f"request {one.index}, {one.name}, at master {one.master}, {one.ended_s - one.begun_s:.1f} "
                            f"s: {one.outcome}: {one.why}; meanwhile: {with_s}")
    return problems


def fault_table(traffic: Traffic, faults: Faults) -> dict[str, dict[str, float]]:
    """By kind: how many, seconds from the cause's end to the cluster's being whole, and the longest silence of streams
    meanwhile, which another fault may have caused, at all masters but one that was killed."""
    by_kind = defaultdict(list)
    for one in faults.happened:
        by_kind[one.kind].append(one)
    table = {}
    for kind, found in sorted(by_kind.items()):
        recovery_s = sorted(one.ended_s - one.lifted_s for one in found)
        gaps_s = [max((r.answer.longest_gap_s for r in traffic.ended
                       if r.begun_s <= one.ended_s and r.ended_s >= one.begun_s and r.master != one.dead), default=0.0)
                  for one in found]
        table[kind] = {"num": len(found), "recovery_median_s": round(recovery_s[len(recovery_s) // 2], 2),
                       "recovery_max_s": round(recovery_s[-1], 2), "longest_silence_s": round(max(gaps_s), 2),
                       **{f"{name}_max_s": round(max(one.figures.get(name, 0.0) for one in found), 2)
                          for name in found[0].figures}}
        ends_s = [r.ended_s - one.begun_s for one in found for r in traffic.ended
                  if r.master == one.dead and r.begun_s < one.begun_s < r.ended_s]
        if ends_s:  # those that were open at a master that was killed
            table[kind] |= {"connections_ended": len(ends_s), "ended_max_s": round(max(ends_s), 2)}
    return table


async def run(folder: Path, seed: int, seconds: float | None, clients: int = 10, *,
              fault: str | None = None, has_roles: bool = False) -> dict[str, Any]:
    """The report; `problems` in it is what a caller should look at. seconds: None: each fault once, alone, or only
    those of these names, parted by commas. Raises ValueError: there is none by a name."""
    cluster = ChaosCluster(folder, secrets.token_hex(32), 4 if has_roles else 3, has_tiers=True, has_roles=has_roles)
    try:
        await cluster.open()
        expected = await references(cluster.instances[0].process.get(), [LONGEST] if has_roles else ())
        warm_up, is_over = Traffic(cluster, expected, seed + 10**6), asyncio.Event()
        asyncio.get_running_loop().call_later(5.0, is_over.set)
        await warm_up.play(clients, is_over)
        before = await counts(cluster)
        traffic, totals = Traffic(cluster, expected, seed), Totals(cluster)
        faults = RoleFaults(cluster, Random(seed), traffic) if has_roles else Faults(cluster, Random(seed))
        following = [asyncio.create_task(each) for each in (faults.stall.follow(), totals.follow())]
        begun_s = time.monotonic()
        problems = judged(warm_up, faults)
        if seconds is not None:
            await _under_load(traffic, clients, faults.play(seconds))
            problems += judged(traffic, faults) + await left_over(cluster, before)
        else:
            kinds = faults.kinds()
            wanted = fault.split(",") if fault else list(kinds)
            if unknown := [kind for kind in wanted if kind not in kinds]:
                raise ValueError(f"no fault is called {unknown[0]!r}; there are {', '.join(kinds)}")
            for kind in wanted:
                await _under_load(traffic, clients, kinds[kind]())
                problems += [f"after {kind}: {what}" for what in await left_over(cluster, before)]
            problems += judged(traffic, faults)
        took_s = time.monotonic() - begun_s
        for each in following:
            each.cancel()
        not_played = [f"{one.kind} of {one.target}: {one.not_played}" for one in faults.happened if one.not_played]
        if len(not_played) > MAX_NOT_PLAYED * len(faults.happened):
            problems.append(f"{len(not_played)} of {len(faults.happened)} faults could not be played")
        recovered, handovers = await totals.of_masters()
        outcomes = Counter(one.outcome for one in traffic.ended)
        if has_roles and handovers["moved"] < LEAST_MOVED * outcomes["right"]:
            problems.append(f"only {handovers['moved']} of {outcomes['right']} requests were handed over")
        return {
            "seed": seed, "seconds": round(took_s, 1), "requests": len(traffic.ended),
            "tokens": sum(one.answer.usage[1] for one in traffic.ended), "outcomes": dict(sorted(outcomes.items())),
            "faults": fault_table(traffic, faults), "num_faults": len(faults.happened), "not_played": not_played,
            "machine": {"start_s": round(Process.start_s, 1), "stalled_s": round(faults.stall.since(begun_s), 1)},
            "recoveries": dict(sorted(recovered.items())), "handovers": dict(sorted(handovers.items())),
            "landed_bytes": totals.landed_bytes,
            "lost": sum(word in p for p in problems if p.startswith("request")
                        for word in (": lost: ", ": hung: ", ": broken: ", ": unavailable: ")),
            "wrong": outcomes["wrong"], "counts": {"before": before, "after": await counts(cluster)},
            "num_problems": len(problems), "problems": [problem[:3000] for problem in problems[:MAX_SHOWN]],
        }
    finally:
        await cluster.close()


async def _under_load(traffic: Traffic, clients: int, playing: Awaitable[None]) -> None:
    is_over = asyncio.Event()
    asking = asyncio.create_task(traffic.play(clients, is_over))
    await asyncio.sleep(SETTLE_S)
    await playing
    await asyncio.sleep(SETTLE_S)
    is_over.set()
    await asking
