"""`BlockCopies` on tensors of a CPU and a real store: what comes back, what is damaged, what is not trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integrations.test_block_plan import damage
from tests.serving.server_process import wait_for
from xllm import KVStoreClient
from xllm.integrations.block_copies import BlockCopies
from xllm.integrations.block_plan import BlockRun
from xllm.integrations.block_writer import BlockWriter

BLOCK, NUM_BLOCKS = 4, 12
TOKENS = np.arange(50, 50 + 4 * BLOCK, dtype=np.int32)
WIDTHS = {"layers.0": (2, 3), "layers.1": (1, 5)}  # heads and numbers of a token, of two layers that differ
BLOCK_BYTES = {dtype: 2 * sum(heads * width for heads, width in WIDTHS.values()) * BLOCK
               for dtype in (torch.bfloat16, torch.float16)} | {torch.float32: 4 * 11 * BLOCK}
BLOCK_BYTES[torch.float8_e4m3fn] = 11 * BLOCK


class Rank:
    """The tensors of one, random, and what copies between them and the store."""

    def __init__(self, folder: Path, dtype: torch.dtype, seed: int, max_bytes: int, *, writes: bool = True):
        torch.manual_seed(seed)
        self.layers = {name: torch.randn(NUM_BLOCKS, heads, BLOCK, width).to(dtype)
                       for name, (heads, width) in WIDTHS.items()}
        self.store = KVStoreClient(folder, str(dtype), block_size=BLOCK, block_bytes=BLOCK_BYTES[dtype], size="1MiB",
                                   refresh_s=0.0)
        self.writer = BlockWriter(self.store, max_bytes) if writes else None
        self.copies = BlockCopies(self.store, self.writer, self.layers)

    def blocks(self, *numbers: int) -> list[list[float]]:
        return [torch.cat([layer[number].float().flatten() for layer in self.layers.values()]).tolist()
                for number in numbers]

    def save(self, *runs: BlockRun) -> None:
        self.copies.load([])
        self.copies.save(runs)


@contextmanager
def rank(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_bytes: int = 2**20,
         writes: bool = True) -> Iterator[Rank]:
    made = Rank(folder, dtype, seed, max_bytes, writes=writes)
    yield made
    assert made.writer is None or made.writer.close()
    made.store.close()


def run(*block_ids: int, first: int = 0, name: str = "a") -> BlockRun:
    return BlockRun(name, TOKENS[:len(block_ids) * BLOCK], first, block_ids)


@pytest.mark.parametrize("dtype", BLOCK_BYTES, ids=str)
def test_what_one_saves_another_loads(tmp_path, dtype):
    with rank(tmp_path, dtype) as first:
        first.save(run(9, 3, 7, 1))
        saved = first.blocks(9, 3, 7, 1)
        first.layers["layers.0"].zero_()  # the engine goes on at once
    with rank(tmp_path, dtype, seed=1, writes=False) as second:
        own = second.blocks(*range(NUM_BLOCKS))
        assert second.copies.load([run(2, 4, 6, 8, first=1)]) == frozenset()
        assert second.blocks(4, 6, 8) == saved[1:] and second.copies.num_loaded == 3
        rest = [number for number in range(NUM_BLOCKS) if number not in (4, 6, 8)]
        assert second.blocks(*rest) == [own[number] for number in rest], "no other block was touched"


def test_views_of_one_tensor(tmp_path):
    """Layers that lie between each other, blocks first, as engines lay them out."""
    with rank(tmp_path) as first:
        first.save(run(0, 1))
        saved = first.blocks(0, 1)
    with rank(tmp_path, seed=1) as second:
        whole = torch.zeros(NUM_BLOCKS, 8, BLOCK, 8)
        second.layers.update({"layers.0": whole[:, :2, :, :3], "layers.1": whole[:, 5:6, :, :5].transpose(1, 2)})
        with pytest.raises(ValueError, match="bytes a block"):
            BlockCopies(second.store, None, {"layers.0": second.layers["layers.0"]})
        second.layers["layers.1"] = whole[:, 5:6, :, :5]
        assert not BlockCopies(second.store, None, second.layers).load([run(5, 6)])
        assert second.blocks(5, 6) == saved


def test_a_damaged_block_ends_what_is_loaded(tmp_path):
    with rank(tmp_path) as first:
        first.save(run(9, 3, 7, 1))
        rows = first.copies._taken((7,))
        saved = first.blocks(9, 3)
    damage(tmp_path, rows.tobytes())
    with rank(tmp_path, seed=1) as second:
        assert second.copies.load([run(2, 4, 6, 8)]) == {6, 8}
        assert second.blocks(2, 4) == saved and second.store.counters.misses["corrupt"] == 1
        assert second.copies.load([run(2, 4, 6, 8)]) == {6, 8}, "and stays a miss"


def test_what_may_be_wrong_is_not_saved(tmp_path):
    """A load fails: nothing of what was computed with it is saved, in that step or the next one, by whichever request,
    and nothing of such a request later."""
    with rank(tmp_path) as one:
        assert one.copies.load([run(2, 4)]) == {2, 4}, "nothing is stored"
        one.copies.save([run(2, 4, 6, first=2), run(4, 5, first=1, name="b"), run(7, name="c")])
        assert one.copies.num_saved == 1, "only c's"
        one.copies.load([])
        one.copies.save([run(2, 4, 6, 8, first=3), run(1, 4, 5, name="d")])
        one.copies.load([])
        one.copies.save([run(2, 4, 6, 8, first=3), run(1, 4, 5, name="d"), run(4, 5, first=1, name="b")])
        assert one.copies.num_saved == 1, "tainted"
        one.copies.forget({"a", "b", "d"})
        one.save(run(2, 4, 6, 8, name="e"))
        assert one.copies.num_saved == 5


def test_what_does_not_fit_the_buffer_is_dropped(tmp_path):
    with rank(tmp_path, max_bytes=2 * BLOCK_BYTES[torch.float32]) as one:
        one.save(run(0, 1, 2))
        assert (one.copies.num_saved, one.writer.num_dropped) == (0, 3)
        one.save(run(0, 1))
        wait_for(lambda: one.store.match(TOKENS) == 2, what="two blocks are stored")
        wait_for(lambda: one.writer.room() == 2, what="the buffer is free")


def test_a_store_that_fails_is_a_miss(tmp_path):
    folder = tmp_path / "store"
    with rank(folder) as one:
        folder.rename(tmp_path / "gone")
        folder.write_text("no folder")
        one.save(run(0, 1))
        wait_for(lambda: one.writer.num_failed == 2, what="the writer has failed")
        assert one.copies.load([run(2, 4)]) == {2, 4}
        folder.unlink()
        (tmp_path / "gone").rename(folder)
