"""Multi-head latent attention (DeepSeek-V2, 2024) in both of its forms.

Absorbed, attention is over the latents as they lie in their blocks, by an operator that takes up to 16 queries a
sequence. A longer chunk is cut into pieces, each a sequence of its own for the operator: the first keys of the chunk's
sequence, up to the piece's last query. That is exact, as the mask is causal, and costs that each piece reads all keys
anew. Expanded, the latents of a sequence are gathered, and keys and values of some heads at a time are made of them,
over which attention is the plain one.

Letters: T tokens, N heads of the model, L width of a latent, R of the rotated part, D of the rest of a key, V of a
value, B blocks, P tokens per block, S pieces, M blocks each, C positions of all sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_ops import rotary
from npu_ops.attention import Lengths, latent_attention, packed_attention
from npu_ops.contracts import LATENT_HEADS, LATENT_QUERIES, MADE_SEQUENCES

# Of the keys and values that are there at once; they are made together and then laid out apart, so that twice as much
# is taken. More only where one head of one sequence has more. Chosen: it holds all 128 heads of 1,600 positions at
# DeepSeek-V3's widths, and is a five-hundredth of a card of 64 GiB.
MADE_BYTES = 2**27


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


@dataclass(frozen=True, slots=True)
class Expanded:
    """Sequences that are expanded together.

    lengths: where the queries and where the keys of each end, one after the other. slots_C: the places of the keys'
    latents in the cache, int32. num_heads: of which keys and values are there at once.
    """

    lengths: Lengths
    slots_C: Tensor
    num_heads: int


def batches(kv_lens: Sequence[int], head_bytes: int, num_heads: int) -> list[tuple[int, int]]:
    """Cut sequences of these lengths into runs whose keys and values fit in `MADE_BYTES`; one that is too long alone is
    a run of its own, with fewer heads at once. Returns how many sequences each run has, and how many heads at once.

    head_bytes: of the key and the value of one head at one position.
    """
    runs: list[list[int]] = []
    for kv_len in kv_lens:
        if (runs and len(runs[-1]) < MADE_SEQUENCES
                and (sum(runs[-1]) + kv_len) * head_bytes * num_heads <= MADE_BYTES):
            runs[-1].append(kv_len)
        else:
            runs.append([kv_len])
    return [(len(run), max(1, min(num_heads, MADE_BYTES // (sum(run) * head_bytes)))) for run in runs]


def attend_expanded(*, query_TNX: Tensor, up_NYL: Tensor, latents_BPL: Tensor, rotated_BPR: Tensor, batch: Expanded,
                    scale: float) -> Tensor:
    """[T, N * V]. query: [T, N, D + R], of the batch's sequences. up: [N, D + V, L]."""
    latents_CL = latents_BPL.flatten(0, 1).index_select(0, batch.slots_C)
    rotated_CR = rotated_BPR.flatten(0, 1).index_select(0, batch.slots_C)
    parts = []
    for first in range(0, len(up_NYL), batch.num_heads):
        heads = slice(first, first + batch.num_heads)
        key_CNX, value_CNV = _made(latents_CL, rotated_CR, up_NYL[heads], query_TNX.shape[2] - rotated_CR.shape[1])
        parts.append(packed_attention(query_TNH=query_TNX[:, heads].contiguous(), key_CNH=key_CNX,
                                      value_CNV=value_CNV, lengths=batch.lengths, scale=scale).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _made(latents_CL: Tensor, rotated_CR: Tensor, up_NYL: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    """Keys [C, N, D + R] and values [C, N, V] of some heads, each dense."""
    num_heads, num_made, _ = up_NYL.shape
    made_CNY = torch.mm(latents_CL, up_NYL.flatten(0, 1).t()).view(-1, num_heads, num_made)
    shared_CNR = rotated_CR[:, None].expand(-1, num_heads, -1)
    return torch.cat((made_CNY[..., :key_dim], shared_CNR), dim=-1), made_CNY[..., key_dim:].contiguous()
