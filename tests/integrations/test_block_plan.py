"""`BlockPlan`: what is loaded and saved, step by step, of requests as an engine schedules them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xllm import KVStoreClient
from xllm.integrations.block_plan import BlockPlan, BlockRun, StepRuns

BLOCK, TOKENS = 4, list(range(50, 68))  # four blocks and two tokens more


@pytest.fixture
def store(tmp_path):
    with KVStoreClient(tmp_path, "m", block_size=BLOCK, block_bytes=8, size="1MiB", refresh_s=0.0) as opened:
        yield opened


def put(store: KVStoreClient, num_blocks: int, tokens: list[int] = TOKENS, **salt: str) -> None:
    store.put(tokens, [bytes(8)] * num_blocks, **salt)


def step(plan: BlockPlan, *block_ids: int, computed: int, scheduled: int, begins: bool = False) -> StepRuns:
    runs = StepRuns()
    plan.step("a", block_ids, computed, scheduled, runs, begins=begins)
    return runs


def shown(runs: list[BlockRun]) -> list[tuple[Any, ...]]:
    return [(len(run.token_ids), run.first_block, run.block_ids, run.targets) for run in runs]


def test_an_unknown_prompt_is_saved_whole(store):
    plan = BlockPlan([store], BLOCK)
    assert plan.num_loadable("a", TOKENS, 0) == 0
    plan.begin("a", TOKENS, 0)
    runs = step(plan, 9, 3, 7, 1, 5, computed=0, scheduled=18, begins=True)
    assert runs.loads == [] and shown(runs.saves) == [(16, 0, (9, 3, 7, 1), (9, 3, 7, 1))]
    assert runs.saves[0].token_ids.tolist() == TOKENS[:16]
    assert step(plan, computed=18, scheduled=1) == StepRuns(), "what it answers is not saved"
    assert step(plan, 2, computed=19, scheduled=8) == StepRuns()


def test_a_prompt_in_pieces_is_saved_as_its_blocks_fill(store):
    plan = BlockPlan([store], BLOCK)
    plan.begin("a", TOKENS, 0)
    assert shown(step(plan, 9, 3, computed=0, scheduled=7, begins=True).saves) == [(4, 0, (9,), (9,))]
    assert shown(step(plan, 7, computed=7, scheduled=3).saves) == [(8, 1, (9, 3), (3,))]
    assert step(plan, computed=10, scheduled=1) == StepRuns()
    assert shown(step(plan, 1, 5, computed=11, scheduled=7).saves) == [(16, 2, (9, 3, 7, 1), (7, 1))]


def test_what_is_stored_is_loaded_and_the_rest_saved(store):
    put(store, 3)
    plan = BlockPlan([store], BLOCK)
    assert plan.num_loadable("a", TOKENS, 0) == 12 and plan.num_loadable("a", TOKENS, 4) == 8
    plan.begin("a", TOKENS, 8)  # the engine has the first block itself
    runs = step(plan, 9, 3, 7, 1, 5, computed=12, scheduled=6, begins=True)
    assert shown(runs.loads) == [(12, 1, (9, 3, 7), (3, 7))]
    assert shown(runs.saves) == [(16, 3, (9, 3, 7, 1), (1,))]


def test_a_token_is_left_to_be_computed(store):
    put(store, 4)
    plan = BlockPlan([store], BLOCK)
    assert plan.num_loadable("a", TOKENS, 0) == 16
    assert plan.num_loadable("b", TOKENS[:16], 0) == 12 and plan.num_loadable("c", TOKENS[:1], 0) == 0
    assert plan.num_loadable("a", TOKENS, 16) == plan.num_loadable("d", TOKENS, 17) == 0


def test_what_the_engine_has_and_the_store_has_not_is_saved(store):
    """A prompt whose beginning was an answer, of which the engine still has the blocks."""
    put(store, 1)
    plan = BlockPlan([store], BLOCK)
    plan.begin("a", TOKENS, 0)
    runs = step(plan, 9, 3, 7, 1, 5, computed=12, scheduled=6, begins=True)
    assert runs.loads == [] and shown(runs.saves) == [(16, 1, (9, 3, 7, 1), (3, 7, 1))]


def test_a_request_that_begins_again_has_other_blocks(store):
    plan = BlockPlan([store], BLOCK)
    plan.begin("a", TOKENS, 0)
    step(plan, 9, 3, computed=0, scheduled=8, begins=True)
    put(store, 2)
    plan.begin("a", TOKENS, plan.num_loadable("a", TOKENS, 0))
    runs = step(plan, 4, 6, 8, 2, computed=8, scheduled=8, begins=True)
    assert shown(runs.loads) == [(8, 0, (4, 6), (4, 6))]
    assert shown(runs.saves) == [(16, 2, (4, 6, 8, 2), (8, 2))]


def test_a_salt_and_every_rank_count(store, tmp_path):
    put(store, 2, cache_salt="tenant")
    plan = BlockPlan([store], BLOCK)
    assert plan.num_loadable("a", TOKENS, 0) == 0 and plan.num_loadable("b", TOKENS, 0, "tenant") == 8
    plan.begin("b", TOKENS, 8, "tenant")
    runs = StepRuns()
    plan.step("b", [9, 3, 7], 8, 4, runs, begins=True)
    assert {run.cache_salt for run in (*runs.loads, *runs.saves)} == {"tenant"}
    with KVStoreClient(tmp_path, "rank 1", block_size=BLOCK, block_bytes=8, size="1MiB", refresh_s=0.0) as other:
        put(store, 4)
        put(other, 3)
        assert BlockPlan([store, other], BLOCK).num_loadable("a", TOKENS, 0) == 12


def test_roles_and_requests_that_are_not_followed(store):
    put(store, 2)
    reader, writer = BlockPlan([store], BLOCK, saves=False), BlockPlan([store], BLOCK, loads=False)
    assert reader.num_loadable("a", TOKENS, 0) == 8 and writer.num_loadable("a", TOKENS, 0) == 0
    reader.begin("a", TOKENS, 8)
    runs = step(reader, 9, 3, 7, 1, computed=8, scheduled=8, begins=True)
    assert runs.saves == [] and len(runs.loads) == 1
    writer.begin("a", TOKENS, 0)
    assert shown(step(writer, 9, 3, 7, 1, computed=0, scheduled=16, begins=True).saves) == [
        (16, 2, (9, 3, 7, 1), (7, 1))]
    writer.end("a")
    writer.end("a")
    assert step(writer, 5, computed=16, scheduled=2) == StepRuns() == step(reader, computed=16, scheduled=1)


def damage(folder: Path, payload: bytes) -> None:
    """Change a byte of that payload, wherever it lies."""
    for file in folder.rglob("*.kv"):
        data = bytearray(file.read_bytes())
        if (place := data.find(payload)) >= 0:
            data[place + 5] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError("the payload is nowhere")


def test_what_could_not_be_loaded_is_saved_again(store, tmp_path):
    payloads = [bytes([number] * 8) for number in (201, 202, 203, 204)]
    store.put(TOKENS, payloads)
    plan = BlockPlan([store], BLOCK)
    plan.begin("a", TOKENS, plan.num_loadable("a", TOKENS, 0))
    assert len(step(plan, 9, 3, 7, 1, 5, computed=16, scheduled=2, begins=True).loads) == 1
    for payload in (payloads[1], payloads[3]):
        damage(tmp_path, payload)
    plan.failed({3, 7, 1})
    assert plan.num_loadable("b", TOKENS, 0) == 4, "the store knows it, too"
    assert shown(step(plan, computed=4, scheduled=14).saves) == [(16, 1, (9, 3, 7, 1), (3, 7, 1))]
    assert store.put(TOKENS, payloads) == 2, "both are written anew"
    plan.failed({99})
    assert step(plan, computed=18, scheduled=1) == StepRuns()


def test_a_folder_that_fails_is_no_store(store, tmp_path):
    plan, folder = BlockPlan([store], BLOCK), tmp_path / "gone"
    put(store, 4)
    (own,) = tmp_path.iterdir()
    own.rename(folder)
    own.write_text("no folder")
    assert plan.num_loadable("a", TOKENS, 0) == 0
    plan.begin("a", TOKENS, 0)
    assert len(step(plan, 9, 3, 7, 1, 5, computed=0, scheduled=18, begins=True).saves) == 1
    plan.failed({9})
    own.unlink()
    folder.rename(own)


def test_those_that_wait_are_not_looked_up_in_every_step(store):
    plan = BlockPlan([store], BLOCK)
    assert plan.num_loadable("a", TOKENS, 0) == 0
    put(store, 4)
    assert plan.num_loadable("a", TOKENS, 0) == 0, "for a second"
    assert plan.num_loadable("a", [*TOKENS, 1], 0) == 16 == plan.num_loadable("b", TOKENS, 0)
