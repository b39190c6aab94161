"""Multi-head latent attention on a CPU: for each sequence the form that takes fewer multiplications. Products are
torch's; what is summed for few queries is the compiled kernel's (latent.c) where there is one.

Letters: Q queries and C positions of one sequence, D width of a key without its rotated part, V of a value; more in
`opset.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backends.latent_forms import expanding_is_less
from backends.metadata import AttentionMetadata
from backends.reference.kv import latent_width, latents_of

# Scores that are held at once, 16 MiB. Chosen: it bounds the memory of a long prompt's chunk, and products are no
# slower for it.
MAX_SCORES = 2**22

# Queries of a sequence that are never expanded, and that the kernel takes one by one: which form they take does not
# depend on the length, so that a step of such rows alone can be captured. Chosen: products of more are torch's
# strength.
FEW = 16

# (q_XNW, cache, meta, sums_XNL): the latents weighted by each query, scaled and brought to their width, of the
# sequences with FEW queries at most, in order. Lengths are read as it runs. The sums of other tokens, which stand
# behind, are left as they are.
LatentSums = Callable[[Tensor, Tensor, AttentionMetadata, Tensor], None]


def latent_attention(q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, meta: AttentionMetadata, *, scale: float,
                     sums: LatentSums | None = None) -> Tensor:
    """sums: the kernel, if it takes these types; None: torch."""
    num_heads, num_made, width = up_NYL.shape
    key_dim = q_TNX.shape[2] - (latent_width(cache) - width)
    value_dim = num_made - key_dim
    q_TNX, up_NYL, dtype = q_TNX.float() * scale, up_NYL.float(), q_TNX.dtype
    if sums is not None and meta.max_query_len <= FEW:  # the host need not know the lengths
        wide_TNX, sums_TNL = _widened(q_TNX, up_NYL, key_dim)
        sums(wide_TNX, cache, meta, sums_TNL)
        return _values(sums_TNL, up_NYL, key_dim).flatten(1).to(dtype)
    out_TNV = q_TNX.new_zeros((len(q_TNX), num_heads, value_dim))
    starts = meta.query_start_S1.tolist()
    absorbed = []
    for s, seq_len in enumerate(meta.seq_lens_S.tolist()):
        rows = slice(starts[s], starts[s + 1])
        num_queries = rows.stop - rows.start
        if num_queries > FEW and expanding_is_less(num_queries, seq_len, key_dim, value_dim, width):
            _attend_expanded(q_TNX[rows], up_NYL, latents_of(cache, meta, s, seq_len).float(), out_TNV[rows])
        elif num_queries:
            absorbed.append((s, seq_len, rows))
    if absorbed:
        absorbed.sort(key=lambda each: each[2].stop - each[2].start > FEW)
        _attend_absorbed(q_TNX, up_NYL, cache, meta, absorbed, out_TNV, sums)
    return out_TNV.flatten(1).to(dtype)


def _attend_expanded(q_QNX: Tensor, up_NYL: Tensor, kept_CX: Tensor, out_QNV: Tensor) -> None:
    """One head at a time: keys and values of all heads of a long sequence would be many times its latents."""
    num_queries, num_heads, _ = q_QNX.shape
    width, value_dim = up_NYL.shape[2], out_QNV.shape[2]
    key_dim = up_NYL.shape[1] - value_dim
    latents_CL, shared_CR = kept_CX[:, :width], kept_CX[:, width:]
    num_past = len(kept_CX) - num_queries
    for n in range(num_heads):
        made_CY = latents_CL @ up_NYL[n].T
        keys_CX = torch.cat((made_CY[:, :key_dim], shared_CR), dim=1)
        for begin, end in _tiles(num_queries, len(kept_CX)):
            seen = num_past + end  # positions that the last query of the tile sees
            scores_QC = q_QNX[begin:end, n] @ keys_CX[:seen].T
            _hide_later(scores_QC, end - begin)
            torch.mm(scores_QC.softmax(-1), made_CY[:seen, key_dim:], out=out_QNV[begin:end, n])


def _attend_absorbed(q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, meta: AttentionMetadata,
                     sequences: list[tuple[int, int, slice]], out_TNV: Tensor, sums: LatentSums | None) -> None:
    """The matrices are read once for all of these sequences. sequences: number, length and rows of each, those with FEW
    queries first."""
    key_dim = up_NYL.shape[1] - out_TNV.shape[2]
    rows_T = torch.cat([torch.arange(rows.start, rows.stop) for _, _, rows in sequences])
    wide_TNX, sums_TNL = _widened(q_TNX[rows_T], up_NYL, key_dim)
    done = 0
    for s, seq_len, rows in sequences:
        num_queries = rows.stop - rows.start
        if sums is None or num_queries > FEW:
            ours = slice(done, done + num_queries)
            _sum_latents(wide_TNX[ours], latents_of(cache, meta, s, seq_len).float(), sums_TNL[ours])
        done += num_queries
    if sums is not None:
        sums(wide_TNX, cache, meta, sums_TNL)
    out_TNV[rows_T] = _values(sums_TNL, up_NYL, key_dim)


def _widened(q_TNX: Tensor, up_NYL: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    """Queries brought to the latents' width, and memory for their sums."""
    q_NTX = q_TNX.transpose(0, 1)
    latent_q_NTL = torch.bmm(q_NTX[..., :key_dim], up_NYL[:, :key_dim])
    wide_TNX = torch.cat((latent_q_NTL, q_NTX[..., key_dim:]), dim=-1).transpose(0, 1).contiguous()
    return wide_TNX, wide_TNX.new_empty((*wide_TNX.shape[:2], up_NYL.shape[2]))


def _values(sums_TNL: Tensor, up_NYL: Tensor, key_dim: int) -> Tensor:
    """The sums brought back: [T, N, V]."""
    return torch.bmm(sums_TNL.transpose(0, 1), up_NYL[:, key_dim:].transpose(1, 2)).transpose(0, 1)


def _sum_latents(q_QNX: Tensor, kept_CX: Tensor, sums_QNL: Tensor) -> None:
    """The latents of one sequence weighted by each query of each head."""
    num_queries, num_heads, _ = q_QNX.shape
    width, num_past = sums_QNL.shape[2], len(kept_CX) - num_queries
    for begin, end in _tiles(num_queries, num_heads * len(kept_CX)):
        seen = num_past + end
        scores_XC = q_QNX[begin:end].flatten(0, 1) @ kept_CX[:seen].T
        _hide_later(scores_XC.view(end - begin, num_heads, seen), end - begin)
        torch.mm(scores_XC.softmax(-1), kept_CX[:seen, :width], out=sums_QNL[begin:end].flatten(0, 1))


def _tiles(num_queries: int, scores_each: int) -> list[tuple[int, int]]:
    """Runs of queries whose scores together are MAX_SCORES at most, or one query's."""
    size = max(1, MAX_SCORES // scores_each)
    return [(begin, min(begin + size, num_queries)) for begin in range(0, num_queries, size)]


def _hide_later(scores_QXC: Tensor, num_queries: int) -> None:
    """Mask, for each query of a tile, the positions behind it; the last query sees all."""
    hidden_QQ = torch.ones(num_queries, num_queries, dtype=torch.bool).triu_(1)
    last = scores_QXC[..., -num_queries:]
    last.masked_fill_(hidden_QQ if last.dim() == 2 else hidden_QQ[:, None], -torch.inf)
