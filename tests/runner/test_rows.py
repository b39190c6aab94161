"""`RowState` and `HostBatch` against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xllm.request import SamplingParams
from xllm.runner.batch import as_tensor, gather_batch
from xllm.runner.row_state import RowState
from xllm.step import NewRow

BLOCK_SIZE = 4


def make_rows(lengths: list[tuple[int, int, int]], *, max_model_len: int = 40) -> RowState:
    """Rows in reverse order, each (number of tokens, of computed ones, of drafts written behind)."""
    rows = RowState(max_num_seqs=len(lengths), max_model_len=max_model_len, block_size=BLOCK_SIZE)
    for i, (num_tokens, num_computed, num_drafts) in enumerate(lengths):
        row = len(lengths) - 1 - i
        num_blocks = -(-(num_tokens + num_drafts) // BLOCK_SIZE)
        rows.enter(NewRow(
            row=row, request_id=str(row), token_ids=np.arange(num_tokens, dtype=np.int32) + 100 * row,
            num_prompt_tokens=num_tokens, num_computed_tokens=num_computed,
            block_ids=np.arange(num_blocks, dtype=np.int32) * 7 + row, sampling=SamplingParams(),
            eos_token_ids=(), seed=row))
    return rows


@given(st.lists(st.integers(0, 4), max_size=30))
def test_append_blocks_equals_a_loop(row_of_block: list[int]) -> None:
    rows = make_rows([(3, 0, 0)] * 5, max_model_len=140)
    expected = [rows.block_table[row, :1].tolist() for row in range(5)]
    ids = np.arange(len(row_of_block), dtype=np.int32) + 1000
    for row, block in zip(row_of_block, ids.tolist()):
        expected[row].append(block)
    rows.append_blocks(np.array(row_of_block, dtype=np.int32), ids)
    assert [rows.block_table[row, : rows.num_blocks[row]].tolist() for row in range(5)] == expected


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Per row: known tokens, computed ones, tokens to compute, drafts."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        num_tokens = draw(st.integers(1, 20))
        num_computed = draw(st.integers(0, num_tokens - 1))
        chunk = draw(st.sampled_from([1, num_tokens - num_computed]))
        reaches = num_computed + chunk == num_tokens
        found.append((num_tokens, num_computed, chunk, draw(st.integers(0, 3)) if reaches else 0))
    return found


@given(steps())
def test_a_batch_equals_a_loop(step: list[tuple[int, int, int, int]]) -> None:
    rows = make_rows([(tokens, computed, drafts) for tokens, computed, _, drafts in step])
    rows_S = np.arange(len(step), dtype=np.int32)[::-1].copy()
    chunks_S, drafts_S = (np.array([s[i] for s in step], dtype=np.int32) for i in (2, 3))
    drafts_SR = np.full((len(step), int(drafts_S.max())), -1, dtype=np.int32)
    ids, positions, slots, starts, hidden = [], [], [], [0], []
    for i, (num_tokens, num_computed, chunk, drafts) in enumerate(step):
        row = len(step) - 1 - i
        drafts_SR[i, :drafts] = np.arange(drafts) + 5000 + row
        tokens = [*range(100 * row, 100 * row + num_tokens), *drafts_SR[i, :drafts].tolist()]
        where = range(num_computed, num_computed + chunk + drafts)
        ids += [tokens[p] for p in where]
        positions += where
        slots += [(p // BLOCK_SIZE * 7 + row) * BLOCK_SIZE + p % BLOCK_SIZE for p in where]
        starts.append(len(ids))
        if num_computed + chunk == num_tokens:
            hidden += [(row, i, j, len(ids) - 1 - drafts + j) for j in range(drafts + 1)]
    samples_S = np.array([tokens == computed + chunk for tokens, computed, chunk, _ in step])
    rows.write_drafts(rows_S, drafts_SR)
    host = gather_batch(rows, rows_S, chunks_S, drafts_S, samples_S)
    meta = host.metadata(as_tensor)
    assert host.input_ids_T.tolist() == ids
    assert host.positions_T.tolist() == positions
    assert meta.slot_mapping_T.tolist() == slots
    assert meta.query_start_S1.tolist() == starts == host.query_start_S1.tolist()
    assert meta.seq_lens_S.tolist() == [c + n + d for _, c, n, d in step]
    slots_Q = (host.rows_Q, host.steps_Q, host.offsets_Q, host.hidden_Q)
    assert list(zip(*(array.tolist() for array in slots_Q))) == hidden
    assert meta.max_query_len == max(n + d for _, _, n, d in step)
    assert (meta.num_tokens, meta.max_seq_len, meta.block_size) == (len(ids), max(meta.seq_lens_S.tolist()), BLOCK_SIZE)
    tensors = (as_tensor(host.input_ids_T), as_tensor(host.positions_T), meta.slot_mapping_T, meta.query_start_S1,
               meta.seq_lens_S, meta.block_table_SM)
    assert {t.dtype for t in tensors} == {torch.int32}
    assert all(t.is_contiguous() for t in tensors)
    for i, length in enumerate(meta.seq_lens_S.tolist()):
        num_blocks = -(-length // BLOCK_SIZE)
        assert meta.block_table_SM[i, :num_blocks].tolist() == [7 * b + len(step) - 1 - i for b in range(num_blocks)]


@pytest.mark.parametrize(("num_tokens", "num_blocks", "room"), [
    (10, 3, 2),  # the blocks end
    (10, 10, 29),  # max_model_len 40, one token sampled on top
    (38, 10, 1), (39, 10, 0), (40, 10, 0),
])
def test_room_for_drafts(num_tokens: int, num_blocks: int, room: int) -> None:
    rows = make_rows([(num_tokens, 0, 0)])
    rows.num_blocks[0] = num_blocks
    assert rows.room_for_drafts(np.array([0], np.int32)).tolist() == [room]


def test_a_taken_row_cannot_be_entered_and_a_free_one_not_released() -> None:
    rows = make_rows([(3, 0, 0)])
    with pytest.raises(AssertionError, match="taken"):
        rows.enter(NewRow(row=0, request_id="b", token_ids=np.ones(1, np.int32), num_prompt_tokens=1,
                          num_computed_tokens=0, block_ids=np.ones(1, np.int32), sampling=SamplingParams(),
                          eos_token_ids=(), seed=0))
    rows.release(0)
    with pytest.raises(AssertionError, match="free already"):
        rows.release(0)


@pytest.mark.parametrize(("change", "message"), [
    ({"num_tokens_S": [4]}, "past a row's known tokens"),
    ({"samples_S": [False]}, "samples in the wrong rows"),
    ({"num_drafts_S": [2]}, "lacks blocks"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_a_plan_that_contradicts_the_rows_is_refused(change: dict[str, list], message: str) -> None:
    rows = make_rows([(3, 0, 0)])
    plan = {"num_tokens_S": [3], "num_drafts_S": [0], "samples_S": [True], **change}
    arrays = {name: np.array(value, dtype=bool if name == "samples_S" else np.int32) for name, value in plan.items()}
    with pytest.raises(AssertionError, match=message):
        gather_batch(rows, np.zeros(1, np.int32), **arrays)
