"""Random conversations over a tiny device, host memory and a real disk: every output right, every slot accounted for.

The simulated KV memory notices any slot that does not hold the prefix that its reader expects, also while blocks
are on their way; moves run in random order at random times.
"""

import functools
import random

import pytest

from tests.scheduler.harness import VOCAB
from tests.scheduler.tiered import TieredSimulation
from xllm.config import POLICIES


def random_settings(rng: random.Random) -> dict:
    chunked = rng.random() < 0.7
    return {
        "async_scheduling": rng.random() < 0.6,
        "num_speculative_tokens": rng.choice([0, 0, 1, 3]),
        "enable_chunked_prefill": chunked,
        "scheduling_policy": rng.choice(POLICIES),
        "max_num_seqs": rng.choice([1, 2, 4, 7]),
        "block_size": rng.choice([2, 4, 5]),
        "max_num_batched_tokens": rng.choice([4, 8, 17, 40]) if chunked else 96,
        "max_model_len": rng.choice([40, 96]),
        "preemption_mode": rng.choice(["auto", "recompute", "swap"]),
        "host_blocks_factor": 1.0,
    }


def make_simulation(rng: random.Random, folder=None) -> TieredSimulation:
    settings = random_settings(rng)
    num_blocks = -(-settings["max_model_len"] // settings["block_size"]) + rng.choice([0, 1, 5])
    return TieredSimulation(rng, num_blocks=num_blocks, num_host_slots=rng.choice([1, 7, 30, 200]),
                            disk_folder=folder, num_disk_slots=rng.choice([3, 40, 400]),
                            eagerness=rng.choice([0.0, 0.2, 0.7, 0.95]), **settings)


def converse(simulation: TieredSimulation, rng: random.Random, num_turns: int, name: str = "") -> None:
    """Conversations go on turn by turn: what was said before, then something new. Some turns are aborted."""
    length = simulation.config.model.max_model_len
    talks = [[rng.randrange(VOCAB) for _ in range(rng.randrange(2, length // 2))] for _ in range(4)]
    salts = [rng.choice(["", "tenant"]) for _ in talks] if name == "salted" else [""] * 4
    open_turns: dict[str, int] = {}
    added = 0
    while added < num_turns or simulation.loop.has_work():
        if added < num_turns and rng.random() < 0.3:
            which = rng.randrange(len(talks))
            request = f"{name}{added}"
            prompt = talks[which][: length - 2]
            simulation.add(request, prompt, eos=rng.random() < 0.5, max_tokens=rng.choice([1, 3, 9]),
                           offline=rng.random() < 0.2, priority=rng.randrange(3), cache_salt=salts[which])
            open_turns[request] = which
            added += 1
        if open_turns and rng.random() < 0.03:
            simulation.scheduler.abort(rng.choice(list(open_turns)))
        simulation.step()
        for request in [r for r in open_turns if r in simulation.finished]:
            which = open_turns.pop(request)
            said = list(simulation.requests[request].prompt_token_ids) + simulation.outputs[request]
            talks[which] = said + [rng.randrange(VOCAB) for _ in range(3)]
            if len(talks[which]) > length - 6:
                talks[which] = talks[which][: rng.randrange(2, length // 2)]


def run(seed: int, folder=None) -> TieredSimulation:
    rng = random.Random(seed)
    simulation = make_simulation(rng, folder)
    converse(simulation, rng, rng.randrange(5, 30))
    simulation.check_outputs()
    simulation.check_idle()
    return simulation


@pytest.mark.parametrize("start", range(0, 100, 20))
def test_random_conversations_over_host_memory(start):
    for seed in range(start, start + 20):
        try:
            run(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.fixture(scope="module")
def with_disk(tmp_path_factory):
    """Runs a seed with a disk, once; returns how often what came about."""
    folder = tmp_path_factory.mktemp("disks")

    @functools.cache
    def counts(seed: int) -> dict[str, int]:
        try:
            simulation = run(seed, folder / str(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        tiers = simulation.tiers
        found = {"loaded": tiers.loader.num_loaded, "saved": tiers.saver.num_written,
                 "host_evicted": tiers.host.num_evicted, "written": tiers.writer.num_written,
                 "staged": tiers.stager.num_staged, "disk_evicted": tiers.disk.num_evicted,
                 "swaps": simulation.scheduler.counters.swaps_total, "cut": tiers.saver.num_cut}
        simulation.close()
        return found

    return counts


@pytest.mark.parametrize("start", range(0, 40, 20))
def test_random_conversations_over_host_memory_and_disk(start, with_disk):
    for seed in range(start, start + 20):
        with_disk(seed)


def test_the_conversations_reach_what_they_are_meant_to_reach(with_disk):
    """Otherwise the tests above prove little."""
    found = [with_disk(seed) for seed in range(40)]
    totals = {what: sum(counts[what] for counts in found) for what in found[0]}
    assert all(totals.values()), totals
