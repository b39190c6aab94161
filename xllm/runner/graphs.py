"""`GraphedForward`: a step's forward pass through captured graphs, from the embedding to the sampled tokens if
possible.

The runner calls it for each step; it returns None for a step that must run eagerly. A graph ends with "tokens"
(sampled, on the device), "logits", or "hidden" (where only some places are wanted, or all logits would be too large).

Letters: T tokens of the bucket (L where there are logits for each), S its rows, M blocks per row, D hidden, V
vocabulary, Q slots to sample.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from backends.backend import Backend, Capturer
from backends.metadata import AttentionMetadata, HostLengths
from graph.buffers import Field, StaticBuffers, StepMemory
from graph.cache import CaptureOutcome, GraphBudget, GraphCache
from graph.checking import CheckingCapturer
from graph.key import BucketRules, GraphKey, padding_lengths
from xllm.config import EngineConfig
from xllm.layers.adapter_slots import AdapterSlots
from xllm.models.causal_lm import CausalLM
from xllm.parallel.groups import Group
from xllm.runner.batch import HostBatch
from xllm.runner.columns import SAMPLE_INPUTS, sampling_columns
from xllm.runner.row_state import RowState
from xllm.runner.token_feed import QueuedTokens, TokenFeed, sample_into, samples_plainly, wants_hidden_states
from xllm.sizes import parse_amount
from xllm.stats import GraphStats

_log = logging.getLogger(__name__)

NUM_SETS = 2  # of buffers, used in turn: as many as `token_feed.py:NUM_BUFFERS`
# Static memory for logits; steps with more end with the hidden states. Chosen: as
# `sampler.py:SAMPLE_LOGITS_BYTES`.
LOGITS_BYTES = 256 * 2**20
HIDDEN, LOGITS, TOKENS = "hidden", "logits", "tokens"  # what a graph ends with
TABLE, BASE = "table", "base"  # layouts: block ids of each row, or where its blocks begin
LORA = "lora"  # each token's adapter
_NOTHING = np.zeros(0, dtype=np.int32)
# Reasons for an eager step, beside those of `graph/cache.py`.
KV_LOADS, NO_BUCKET = "kv_loads", "no_bucket"

STEP_INPUTS = ("input_ids", "feed", "positions", "slot_mapping", "query_start", "seq_lens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """The result of a forward pass, one of: hidden_TD of all places, logits_TV fp32 of all, or the tokens of the slots.
    A graph's tensors are overwritten by the next step."""

    hidden_TD: Tensor | None = None
    logits_TV: Tensor | None = None
    tokens: QueuedTokens | None = None

    def logits(self, indices: np.ndarray, model: CausalLM) -> Tensor:
        """Logits at some places of the T axis; all places in order need no copy. May be overwritten, once."""
        found_TX = self.logits_TV if self.logits_TV is not None else self.hidden_TD
        assert found_TX is not None, "the graph ended with tokens"
        if len(indices) < len(found_TX):
            found_TX = found_TX[torch.from_numpy(indices).to(found_TX.device)]
        return found_TX if self.logits_TV is not None else model.compute_logits(found_TX)


def make_capturer(config: EngineConfig, backend: Backend, group: Group) -> Capturer | None:
    """The device's capturer, or with graph_mode "checked" the one that checks, the group's exchanges as well; None: the
    device queues nothing, a step is done at once."""
    if config.device.graph_mode != "checked":
        return backend.capturer
    _log.warning("graph_mode checked: steps are run in poisoned memory and checked; this is slow")
    capturer = CheckingCapturer()
    if group.size > 1:
        group.watch = capturer
    return capturer


def agree_among(group: Group, key: GraphKey, index: int, outcome: CaptureOutcome) -> CaptureOutcome:
    """What all ranks go by after a capture: one that failed anywhere failed, and a graph is as large as the largest."""
    if group.size == 1:
        return outcome
    ballots = group.vote(f"graph {key.name} of {key.num_tokens} tokens, {key.num_seqs} rows, set {index}",
                         json.dumps(asdict(outcome)))
    outcomes = [CaptureOutcome(**json.loads(ballot)) for ballot in ballots]
    for rank, each in enumerate(outcomes):
        if each.reason:
            return replace(each, details=f"rank {rank}: {each.details}")
    return CaptureOutcome(num_bytes=max(each.num_bytes for each in outcomes),
                          num_streams=max(each.num_streams for each in outcomes))


def bucket_rules(config: EngineConfig, capturer: Capturer) -> BucketRules:
    """The shapes that a resolved config has graphs for."""
    device, max_num_seqs = config.device, config.scheduler.max_num_seqs
    return BucketRules(max_seqs=min(device.graph_max_seqs or max_num_seqs, max_num_seqs),
                       draft_length=config.speculative.num_speculative_tokens,
                       max_mixed_tokens=device.graph_max_prefill_tokens, step=capturer.bucket_step)


def most_samples(config: EngineConfig, capturer: Capturer) -> int:
    """The most tokens that a step samples, padding included."""
    return max(bucket_rules(config, capturer).max_num_tokens, config.scheduler.max_num_seqs)


class StepProgram:
    """The `Program` of one key over one set: model and sampler over static tensors."""

    def __init__(self, owner: GraphedForward, key: GraphKey, index: int, memory: StepMemory):
        self.memory, self.index, self._owner = memory, index, owner
        self._source = owner.feed.buffers[1 - index]
        inputs, rows = memory.inputs, owner.rows
        self.meta = AttentionMetadata(
            query_start_S1=inputs["query_start"], seq_lens_S=inputs["seq_lens"],
            block_table_SM=inputs.get("block_table", owner.no_table), slot_mapping_T=inputs["slot_mapping"],
            max_query_len=key.max_query_len, max_seq_len=rows.max_model_len + 1, num_tokens=key.num_tokens,
            block_size=rows.block_size, kv_base_S=inputs.get("kv_base"),
            # Where plans are captured too, nothing in a graph may depend on the lengths of its capture.
            host=None if owner.capturer.plans_in_graph else HostLengths(memory.host_array("query_start"),
                                                                        memory.host_array("seq_lens")))

    def prepare(self) -> None:
        """Compute attention's parameters, where the host makes them. Called before each capture and replay."""
        capturer = self._owner.capturer
        if isinstance(capturer, CheckingCapturer):
            with capturer.no_exchange("attention is planned"):
                self.meta.plan = self._owner.model.plan(self.meta)
        elif not capturer.plans_in_graph:
            self.meta.plan = self._owner.model.plan(self.meta)

    def __call__(self) -> None:
        if LORA not in self.memory.inputs:
            self._run()
            return
        assert self._owner.adapters is not None
        with self._owner.adapters.used(self.memory.inputs[LORA]):
            self._run()

    def _run(self) -> None:
        owner, inputs, outputs = self._owner, self.memory.inputs, self.memory.outputs
        if owner.capturer.plans_in_graph:
            self.meta.plan = owner.model.plan(self.meta)
        ids_T = owner.ops.feed_tokens(inputs["input_ids"], inputs["feed"], self._source)
        hidden_TD = owner.model.forward(ids_T, inputs["positions"], owner.layers, self.meta)
        if owner.capturer.plans_in_graph:
            self.meta.plan = None  # its memory is the pool's, for other graphs to use
        if HIDDEN in outputs:
            outputs[HIDDEN].copy_(hidden_TD)
            return
        logits_TV = owner.model.compute_logits(hidden_TD)
        if LOGITS in outputs:
            outputs[LOGITS].copy_(logits_TV)
            return
        sample_into(outputs[TOKENS], owner.ops, logits_TV, (inputs[name] for name in SAMPLE_INPUTS))


class GraphedForward:
    """Finds the key of a step, fills a buffer set, replays, and takes the results out of the padding."""

    def __init__(self, config: EngineConfig, backend: Backend, group: Group, model: CausalLM, rows: RowState,
                 layers: Sequence[tuple[Tensor, ...]], feed: TokenFeed, adapters: AdapterSlots | None = None):
        """config: resolved. group: the ranks that share the model. layers: the KV caches, which never move."""
        device, capturer = config.device, feed.capturer
        self.capturer, self.ops, self.model, self.rows, self.layers = capturer, backend.ops, model, rows, layers
        self.feed, self.adapters = feed, adapters
        self.no_table = torch.zeros((0, 0), dtype=torch.int32, device=backend.device)
        self._rules = bucket_rules(config, capturer)
        self._max_logits = min(self._rules.max_num_tokens, LOGITS_BYTES // (4 * model.config.vocab_size))
        capacity = {"T": self._rules.max_num_tokens, "S": self._rules.max_num_seqs, "S1": self._rules.max_num_seqs + 1,
                    "M": rows.block_table.shape[1] + 1, "D": model.config.hidden_size, "V": model.config.vocab_size,
                    "L": self._max_logits, "Q": len(feed.sink)}
        shared: dict[str, Tensor] = {}
        self._sets = [StaticBuffers(_inputs(), _outputs(model.dtype), capacity, device=backend.device,
                                    allocate_host=backend.allocate_host, shared=shared, given={TOKENS: buffer})
                      for buffer in feed.buffers]
        num_bytes, share = parse_amount("graph_memory", device.graph_memory)
        limit = int(share * backend.available_memory_bytes()) if share else num_bytes
        budget = GraphBudget(num_graphs=device.graph_max_graphs, num_bytes=limit)
        self.cache = GraphCache(capturer, self._build, budget=budget, num_sets=NUM_SETS,
                                agree=partial(agree_among, group))

    def stats(self) -> GraphStats:
        """Reads only, so another thread may call it."""
        cache, c = self.cache, self.cache.counters
        return GraphStats(num_graphs=len(cache), num_bytes=cache.num_bytes, captures_total=c.captures,
                          evictions_total=c.evictions, replays_total=dict(c.replays),
                          fallbacks_total=dict(c.fallbacks), fed_steps_total=self.feed.num_fed)

    def key_of(self, batch: HostBatch, rows_S: np.ndarray) -> GraphKey | None:
        """The key of a step's graph; None: it fits none."""
        key = self._rules.find(batch.num_tokens, batch.num_seqs, batch.max_query_len)
        return None if key is None else replace(
            key, layout=_layout(batch), ends_with=self._ends_with(batch, rows_S, key.num_tokens),
            lora=batch.lora_T is not None)

    def run(self, batch: HostBatch, rows_S: np.ndarray, *, layer_by_layer: bool) -> Forwarded | None:
        """One step through a graph, or None: it is to be run eagerly. `batch` is in the order of rows_S."""
        if layer_by_layer:  # layer by layer, which only the host can do
            self.cache.fall_back(KV_LOADS)
            return None
        key = self.key_of(batch, rows_S)
        if key is None:
            self.cache.fall_back(NO_BUCKET)
            return None
        self.cache.turn = self.feed.turn
        program = self.cache.run(key, lambda program: self._fill(program, key, batch))
        return None if program is None else self._results(program, batch)

    def capture_ahead(self, num_seqs: int, *, has_table: bool) -> None:
        """Capture plain decode steps of up to `num_seqs` rows, over both sets, before a request waits for one."""
        empty = HostBatch.empty(self.rows.block_size, has_table=has_table)
        for bucket in self._rules.decode_keys(num_seqs):
            key = replace(bucket, layout=_layout(empty), ends_with=TOKENS)
            for index in range(NUM_SETS):
                self.cache.turn = index
                self.cache.run(key, lambda program, key=key: self._fill(program, key, empty))  # type: ignore[misc]

    def _ends_with(self, batch: HostBatch, rows_S: np.ndarray, num_tokens: int) -> str:
        """What the graph of a step with a bucket of `num_tokens` tokens ends with: TOKENS, LOGITS or HIDDEN."""
        if 2 * batch.num_slots < batch.num_tokens or num_tokens > self._max_logits:
            return HIDDEN
        if wants_hidden_states(self.rows, rows_S):
            return HIDDEN
        return TOKENS if samples_plainly(self.rows, batch.rows_Q) else LOGITS

    def _build(self, key: GraphKey, index: int) -> StepProgram:
        names = [*STEP_INPUTS, "kv_base" if key.layout == BASE else "block_table", *((LORA,) if key.lora else ()),
                 *(SAMPLE_INPUTS if key.ends_with == TOKENS else ())]
        sizes = {"T": key.num_tokens, "L": key.num_tokens, "Q": key.num_tokens, "S": key.num_seqs,
                 "S1": key.num_seqs + 1}
        return StepProgram(self, key, index, StepMemory(self._sets[index], names, [key.ends_with], sizes))

    def _fill(self, program: StepProgram, key: GraphKey, batch: HostBatch) -> None:
        memory = program.memory
        memory.num_live = {"T": batch.num_tokens, "L": batch.num_tokens, "Q": batch.num_tokens, "S": batch.num_seqs}
        padding_P = padding_lengths(key, batch.num_tokens, batch.num_seqs)
        ends_P = np.cumsum(padding_P, dtype=np.int32)
        num_padding = key.num_tokens - batch.num_tokens
        places_T = np.arange(num_padding, dtype=np.int32) - np.repeat(ends_P - padding_P, padding_P)
        memory.fill("input_ids", batch.input_ids_T)
        memory.fill("feed", _NOTHING if batch.feed_T is None else batch.feed_T, -1)
        if batch.lora_T is not None:
            memory.fill(LORA, batch.lora_T)
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
            for name, value_Q in sampling_columns(self.rows, batch.rows_Q, batch.offsets_Q).items():
                array_T = memory.host_array(name)
                array_T.fill(SAMPLE_INPUTS[name].unused)
                array_T[batch.hidden_Q] = value_Q

    def _results(self, program: StepProgram, batch: HostBatch) -> Forwarded:
        memory = program.memory
        if HIDDEN in memory.outputs:
            return Forwarded(hidden_TD=memory.live_output(HIDDEN))
        if LOGITS in memory.outputs:
            return Forwarded(logits_TV=memory.live_output(LOGITS))
        return Forwarded(tokens=self.feed.queue_read(batch.num_tokens, batch.hidden_Q))


def _layout(batch: HostBatch) -> str:
    return TABLE if batch.kv_base_S is None else BASE


def _inputs() -> list[Field]:
    """Static inputs, the largest last. The table has a column more than a row can need: kernels that fetch the next
    block's id ahead may read the one behind the last."""
    int32 = torch.int32
    by_token = ("input_ids", "feed", LORA, "positions", "slot_mapping")
    return [*(Field(name, int32, ("T",)) for name in by_token), Field("query_start", int32, ("S1",)),
            Field("seq_lens", int32, ("S",)), Field("kv_base", int32, ("S",)),
            *(Field(name, getattr(torch, column.dtype), ("T",)) for name, column in SAMPLE_INPUTS.items()),
            Field("block_table", int32, ("S", "M"))]


def _outputs(dtype: torch.dtype) -> list[Field]:
    return [Field(HIDDEN, dtype, ("T", "D"), shared=True), Field(LOGITS, torch.float32, ("L", "V"), shared=True),
            Field(TOKENS, torch.int64, ("Q",))]
