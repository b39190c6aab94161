"""Runs a model over a paged KV cache, without an engine: block tables, slots and metadata by hand.

Block ids are dealt out shuffled, caches start full of large finite garbage, and the unused part of
a block table holds an id that does not exist, so that a wrong read shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backends.backend import Backend
from backends.metadata import AttentionMetadata
from xllm.models.decoder import CausalLM

GARBAGE = 1.0e3
NO_BLOCK = 2**30


class PagedRunner:
    """Sequences are named; each keeps its length and its blocks from step to step."""

    def __init__(self, model: CausalLM, backend: Backend, *, num_blocks: int = 48, seed: int = 0,
                 kv_dtype: torch.dtype = torch.float32):
        config = model.config
        self.model, self.backend = model, backend
        self.block_size = backend.default_block_size
        shape = backend.kv_cache_shape(num_blocks, self.block_size, config.num_kv_heads, config.head_dim)
        self.kv_caches = [self._cache_pair(shape, kv_dtype) for _ in range(config.num_layers)]
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        self.free_blocks: list[int] = order.tolist()
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def _cache_pair(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_cache = self.backend.allocate_kv_cache(shape, dtype).fill_(GARBAGE)
        return k_cache, self.backend.allocate_kv_cache(shape, dtype).fill_(-GARBAGE)

    @torch.inference_mode()
    def step(self, chunks: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """One forward pass that appends each chunk to its sequence; the logits of every token, [len(chunk), V]."""
        config = self.model.config
        starts = {name: self.lengths.get(name, 0) for name in chunks}
        positions = [starts[name] + i for name, chunk in chunks.items() for i in range(len(chunk))]
        meta = self._metadata(chunks, starts)
        meta.plan = self.backend.ops.plan(
            meta, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
        input_ids_T = torch.tensor([token for chunk in chunks.values() for token in chunk], dtype=torch.int32)
        hidden_TD = self.model.forward(input_ids_T, _int32(positions), self.kv_caches, meta)
        assert hidden_TD.shape == (len(positions), config.hidden_size)
        logits_TV = self.model.compute_logits(hidden_TD)
        sizes = [len(chunk) for chunk in chunks.values()]
        return dict(zip(chunks, logits_TV.split(sizes), strict=True))

    def _metadata(self, chunks: Mapping[str, Sequence[int]], starts: Mapping[str, int]) -> AttentionMetadata:
        slots: list[int] = []
        for name, chunk in chunks.items():
            end = starts[name] + len(chunk)
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * self.block_size < end:
                blocks.append(self.free_blocks.pop())
            slots += [blocks[p // self.block_size] * self.block_size + p % self.block_size
                      for p in range(starts[name], end)]
            self.lengths[name] = end
        tables = [self.blocks[name] for name in chunks]
        width = max(map(len, tables)) + 1
        query_lens = torch.tensor([len(chunk) for chunk in chunks.values()])
        return AttentionMetadata(
            query_start_S1=torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).to(torch.int32),
            seq_lens_S=_int32([self.lengths[name] for name in chunks]),
            block_table_SM=_int32([table + [NO_BLOCK] * (width - len(table)) for table in tables]),
            slot_mapping_T=_int32(slots),
            max_query_len=int(query_lens.max()),
            max_seq_len=max(self.lengths[name] for name in chunks),
            num_tokens=len(slots),
            block_size=self.block_size,
        )


def _int32(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def greedy(runner: PagedRunner, name: str, prompt: Sequence[int], chunk_sizes: Sequence[int],
           num_tokens: int) -> tuple[list[int], Tensor]:
    """Prefill `prompt` in chunks of those sizes (the last one repeats), then decode greedily.

    Returns the `num_tokens` new tokens and the logits of all positions computed, in order.
    """
    logits: list[Tensor] = []
    sizes = list(chunk_sizes)
    done = 0
    while done < len(prompt):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits.append(runner.step({name: prompt[done:done + size]})[name])
        done += size
    tokens = [int(logits[-1][-1].argmax())]
    while len(tokens) < num_tokens:
        logits.append(runner.step({name: tokens[-1:]})[name])
        tokens.append(int(logits[-1][-1].argmax()))
    return tokens, torch.cat(logits)
