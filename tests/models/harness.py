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
from backends.opset import OpSet
from backends.reference.kv_codes import QUANTISED
from xllm.models.causal_lm import CausalLM
from xllm.runner.kv_cache import KVCache

GARBAGE = 1.0e3
GARBAGE_CODE = 0x77  # as a code, or as a byte of a scale: finite in every format
NO_BLOCK = 2**30


class PagedRunner:
    """Sequences are named; each keeps its length and its blocks from step to step."""

    def __init__(self, model: CausalLM, backend: Backend, *, num_blocks: int = 48, seed: int = 0,
                 kv_dtype: torch.dtype = torch.float32):
        self.model, self.backend = model, backend
        self.block_size = backend.default_block_size
        cache = KVCache(backend, model.kv_specs, num_blocks=num_blocks, block_size=self.block_size, dtype=kv_dtype)
        self.kv_caches = cache.layers
        for parts in self.kv_caches:
            for part, tensor in enumerate(parts):
                if kv_dtype in QUANTISED:
                    tensor.view(torch.uint8).fill_(GARBAGE_CODE)
                else:
                    tensor.fill_(-GARBAGE if part else GARBAGE)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        self.free_blocks: list[int] = order.tolist()
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    @torch.inference_mode()
    def step(self, chunks: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """One forward pass that appends each chunk to its sequence; the logits of every token, [len(chunk), V]."""
        starts = {name: self.lengths.get(name, 0) for name in chunks}
        positions = [starts[name] + i for name, chunk in chunks.items() for i in range(len(chunk))]
        meta = self._metadata(chunks, starts)
        meta.plan = self.model.plan(meta)
        input_ids_T = torch.tensor([token for chunk in chunks.values() for token in chunk], dtype=torch.int32)
        hidden_TD = self.model.forward(input_ids_T, _int32(positions), self.kv_caches, meta)
        assert hidden_TD.shape == (len(positions), self.model.config.hidden_size)
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


def weight_bytes(model: CausalLM) -> int:
    """Bytes of all tensors and packed weights that a model holds, each counted once."""
    seen: set[int] = set()

    def walk(thing: object) -> int:
        if id(thing) in seen or isinstance(thing, (type, str, OpSet)):
            return 0
        seen.add(id(thing))
        if isinstance(num_bytes := getattr(thing, "nbytes", None), int):  # a tensor, or what `pack_linear` made
            return num_bytes
        if isinstance(thing, (list, tuple)):
            return sum(map(walk, thing))
        names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        held = [getattr(thing, name) for name in names] + list(getattr(thing, "__dict__", {}).values())
        return sum(map(walk, held)) if type(thing).__module__.startswith(("xllm.models", "xllm.layers")) else 0

    return walk(model)


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
