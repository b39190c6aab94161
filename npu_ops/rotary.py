"""Rotary embeddings. The engine's steps use `rotary_mul`, which takes any even head dimension; those of latents, where
it is 64, `apply_rotary_pos_emb`.

Letters: T tokens, N heads, H head dim, L longest position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_ops.contracts import check


def angles(cos_sin_LH: Tensor, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of each token's angles as `rotary_mul` takes them: [1, T, 1, H], each half the same."""
    cos_TX, sin_TX = cos_sin_LH.index_select(0, positions_T).to(dtype).chunk(2, dim=-1)
    cos_TH, sin_TH = torch.cat((cos_TX, cos_TX), dim=-1), torch.cat((sin_TX, sin_TX), dim=-1)
    return cos_TH[None, :, None], sin_TH[None, :, None]


def rotary_mul(*, x_TNH: Tensor, cos: Tensor, sin: Tensor, mode: str = "half") -> Tensor:
    """Rotate the pairs (x[i], x[i + H/2]) of every head ("interleave": neighbours), into a new tensor."""
    check("npu_rotary_mul", input=x_TNH[None], r1=cos, r2=sin, rotary_mode=mode)
    out: Tensor = torch.ops.npu.npu_rotary_mul(x_TNH[None], cos, sin, rotary_mode=mode)[0]
    return out


def apply_rotary_pos_emb(*, query_TNH: Tensor, key_TKH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys at once, in place though the schema hides it. H is 64 or 128; cos as of `angles`."""
    arguments = {"query": query_TNH, "key": key_TKH, "cos": cos[0], "sin": sin[0], "layout": "TND",
                 "rotary_mode": "half"}
    check("npu_apply_rotary_pos_emb", **arguments)
    query, key = torch.ops.npu.npu_apply_rotary_pos_emb(**arguments)
    return query, key


def mrope(*, positions: Tensor, query_TX: Tensor, key_TX: Tensor, cos_sin_LR: Tensor, head_dim: int,
          sections: Sequence[int] = (0, 0, 0)) -> tuple[Tensor, Tensor]:
    """Rotate by up to three positions a token: sections[i] of the R/2 angles take theirs from positions[i].

    positions: [3, T], or [T] for text, with sections (0, 0, 0). query, key: [T, heads * head_dim]; the first R numbers
    of each head are rotated. cos_sin_LR: cos of the R/2 angles, then sin, in the query's dtype.
    """
    arguments = {"positions": positions, "query": query_TX, "key": key_TX, "cos_sin_cache": cos_sin_LR,
                 "head_size": head_dim, "mrope_section": list(sections), "rotary_mode": "half"}
    check("npu_mrope", **arguments)
    query, key = torch.ops.npu.npu_mrope(**arguments)
    return query, key
