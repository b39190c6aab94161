"""Multi-head latent attention on an Ascend NPU, over `npu_ops/latent.py`: for each sequence of a step the form that is
less work.

Letters: T tokens, S sequences, M blocks each, C positions of some sequences, N heads, L width of a latent, R of the
rotated part, D of the rest of a key, V of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.latent_form import LatentWidths, expanding_is_less
from backends.metadata import AttentionMetadata
from backends.npu_step import angles, block_table, derived, step_plan
from npu_ops import kv, latent, norm
from npu_ops.attention import Lengths
from npu_ops.contracts import LATENT_QUERIES, MADE_POSITIONS, takes_made_widths
from npu_ops.kv import Dense
from npu_ops.recording import current_recorder


@dataclass(frozen=True, slots=True)
class Absorbed:
    """Sequences in pieces of as many queries as the operator takes. table: int32 [pieces, M]. lengths: of the pieces,
    asked for at each launch."""

    table_SM: Tensor
    lengths: Callable[[], Lengths]


@dataclass(frozen=True, slots=True)
class Forms:
    """A step by the form that its sequences take: first the `batches` whose keys and values are made, then the absorbed
    ones, if there are any. order_T, back_T: the step's tokens in this order, and the way back, int32; None: they
    already are in it."""

    batches: Sequence[latent.Expanded]
    absorbed: Absorbed | None
    order_T: Tensor | None = None
    back_T: Tensor | None = None


def latent_rope_write(
    latent_TX: Tensor,
    q_TNX: Tensor,
    positions_T: Tensor,
    cos_sin_XR: Tensor,
    cache: tuple[Tensor, Tensor],
    meta: AttentionMetadata,
    *,
    norm_weight_L: Tensor,
    eps: float,
    interleaved: bool,
) -> Tensor:
    width, rotated = len(norm_weight_L), cos_sin_XR.shape[1]
    cos, sin = angles(meta, cos_sin_XR, positions_T, q_TNX.dtype)
    latents, shared = dense_latents(cache)
    latents_TL = norm.rms_norm(x=latent_TX[:, :width].contiguous(), gamma=norm_weight_L, epsilon=eps)
    q_TNR, shared_T1R = latent.rotate(q_TNX[..., -rotated:], latent_TX[:, None, width:], cos, sin,
                                      interleaved=interleaved)
    slots_T = derived(meta, ("slots", latents.every), lambda: latents.slots(meta.slot_mapping_T.clamp(min=0)))
    kv.write_kv(key_TKH=latents_TL[:, None], value_TKH=shared_T1R, key=latents, value=shared, slots_T=slots_T)
    return torch.cat((q_TNX[..., :-rotated], q_TNR), dim=-1)


def latent_attention(q_TNX: Tensor, up_NYL: Tensor, cache: tuple[Tensor, Tensor], meta: AttentionMetadata, *,
                     scale: float) -> Tensor:
    """See `opset.LatentAttentionOp`. Graphs have the absorbed form: which form is less work is not the same in every
    replay."""
    latents, shared = dense_latents(cache)
    (num_heads, num_made, width), rotated = up_NYL.shape, shared.cache.shape[3]
    key_dim = q_TNX.shape[2] - rotated
    widths = LatentWidths(num_heads, key_dim, rotated, num_made - key_dim, width, q_TNX.element_size())
    step_plan(meta)
    forms = derived(meta, ("forms", widths, latents.every), lambda: forms_of(meta, widths, latents))
    ordered_TNX = q_TNX if forms.order_T is None else q_TNX.index_select(0, forms.order_T)
    parts, done = [], 0
    for batch in forms.batches:
        ours = slice(done, done + batch.lengths.query_ends[-1])
        parts.append(latent.attend_expanded(query_TNX=ordered_TNX[ours], up_NYL=up_NYL, latents_BPL=latents.rows_BPX,
                                            rotated_BPR=shared.rows_BPX, batch=batch, scale=scale))
        done = ours.stop
    if forms.absorbed is not None:
        parts.append(latent.attend(query_TNX=ordered_TNX[done:], up_NYL=up_NYL, latents_BPL=latents.rows_BPX,
                                   rotated_BPR=shared.rows_BPX, block_table_SM=forms.absorbed.table_SM,
                                   lengths=forms.absorbed.lengths, scale=scale))
    out_TX = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out_TX if forms.back_T is None else out_TX.index_select(0, forms.back_T)


def dense_latents(cache: tuple[Tensor, Tensor]) -> list[Dense]:
    """Raises ValueError where blocks of the two parts lie apart by different multiples of their sizes: one table gives
    the blocks of both."""
    latents, rotated = (Dense.of(part) for part in cache)
    if latents.every != rotated.every:
        raise ValueError(f"latents on an NPU lie as many blocks apart as their rotated parts, not {latents.every} and "
                         f"{rotated.every}")
    return [latents, rotated]


def forms_of(meta: AttentionMetadata, widths: LatentWidths, latents: Dense) -> Forms:
    """Whether the lengths say that a sequence is expanded depends on the step, so that a graph expands none."""
    table_SM = latents.blocks(block_table(meta))
    if current_recorder() is None:
        lengths = step_plan(meta).lengths
        made = [s for s, counts in enumerate(counts_of(lengths)) if expands(*counts, widths)]
        if made:
            return mixed_forms(table_SM, meta.block_size, widths, lengths, made)
    return Forms((), Absorbed(table_of_pieces(meta, table_SM), lambda: pieces(meta).lengths))


def counts_of(lengths: Lengths) -> Iterator[tuple[int, int]]:
    """Queries and keys of each sequence."""
    starts = (0, *lengths.query_ends)
    return ((end - start, kv_len) for start, end, kv_len in zip(starts, lengths.query_ends, lengths.kv_lens))


def expands(num_queries: int, seq_len: int, widths: LatentWidths) -> bool:
    """Whether the keys and values of a sequence are made: that is less work, and there is an operator for them."""
    return (num_queries > LATENT_QUERIES and seq_len <= MADE_POSITIONS
            and takes_made_widths(widths.key + widths.rotated, widths.value)
            and expanding_is_less(num_queries, seq_len, widths.key, widths.value, widths.latent))


def expanded_bytes(widths: LatentWidths, *, num_positions: int, longest: int) -> int:
    """Of `Backend.expanded_bytes`: the gathered latents of one of `latent.batches`, and keys and values of some heads,
    which are there a second time while they are laid out."""
    if not takes_made_widths(widths.key + widths.rotated, widths.value):
        return 0
    longest, all_heads = min(longest, num_positions, MADE_POSITIONS), widths.head_bytes * widths.num_heads
    most_positions = min(num_positions, max(longest, latent.MADE_BYTES // all_heads))
    made = min(most_positions * all_heads, max(latent.MADE_BYTES, longest * widths.head_bytes))
    return most_positions * (widths.latent + widths.rotated) * widths.number_bytes + 2 * made


def mixed_forms(table_SM: Tensor, block_size: int, widths: LatentWidths, lengths: Lengths, made: list[int]) -> Forms:
    """made: the sequences that are expanded."""
    counts, is_made = list(counts_of(lengths)), set(made)
    absorbed = [s for s, (num_queries, _) in enumerate(counts) if num_queries and s not in is_made]
    batches, done = [], 0
    for number, heads in latent.batches([counts[s][1] for s in made], widths.head_bytes, widths.num_heads):
        ours, done = made[done : done + number], done + number
        slots_C = slots_of(table_SM, [(s, counts[s][1]) for s in ours], block_size)
        query_ends, kv_ends = (list(accumulate(counts[s][i] for s in ours)) for i in (0, 1))
        batches.append(latent.Expanded(Lengths(query_ends, kv_ends), slots_C, heads))
    return Forms(batches, absorbed_of(table_SM, [(s, *counts[s]) for s in absorbed]) if absorbed else None,
                 *orders([*made, *absorbed], lengths, table_SM.device))


def slots_of(table_SM: Tensor, sequences: Sequence[tuple[int, int]], block_size: int) -> Tensor:
    """int32 [C]: the slots of all positions of sequences, which are given by number and length."""
    places = [np.arange(length, dtype=np.int32) for _, length in sequences]
    entries = [place // block_size + s * table_SM.shape[1] for (s, _), place in zip(sequences, places)]
    entries_C, offsets_C = to_device((np.concatenate(entries), np.concatenate(places) % block_size), table_SM.device)
    return table_SM.view(-1).index_select(0, entries_C) * block_size + offsets_C


def absorbed_of(table_SM: Tensor, sequences: Sequence[tuple[int, int, int]]) -> Absorbed:
    """sequences: number, queries and length of each."""
    found = latent.cut(Lengths(list(accumulate(q for _, q, _ in sequences)), [length for *_, length in sequences]))
    rows, = to_device([[sequences[i][0] for i in found.sequences]], table_SM.device)
    return Absorbed(table_SM.index_select(0, rows), lambda: found.lengths)


def orders(sequences: list[int], lengths: Lengths, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The step's tokens in this order of sequences, and back."""
    if sequences == sorted(sequences):
        return None, None
    starts = (0, *lengths.query_ends)
    order_T = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in sequences])
    back_T = np.empty_like(order_T)
    back_T[order_T] = np.arange(len(order_T))
    found = to_device((order_T, back_T), device)
    return found[0], found[1]


def to_device(lists: Sequence[Any], device: torch.device) -> Sequence[Tensor]:
    """Lists of one length as int32, by one copy that nothing waits for."""
    return kv.to_device(torch.from_numpy(np.array(lists, dtype=np.int32)), device).unbind()


def pieces(meta: AttentionMetadata) -> latent.Pieces:
    lengths = step_plan(meta).lengths
    found: latent.Pieces = derived(meta, "pieces", lambda: latent.cut(lengths))
    return found


def table_of_pieces(meta: AttentionMetadata, table_SM: Tensor) -> Tensor:
    """int32 [pieces, M]. Raises RuntimeError in the capture of a step whose sequences may have several: a replay has
    as many as the capture."""
    if current_recorder() is not None and meta.max_query_len > LATENT_QUERIES:
        raise RuntimeError(f"graphs of attention over latents have up to {LATENT_QUERIES} tokens of a sequence, not "
                           f"{meta.max_query_len}")
    sequences = pieces(meta).sequences
    if sequences == list(range(len(table_SM))):
        return table_SM
    return table_SM.index_select(0, kv.to_device(torch.tensor(sequences), table_SM.device))
