"""Multi-head latent attention (DeepSeek-V2, 2024) in its absorbed form, which is what the operator knows.

It takes up to 16 queries a sequence. A longer chunk is cut into pieces, each a sequence of its own for the operator:
the first keys of the chunk's sequence, up to the piece's last query. That is exact, as the mask is causal, and costs
that each piece reads all keys anew.

Letters: T tokens, N heads of the model, L width of a latent, R of the rotated part, D of the rest of a key, V of a
value, B blocks, P tokens per block, S pieces, M blocks each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_ops import rotary
from npu_ops.attention import Lengths, latent_attention
from npu_ops.contracts import LATENT_HEADS, LATENT_QUERIES


@dataclass(frozen=True, slots=True)
class Pieces:
    """A step in pieces of at most `LATENT_QUERIES` queries. sequences: which one each piece is of."""

    lengths: Lengths
    sequences: list[int]


def cut(lengths: Lengths) -> Pieces:
    """A sequence without queries has no piece."""
    cut_ends, kv_lens, sequences, start = [], [], [], 0
    for sequence, (end, kv_len) in enumerate(zip(lengths.query_ends, lengths.kv_lens, strict=True)):
        for first in range(start, end, LATENT_QUERIES):
            cut_end = min(first + LATENT_QUERIES, end)
            cut_ends.append(cut_end)
            kv_lens.append(kv_len - (end - cut_end))
            sequences.append(sequence)
        start = end
    return Pieces(Lengths(cut_ends, kv_lens), sequences)


def rotate(query_TNR: Tensor, shared_T1R: Tensor, cos: Tensor, sin: Tensor, *,
           interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both rotated, which may overwrite them: the first numbers of all pairs, then the second ones, also where pairs
    are neighbours (interleaved). cos, sin: of `rotary.angles`."""
    if interleaved:
        query_TNR, shared_T1R = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
                                 for x in (query_TNR, shared_T1R))
    return rotary.apply_rotary_pos_emb(query_TNH=query_TNR.contiguous(), key_TKH=shared_T1R.contiguous(), cos=cos,
                                       sin=sin)


def attend(*, query_TNX: Tensor, up_NYL: Tensor, latents_BPL: Tensor, rotated_BPR: Tensor, block_table_SM: Tensor,
           lengths: Callable[[], Lengths], scale: float) -> Tensor:
    """[T, N * V]. query: [T, N, D + R]. up: [N, D + V, L]. lengths, block_table: of pieces (`cut`)."""
    groups = [slice(first, first + LATENT_HEADS[-1]) for first in range(0, len(up_NYL), LATENT_HEADS[-1])]
    parts = [_attend(query_TNX[:, heads], up_NYL[heads], latents_BPL, rotated_BPR, block_table_SM, lengths, scale)
             for heads in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _attend(query_TNX: Tensor, up_NYL: Tensor, latents_BPL: Tensor, rotated_BPR: Tensor, block_table_SM: Tensor,
            lengths: Callable[[], Lengths], scale: float) -> Tensor:
    """`attend`, for as many heads as the operator takes."""
    num_heads, key_dim = len(up_NYL), query_TNX.shape[2] - rotated_BPR.shape[2]
    query_TNL = _padded(torch.bmm(query_TNX[..., :key_dim].transpose(0, 1), up_NYL[:, :key_dim]).transpose(0, 1))
    out_NTL = latent_attention(
        query_TNL=query_TNL, query_rope_TNR=_padded(query_TNX[..., key_dim:]),
        key_BPL=latents_BPL, key_rope_BPR=rotated_BPR, block_table_SM=block_table_SM, lengths=lengths, scale=scale)
    out_NTV = torch.bmm(out_NTL[:num_heads], up_NYL[:, key_dim:].transpose(1, 2))
    return out_NTV.transpose(0, 1).flatten(1)


def _padded(x_TNX: Tensor) -> Tensor:
    """Contiguous, with heads of zeros up to a number that the operator takes: there are 32 at least, and ranks that
    share a model have few each."""
    num_tokens, num_heads, width = x_TNX.shape
    padded_heads = next(number for number in LATENT_HEADS if number >= num_heads)
    if padded_heads == num_heads:
        return x_TNX.contiguous()
    padded = x_TNX.new_zeros((num_tokens, padded_heads, width))
    padded[:, :num_heads] = x_TNX
    return padded
