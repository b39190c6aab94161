"""Where a backend says that numbers lie in stored blocks is where its `export_blocks` puts them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from backends import get_backend
from backends.opset import OpSet
from backends.reference import REFERENCE
from backends.reference.kv_codes import QUANTISED
from backends.reference.stored_kv import stored_fields
from backends.stored_field import StoredField
from tests.ops.conftest import Groups, layout_of, sizes, spread_cache
from tests.ops.stored_views import as_stored, assert_they_say
from tests.ops.test_transfer import FORMATS, caches
from xllm import env

SHAPES = sizes([(2, 16, 64), (1, 1, 1), (3, 5, 7)], [(2, 16, 16), (3, 5, 7)])  # K, P, H
QUANTISED_SHAPES = sizes(SHAPES, [(2, 16, 16), (3, 8, 12)])  # CUDA's kernels read such caches by words of four bytes
BLOCKS = [4, 0, 3]


def fields_of(ops: OpSet, parts: Sequence[Tensor], format: str) -> list[StoredField]:
    """What the backend of these ops says; a backend of a device that is not here is not begun."""
    if ops is REFERENCE:
        return stored_fields(parts, format=format)
    if ops.name == "cpu":
        return get_backend("cpu", cache_dir=env.cache_dir(), compiled=False).stored_fields(parts, format=format)
    from backends.cuda import CudaBackend

    return object.__new__(CudaBackend).stored_fields(parts, format=format)


def export(ops: OpSet, parts: tuple[Tensor, ...], format: str) -> Tensor:
    stored = torch.full((len(BLOCKS), ops.stored_bytes(parts, format=format)), 0xA5, dtype=torch.uint8)
    ops.export_blocks(parts, torch.tensor(BLOCKS), stored, torch.arange(len(BLOCKS)), format=format)
    return stored


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_keys_and_values(ops: OpSet, shape: tuple[int, int, int], name: str) -> None:
    pair, layout = caches(ops, shape), layout_of(ops)
    numbers = layout.keys(pair[0])[BLOCKS], layout.values(pair[1])[BLOCKS]
    assert_they_say(fields_of(ops, pair, name), export(ops, pair, name), as_stored(numbers, name))


@pytest.mark.parametrize("name", FORMATS)
def test_a_latent(ops: OpSet, name: str) -> None:
    _, latents = caches(ops, (1, 5, 24))
    numbers = layout_of(ops).values(latents)[BLOCKS]
    assert_they_say(fields_of(ops, (latents,), name), export(ops, (latents,), name), as_stored([numbers], name))


@pytest.mark.parametrize("shape", QUANTISED_SHAPES, ids=str)
@pytest.mark.parametrize("num_parts", [2, 1])
def test_quantised_caches(ops: OpSet, kv_dtype: torch.dtype, shape: tuple[int, int, int], num_parts: int) -> None:
    (K, P, H), name = shape, QUANTISED[kv_dtype]
    parts = tuple(spread_cache(ops, 6, P, K, H, gap=4, dtype=kv_dtype) for _ in range(num_parts))
    numbers = []
    for i, cache in enumerate(parts):
        cache.view(torch.uint8).copy_(torch.randint(256, cache.shape, dtype=torch.uint8))
        groups = Groups.of(ops, cache, keys=num_parts == 2 and i == 0)
        scales = groups.scales[BLOCKS].clone(memory_format=torch.contiguous_format)
        numbers += [groups.codes[BLOCKS], scales.view(torch.float32) if name == "int8" else scales]
    assert_they_say(fields_of(ops, parts, name), export(ops, parts, name), numbers)
