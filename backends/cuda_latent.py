"""Multi-head latent attention on CUDA: for each sequence of an eager step the form that is less work.

Letters: T tokens, L width of a latent, N heads, V of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends.latent_form import EXPANDED_BYTES, expanding_is_less
from backends.metadata import AttentionMetadata, HostLengths
from cuda_ops import latent, latent_expanded
from cuda_ops.attention import Batch
from cuda_ops.kv import to_device

# Multiplications that expanding a sequence must save in a layer, all heads of this rank together. Those of either form
# are products of the tensor cores, but expanding launches more kernels, six or so (gathering; a product and attention
# for each group of heads; the rows of other sequences picked out and put back), which small chunks do not earn. Chosen,
# not measured: 20 us of 430 TFLOP/s, about half of what an H100 has.
LEAST_SAVED = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """What takes which form in a step. rows_T: the tokens of `absorbed`, the step of those sequences that are not
    expanded; both None where all are."""

    runs: list[latent_expanded.Run]
    rows_T: Tensor | None
    absorbed: Batch | None


def attention(q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, meta: AttentionMetadata, batch: Batch, *,
              scale: float) -> Tensor:
    """Without lengths on the host, as in a captured step, everything is absorbed. batch: of the same step."""
    widths = latent_expanded.Widths.of(q_TNX, up_NYL, cache)
    forms = None
    if meta.host is not None and meta.max_query_len > latent.DECODE_QUERIES:
        kept: dict[Any, Forms | None] = {} if meta.plan is None else meta.plan
        key = ("latents", len(up_NYL), widths)  # layers of a model share it
        if key not in kept:
            kept[key] = choose(meta.host, batch, len(up_NYL), widths, q_TNX)
        forms = kept[key]
    if forms is None:
        return latent.latent_attention(q_TNX, up_NYL, cache, batch, scale=scale)
    out_TNV = q_TNX.new_empty(*q_TNX.shape[:2], widths.value)
    if forms.absorbed is not None:
        few_TX = latent.latent_attention(q_TNX[forms.rows_T], up_NYL, cache, forms.absorbed, scale=scale)
        out_TNV[forms.rows_T] = few_TX.view(-1, *out_TNV.shape[1:])
    for run in forms.runs:
        latent_expanded.attend(q_TNX, up_NYL, cache, batch, run, out_TNV, scale=scale)
    return out_TNV.flatten(1)


def choose(host: HostLengths, batch: Batch, num_heads: int, widths: latent_expanded.Widths,
           like: Tensor) -> Forms | None:
    """None: nothing is expanded. like: a tensor of the queries' dtype and device."""
    starts, seq_lens = host.query_start_S1.tolist(), host.seq_lens_S.tolist()
    chunks, others = [], []
    for s, (begin, end, seq_len) in enumerate(zip(starts, starts[1:], seq_lens)):
        if _is_expanded(end - begin, seq_len, num_heads, widths, like):
            chunks.append(latent_expanded.Chunk(sequence=s, first_row=begin, num_queries=end - begin, seq_len=seq_len))
        elif end > begin:
            others.append((s, begin, end))
    if not chunks:
        return None
    runs = latent_expanded.plan(chunks, widths, like, EXPANDED_BYTES)
    if not others:
        return Forms(runs=runs, rows_T=None, absorbed=None)
    rows_T = to_device(torch.cat([torch.arange(begin, end) for _, begin, end in others]), like.device)
    return Forms(runs=runs, rows_T=rows_T, absorbed=_step_of(others, batch, like.device))


def _is_expanded(num_queries: int, seq_len: int, num_heads: int, widths: latent_expanded.Widths, like: Tensor) -> bool:
    """Never what is decoded."""
    least = LEAST_SAVED // num_heads
    return (num_queries > latent.DECODE_QUERIES
            and expanding_is_less(num_queries, seq_len, widths.key, widths.value, widths.latent, least=least)
            and latent_expanded.fits(num_queries, seq_len, num_heads, widths, like, EXPANDED_BYTES))


def _step_of(sequences: list[tuple[int, int, int]], batch: Batch, device: torch.device) -> Batch:
    """Some sequences of a step, their tokens one after the other. sequences: number, first token and end of each."""
    sequences_S = to_device(torch.tensor([s for s, *_ in sequences]), device)
    query_lens = [end - begin for _, begin, end in sequences]
    starts_S1 = torch.tensor([0, *query_lens]).cumsum(0).int()
    return Batch(query_start_S1=to_device(starts_S1, device), seq_lens_S=batch.seq_lens_S[sequences_S],
                 block_table_SM=batch.block_table_SM[sequences_S],
                 kv_base_S=None if batch.kv_base_S is None else batch.kv_base_S[sequences_S],
                 num_tokens=sum(query_lens), max_query_len=max(query_lens))  # fmt: skip
