"""Attention over packed, dense and paged sequences, with the checks that devices make (fused.py has the operators).

N query heads, K key-value heads, D head size, V value head size, Q query tokens, S keys of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASK_SIZE = 2048
HALVES = (torch.float16, torch.bfloat16)
LATENT_HEADS = tuple(2**i for i in range(8))  # that CANN 9.1 takes; older versions only the last three
_checked_masks: set[int] = set()


@dataclass
class Call:
    """One call, with the names of v1."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    q_lens: Sequence[int] | None
    kv_lens: Sequence[int] | None
    block_table: Tensor | None
    query_rope: Tensor | None
    key_rope: Tensor | None
    sink: Tensor | None
    num_heads: int
    num_kv_heads: int
    scale: float
    pre_tokens: int
    next_tokens: int
    layout: str
    sparse_mode: int
    block_size: int
    wants_lse: bool

    def __post_init__(self) -> None:
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        is_latent = self.query_rope is not None
        if self.num_heads % self.num_kv_heads or (self.num_heads // self.num_kv_heads > 64 and not is_latent):
            raise RuntimeError(f"{self.num_heads} heads over {self.num_kv_heads}")
        if len({self.query.dtype, self.key.dtype, self.value.dtype}) > 1:
            raise RuntimeError(f"query, key and value are {self.query.dtype}, {self.key.dtype}, {self.value.dtype}")
        if self.sparse_mode in (2, 3, 4):
            _check_causal_mask(self.mask)
        elif self.sparse_mode not in (0, 1):
            raise NotImplementedError(f"sparse_mode {self.sparse_mode} is not emulated")
        paged = self.block_table is not None
        if paged and (self.block_table.dtype is not torch.int32 or self.block_table.dim() != 2):  # type: ignore[union-attr]
            raise RuntimeError("block_table is not int32 of two dimensions")
        if paged and (self.kv_lens is None or not self.block_size):
            raise RuntimeError("a block_table needs actual_seq_lengths_kv and block_size")
        if paged and max(self.key.numel(), self.value.numel()) >= 2**31:
            raise RuntimeError("a paged key or value of 2^31 numbers or more: devices read it from wrong places")
        if (
            self.layout.startswith(("TND", "NTD"))
            and self.sparse_mode == 0
            and paged
            and self.mask is None
            and self.query_rope is None
        ):
            raise RuntimeError("TND over pages with sparse_mode 0 and no mask: devices have returned a plain mean")
        if self.query_rope is not None or self.key_rope is not None:
            self._check_latents()
        elif not paged and self.layout in ("TND", "NTD", "NTD_TND"):
            self._check_packed()

    def _check_packed(self) -> None:
        """What a device asks of keys that lie one after the other: `CheckGqaDSupport`, `CheckSpecConditions` and
        `CheckActSeqWhenLayoutIsTND` of ops-transformer 9.1, and what its documents say."""
        widths = self.query.shape[2], self.key.shape[2], self.value.shape[2]
        same = len(set(widths)) == 1 and (widths[0] in (64, 128) or (self.layout == "TND" and widths[0] <= 256))
        if widths != (192, 192, 128) and not same:
            raise RuntimeError(f"queryD, keyD and valueD are {widths}: only 192, 192, 128, or the same are supported")
        if self.query.dtype not in HALVES or not all(x.is_contiguous() for x in (self.query, self.key, self.value)):
            raise RuntimeError("packed query, key and value are contiguous, and of 16 bits")
        if self.sparse_mode not in (0, 3, 4) or (self.sparse_mode == 0 and self.mask is not None):
            raise RuntimeError(f"{self.layout} only supports sparse 0 without a mask, 3 and 4")
        ends, kv_ends = list(self.q_lens or ()), list(self.kv_lens or ())
        if len(ends) != len(kv_ends) or len(ends) > 4096:
            raise RuntimeError(f"{len(ends)} queries' lengths, {len(kv_ends)} keys', 4096 at most")
        if any(b < a for a, b in zip([0, *kv_ends], kv_ends, strict=False)):
            raise RuntimeError(f"actual_seq_lengths_kv {kv_ends} do not ascend")
        if self.sparse_mode == 3 and any(
            q1 - q0 > k1 - k0 for q0, q1, k0, k1 in zip([0, *ends], ends, [0, *kv_ends], kv_ends, strict=False)
        ):
            raise RuntimeError("sparse 3: a sequence has more queries than keys")

    def _check_latents(self) -> None:
        """What a device asks of latent attention (MLA): `IFATiling::CheckMlaAttrs`, `CheckMlaKeyRope`, `CheckMlaMisc`
        and `CheckTndMaskShapeWithSparseMode` of ops-transformer 9.1, in its words where they are ours."""
        query, key, rope, key_rope = self.query, self.key, self.query_rope, self.key_rope
        if rope is None or key_rope is None:
            raise RuntimeError("query_rope and key_rope go together")
        if self.layout not in ("TND", "TND_NTD"):
            raise NotImplementedError(f"query_rope in layout {self.layout} is not emulated")
        if self.block_table is None:
            raise RuntimeError("only PageAttention KvCache is supported in MLA mode")
        if len({query.dtype, key.dtype, rope.dtype, key_rope.dtype}) > 1 or query.dtype not in HALVES:
            raise RuntimeError(f"query and key are {query.dtype} and {key.dtype}, their ropes {rope.dtype} and "
                               f"{key_rope.dtype}")
        if self.num_kv_heads != 1 or self.num_heads not in LATENT_HEADS or query.shape[1] != self.num_heads:
            raise RuntimeError(f"{self.num_heads} heads over {self.num_kv_heads}, MLA only support 1, 2, 4 ... 128 "
                               "over 1")
        if (query.shape[2], rope.shape[2]) != (512, 64) or rope.shape[:2] != query.shape[:2]:
            raise RuntimeError(f"query {tuple(query.shape)}, query_rope {tuple(rope.shape)}: only 512 and 64 in MLA")
        if self.block_size not in (16, 128):
            raise RuntimeError(f"blockSize({self.block_size}), MLA only support {{16, 128}}")
        if (key.shape[1:] != (self.block_size, 512) or key_rope.shape != (*key.shape[:2], 64)
                or self.value.shape != key.shape):
            raise RuntimeError(f"key {tuple(key.shape)}, value {tuple(self.value.shape)}, key_rope "
                               f"{tuple(key_rope.shape)} with block_size {self.block_size}")
        if not all(x.is_contiguous() for x in (query, rope, key, self.value, key_rope)):
            raise RuntimeError("a tensor of MLA is not contiguous")
        if self.sparse_mode not in (0, 3) or (self.sparse_mode == 0 and self.mask is not None):
            raise RuntimeError("TND/TND_NTD only support sparse 0 without a mask, or 3")
        ends = list(self.q_lens or ())
        if not all(1 <= end - start <= 16 for start, end in zip([0, *ends], ends, strict=False)):
            raise RuntimeError(f"actual_seq_lengths {ends}: MLA takes 1 to 16 queries a sequence")


def _check_causal_mask(mask: Tensor | None) -> None:
    """sparse_mode 2, 3 and 4 need the fixed triangle, whatever the lengths are."""
    if mask is None or mask.shape[-2:] != (MASK_SIZE, MASK_SIZE) or mask.numel() != MASK_SIZE**2:
        given = None if mask is None else tuple(mask.shape)
        raise RuntimeError(f"sparse_mode 2, 3 and 4 need a mask of {MASK_SIZE} x {MASK_SIZE}, got {given}")
    if mask.dtype not in (torch.bool, torch.int8, torch.uint8):
        raise RuntimeError(f"a mask of {mask.dtype}")
    flat = mask.view(MASK_SIZE, MASK_SIZE)
    corner = flat[:2, :2].tolist()
    if corner != [[0, 1], [0, 0]]:
        raise RuntimeError("the mask is not ones above the diagonal")
    if mask.data_ptr() not in _checked_masks:
        if not torch.equal(flat.bool(), torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1)):
            raise RuntimeError("the mask is not ones above the diagonal")
        _checked_masks.add(mask.data_ptr())


def attend(call: Call) -> tuple[Tensor, Tensor]:
    source, _, target = call.layout.partition("_")
    target = target or source
    if source in ("TND", "NTD"):
        return _packed(call, source, target)
    return _batched(call, source, target)


def _packed(call: Call, source: str, target: str) -> tuple[Tensor, Tensor]:
    query = _with_rope(call.query, call.query_rope)
    if source == "NTD":
        query = query.transpose(0, 1)
    ends = list(call.q_lens or ())
    if not ends or ends[-1] != query.shape[0]:
        raise RuntimeError(f"queryT({query.shape[0]}) must be equal to the last element of actual_seq_lengths {ends}")
    if any(b < a for a, b in zip([0, *ends], ends, strict=False)):
        raise RuntimeError(f"actual_seq_lengths {ends} do not ascend")
    if call.block_table is not None and call.block_table.shape[0] != len(ends):
        raise RuntimeError(f"{len(ends)} sequences, {call.block_table.shape[0]} rows of the block_table")
    out = query.new_zeros(query.shape[0], call.num_heads, _value_dim(call))
    lse = torch.full((query.shape[0], call.num_heads, 1), float("inf"))
    start = 0
    for row, end in enumerate(ends):
        key, value = _packed_keys(call, row, len(ends), source)
        if end > start:
            out[start:end], lse[start:end, :, 0] = attend_one(call, query[start:end], key, value, row)
        start = end
    return (out.transpose(0, 1).contiguous() if target == "NTD" else out), (lse if call.wants_lse else torch.empty(0))


def _packed_keys(call: Call, row: int, num_rows: int, source: str) -> tuple[Tensor, Tensor]:
    lens = list(call.kv_lens or ())
    if len(lens) != num_rows:
        raise RuntimeError(f"{num_rows} sequences, actual_seq_lengths_kv {lens}")
    if call.block_table is not None:
        return paged_keys(call, row, lens[row])
    key, value = _with_rope(call.key, call.key_rope), call.value
    if source == "NTD":
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    if lens[-1] != key.shape[0]:
        raise RuntimeError(f"keyT({key.shape[0]}) must be equal to the last element of actual_seq_lengths_kv {lens}")
    start = lens[row - 1] if row else 0
    return key[start : lens[row]], value[start : lens[row]]


def _batched(call: Call, source: str, target: str) -> tuple[Tensor, Tensor]:
    query = _bsnd(_with_rope(call.query, call.query_rope), source, call.num_heads)
    batch, length = query.shape[:2]
    if source == "BSH" and call.query_rope is not None:
        raise NotImplementedError("query_rope in layout BSH is not emulated")
    paged = call.block_table is not None
    key = None if paged else _bsnd(_with_rope(call.key, call.key_rope), source, call.num_kv_heads)
    value = None if paged else _bsnd(call.value, source, call.num_kv_heads)
    out = query.new_zeros(batch, length, call.num_heads, _value_dim(call))
    lse = torch.full((batch, call.num_heads, length, 1), float("inf"))
    for row in range(batch):
        num_q = _at(call.q_lens, row, length)
        if paged:
            k, v = paged_keys(call, row, _at(call.kv_lens, row, 0))
        else:
            assert key is not None and value is not None
            num_kv = _at(call.kv_lens, row, key.shape[1])
            k, v = key[row, :num_kv], value[row, :num_kv]
        if num_q:
            out[row, :num_q], rows = attend_one(call, query[row, :num_q], k, v, row)
            lse[row, :, :num_q, 0] = rows.T
    return _laid_out(out, target), (lse if call.wants_lse else torch.empty(0))


def _at(lens: Sequence[int] | None, row: int, otherwise: int) -> int:
    if not lens:
        return otherwise
    return int(lens[row] if len(lens) > 1 else lens[0])


def _bsnd(x: Tensor, layout: str, num_heads: int) -> Tensor:
    if layout == "BSH":
        return x.reshape(x.shape[0], x.shape[1], num_heads, -1)
    if layout == "BNSD":
        return x.transpose(1, 2)
    if layout != "BSND":
        raise RuntimeError(f"Layout {layout} is not supported!")
    return x


def _laid_out(out: Tensor, layout: str) -> Tensor:
    if layout == "BSH":
        return out.flatten(2)
    order = {"BSND": (0, 1, 2, 3), "BNSD": (0, 2, 1, 3), "NBSD": (2, 0, 1, 3)}[layout]
    return out.permute(order).contiguous()


def _with_rope(x: Tensor, rope: Tensor | None) -> Tensor:
    return x if rope is None else torch.cat((x, rope), -1)


def _value_dim(call: Call) -> int:
    """V, out of any layout of the values."""
    value = call.value
    if value.dim() == 3 and (call.block_table is not None or call.layout.startswith("BSH")):
        return value.shape[-1] // call.num_kv_heads
    return value.shape[-1] if value.dim() < 5 else value.shape[2] * value.shape[4]


def paged_keys(call: Call, row: int, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values of a sequence: (S, K, D) and (S, K, V)."""
    assert call.block_table is not None
    num_blocks = -(-length // call.block_size)
    if num_blocks > call.block_table.shape[1]:
        raise RuntimeError(f"{length} keys need {num_blocks} blocks, the block_table has {call.block_table.shape[1]}")
    blocks = call.block_table[row, :num_blocks].long()
    if num_blocks and (int(blocks.min()) < 0 or int(blocks.max()) >= call.key.shape[0]):
        raise RuntimeError(f"blocks {blocks.tolist()} are not all in [0, {call.key.shape[0]})")
    keys = [_unpaged(call, cache, blocks) for cache in (call.key, call.key_rope) if cache is not None]
    return torch.cat(keys, -1)[:length], _unpaged(call, call.value, blocks)[:length]


def _unpaged(call: Call, cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks of a cache (blocks, size, K*D), (blocks, K, size, D) or NZ (blocks, K, D/16, size, 16) as (S, K, D)."""
    pages = cache[blocks]
    if cache.dim() == 3:
        pages = pages.view(*pages.shape[:2], call.num_kv_heads, cache.shape[2] // call.num_kv_heads)
    elif cache.dim() == 4:
        pages = pages.transpose(1, 2)
    else:
        pages = pages.permute(0, 3, 1, 2, 4).flatten(3)
    if pages.shape[1] != call.block_size or pages.shape[2] != call.num_kv_heads:
        raise RuntimeError(
            f"a cache {tuple(cache.shape)} with block_size {call.block_size} and {call.num_kv_heads} heads"
        )
    return pages.flatten(0, 1)


def attend_one(call: Call, query: Tensor, key: Tensor, value: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """query (Q, N, D), key (S, K, D), value (S, K, V) to out (Q, N, V) and lse (Q, N)."""
    num_q, num_heads, _ = query.shape
    num_keys, num_kv_heads, _ = key.shape
    ratio = num_heads // num_kv_heads
    wide = query.float().view(num_q, num_kv_heads, ratio, -1).permute(1, 2, 0, 3)  # K, ratio, Q, D
    scores = torch.matmul(wide.flatten(1, 2), key.float().permute(1, 2, 0)) * call.scale  # K, ratio * Q, S
    scores = scores.view(num_heads, num_q, num_keys)
    hidden = _hidden(call, num_q, num_keys, row)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if call.sink is not None:
        sink = call.sink.float()[:, None, None].expand(num_heads, num_q, 1)
        lse = torch.cat((scores, sink), -1).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1) if num_keys else torch.full((num_heads, num_q), float("-inf"))
    nothing = lse == float("-inf")
    weights = torch.exp(scores - lse.masked_fill(nothing, 0.0)[..., None]).view(num_kv_heads, ratio * num_q, num_keys)
    out = torch.matmul(weights, value.float().transpose(0, 1)).view(num_heads, num_q, -1)
    return out.transpose(0, 1).to(query.dtype), lse.masked_fill(nothing, float("inf")).T


def _hidden(call: Call, num_q: int, num_keys: int, row: int) -> Tensor | None:
    """True where a key must not be seen, (Q, S); None: everything is seen."""
    mode = call.sparse_mode
    if mode in (0, 1):
        return None if call.mask is None else _given_mask(call.mask, num_q, num_keys, row)
    if mode == 3 and num_q == 1:
        return None
    distance = torch.arange(num_keys)[None, :] - torch.arange(num_q)[:, None]  # to the right of the left-up diagonal
    if mode == 2:
        return distance > 0
    distance = distance - (num_keys - num_q)
    return distance > 0 if mode == 3 else (distance > call.next_tokens) | (distance < -call.pre_tokens)


def _given_mask(mask: Tensor, num_q: int, num_keys: int, row: int) -> Tensor:
    while mask.dim() > 2:
        mask = mask[min(row, mask.shape[0] - 1)] if mask.shape[0] > 1 else mask[0]
    if mask.shape[0] < num_q or mask.shape[1] < num_keys:
        raise RuntimeError(f"a mask of {tuple(mask.shape)} for {num_q} queries and {num_keys} keys")
    return mask[:num_q, :num_keys].bool()
