"""KV blocks to the store's formats and back: exactness, error bounds against float64, NaN, strides."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from backends.opset import OpSet
from backends.reference import REFERENCE
from tests.ops.conftest import INTERPRETED, NAN, TRANSPOSED_KEYS, layout_of, sizes, spread_cache

FORMATS = ["fp32", "bf16", "fp16", "int8", "fp8"]
QUANTISED = ["int8", "fp8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(2, 16, 64), (1, 1, 1), (3, 5, 7), *sizes([(1, 33, 20)], []), (2, 9, 130)]  # K, P, H
INF = float("inf")


def caches(ops: OpSet, shape: tuple[int, int, int], *, num_blocks: int = 6, gap: int = 3) -> tuple[Tensor, Tensor]:
    """Random keys and values, of very different sizes from head to head and place to place; NaN between the blocks."""
    (K, P, H), layout = shape, layout_of(ops)
    k_cache, v_cache = (spread_cache(ops, num_blocks, P, K, H, gap) for _ in range(2))
    for numbers in (layout.keys(k_cache), layout.values(v_cache)):
        numbers.copy_(torch.randn(numbers.shape) * torch.randn(*numbers.shape[:3], 1).mul(3).exp())
    return k_cache, v_cache


def like_the_reference(ops: OpSet, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """The same keys and values where the reference has them."""
    keys, values = layout_of(ops).keys(k_cache), layout_of(ops).values(v_cache)
    num_blocks, K, P, H = keys.shape
    k_copy, v_copy = (torch.empty(TRANSPOSED_KEYS.shape(num_blocks, P, K, H), dtype=keys.dtype) for _ in range(2))
    TRANSPOSED_KEYS.keys(k_copy).copy_(keys)
    TRANSPOSED_KEYS.values(v_copy).copy_(values)
    return k_copy, v_copy


def reference_bytes(ops: OpSet, k_cache: Tensor, v_cache: Tensor, blocks: list[int], format: str) -> Tensor:
    """What the reference stores; where keys lie as values do, they are stored as the reference stores values."""
    k_cache, v_cache = like_the_reference(ops, k_cache, v_cache)
    count = len(blocks)
    if layout_of(ops) is TRANSPOSED_KEYS:
        return Store(REFERENCE, k_cache, v_cache, format, count).export(k_cache, v_cache, blocks, [*range(count)])
    keys = TRANSPOSED_KEYS.keys(k_cache).contiguous()
    stored = [Store(REFERENCE, x, x, format, count).export(x, x, blocks, [*range(count)]) for x in (keys, v_cache)]
    return torch.cat([twice[:, twice.shape[1] // 2 :] for twice in stored], 1)


class Store:
    """Payloads of which a layer's part is the middle; what is around it is known."""

    def __init__(self, ops: OpSet, k_cache: Tensor, v_cache: Tensor, format: str, num_slots: int = 5):
        self.ops, self.format = ops, format
        self.num_bytes = ops.stored_bytes((k_cache, v_cache), format=format)
        self.payloads = torch.full((num_slots, self.num_bytes + 12), 0xA5, dtype=torch.uint8)
        self.part = self.payloads[:, 5 : 5 + self.num_bytes]

    def export(self, k_cache: Tensor, v_cache: Tensor, blocks: list[int], slots: list[int]) -> Tensor:
        self.ops.export_blocks((k_cache, v_cache), torch.tensor(blocks, dtype=torch.int64), self.part,
                               torch.tensor(slots, dtype=torch.int64), format=self.format)
        return self.part[slots]

    def bring_back(self, k_cache: Tensor, v_cache: Tensor, blocks: list[int], slots: list[int]) -> None:
        self.ops.import_blocks((k_cache, v_cache), torch.tensor(blocks, dtype=torch.int64), self.part,
                               torch.tensor(slots, dtype=torch.int64), format=self.format)


def copy_in_threads(store: Store, caches: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]) -> None:
    """All blocks into the store and out of it into `back`, many times, by four threads with a share each."""
    count = len(caches[0])

    def work(part: list[int]) -> None:
        for _ in range(20):
            store.export(*caches, part, part)
            store.bring_back(*back, part, part)

    threads = [threading.Thread(target=work, args=(list(range(i, count, 4)),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def there_and_back(ops: OpSet, k_cache: Tensor, v_cache: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """All blocks through the store, into new caches."""
    count = len(k_cache)
    store = Store(ops, k_cache, v_cache, format, count)
    store.export(k_cache, v_cache, list(range(count)), list(range(count)))
    back = torch.full_like(k_cache, NAN), torch.full_like(v_cache, NAN)
    store.bring_back(*back, list(range(count)), list(range(count)))
    return back


def one_group(ops: OpSet, numbers: list[float]) -> tuple[Tensor, Tensor]:
    """Caches of one block with one head and one position, whose key and value are these numbers."""
    shape = layout_of(ops).shape(1, 1, 1, len(numbers))
    return torch.tensor(numbers).view(shape), torch.tensor(numbers).view(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_equals_the_reference_bit_for_bit(ops: OpSet, shape: tuple[int, int, int], name: str,
                                          dtype: torch.dtype) -> None:
    k_cache, v_cache = (cache.clamp(-6e4, 6e4).to(dtype) for cache in caches(ops, shape))
    k_same, v_same = like_the_reference(ops, k_cache, v_cache)
    mine, truth = Store(ops, k_cache, v_cache, name), Store(REFERENCE, k_same, v_same, name)
    blocks, slots = [5, 0, 3], [1, 4, 0]
    stored = mine.export(k_cache, v_cache, blocks, slots)
    assert torch.equal(stored, reference_bytes(ops, k_cache, v_cache, blocks, name))
    truth.export(k_same, v_same, blocks, slots)
    back = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
    expected = like_the_reference(ops, *back)
    mine.bring_back(*back, blocks, slots)
    truth.bring_back(*expected, blocks, slots)
    off = 2.0**-7 if INTERPRETED and dtype is torch.bfloat16 and name in QUANTISED else 0  # it rounds towards zero
    for mine_back, truth_back in zip(like_the_reference(ops, *back), expected):
        torch.testing.assert_close(mine_back, truth_back, rtol=off, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_one_part_alone_is_stored_as_values_are(ops: OpSet, name: str) -> None:
    """A latent: the bytes are the values' in a pair, and they come back as those do."""
    k_cache, v_cache = caches(ops, (1, 5, 24))
    pair, ids = Store(ops, k_cache, v_cache, name), torch.tensor([4, 1, 2])
    pair_bytes = pair.export(k_cache, v_cache, ids.tolist(), [0, 1, 2])
    num_bytes = ops.stored_bytes((v_cache,), format=name)
    stored = torch.full((3, num_bytes), 0xA5, dtype=torch.uint8)
    ops.export_blocks((v_cache,), ids, stored, torch.arange(3), format=name)
    assert torch.equal(stored, pair_bytes[:, -num_bytes:])
    alone, (_, beside) = torch.zeros_like(v_cache), (torch.zeros_like(v_cache) for _ in range(2))
    ops.import_blocks((alone,), ids, stored, torch.arange(3), format=name)
    pair.bring_back(torch.zeros_like(k_cache), beside, ids.tolist(), [0, 1, 2])
    assert torch.equal(alone, beside) and alone[ids].any()


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_other_heads_and_widths(ops: OpSet, name: str) -> None:
    """Keys of 3 heads of 24 numbers, values of 2 heads of 10: each part as it would be beside one like itself."""
    (k_cache, k_like), (v_like, v_cache) = caches(ops, (3, 5, 24)), caches(ops, (2, 5, 10))
    mixed, ids = Store(ops, k_cache, v_cache, name), [4, 1]
    stored = mixed.export(k_cache, v_cache, ids, [0, 1])
    keys = Store(ops, k_cache, k_like, name).export(k_cache, k_like, ids, [0, 1])
    values = Store(ops, v_like, v_cache, name).export(v_like, v_cache, ids, [0, 1])
    num_bytes = [each.shape[1] // 2 for each in (keys, values)]
    assert torch.equal(stored, torch.cat((keys[:, :num_bytes[0]], values[:, num_bytes[1]:]), dim=1))
    back = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
    mixed.bring_back(*back, ids, [0, 1])
    again = Store(ops, *back, name).export(*back, ids, [0, 1])
    assert torch.equal(again, stored)


@pytest.mark.parametrize("name", FORMATS)
def test_touches_its_blocks_and_bytes_only(ops: OpSet, name: str) -> None:
    k_cache, v_cache = caches(ops, (2, 5, 7))
    store = Store(ops, k_cache, v_cache, name)
    store.export(k_cache, v_cache, [4, 2], [3, 0])
    assert (store.payloads[[1, 2, 4]] == 0xA5).all()
    assert (store.payloads[:, :5] == 0xA5).all()
    assert (store.payloads[:, 5 + store.num_bytes :] == 0xA5).all()
    k_new, v_new = caches(ops, (2, 5, 7))
    before = k_new.clone(), v_new.clone()
    memory = [torch.as_strided(c, (len(c) - 1, c.stride(0)), (c.stride(0), 1)) for c in (k_new, v_new)]
    store.bring_back(k_new, v_new, [1, 5], [0, 3])
    for new, old in ((k_new, before[0]), (v_new, before[1])):
        assert torch.equal(new[[0, 2, 3, 4]], old[[0, 2, 3, 4]])
        assert not torch.equal(new[1], old[1])
    assert all(m[:, 70:].isnan().all() for m in memory)  # between the blocks


@pytest.mark.parametrize("name", FORMATS)
def test_no_blocks(ops: OpSet, name: str) -> None:
    k_cache, v_cache = caches(ops, (1, 2, 3))
    store = Store(ops, k_cache, v_cache, name)
    before = k_cache.clone()
    assert store.export(k_cache, v_cache, [], []).shape == (0, store.num_bytes)
    store.bring_back(k_cache, v_cache, [], [])
    assert torch.equal(k_cache, before) and (store.payloads == 0xA5).all()


@pytest.mark.parametrize("name", DTYPES)
def test_a_format_that_holds_the_numbers_is_exact(ops: OpSet, name: str) -> None:
    k_cache, v_cache = (cache.clamp(-6e4, 6e4).to(DTYPES[name]) for cache in caches(ops, (2, 5, 7)))
    wider = [name, "fp32"]
    for format in wider:
        k_back, v_back = there_and_back(ops, k_cache, v_cache, format)
        assert torch.equal(k_back, k_cache) and torch.equal(v_back, v_cache)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern(ops: OpSet, name: str, cache_dtype: torch.dtype) -> None:
    """Reading all stored patterns, and rounding all between neighbours, as torch does; NaN stays NaN."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(DTYPES[name])
    k_cache = torch.zeros(1, 1, 256, 256, dtype=cache_dtype)
    v_cache = k_cache.clone()
    store = Store(ops, k_cache, v_cache, name, 1)
    store.part[0] = torch.cat((patterns, patterns)).view(torch.uint8)
    store.bring_back(k_cache, v_cache, [0], [0])
    expected = patterns.to(cache_dtype).view_as(v_cache)
    assert torch.equal(v_cache.isnan(), expected.isnan())
    assert torch.equal(v_cache.nan_to_num(0.25, INF, -INF), expected.nan_to_num(0.25, INF, -INF))


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


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_rounds_to_nearest_even(ops: OpSet, name: str) -> None:
    low = torch.arange(0, 0x7800, dtype=torch.int16).view(DTYPES[name]).double()
    high = torch.arange(1, 0x7801, dtype=torch.int16).view(DTYPES[name]).double()
    numbers = torch.cat([low + (high - low) * part for part in (0.25, 0.5, 0.5000001, 0.75)]).float()
    k_cache = torch.cat((numbers, -numbers)).view(1, 1, 256, -1)
    _, v_back = there_and_back(ops, k_cache, k_cache.clone(), name)
    assert torch.equal(v_back, k_cache.to(DTYPES[name]).float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", QUANTISED)
def test_error_bounds(ops: OpSet, shape: tuple[int, int, int], name: str) -> None:
    """int8: half a 127th of the group's largest, and the scale's rounding; fp8: 3 bits, or the last of small ones."""
    k_cache, v_cache = caches(ops, shape)
    k_back, v_back = there_and_back(ops, k_cache, v_cache, name)
    layout = layout_of(ops)
    for x, y in ((layout.keys(k_cache), layout.keys(k_back)), (layout.values(v_cache), layout.values(v_back))):
        x, y = x.double(), y.double()
        largest = x.abs().amax(3, keepdim=True)
        bound = largest / 254 if name == "int8" else torch.maximum(x.abs() / 16, largest / 232 * 2.0**-10)
        assert ((y - x).abs() <= bound * (1 + 2.0**-14)).all()
        assert ((y - x).abs() > bound / 4).any() or x.numel() < 64  # it is no copy


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_what_was_stored_is_stored_again_as_the_same_bytes(ops: OpSet, shape: tuple[int, int, int], name: str) -> None:
    for scale in (1.0, 1e-20, 1e-33, 1e30):
        k_cache, v_cache = (cache * scale for cache in caches(ops, shape))
        first, again = (Store(ops, k_cache, v_cache, name, 6) for _ in range(2))
        everything = list(range(6))
        first.export(k_cache, v_cache, everything, everything)
        first.bring_back(k_cache, v_cache, everything, everything)
        again.export(k_cache, v_cache, everything, everything)
        assert torch.equal(again.payloads, first.payloads)


@pytest.mark.parametrize("top", [1.8124999, 1.8125, 1.8125001, 1.9375, 1.9999999, 1.0])
@pytest.mark.parametrize("name", QUANTISED)
def test_the_largest_number_of_a_group_is_kept(ops: OpSet, name: str, top: float) -> None:
    """Around the point where fp8's exponent steps."""
    k_cache, v_cache = one_group(ops, [top, -top / 3, top / 500, 0.0])
    for cache in there_and_back(ops, k_cache, v_cache, name):
        kept, sixth = cache.flatten()[0].item(), cache.flatten()[1].item()
        assert kept == pytest.approx(top, rel=1e-4 if name == "int8" else 1 / 16)
        assert sixth == pytest.approx(-top / 3, rel=2 / 127 if name == "int8" else 1 / 16)


@pytest.mark.parametrize("name", QUANTISED)
def test_zeros_and_tiny_groups_become_zeros(ops: OpSet, name: str) -> None:
    for numbers in ([0.0, -0.0, 0.0], [1e-40, -1e-42, 0.0], [2.0**-101, 0.0, 0.0]):
        for cache in there_and_back(ops, *one_group(ops, numbers), name):
            assert (cache == 0).all()
    for cache in there_and_back(ops, *one_group(ops, [2.0**-99, 0.0, 0.0]), name):
        assert cache.flatten()[0].item() == pytest.approx(2.0**-99, rel=1e-4)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_group_without_a_finite_largest_is_nan(ops: OpSet, name: str, bad: float) -> None:
    """One head's key or value of one position, all of it; no other."""
    k_cache, v_cache = (cache.contiguous() for cache in caches(ops, (2, 5, 7)))
    layout, everything = layout_of(ops), list(range(6))
    layout.keys(k_cache)[2, 1, 4, 3] = layout.values(v_cache)[0, 1, 2, 6] = bad
    stored = Store(ops, k_cache, v_cache, name, 6).export(k_cache, v_cache, everything, everything)
    assert torch.equal(stored, reference_bytes(ops, k_cache, v_cache, everything, name))
    k_back, v_back = there_and_back(ops, k_cache, v_cache, name)
    keys, values = layout.keys(k_back), layout.values(v_back)
    assert keys[2, 1, 4].isnan().all() and values[0, 1, 2].isnan().all()
    assert int(keys.isnan().sum()) == 7 and int(values.isnan().sum()) == 7
    k_clean, v_clean = k_cache.nan_to_num(0, 0, 0), v_cache.nan_to_num(0, 0, 0)
    k_expected, v_expected = there_and_back(ops, k_clean, v_clean, name)
    assert torch.equal(keys[~keys.isnan()], layout.keys(k_expected)[~keys.isnan()])
    assert torch.equal(v_back[~v_back.isnan()], v_expected[~v_back.isnan()])


@pytest.mark.parametrize("name", DTYPES)
def test_plain_formats_keep_nan_and_inf_where_they_are(ops: OpSet, name: str) -> None:
    quiet, loud = torch.tensor([0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32).tolist()
    k_cache, v_cache = one_group(ops, [1.0, INF, quiet, -INF, loud, 2.0, 1e38, -1e38])
    for cache in there_and_back(ops, k_cache, v_cache, name):
        numbers = cache.flatten()
        assert numbers[[0, 1, 3, 5]].tolist() == [1.0, INF, -INF, 2.0]
        assert numbers[[2, 4]].isnan().all()
        assert (numbers[6:].abs() >= 9e37).all()  # as it was, or inf: never a smaller number


@pytest.mark.parametrize("name", QUANTISED)
def test_numbers_at_the_end_of_the_range_do_not_turn_small(ops: OpSet, name: str) -> None:
    for cache in there_and_back(ops, *one_group(ops, [3.4028235e38, 1e38, -1.0]), name):
        assert cache.flatten()[0].item() > 3.2e38  # it may be inf
        assert 9e37 < cache.flatten()[1].item() < 1.1e38


def test_sizes(ops: OpSet) -> None:
    """A block of 16 positions, 2 heads, 64 numbers each; one scale per position and head, for keys and values."""
    k_cache, v_cache = caches(ops, (2, 16, 64))
    sizes = {name: ops.stored_bytes((k_cache, v_cache), format=name) for name in FORMATS}
    numbers, groups = 2 * 2 * 16 * 64, 2 * 2 * 16
    assert sizes == {"fp32": 4 * numbers, "bf16": 2 * numbers, "fp16": 2 * numbers, "int8": numbers + 4 * groups,
                     "fp8": numbers + groups}


@pytest.mark.parametrize("top", [1.8124999, 1.8125, 1.9999999, 2.0**-99, 2.0**-101, 1e-42, 0.0, 3.4028235e38])
@pytest.mark.parametrize("name", QUANTISED)
def test_scales_at_their_limits(ops: OpSet, name: str, top: float) -> None:
    k_cache, v_cache = one_group(ops, [top, -top / 3, top / 500, 0.0])
    stored = Store(ops, k_cache, v_cache, name).export(k_cache, v_cache, [0], [0])
    assert torch.equal(stored, reference_bytes(ops, k_cache, v_cache, [0], name))


@pytest.mark.parametrize("name", QUANTISED)
def test_numbers_much_smaller_than_the_largest(ops: OpSet, name: str) -> None:
    """With 464 fp8's scale is 1, so that the others are rounded to its subnormals and to the first of its normals."""
    for half in (torch.arange(-512, 0) * 2.0**-14, torch.arange(512) * 2.0**-14):
        k_cache, v_cache = one_group(ops, [464.0, *half.tolist()[1:]])
        stored = Store(ops, k_cache, v_cache, name).export(k_cache, v_cache, [0], [0])
        assert torch.equal(stored, reference_bytes(ops, k_cache, v_cache, [0], name))
