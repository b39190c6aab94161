"""`PagedStep`: sequences whose keys and values are known, in a paged cache that is NaN wherever nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.backend import Backend
from backends.metadata import AttentionMetadata, HostLengths
from backends.opset import OpSet
from backends.reference.kv import keys_BKHP
from backends.reference.kv_codes import QUANTISED, dequantise, quantise, row_width, split_tiles

NAN = float("nan")
GARBAGE_ID = 2**30  # in a block table behind a sequence's last block


def keys_BKPH(backend: Backend, k_cache: Tensor) -> Tensor:
    """A K cache of the backend as [B, K, P, H], whatever its own order; shares its memory."""
    return keys_BKHP(k_cache).transpose(2, 3) if backend.name == "cpu" else k_cache


def codes_BKPH(backend: Backend, cache: Tensor, *, keys: bool) -> Tensor:
    """The codes of a quantised cache as uint8 [B, K, P, H], whatever the backend's order; shares its memory."""
    codes_BKX, scales_BKP = split_tiles(cache)
    if keys and backend.name == "cpu":
        return codes_BKX.unflatten(-1, (-1, scales_BKP.shape[2])).transpose(2, 3)
    return codes_BKX.unflatten(-1, (scales_BKP.shape[2], -1))


def numbers_BKPH(backend: Backend, cache: Tensor, *, keys: bool) -> Tensor:
    """What a cache holds, as [B, K, P, H]: its own numbers, or fp32 where it is quantised."""
    if cache.dtype not in QUANTISED:
        return keys_BKPH(backend, cache) if keys else cache
    codes = codes_BKPH(backend, cache, keys=keys).contiguous().view(cache.dtype)
    return dequantise(codes, split_tiles(cache)[1].unsqueeze(-1), QUANTISED[cache.dtype])


def fill_nan(cache: Tensor) -> Tensor:
    """Every number NaN: of a quantised cache every byte 255, which is NaN as a scale of either format."""
    if cache.dtype in QUANTISED:
        cache.view(torch.uint8).fill_(255)
        return cache
    return cache.fill_(NAN)


class PagedStep:
    """A step of sequences with the last `query_lens` of their `seq_lens` tokens in it.

    Letters: S sequences, C tokens of all of them, K kv heads, H head dim, P tokens a block. Blocks are scattered.
    kv_dtype: of the caches, where that is not `dtype`. What a quantised cache cannot hold is in no key and no value:
    they are what it gives back.
    """

    def __init__(self, backend: Backend, query_lens: Sequence[int], seq_lens: Sequence[int], *, num_kv_heads: int,
                 head_dim: int, dtype: torch.dtype, generator: torch.Generator, block_size: int | None = None,
                 kv_dtype: torch.dtype | None = None):
        self.backend, self.query_lens, self.seq_lens = backend, list(query_lens), list(seq_lens)
        self.dtype, self.kv_dtype, self._generator = dtype, kv_dtype or dtype, generator
        self.P, self.K, self.H = block_size or backend.default_block_size, num_kv_heads, head_dim
        device = backend.device
        num_used = [-(-n // self.P) for n in seq_lens]
        order = torch.randperm(sum(num_used) + 3, generator=generator, device=device, dtype=torch.int32)
        table = torch.full((len(num_used), max(num_used) + 2), GARBAGE_ID, dtype=torch.int32, device=device)
        slots, taken = [], 0
        for s, count in enumerate(num_used):
            table[s, :count] = order[taken : taken + count]
            taken += count
            position = torch.arange(seq_lens[s], device=device)
            slots.append(table[s, position // self.P].long() * self.P + position % self.P)
        self.slots_C = torch.cat(slots)
        self.keys_CKH, self.values_CKH = (self.held(self.random(sum(seq_lens), self.K, self.H)) for _ in range(2))
        self.shape = backend.kv_cache_shape(len(order), self.P, self.K, row_width(self.H, self.kv_dtype))
        self.meta = self._metadata(table, [s[n - q :] for s, n, q in zip(slots, seq_lens, query_lens)])

    def _metadata(self, table: Tensor, written: list[Tensor]) -> AttentionMetadata:
        device = table.device
        starts, lens = torch.tensor([0, *self.query_lens]).cumsum(0).int(), torch.tensor(self.seq_lens).int()
        return AttentionMetadata(
            query_start_S1=starts.to(device), seq_lens_S=lens.to(device),
            block_table_SM=table, slot_mapping_T=torch.cat(written).int(), max_query_len=max(self.query_lens),
            max_seq_len=max(self.seq_lens), num_tokens=sum(self.query_lens), block_size=self.P,
            host=HostLengths(starts.numpy(), lens.numpy()),
        )  # fmt: skip

    def random(self, *shape: int) -> Tensor:
        device = self.backend.device
        return torch.randn(shape, generator=self._generator, device=device).to(self.dtype)

    def held(self, x_XKH: Tensor) -> Tensor:
        """The numbers that the cache makes of these."""
        if self.kv_dtype not in QUANTISED:
            return x_XKH
        format = QUANTISED[self.kv_dtype]
        return dequantise(*quantise(x_XKH, format, dim=2), format)

    def empty_caches(self) -> tuple[Tensor, Tensor]:
        """All NaN."""
        device = self.backend.device
        k_cache, v_cache = (fill_nan(torch.empty(self.shape, dtype=self.kv_dtype, device=device)) for _ in "kv")
        return k_cache, v_cache

    def filled_caches(self) -> tuple[Tensor, Tensor]:
        """With every sequence's keys and values."""
        k_cache, v_cache = self.empty_caches()
        self.write(k_cache, v_cache, self.keys_CKH, self.values_CKH, self.slots_C)
        return k_cache, v_cache

    def write(self, k_cache: Tensor, v_cache: Tensor, k_XKH: Tensor, v_XKH: Tensor, slots_X: Tensor) -> None:
        blocks, offsets = slots_X // self.P, slots_X % self.P
        if k_cache.dtype in QUANTISED:
            for x_XKH, cache, keys in ((k_XKH, k_cache, True), (v_XKH, v_cache, False)):
                codes, scales_XK1 = quantise(x_XKH, QUANTISED[cache.dtype], dim=2)
                codes_BKPH(self.backend, cache, keys=keys)[blocks, :, offsets] = codes.view(torch.uint8)
                split_tiles(cache)[1][blocks, :, offsets] = scales_XK1[..., 0]
            return
        keys_BKPH(self.backend, k_cache)[blocks, :, offsets] = k_XKH.to(k_cache.dtype)
        v_cache[blocks, :, offsets] = v_XKH.to(v_cache.dtype)

    def attend(self, ops: OpSet, q_TNH: Tensor, caches: tuple[Tensor, Tensor], window: int | None = None,
               plan: Any = None) -> Tensor:
        self.meta.plan = plan if plan is not None else self.plan(ops, q_TNH.shape[1])
        return ops.attention(q_TNH, *caches, self.meta, scale=self.H**-0.5, sliding_window=window)

    def plan(self, ops: OpSet, num_heads: int) -> Any:
        return ops.plan(self.meta, num_heads=num_heads, num_kv_heads=self.K, head_dim=self.H)

    def truth(self, q_TNH: Tensor, window: int | None = None) -> Tensor:
        """Attention in float64, where q lies: [T, N * H]."""
        rows, t, c = [], 0, 0
        for query_len, seq_len in zip(self.query_lens, self.seq_lens):
            rows.append(self._attend_one(q_TNH[t : t + query_len], slice(c, c + seq_len), window))
            t, c = t + query_len, c + seq_len
        return torch.cat(rows).flatten(1)

    def _attend_one(self, q_QNH: Tensor, tokens: slice, window: int | None) -> Tensor:
        query_len, num_heads = q_QNH.shape[:2]
        seq_len, group = tokens.stop - tokens.start, num_heads // self.K
        last = torch.arange(seq_len - query_len, seq_len, device=q_QNH.device)[:, None]
        age = last - torch.arange(seq_len, device=q_QNH.device)
        unseen = (age < 0) | (age >= (window or seq_len))
        heads = []
        for k in range(self.K):
            keys_CH, values_CH = (x[tokens, k].to(q_QNH.device).double() for x in (self.keys_CKH, self.values_CKH))
            q = q_QNH[:, k * group : (k + 1) * group].double() * self.H**-0.5
            scores = torch.einsum("qgh,ch->gqc", q, keys_CH).masked_fill(unseen, -torch.inf)
            heads.append(torch.einsum("gqc,ch->qgh", scores.softmax(-1), values_CH))
        return torch.cat(heads, dim=1)
