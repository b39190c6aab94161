"""Every message arrives as it was sent, and nothing else is ever made of bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from xllm.config import EngineConfig
from xllm.kv.moves import WRITE, Move, MoveDone, MoveError, SharedFacts, StoredBlocks, TierFacts
from xllm.pooling import PoolingDefaults, PoolingParams
from xllm.request import SamplingParams, TokenLogprobs
from xllm.stats import GraphStats, ThreadStats
from xllm.step import NewRow, ScheduleOutput, StepCheck, StepOutput
from xllm.structured.spec import StructuredOutput
from xllm.worker import messages as m
from xllm.worker.message_codec import KINDS, decode, encode


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


SPEC = StructuredOutput(json={"type": "object"}, after="</think>")
NEW_ROW = NewRow(
    row=3, request_id="a/0", token_ids=ints(5, 6, 7), num_prompt_tokens=3, num_computed_tokens=2, block_ids=ints(9),
    sampling=SamplingParams(logit_bias={4: -1.5}, bad_words_token_ids=((1, 2), (3,)), stop=("x",), structured=SPEC,
                            allowed_token_ids=(1, 2), seed=2**64 - 1, max_tokens=None),
    eos_token_ids=(2, 3), seed=2**64 - 1, pooling=PoolingParams(), lora_slot=2)
PLAN = ScheduleOutput(
    step=7, rows_S=ints(3, 1), num_tokens_S=ints(1, 2), max_drafts_S=ints(0, 4), samples_S=np.array([True, False]),
    new_rows=(NEW_ROW,), released_rows=(4, 5), append_rows_B=ints(1), append_ids_B=ints(2), replace_rows_C=ints(1),
    replace_places_C=ints(0), replace_ids_C=ints(8), copy_src=ints(1), copy_dst=ints(2), tickets=(11, 12))
OUTPUT = StepOutput(
    step=7, num_sampled_S=ints(1, 0), token_ids_SR=ints(5, -1, -1, -1).reshape(2, 2), num_drafts_S=ints(0, 1),
    logprobs={0: [TokenLogprobs(5, -0.25, 1, (5, 6), (-0.25, float("-inf")))]},
    prompt_logprobs={1: [TokenLogprobs(6, -1.0, 2)]}, failed={1: "no token is left"},
    pooled={0: np.array([0.5, np.nan], dtype=np.float32)},
    check=StepCheck(ids=2**64 - 1, blocks_B=ints(4), digests_B=np.array([2**64 - 1], dtype=np.uint64)))
SAMPLES = [
    m.Load(config=EngineConfig.from_flat(lora_modules=("a=b",), num_kv_blocks=3)), PLAN, m.Settle(),
    m.Foreground(True), m.EndLanding(3),
    Move(number=3, lane=WRITE, priority=-1, num_bytes=2**40, sources=ints(1), targets=ints(2),
         ticket=4, digests=(bytes(16),), parents=(b"p" * 16,)),
    MoveDone(3, 1, 0.5, 1.5, MoveError("disk", "full")),
    m.PutGrammar(SPEC), m.ReadAdapter(number=1, folder="/a", max_rank=8), m.PutAdapter(slot=1, number=None),
    m.Sleep(True), m.Wake(), m.StopWorker(), m.LoadProgress("weights", 0.5),
    m.Loaded(config=EngineConfig(), model_path="/m", vocab_size=9, hidden_size=8, eos_token_ids=(1, 2), num_blocks=7,
             num_reserved_blocks=1, queues_steps=True, generates=False,
             pooling=PoolingDefaults(kind="mean", normalize=False, width=8),
             placement=m.Placement(device="cpu", dtype="float32", weights_bytes=2**40, advice="w8a8"),
             tiers=TierFacts(5, 100, 7, StoredBlocks(ints(1, 2), np.ones((2, 16), dtype=np.uint8),
                                                     np.zeros((2, 16), dtype=np.uint8)),
                             SharedFacts("/kv", bytes(32), 9))),
    OUTPUT, m.Settled(7, OUTPUT.check, 2**32 - 1),
    m.StepBegun(7, 2, 3, "decode", 2**32 - 1), m.Failed("MemoryError", "none"), m.GrammarDone(SPEC, "no"),
    m.AdapterRead(1, "d", m.Failed("ModelError", "x")), m.Done("Sleep"),
    m.WorkerStats(graphs=GraphStats(num_graphs=2, replays_total={"decode": 3}), tier_misses={"disk": {"torn": 1}},
                  threads=ThreadStats(num_threads=1, max_threads=2, lowered_total=3), exchange_s=0.5),
]


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, down to the types of arrays."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message):
    assert same(decode(encode(message)), message)


def test_there_is_a_sample_of_every_message():
    assert {type(message) for message in SAMPLES} == set(KINDS)


def test_arrays_that_arrive_may_be_written_to():
    plan = decode(encode(PLAN))
    plan.rows_S[0] = 1


@pytest.mark.parametrize("frame", [b"", bytes([len(KINDS)]), b"\xff", encode(PLAN)[:-1], b"\x01\xc0"])
def test_bytes_that_are_no_message_are_refused(frame):
    with pytest.raises(ValueError):
        decode(frame)


def test_no_array_of_objects_is_made():
    import msgspec

    frame = bytes([KINDS.index(StepOutput)]) + msgspec.msgpack.encode(
        {"step": 1, "num_sampled_S": ("|O", [1], bytes(8)), "token_ids_SR": ("<i4", [0], b""),
         "num_drafts_S": ("<i4", [0], b"")})
    with pytest.raises(ValueError):
        decode(frame)


def test_rows_of_a_call_share_their_parameters_even_across_steps() -> None:
    sampling = SamplingParams(allowed_token_ids=range(2000), seed=1)
    rows = [dataclasses.replace(NEW_ROW, row=row, sampling=sampling.varied(seed=row)) for row in range(3)]

    def step(*new_rows: NewRow) -> ScheduleOutput:
        return ScheduleOutput(step=1, rows_S=ints(0), num_tokens_S=ints(1), max_drafts_S=ints(0),
                              samples_S=np.array([True]), new_rows=new_rows)

    plans = [decode(encode(step(*some))) for some in (rows[:2], rows[2:])]
    found = [new for plan in plans for new in plan.new_rows]
    assert [new.sampling for new in found] == [row.sampling for row in rows]
    assert all(new.sampling.shares_collections(found[0].sampling) for new in found)
    assert len(encode(step(*rows))) < len(encode(step(rows[0]))) + 2000
