"""`GraphedForward`: a step's forward pass through captured graphs, from the embedding to the sampled tokens if it can.

The runner asks for each step; None means: run it eagerly. What a graph computes last is its variant: "tokens" (sampled,
on the device), "logits", or "hidden" (where only some places are wanted, or all logits would be too large).

Letters: T tokens of the bucket (L where there are logits for each), S its rows, M blocks per row, D hidden,
V vocabulary, Q slots to sample.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from backends.backend import Backend, Capturer
from backends.metadata import AttentionMetadata, HostLengths
from graph.buffers import Field, StaticBuffers, StepMemory
from graph.cache import GraphBudget, GraphCache
from graph.checking import CheckingCapturer
from graph.key import BucketRules, GraphKey, padding_lengths
from xllm.config import EngineConfig
from xllm.metrics import GraphStats
from xllm.models.decoder import CausalLM
from xllm.runner.batch import HostBatch, SampleSlots
from xllm.runner.rows import NO_LOGPROBS, RowState
from xllm.runner.sampler import NOT_FINITE, Draws
from xllm.runner.uniform import uniforms
from xllm.sizes import parse_amount

_log = logging.getLogger(__name__)

NUM_SETS = 2
LOGITS_BYTES = 256 * 2**20  # static memory for logits; longer steps end with the hidden states
HIDDEN, LOGITS, TOKENS = "hidden", "logits", "tokens"
# Reasons for an eager step, beside those of `graph/cache.py`.
KV_LOADS, NO_BUCKET = "kv_loads", "no_bucket"

STEP_INPUTS = ("input_ids", "positions", "slot_mapping", "query_start", "seq_lens")
# Sampling parameters, by token, with what a place that is not sampled gets: they make it an argmax.
SAMPLING_INPUTS = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.0}
OUTPUTS = {HIDDEN: (HIDDEN,), LOGITS: (LOGITS,), TOKENS: ("token_ids", "finite")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """What a forward pass gave, as far as it went: hidden_TD of all places, or logits_TV fp32 of all, or the draws of
    the slots. A graph's tensors are overwritten by the next step."""

    hidden_TD: Tensor | None = None
    logits_TV: Tensor | None = None
    draws: Draws | None = None

    def logits(self, indices: np.ndarray, model: CausalLM) -> Tensor:
        """Logits at some places of the T axis; all places in order need no copy. May be overwritten, once."""
        found_TX = self.logits_TV if self.logits_TV is not None else self.hidden_TD
        assert found_TX is not None, "the graph ended with tokens"
        if len(indices) < len(found_TX):
            found_TX = found_TX[torch.from_numpy(indices).to(found_TX.device)]
        return found_TX if self.logits_TV is not None else model.compute_logits(found_TX)


def make_graphs(config: EngineConfig, backend: Backend, model: CausalLM, rows: RowState,
                layers: Sequence[tuple[Tensor, Tensor]]) -> GraphedForward | None:
    """Graphs for a resolved config; None: every step runs eagerly."""
    capturer = backend.capturer
    if config.device.graph_mode == "checked":
        capturer = CheckingCapturer()
        _log.warning("graph_mode checked: steps are run in poisoned memory and checked; this is slow")
    if config.device.graph_mode == "off" or capturer is None:
        return None
    return GraphedForward(config, backend, capturer, model, rows, layers)


class StepProgram:
    """The `Program` of one key over one set: model and sampler over static tensors."""

    def __init__(self, owner: GraphedForward, key: GraphKey, memory: StepMemory):
        self.memory, self._owner, self._key = memory, owner, key
        inputs, rows = memory.inputs, owner.rows
        self.meta = AttentionMetadata(
            query_start_S1=inputs["query_start"], seq_lens_S=inputs["seq_lens"],
            block_table_SM=inputs.get("block_table", owner.no_table), slot_mapping_T=inputs["slot_mapping"],
            max_query_len=key.max_query_len, max_seq_len=rows.max_model_len + 1, num_tokens=key.num_tokens,
            block_size=rows.block_size, kv_base_S=inputs.get("kv_base"),
            host=HostLengths(memory.host_array("query_start"), memory.host_array("seq_lens")))

    def prepare(self) -> None:
        """Attention's parameters, where the host makes them."""
        if not self._owner.capturer.plans_in_graph:
            self.meta.plan = self._owner.plan(self.meta)

    def __call__(self) -> None:
        owner, inputs, outputs = self._owner, self.memory.inputs, self.memory.outputs
        if owner.capturer.plans_in_graph:
            self.meta.plan = owner.plan(self.meta)
        hidden_TD = owner.model.forward(inputs["input_ids"], inputs["positions"], owner.layers, self.meta)
        if owner.capturer.plans_in_graph:
            self.meta.plan = None  # its memory is the pool's, for other graphs to use
        if HIDDEN in outputs:
            outputs[HIDDEN].copy_(hidden_TD)
            return
        logits_TV = owner.model.compute_logits(hidden_TD)
        if LOGITS in outputs:
            outputs[LOGITS].copy_(logits_TV)
            return
        finite_T = torch.isfinite(logits_TV.sum(dim=-1))
        token_ids_T = owner.ops.sample(logits_TV, *(inputs[name] for name in SAMPLING_INPUTS))
        outputs["finite"].copy_(finite_T)
        outputs["token_ids"].copy_(token_ids_T * finite_T)


class GraphedForward:
    """Finds the key of a step, fills a buffer set, replays, and takes the results out of the padding."""

    def __init__(self, config: EngineConfig, backend: Backend, capturer: Capturer, model: CausalLM, rows: RowState,
                 layers: Sequence[tuple[Tensor, Tensor]]):
        """config: resolved. layers: the KV caches, which never move."""
        device = config.device
        self.capturer, self.ops, self.model, self.rows, self.layers = capturer, backend.ops, model, rows, layers
        self.no_table = torch.zeros((0, 0), dtype=torch.int32, device=backend.device)
        self._rules = BucketRules(
            max_seqs=min(device.graph_max_seqs or config.scheduler.max_num_seqs, config.scheduler.max_num_seqs),
            draft_length=config.speculative.num_speculative_tokens, max_mixed_tokens=device.graph_max_prefill_tokens,
            step=capturer.bucket_step)
        self._max_logits = min(self._rules.max_num_tokens, LOGITS_BYTES // (4 * model.config.vocab_size))
        capacity = {"T": self._rules.max_num_tokens, "S": self._rules.max_num_seqs, "S1": self._rules.max_num_seqs + 1,
                    "M": rows.block_table.shape[1] + 1, "D": model.config.hidden_size, "V": model.config.vocab_size,
                    "L": self._max_logits}
        shared: dict[str, Tensor] = {}
        self._sets = [StaticBuffers(_inputs(), _outputs(layers[0][0].dtype), capacity, device=backend.device,
                                    allocate_host=backend.allocate_host, shared=shared) for _ in range(NUM_SETS)]
        num_bytes, share = parse_amount("graph_memory", device.graph_memory)
        limit = int(share * backend.available_memory_bytes()) if share else num_bytes
        budget = GraphBudget(num_graphs=device.graph_max_graphs, num_bytes=limit)
        self.cache = GraphCache(capturer, self._build, budget=budget, num_sets=NUM_SETS)

    def stats(self) -> GraphStats:
        """Reads only, so another thread may call it."""
        cache, c = self.cache, self.cache.counters
        return GraphStats(num_graphs=len(cache), num_bytes=cache.num_bytes, captures_total=c.captures,
                          evictions_total=c.evictions, replays_total=dict(c.replays),
                          fallbacks_total=dict(c.fallbacks))

    def plan(self, meta: AttentionMetadata) -> object:
        """What attention wants computed once a step."""
        config = self.model.config
        return self.ops.plan(meta, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
                             head_dim=config.head_dim)

    def run(self, batch: HostBatch, rows_S: np.ndarray, *, waits_for_loads: bool) -> Forwarded | None:
        """One step through a graph, or None: it is to be run eagerly. `batch` is in the order of rows_S."""
        if waits_for_loads:  # layer by layer, which only the host can do
            self.cache.fall_back(KV_LOADS)
            return None
        key = self._rules.find(batch.num_tokens, batch.num_seqs, batch.max_query_len)
        if key is None:
            self.cache.fall_back(NO_BUCKET)
            return None
        layout = "table" if batch.kv_base_S is None else "base"
        key = replace(key, variant=f"{layout}-{self._ends_with(batch, rows_S, key.num_tokens)}")
        program = self.cache.run(key, lambda program: self._fill(program, key, batch))
        return None if program is None else _results(program.memory, batch.slots)

    def _ends_with(self, batch: HostBatch, rows_S: np.ndarray, num_tokens: int) -> str:
        """How far the graph of a step with a bucket of that many tokens goes."""
        rows, slots = self.rows, batch.slots
        if 2 * len(slots) < batch.num_tokens or num_tokens > self._max_logits:
            return HIDDEN
        asks_S = rows.num_prompt_logprobs[rows_S] != NO_LOGPROBS
        if (asks_S & (rows.num_computed[rows_S] < rows.num_prompt_tokens[rows_S])).any():
            return HIDDEN
        plain_Q = ((rows.num_logprobs[slots.rows] == NO_LOGPROBS) & ~rows.edits_logits[slots.rows]
                   & (rows.min_output_tokens[slots.rows] == 0))
        return TOKENS if plain_Q.all() else LOGITS

    def _build(self, key: GraphKey, index: int) -> StepProgram:
        layout, ends_with = key.variant.split("-")
        names = [*STEP_INPUTS, "kv_base" if layout == "base" else "block_table",
                 *(SAMPLING_INPUTS if ends_with == TOKENS else ())]
        sizes = {"T": key.num_tokens, "L": key.num_tokens, "S": key.num_seqs, "S1": key.num_seqs + 1}
        return StepProgram(self, key, StepMemory(self._sets[index], names, OUTPUTS[ends_with], sizes))

    def _fill(self, program: StepProgram, key: GraphKey, batch: HostBatch) -> None:
        memory = program.memory
        memory.num_live = {"T": batch.num_tokens, "L": batch.num_tokens, "S": batch.num_seqs}
        padding_P = padding_lengths(key, batch.num_tokens, batch.num_seqs)
        ends_P = np.cumsum(padding_P, dtype=np.int32)
        num_padding = key.num_tokens - batch.num_tokens
        places_T = np.arange(num_padding, dtype=np.int32) - np.repeat(ends_P - padding_P, padding_P)
        memory.fill("input_ids", batch.input_ids_T)
        memory.fill("positions", np.concatenate((batch.positions_T, places_T)))
        memory.fill("slot_mapping", batch.slot_mapping_T, self.capturer.pad_slot)
        memory.fill("query_start", np.concatenate((batch.query_start_S1, batch.num_tokens + ends_P)))
        memory.fill("seq_lens", np.concatenate((batch.seq_lens_S, padding_P)))
        if batch.kv_base_S is not None:
            memory.fill("kv_base", batch.kv_base_S, self.capturer.pad_block)
        else:
            width = -(-int(padding_P.max(initial=0)) // batch.block_size)
            memory.fill("block_table", batch.table_SM, self.capturer.pad_block, width=width)
        if "uniform" in memory.inputs:
            self._fill_sampling(memory, batch.slots)

    def _fill_sampling(self, memory: StepMemory, slots: SampleSlots) -> None:
        rows = self.rows
        values = (rows.temperature[slots.rows], rows.top_k[slots.rows], rows.top_p[slots.rows], rows.min_p[slots.rows],
                  uniforms(rows.seed[slots.rows], rows.num_tokens[slots.rows] + slots.offsets))
        for (name, unused), value_Q in zip(SAMPLING_INPUTS.items(), values, strict=True):
            array_T = memory.host_array(name)
            array_T.fill(unused)
            array_T[slots.hidden] = value_Q


def _results(memory: StepMemory, slots: SampleSlots) -> Forwarded:
    if HIDDEN in memory.outputs:
        return Forwarded(hidden_TD=memory.live_output(HIDDEN))
    if LOGITS in memory.outputs:
        return Forwarded(logits_TV=memory.live_output(LOGITS))
    token_ids_Q = memory.live_output("token_ids").cpu().numpy()[slots.hidden]
    bad = np.flatnonzero(memory.live_output("finite").cpu().numpy()[slots.hidden] == 0)
    return Forwarded(draws=Draws(token_ids_Q=token_ids_Q, failed=dict.fromkeys(bad.tolist(), NOT_FINITE)))


def _inputs() -> list[Field]:
    """Static inputs, the largest last. The table has a column more than a row can need: kernels that fetch the next
    block's id ahead may read the one behind the last."""
    int32, float32 = torch.int32, torch.float32
    return [Field("input_ids", int32, ("T",)), Field("positions", int32, ("T",)), Field("slot_mapping", int32, ("T",)),
            Field("query_start", int32, ("S1",)), Field("seq_lens", int32, ("S",)), Field("kv_base", int32, ("S",)),
            Field("temperature", float32, ("T",)), Field("top_k", int32, ("T",)), Field("top_p", float32, ("T",)),
            Field("min_p", float32, ("T",)), Field("uniform", float32, ("T",)), Field("block_table", int32, ("S", "M"))]


def _outputs(dtype: torch.dtype) -> list[Field]:
    return [Field(HIDDEN, dtype, ("T", "D"), shared=True), Field(LOGITS, torch.float32, ("L", "V"), shared=True),
            Field("token_ids", torch.int64, ("T",)), Field("finite", torch.uint8, ("T",))]
