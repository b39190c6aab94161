"""What the fields of a backend (`Backend.stored_fields`) say is where in stored blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backends.reference.kv_codes import quantise
from backends.reference.stored_kv import PLAIN
from backends.stored_field import StoredField


def assert_they_say(fields: Sequence[StoredField], stored_BX: Tensor, numbers: Sequence[Tensor]) -> None:
    """The fields have these numbers, each [B, K, P, width] of any dtype, bit for bit; every byte of a block belongs to
    one of them."""
    block_size, blocks_BX = numbers[0].shape[2], stored_BX.cpu().contiguous().numpy()
    times = np.zeros(blocks_BX.shape[1], dtype=np.int64)
    for f, expected in zip(fields, numbers, strict=True):
        assert (f.num_heads, f.width, f.item_bytes) == (expected.shape[1], expected.shape[3], expected.element_size())
        offsets_KPHX = f.offset + sum(np.ix_(np.arange(f.num_heads) * f.head_stride,
                                             np.arange(block_size) * f.position_stride,
                                             np.arange(f.width) * f.number_stride, np.arange(f.item_bytes)))
        np.add.at(times, offsets_KPHX, 1)
        as_bytes = expected.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
        np.testing.assert_array_equal(blocks_BX[:, offsets_KPHX], as_bytes.reshape(-1, *offsets_KPHX.shape))
    assert (times == 1).all(), "a byte belongs to no field, or to two"


def as_stored(parts: Sequence[Tensor], format: str) -> list[Tensor]:
    """Numbers [B, K, P, H] of each part of a layer as this format has them: also the scales [B, K, P, 1] of each."""
    if format in PLAIN:
        return [part.to(PLAIN[format]) for part in parts]
    return [made for part in parts for made in quantise(part, format, dim=3)]
