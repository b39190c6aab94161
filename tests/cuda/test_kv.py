"""Keys and values to the store's formats and back: the reference's bytes, but for the order of the keys' numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.opset import OpSet
from backends.reference import stored_kv
from tests.ops.conftest import NAN
from tests.ops.test_transfer import DTYPES, FORMATS, INF, QUANTISED, Store, caches, there_and_back

SHAPES = [(2, 16, 64), (1, 1, 1), (3, 5, 7), (2, 9, 130)]  # K, P, H


def reference_bytes(k_cache: Tensor, v_cache: Tensor, blocks: list[int], format: str) -> Tensor:
    """What the reference stores of both when they lie as its values do."""
    ids, slots = torch.tensor(blocks), torch.arange(len(blocks))
    halves = []
    for cache in (k_cache, v_cache):
        stored = torch.empty(len(blocks), stored_kv.stored_bytes(cache, cache, format=format), dtype=torch.uint8)
        stored_kv.export_blocks(cache, cache, ids, stored, slots, format=format)
        halves.append(stored[:, stored.shape[1] // 2 :])
    return torch.cat(halves, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_equals_the_reference_bit_for_bit(ops: OpSet, shape: tuple[int, int, int], name: str,
                                          dtype: torch.dtype) -> None:
    k_cache, v_cache = (cache.clamp(-6e4, 6e4).to(dtype) for cache in caches(shape))
    store = Store(ops, k_cache, v_cache, name)
    stored = store.export(k_cache, v_cache, [5, 0, 3], [1, 4, 0])
    assert torch.equal(stored, reference_bytes(k_cache, v_cache, [5, 0, 3], name))
    again = Store(ops, k_cache, v_cache, name)
    if dtype is torch.float32:  # another dtype is rounded once more on its way into the cache
        store.bring_back(k_cache, v_cache, [1, 2, 4], [1, 4, 0])
        assert torch.equal(again.export(k_cache, v_cache, [1, 2, 4], [1, 4, 0]), stored)


@pytest.mark.parametrize("name", FORMATS)
def test_touches_its_blocks_and_bytes_only(ops: OpSet, name: str) -> None:
    k_cache, v_cache = caches((2, 5, 7))
    store = Store(ops, k_cache, v_cache, name)
    store.export(k_cache, v_cache, [4, 2], [3, 0])
    assert (store.payloads[[1, 2, 4]] == 0xA5).all()
    assert (store.payloads[:, :5] == 0xA5).all()
    assert (store.payloads[:, 5 + store.num_bytes :] == 0xA5).all()
    k_new, v_new = caches((2, 5, 7))
    before = k_new.clone(), v_new.clone()
    memory = [torch.as_strided(c, (len(c) - 1, c.stride(0)), (c.stride(0), 1)) for c in (k_new, v_new)]
    store.bring_back(k_new, v_new, [1, 5], [0, 3])
    for new, old in ((k_new, before[0]), (v_new, before[1])):
        assert torch.equal(new[[0, 2, 3, 4]], old[[0, 2, 3, 4]])
        assert not torch.equal(new[1], old[1])
    assert all(m[:, 70:].isnan().all() for m in memory)  # between the blocks


@pytest.mark.parametrize("name", QUANTISED)
def test_error_bounds(ops: OpSet, name: str) -> None:
    k_cache, v_cache = caches((2, 16, 64))
    for x, y in zip((k_cache, v_cache), there_and_back(ops, k_cache, v_cache, name)):
        x, y = x.double(), y.double()
        largest = x.abs().amax(3, keepdim=True)
        bound = largest / 254 if name == "int8" else torch.maximum(x.abs() / 16, largest / 232 * 2.0**-10)
        assert ((y - x).abs() <= bound * (1 + 2.0**-14)).all()
        assert ((y - x).abs() > bound / 4).any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_group_without_a_finite_largest_is_nan(ops: OpSet, name: str, bad: float) -> None:
    k_cache, v_cache = (cache.contiguous() for cache in caches((2, 5, 7)))
    k_cache[2, 1, 3, 4] = v_cache[0, 1, 2, 6] = bad
    stored = Store(ops, k_cache, v_cache, name, 6).export(k_cache, v_cache, list(range(6)), list(range(6)))
    assert torch.equal(stored, reference_bytes(k_cache, v_cache, list(range(6)), name))
    k_back, v_back = there_and_back(ops, k_cache, v_cache, name)
    assert k_back[2, 1, 3].isnan().all() and v_back[0, 1, 2].isnan().all()
    assert int(k_back.isnan().sum()) == int(v_back.isnan().sum()) == 7


@pytest.mark.parametrize("top", [1.8124999, 1.8125, 1.9999999, 2.0**-99, 2.0**-101, 1e-42, 0.0, 3.4028235e38])
@pytest.mark.parametrize("name", QUANTISED)
def test_scales_at_their_limits(ops: OpSet, name: str, top: float) -> None:
    k_cache = torch.tensor([top, -top / 3, top / 500, 0.0]).view(1, 1, 1, -1)
    stored = Store(ops, k_cache, k_cache, name).export(k_cache, k_cache, [0], [0])
    assert torch.equal(stored, reference_bytes(k_cache, k_cache, [0], name))


@pytest.mark.parametrize("name", QUANTISED)
def test_numbers_much_smaller_than_the_largest(ops: OpSet, name: str) -> None:
    """With 464 fp8's scale is 1, so that the others are rounded to its subnormals and to the first of its normals."""
    k_cache = torch.arange(-512, 512).view(1, 1, 2, 512) * 2.0**-14
    k_cache[..., 0] = 464
    stored = Store(ops, k_cache, k_cache, name).export(k_cache, k_cache, [0], [0])
    assert torch.equal(stored, reference_bytes(k_cache, k_cache, [0], name))


def test_every_fp8_code_under_every_scale(ops: OpSet) -> None:
    k_cache = torch.zeros(1, 1, 256, 256)  # a row of values for each scale
    v_cache = k_cache.clone()
    store = Store(ops, k_cache, v_cache, "fp8", 1)
    codes, scales = torch.arange(256, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)
    store.part[0] = torch.cat((codes.repeat(256), scales)).repeat(2)
    store.bring_back(k_cache, v_cache, [0], [0])
    scale = torch.tensor([0.0, *(2.0**e for e in range(-126, 128)), NAN])  # no group has the smallest: it means zeros
    expected = codes.view(torch.float8_e4m3fn).float() * scale[:, None]
    assert torch.equal(v_cache[0, 0].isnan(), expected.isnan())
    assert torch.equal(v_cache[0, 0].nan_to_num(0.25, INF, -INF), expected.nan_to_num(0.25, INF, -INF))


def test_sizes(ops: OpSet) -> None:
    k_cache, v_cache = caches((2, 16, 64))
    for name in FORMATS:
        expected = stored_kv.stored_bytes(k_cache, v_cache, format=name)
        assert ops.stored_bytes(k_cache, v_cache, format=name) == expected
