"""KV blocks on the device: copies, and the stored form in host memory and back, bit for bit."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from backends.reference import stored_kv
from tests.npu.device import npu

FORMATS = ["fp32", "bf16", "fp16", "int8", "fp8"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUM_BLOCKS = 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def caches(dtype: torch.dtype, *, every: int = 1) -> tuple[Tensor, Tensor]:
    """Numbers of very different sizes from head to head and place to place, with some that are not finite."""
    made = []
    for _ in range(2):
        numbers = torch.randn(NUM_BLOCKS, 128, 2, 16) * torch.randn(NUM_BLOCKS, 128, 2, 1).mul(3).exp()
        numbers[0, 3], numbers[1, 4, 0] = 0.0, torch.randn(16) * 1e-33
        numbers[2, 5, 1, 7], numbers[2, 6, 0, 1] = float("nan"), float("inf")
        memory = torch.zeros(NUM_BLOCKS, every, 128, 2, 16, dtype=dtype, device=npu().device)
        made.append(memory[:, every - 1].copy_(numbers.clamp(-6e4, 6e4) if dtype is torch.float16 else numbers))
    return made[0], made[1]


class Store:
    """Rows of pinned memory of which the payload is the middle."""

    def __init__(self, k_cache: Tensor, v_cache: Tensor, format: str, num_slots: int = NUM_BLOCKS):
        self.format = format
        self.num_bytes = npu().ops.stored_bytes((k_cache, v_cache), format=format)
        self.rows = npu().allocate_host(num_slots * (self.num_bytes + 12)).fill_(0xA5).view(num_slots, -1)
        self.part = self.rows[:, 5 : 5 + self.num_bytes]

    def export(self, k_cache: Tensor, v_cache: Tensor, blocks: list[int], slots: list[int]) -> Tensor:
        npu().ops.export_blocks((k_cache, v_cache), torch.tensor(blocks), self.part, torch.tensor(slots),
                                format=self.format)
        npu().synchronize_copies()
        return self.part[slots]

    def bring_back(self, k_cache: Tensor, v_cache: Tensor, blocks: list[int], slots: list[int]) -> None:
        npu().ops.import_blocks((k_cache, v_cache), torch.tensor(blocks), self.part, torch.tensor(slots),
                                format=self.format)
        npu().synchronize_copies()


def expected(cache: Tensor, format: str) -> Tensor:
    """The stored form by the reference: groups are the numbers of a head, in this device's order."""
    return stored_kv._encode(cache.cpu(), format, dim=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_are_the_reference_s(name: str, every: int, dtype: torch.dtype) -> None:
    k_cache, v_cache = caches(dtype, every=every)
    store, blocks, slots = Store(k_cache, v_cache, name), [5, 0, 2, 1], [1, 4, 0, 5]
    found = store.export(k_cache, v_cache, blocks, slots)
    truth = torch.cat([expected(cache, name)[blocks] for cache in (k_cache, v_cache)], dim=1)
    if name in ("int8", "fp8"):  # which NaN it is does not matter
        assert torch.equal(found[:, : 0] , truth[:, : 0]) and found.shape == truth.shape
    assert torch.equal(found, truth)
    assert (store.rows[[2, 3]] == 0xA5).all() and (store.rows[:, :5] == 0xA5).all()
    assert (store.rows[:, 5 + store.num_bytes :] == 0xA5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_back_again(name: str, dtype: torch.dtype) -> None:
    k_cache, v_cache = caches(dtype, every=2)
    store, everything = Store(k_cache, v_cache, name), list(range(NUM_BLOCKS))
    stored = store.export(k_cache, v_cache, everything, everything).clone()
    back = tuple(torch.zeros_like(cache) for cache in (k_cache, v_cache))
    store.bring_back(*back, [4, 0, 2], [4, 0, 2])
    for cache, part in zip(back, stored.chunk(2, dim=1)):
        truth = stored_kv._decode(part, tuple(cache.shape), name, 3).to(dtype)
        same = (cache.cpu() == truth) | (cache.cpu().isnan() & truth.isnan())
        assert same[[4, 0, 2]].all()
        assert (cache.cpu()[[1, 3, 5]] == 0).all()
    if dtype is torch.float32 or name != "fp32":
        again = Store(k_cache, v_cache, name)
        assert torch.equal(again.export(*back, [4, 0], [4, 0]), stored[[4, 0]])


def test_no_blocks() -> None:
    k_cache, v_cache = caches(torch.bfloat16)
    store = Store(k_cache, v_cache, "bf16")
    store.export(k_cache, v_cache, [], [])
    store.bring_back(k_cache, v_cache, [], [])
    assert (store.rows == 0xA5).all()


def test_every_fp8_code_under_every_scale() -> None:
    k_cache = torch.zeros(1, 128, 2, 256, device=npu().device)  # a head for each scale
    v_cache = k_cache.clone()
    store = Store(k_cache, v_cache, "fp8", 1)
    codes, scales = torch.arange(256, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)
    store.part[0] = torch.cat((codes.repeat(256), scales)).repeat(2)
    store.bring_back(k_cache, v_cache, [0], [0])
    truth = stored_kv._decode(store.part[:, : store.num_bytes // 2], (1, 128, 2, 256), "fp8", 3)
    found = v_cache.cpu()
    assert torch.equal(found.isnan(), truth.isnan()) and torch.equal(found.nan_to_num(0.25), truth.nan_to_num(0.25))


@pytest.mark.parametrize("every", [1, 2])
def test_copy_blocks(every: int) -> None:
    cache, _ = caches(torch.float32, every=every)
    cache.nan_to_num_(0.5, 1.0, 2.0)
    before = cache.cpu()
    npu().ops.copy_blocks(cache, *(torch.tensor(ids, device=npu().device) for ids in ([5, 1], [0, 3])))
    assert torch.equal(cache.cpu()[[0, 1, 2, 3, 4, 5]], before[[5, 1, 2, 1, 4, 5]])


def test_several_threads_at_once() -> None:
    """Each with its own stream, blocks and slots: savers and loaders."""
    k_cache, v_cache = caches(torch.bfloat16)
    everything = list(range(NUM_BLOCKS))
    truth = Store(k_cache, v_cache, "int8").export(k_cache, v_cache, everything, everything)
    store = Store(k_cache, v_cache, "int8")
    back, failed = tuple(torch.zeros_like(cache) for cache in (k_cache, v_cache)), []

    def work(part: list[int]) -> None:
        try:
            for _ in range(3):
                store.export(k_cache, v_cache, part, part)
                store.bring_back(*back, part, part)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(everything[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert torch.equal(store.part, truth)
    assert back[0][3].any() and back[1][4].any()


def test_copies_see_what_was_queued_before() -> None:
    k_cache, v_cache = (cache.nan_to_num(0, 1, 2) for cache in caches(torch.float32))
    store = Store(k_cache, v_cache, "fp32")
    for round in range(3):
        k_cache.fill_(round + 1.0)
        v_cache.fill_(round + 2.0)
        stored = store.export(k_cache, v_cache, [2], [0]).clone().view(torch.float32)
        assert (stored[0, : 128 * 32] == round + 1.0).all() and (stored[0, 128 * 32 :] == round + 2.0).all()
