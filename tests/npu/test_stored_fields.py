"""Where the backend says that numbers lie in stored blocks is where its `export_blocks` puts them."""

from __future__ import annotations

import pytest
import torch

from tests.npu.device import npu
from tests.npu.test_kv import FORMATS, caches
from tests.ops.stored_views import as_stored, assert_they_say

BLOCKS = [4, 0, 3]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["keys and values", "latents", "one part"])
def test_fields(kind: str, format: str) -> None:
    torch.manual_seed(0)
    parts: tuple[torch.Tensor, ...] = caches(torch.float32)
    if kind == "latents":  # and their rotated numbers, a part of their own (`latent_cache_shapes`)
        shapes = npu().latent_cache_shapes(6, 128, 512, 64, torch.float32)
        parts = tuple(torch.randn(shape).to(npu().device) for shape in shapes)
    elif kind == "one part":
        parts = parts[1:]
    stored = npu().allocate_host(len(BLOCKS) * npu().ops.stored_bytes(parts, format=format)).view(len(BLOCKS), -1)
    npu().ops.export_blocks(parts, torch.tensor(BLOCKS), stored, torch.arange(len(BLOCKS)), format=format)
    npu().synchronize_copies()
    numbers = [part.cpu()[BLOCKS].transpose(1, 2) for part in parts]
    assert_they_say(npu().stored_fields(parts, format=format), stored, as_stored(numbers, format))
