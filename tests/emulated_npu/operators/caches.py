"""Writing, gathering and scattering the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.emulated_npu.operators.registry import emulates, refuse
from tests.emulated_npu.tensors import poison


def _write(name: str, new: Tensor, cache: Tensor, slots: Tensor, num_slots: int) -> None:
    """cache (slots, ...). Slots out of range fault; of rows with one slot it is undefined which one is written."""
    where = slots.long()
    if where.numel() and (int(where.min()) < 0 or int(where.max()) >= num_slots):
        raise RuntimeError(f"{name}: slots {where.tolist()} are not all in [0, {num_slots})")
    cache[where] = new
    if where.unique().numel() != where.numel():
        lost = (cache[where] != new).flatten(1).any(1)
        for slot in where[lost].unique().tolist():
            poison(cache[slot])


def _check(name: str, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    if len({key.dtype, value.dtype, key_cache.dtype, value_cache.dtype}) > 1:
        raise RuntimeError(f"{name}: types differ: {key.dtype}, {value.dtype}, {key_cache.dtype}, {value_cache.dtype}")
    if not all(each.is_contiguous() for each in (key, value, key_cache, value_cache, slots)):
        raise RuntimeError(f"{name}: a tensor is not contiguous")
    if slots.dtype not in (torch.int32, torch.int64) or slots.dim() != 1 or slots.shape[0] != key.shape[0]:
        raise RuntimeError(f"{name}: slots {slots.dtype} {tuple(slots.shape)} for {key.shape[0]} tokens")
    if key.dim() != 3 or value.dim() != 3 or key.shape[:2] != value.shape[:2]:
        raise RuntimeError(f"{name}: key {tuple(key.shape)}, value {tuple(value.shape)}")


@emulates("npu::npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """key (tokens, heads, dim). The default lays a block out as NZ, whatever the shape of the cache says."""
    name = "npu_scatter_pa_kv_cache"
    refuse(name, {"compress_lens": compress_lens, "compress_seq_offsets": compress_seq_offsets, "seq_lens": seq_lens})
    _check(name, key, value, key_cache, value_cache, slot_mapping)
    for new, cache in ((key, key_cache), (value, value_cache)):
        if cache_mode == "Norm":
            if cache.dim() != 4 or cache.shape[2:] != new.shape[1:]:
                raise RuntimeError(f"{name}: cache {tuple(cache.shape)} for {tuple(new.shape)}")
            _write(name, new, cache.view(-1, *cache.shape[2:]), slot_mapping, cache.shape[0] * cache.shape[1])
        elif cache_mode in ("PA_NZ", None):
            _write_nz(name, new, cache, slot_mapping)
        else:
            raise RuntimeError(f"{name}: cache_mode {cache_mode!r}")


def _write_nz(name: str, new: Tensor, cache: Tensor, slots: Tensor) -> None:
    """(blocks, heads * dim / 16, block_size, 16): a token's elements lie 16 by 16, a block apart."""
    lane = 32 // new.element_size()
    width = new.shape[1] * new.shape[2]
    if width % lane:
        raise RuntimeError(f"{name}: {width} elements a token are no multiple of {lane}")
    block_size = cache[0].numel() // width
    pages = cache.view(cache.shape[0], width // lane, block_size, lane).permute(0, 2, 1, 3)
    rows = pages.reshape(-1, width // lane, lane)
    _write(name, new.view(-1, width // lane, lane), rows, slots, rows.shape[0])
    pages.copy_(rows.view(pages.shape))


@emulates("atb::_npu_reshape_and_cache")
def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    name = "_npu_reshape_and_cache"
    _check(name, key, value, key_cache, value_cache, slot_indices)
    if slot_indices.dtype is not torch.int32:
        raise RuntimeError(f"{name}: slots must be int32, not {slot_indices.dtype}")
    for new, cache in ((key, key_cache), (value, value_cache)):
        if cache.dim() != 4 or cache.shape[2:] != new.shape[1:]:
            raise RuntimeError(f"{name}: cache {tuple(cache.shape)} for {tuple(new.shape)}")
        _write(name, new, cache.view(-1, *cache.shape[2:]), slot_indices, cache.shape[0] * cache.shape[1])


@emulates("npu::npu_scatter_nd_update_")
def scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """`indices[..., :k]` name a place in the first k dimensions of `input`."""
    depth = indices.shape[-1]
    if indices.dtype not in (torch.int32, torch.int64) or updates.dtype != input.dtype:
        raise RuntimeError(
            f"npu_scatter_nd_update_: indices {indices.dtype}, updates {updates.dtype} into {input.dtype}"
        )
    if updates.shape != indices.shape[:-1] + input.shape[depth:]:
        raise RuntimeError(f"npu_scatter_nd_update_: updates {tuple(updates.shape)}, indices {tuple(indices.shape)}")
    flat = indices.reshape(-1, depth).long()
    for axis in range(depth):
        part = flat[:, axis]
        if part.numel() and (int(part.min()) < 0 or int(part.max()) >= input.shape[axis]):
            raise RuntimeError(
                f"npu_scatter_nd_update_: indices {part.tolist()} are not all in [0, {input.shape[axis]})"
            )
    input[tuple(flat.unbind(1))] = updates.reshape(flat.shape[0], *input.shape[depth:])
    return input


@emulates("npu::npu_gather_pa_kv_cache")
def gather_pa_kv_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    seq_offset: Tensor | None = None,
    is_seq_lens_cumsum: bool = False,
) -> None:
    """cache (blocks, block_size, heads, dim): all sequences one after the other into key, value (tokens, heads, D)."""
    if block_tables.dtype is not torch.int32 or seq_lens.dtype is not torch.int32:
        raise RuntimeError(f"npu_gather_pa_kv_cache: tables {block_tables.dtype}, lengths {seq_lens.dtype}")
    lengths = seq_lens.diff().tolist() if is_seq_lens_cumsum else seq_lens.tolist()
    starts = seq_offset.tolist() if seq_offset is not None else [0] * len(lengths)
    block_size = key_cache.shape[1]
    if sum(lengths) != key.shape[0]:
        raise RuntimeError(f"npu_gather_pa_kv_cache: {sum(lengths)} tokens into {key.shape[0]}")
    for cache, out in ((key_cache, key), (value_cache, value)):
        at = 0
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            place = torch.arange(start, start + length)
            blocks = block_tables[row].long()[place // block_size]
            out[at : at + length] = cache[blocks, place % block_size]
            at += length
