"""What several ranks answer reaches the engine once, and where they differ it hears of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from xllm.config import EngineConfig
from xllm.errors import WorkerError
from xllm.kv.moves import READ, STORE_LANES, URGENT, WRITE, Move, MoveDone
from xllm.pooling import PoolingDefaults
from xllm.step import StepCheck, StepOutput
from xllm.structured.spec import StructuredOutput
from xllm.worker.gather import Gatherer
from xllm.worker.messages import (
    AdapterRead,
    Done,
    Failed,
    GrammarDone,
    Loaded,
    LoadProgress,
    Placement,
    Settled,
    StepBegun,
)

NONE = np.zeros(0, dtype=np.int32)
CHECK = StepCheck(ids=1, blocks_B=np.array([4, 6], dtype=np.int32), digests_B=np.array([7, 8], dtype=np.uint64))


def output(step: int, check: StepCheck | None = None) -> StepOutput:
    return StepOutput(step=step, num_sampled_S=NONE, token_ids_SR=NONE.reshape(0, 1), num_drafts_S=NONE, check=check)


def test_a_step_is_done_when_all_ranks_have_done_it():
    gatherer = Gatherer(3)
    first = output(1)
    assert gatherer.add(2, Settled(1)) is None
    assert gatherer.add(0, first) is None
    assert gatherer.add(0, output(2)) is None, "a rank may be a step ahead"
    assert gatherer.add(1, Settled(1)) is first


def test_one_rank_s_reports_are_the_engine_s():
    assert Gatherer(1).add(0, Settled(1)) == Settled(1)


def test_answers_to_the_same_question_are_told_apart_by_their_order():
    spec, gatherer = StructuredOutput(regex="a"), Gatherer(2)
    assert gatherer.add(0, GrammarDone(spec)) is None
    assert gatherer.add(0, GrammarDone(spec)) is None
    assert gatherer.add(1, GrammarDone(spec)) == GrammarDone(spec)
    assert gatherer.add(1, GrammarDone(spec)) == GrammarDone(spec)
    assert gatherer.add(1, GrammarDone(spec)) is None


def test_one_rank_s_error_is_the_answer():
    gatherer, error = Gatherer(2), Failed("ModelError", "gone")
    assert gatherer.add(0, AdapterRead(1, "d")) is None
    assert gatherer.add(1, AdapterRead(1, "", error)) == AdapterRead(1, "", error)
    assert gatherer.add(1, Done("Wake", error)) is None
    assert gatherer.add(0, Done("Wake")) == Done("Wake", error)


def test_ranks_that_read_different_files_are_found_out():
    gatherer = Gatherer(2)
    gatherer.add(0, AdapterRead(1, "d"))
    answer = gatherer.add(1, AdapterRead(1, "e"))
    assert answer.error is not None and "different files" in answer.error.message


def test_the_poorest_rank_says_how_many_kv_blocks_there_are():
    gatherer = Gatherer(3)
    loaded = Loaded(config=EngineConfig(), model_path="", vocab_size=8, hidden_size=8, eos_token_ids=(), num_blocks=90,
                    num_reserved_blocks=0, queues_steps=False, pooling=PoolingDefaults(width=8), generates=True,
                    tiers=None, placement=Placement(device="cpu", dtype="", kv_dtype="", num_threads=1, weights_bytes=0,
                                                    kv_bytes=0, advice=""))
    assert gatherer.add(0, loaded) is None
    assert gatherer.add(2, replace(loaded, num_blocks=70)) is None
    assert gatherer.add(1, replace(loaded, num_blocks=80)) == replace(loaded, num_blocks=70)


def test_failures_come_at_once_and_name_their_rank():
    assert Gatherer(2).add(1, Failed("MemoryError", "no room")) == Failed("MemoryError", "rank 1: no room")


def test_phases_are_rank_0_s():
    gatherer = Gatherer(2)
    assert gatherer.add(1, LoadProgress("weights", 0.5)) is None
    assert gatherer.add(0, LoadProgress("weights", 0.5)) == LoadProgress("weights", 0.5)


@pytest.mark.parametrize(("other", "message"), [
    (replace(CHECK, digests_B=np.array([7, 9], dtype=np.uint64)), "step 5: rank 1 has other contents in KV block 6"),
    (replace(CHECK, blocks_B=np.array([4, 5], dtype=np.int32)), r"step 5: rank 1 filled the KV blocks \[4, 5\]"),
    (replace(CHECK, ids=2), "step 5: rank 1 sampled other tokens"),
])
def test_a_difference_names_rank_step_and_block(other, message):
    import re

    gatherer = Gatherer(2)
    gatherer.add(1, Settled(5, other))
    answer = gatherer.add(0, output(5, CHECK))
    assert isinstance(answer, Failed) and answer.kind == "IntegrityError" and re.search(message, answer.message)


def test_equal_digests_are_no_difference():
    gatherer = Gatherer(2)
    gatherer.add(1, Settled(5, replace(CHECK)))
    assert isinstance(gatherer.add(0, output(5, CHECK)), StepOutput)


def test_a_rank_that_stays_behind_is_seen():
    now = [0.0]
    gatherer = Gatherer(3, clock=lambda: now[0])
    gatherer.add(0, output(1))
    gatherer.add(2, Settled(1))
    now[0] = 5.0
    assert gatherer.late_ranks(6.0, 1.0) is None
    assert gatherer.late_ranks(4.0, 9.0) == ("finished step 1", {1}, 5.0)
    gatherer.add(1, Settled(1))
    assert gatherer.late_ranks(4.0, 4.0) is None
    gatherer.add(0, Done("Wake"))
    now[0] = 15.0
    assert gatherer.late_ranks(11.0, 1.0) is None
    assert gatherer.late_ranks(9.0, 99.0) == ("finished what it was told", {1, 2}, 10.0)
    gatherer.add(2, LoadProgress("weights", 0.5))
    assert gatherer.late_ranks(9.0, 99.0) is None, "it reads the weights again"


def test_only_what_no_request_waits_for_may_take_long():
    now = [0.0]
    gatherer = Gatherer(2, clock=lambda: now[0])
    none = np.zeros(0, dtype=np.int32)
    for number, (lane, priority) in enumerate([(WRITE, 1), (READ, URGENT)]):
        gatherer.note_sent(Move(number=number, lane=lane, priority=priority, num_bytes=0, sources=none, targets=none))
    gatherer.add(0, MoveDone(0, 1, 0.0, 0.0))
    now[0] = 8.0
    assert gatherer.late_ranks(7.0, 60.0) is None
    gatherer.add(0, MoveDone(1, 1, 0.0, 0.0))
    now[0] = 16.0
    assert gatherer.late_ranks(7.0, 60.0) == ("finished copying KV blocks", {1}, 8.0)


def test_a_move_of_the_shared_store_may_take_any_time():
    """A file server that is away for one rank is no reason to end the engine."""
    now = [0.0]
    gatherer = Gatherer(2, clock=lambda: now[0])
    blocks = np.zeros(0, dtype=np.int32)
    for number, lane in enumerate(STORE_LANES):
        gatherer.note_sent(Move(number=number, lane=lane, priority=URGENT, num_bytes=0, sources=blocks, targets=blocks))
        gatherer.add(0, MoveDone(number, 1, 0.0, 0.0))
    now[0] = 1e6
    assert gatherer.late_ranks(7.0, 60.0) is None
    assert gatherer.add(1, MoveDone(1, 0, 0.0, 0.0)) == MoveDone(1, 0, 0.0, 0.0) and len(gatherer._unbounded) == 1


def begun(**other) -> StepBegun:
    return StepBegun(**{"step": 5, "num_rows": 2, "num_tokens": 9, "graph": "decode", "inputs": 7, **other})


@pytest.mark.parametrize(("other", "message"), [
    ({"step": 6}, "rank 1 has begun step 6 where rank 0 has begun step 5"),
    ({"num_rows": 3}, r"rank 1 has begun step 5 with other num_rows \(3\) than rank 0 \(2\)"),
    ({"num_tokens": 8}, r"rank 1 has begun step 5 with other num_tokens \(8\) than rank 0 \(9\)"),
    ({"graph": ""}, r"rank 1 has begun step 5 with other graph \(''\) than rank 0 \('decode'\)"),
    ({"inputs": 8}, "rank 1 has begun step 5 with other token ids or positions than rank 0"),
])
def test_a_rank_that_begins_something_else_is_named(other, message):
    gatherer = Gatherer(2)
    assert gatherer.add(0, begun()) is None
    assert gatherer.add(1, begun()) is None
    gatherer.add(1, begun(**other))
    with pytest.raises(WorkerError, match=message):
        gatherer.add(0, begun())


def test_a_rank_that_does_another_step_or_draws_other_tokens_is_named():
    gatherer = Gatherer(2)
    gatherer.add(1, Settled(6))
    with pytest.raises(WorkerError, match="rank 1 has finished step 6 where rank 0 has finished step 5"):
        gatherer.add(0, output(5))
    gatherer = Gatherer(2)
    gatherer.add(1, Settled(5, None, 1))
    with pytest.raises(WorkerError, match="rank 1 has drawn other tokens in step 5"):
        gatherer.add(0, output(5))


def test_a_rank_that_does_not_come_to_an_exchange_is_seen():
    gatherer = Gatherer(3)
    gatherer.note_exchange(0, 7.5)
    gatherer.note_exchange(2, 7.2)
    assert gatherer.absent_ranks(8.0) is None
    assert gatherer.absent_ranks(7.0) == ({1}, 7.5)
    gatherer.note_exchange(1, 7.1)
    assert gatherer.absent_ranks(7.0) is None, "all have come, to different ones"
