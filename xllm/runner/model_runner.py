"""`ModelRunner`: one step on the device. A plan comes in, tokens come out.

Where the device works on its own, a step that samples plainly is queued and read later (`QueuedStep`): the next one is
started meanwhile. Every other step waits for its results, and for those of the one before it if it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from backends.backend import Backend
from xllm.config import EngineConfig
from xllm.kv.tickets import TicketBoard
from xllm.layers.adapter_slots import Adapter, AdapterSlots
from xllm.models.causal_lm import CausalLM, KVCaches
from xllm.parallel.groups import ALONE, Group
from xllm.request import TokenLogprobs
from xllm.runner.batch import HostBatch, gather_batch
from xllm.runner.eager import EagerForward, padding_batch
from xllm.runner.graphs import Forwarded, GraphedForward, make_capturer, most_samples
from xllm.runner.host_mover import gated, published
from xllm.runner.kv_cache import KVCache, cache_dtype, page_regions
from xllm.runner.logprobs import token_logprobs
from xllm.runner.pooler import Pooler
from xllm.runner.row_state import NO_LOGPROBS, RowState
from xllm.runner.sampler import Sampler, slices
from xllm.runner.staging import Staging, step_bytes
from xllm.runner.token_feed import QueuedTokens, TokenFeed, samples_plainly, wants_hidden_states
from xllm.runner.virtual_rows import make_virtual_rows
from xllm.runner.warm_up import warm_up_chunks
from xllm.speculative.proposer_registry import make_proposer
from xllm.speculative.verify import num_accepted
from xllm.step import ScheduleOutput, StepOutput
from xllm.structured.matchers import RowMatchers

# As `sampler.py: SAMPLE_LOGITS_BYTES` for prompt_logprobs, whose log-softmax needs several copies. Chosen smaller for
# that.
PROMPT_LOGITS_BYTES = 32 * 2**20


class QueuedStep:
    """A step that the device may still be computing. Everything but the tokens is known; it has no drafts."""

    def __init__(self, rows: RowState, plan: ScheduleOutput, batch: HostBatch, tokens: QueuedTokens):
        self._rows, self._plan, self._rows_Q, self._steps_Q = rows, plan, batch.rows_Q, batch.steps_Q
        self._tokens, self._positions_Q = tokens, rows.num_tokens[batch.rows_Q]
        rows.advance_unread(plan.rows_S, plan.num_tokens_S, batch.rows_Q, tokens.places_Q)
        self._output: StepOutput | None = None

    @property
    def is_finished(self) -> bool:
        return self._output is not None

    def finish(self) -> StepOutput:
        """Wait for the tokens and write them into the rows. Called once."""
        if self._output is None:
            token_ids_Q, reasons = self._tokens.read()
            self._rows.read(self._rows_Q, self._positions_Q, token_ids_Q)
            drawn_SR = np.full((self._plan.num_rows, 1), -1, dtype=np.int32)
            drawn_SR[self._steps_Q, 0] = token_ids_Q
            failed = {int(self._steps_Q[q]): reason for q, reason in reasons.items()}
            drawn_SR[list(failed)] = -1
            self._output = StepOutput(
                step=self._plan.step, num_sampled_S=(drawn_SR[:, 0] >= 0).astype(np.int32), token_ids_SR=drawn_SR,
                num_drafts_S=np.zeros(self._plan.num_rows, dtype=np.int32), failed=failed)
        return self._output


class ModelRunner:
    """Owns the rows, the KV tensors, the sampler and the proposer; `prepare` and `start` (or `run`) compute a step.

    One thread at a time may call it, but for `prepare`.
    """

    def __init__(self, config: EngineConfig, backend: Backend, model: CausalLM, num_blocks: int,
                 adapters: AdapterSlots | None = None,
                 embedding_layers: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (), group: Group = ALONE):
        """config: resolved. num_blocks: from `plan_num_blocks`. adapters: the model's, if it takes any.
        embedding_layers: what embeddings pass through in the end. group: the ranks that share the model."""
        max_model_len, block_size = config.model.max_model_len, config.cache.block_size
        assert max_model_len is not None, "resolve() first"
        assert block_size is not None, "resolve() first"
        self._backend = backend
        self._model = model
        self.rows = RowState(max_num_seqs=config.scheduler.max_num_seqs, max_model_len=max_model_len,
                             block_size=block_size)
        dtype = cache_dtype(config, backend, model.config)
        self.virtual_rows = make_virtual_rows(config, backend, num_blocks=num_blocks,
                                              regions=page_regions(config, backend, model.kv_specs, dtype),
                                              number_bytes=dtype.itemsize,
                                              pages_per_row=self.rows.block_table.shape[1], group=group)
        self.kv_cache = KVCache(backend, model.kv_specs, num_blocks=num_blocks, block_size=block_size, dtype=dtype,
                                arena=self.virtual_rows.arena if self.virtual_rows else None)
        self.feed: TokenFeed | None = None
        self.graphs: GraphedForward | None = None
        staging: Staging | None = None
        if (capturer := make_capturer(config, backend, group)) is not None:
            self.feed = TokenFeed(backend, capturer, most_samples(config, capturer))
            staging = Staging(backend, capturer, step_bytes(config, self.rows))
            if config.device.graph_mode != "off":
                self.graphs = GraphedForward(config, backend, group, model, self.rows, self.kv_cache.layers,
                                             self.feed, adapters)
        num_seqs = config.device.graph_warmup_seqs
        if num_seqs is None:
            num_seqs = backend.warm_up_seqs
        longest = config.scheduler.max_num_batched_tokens or max_model_len
        chunks = warm_up_chunks(longest=longest, max_len=max_model_len, varies=model.config.attention_varies)
        self._warm_up = chunks, num_seqs
        self._eager = EagerForward(backend, model, self.feed, staging, adapters)
        self._adapters = adapters
        self._queued: QueuedStep | None = None  # the step started last, if it was
        self._pooler = Pooler(self.rows, embedding_layers)
        self._sampler = Sampler(backend.ops, self.rows, model.config.vocab_size, backend.device)
        self.proposer = make_proposer(config.speculative)
        self.board = TicketBoard()  # of loads from host memory
        self.departing = TicketBoard()  # of steps that fill blocks which are sent to other instances
        # Called before each forward pass with what ranks must agree on: `worker/messages.py:StepBegun`.
        self.on_begin: Callable[[int, int, int, str, int], None] | None = None

    @property
    def matchers(self) -> RowMatchers:
        """The grammars of the rows that have one."""
        return self._sampler.matchers

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture ahead what the first requests need: prefills (`warm_up_chunks`), and decode graphs of up
        to `graph_warmup_seqs` rows. Rows and KV cache stay as they are. Does nothing on a device without graphs."""
        chunks, num_seqs = self._warm_up
        feed, has_table = self.feed, self.virtual_rows is None
        for num_tokens, num_past in chunks if feed is not None and num_seqs else ():
            assert feed is not None
            host = padding_batch(feed.capturer, num_tokens, self.rows.block_size, has_table=has_table,
                                 num_past=num_past)
            hidden_TD = self._eager.run(host, self.kv_cache.layers).hidden_TD
            assert hidden_TD is not None
            self._eager.sample(self.rows, host, hidden_TD)
        if self.graphs is not None:
            self.graphs.capture_ahead(num_seqs, has_table=has_table)
        self._backend.synchronize()

    def put_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Fill a slot, or empty it; no open request uses it. Captured graphs hold the old matrices, so they go."""
        assert self._adapters is not None
        self._finish_last()
        self._adapters.put(slot, adapter)
        if self.graphs is not None:
            self.graphs.cache.clear()

    def prepare(self, plan: ScheduleOutput) -> None:
        """Called with each plan in order, by the submitter's thread, while the step before it may still run."""
        if self.virtual_rows is not None:
            self.virtual_rows.prepare(plan)

    def run(self, plan: ScheduleOutput) -> StepOutput:
        """Do one step. A step without rows only updates the row state."""
        started = self.start(plan)
        return started if isinstance(started, StepOutput) else started.finish()

    @torch.inference_mode()
    def start(self, plan: ScheduleOutput) -> StepOutput | QueuedStep:
        """Run a step, or queue it on the device. Finishes the step before the last one started, if that is still
        queued."""
        kv_base_S = None if self.virtual_rows is None else self.virtual_rows.take(plan, self._finish_last)
        self._apply(plan)
        if not plan.num_rows:
            none = np.zeros(0, dtype=np.int32)
            return StepOutput(step=plan.step, num_sampled_S=none, token_ids_SR=none.reshape(0, 1), num_drafts_S=none)
        if self.feed is not None:
            self.feed.next_step()
        drafts_SR, num_drafts_S = self._propose(plan)
        fed = self._queued is not None and not self._queued.is_finished
        batch = gather_batch(self.rows, plan.rows_S, plan.num_tokens_S, num_drafts_S, plan.samples_S, kv_base_S,
                             fed=fed)
        if not fed:
            self._sampler.begin(batch.rows_Q, batch.offsets_Q)
        if self.feed is not None:
            self.feed.num_fed += fed
        if self.on_begin is not None:
            key = None if self.graphs is None else self.graphs.key_of(batch, plan.rows_S)
            graph = "" if key is None else f"{key.name} {key.num_tokens}x{key.num_seqs}"
            self.on_begin(plan.step, batch.num_seqs, batch.num_tokens, graph, batch.digest())
        done = self._forward(batch, plan)
        tokens = done.tokens or self._queue_sampling(plan, batch, done)
        if tokens is not None and not num_drafts_S.any():
            self._queued = QueuedStep(self.rows, plan, batch, tokens)
            return self._queued
        self._finish_last()
        prompt_logprobs = self._prompt_logprobs(plan, batch, done)
        logprobs: dict[int, TokenLogprobs] = {}
        if tokens is not None:
            token_ids_Q, failed = tokens.read()
        else:
            token_ids_Q, failed, logprobs = self._sampler.draw(
                lambda places: done.logits(places, self._model), batch.rows_Q, batch.offsets_Q, batch.hidden_Q)
        pooled = {} if done.hidden_TD is None else self._pooler.pool(plan, batch, done.hidden_TD)
        output = self._settle(plan, drafts_SR, num_drafts_S, batch, token_ids_Q, failed, logprobs)
        if pooled or prompt_logprobs:
            output = replace(output, pooled=pooled, prompt_logprobs=prompt_logprobs)
        return output

    def _finish_last(self) -> None:
        """Wait for the queued step: its tokens are needed on the host."""
        if self._queued is not None:
            self._queued.finish()

    def _apply(self, plan: ScheduleOutput) -> None:
        """Carry out what a plan changes before the forward pass, in the order that `ScheduleOutput` states."""
        for row in plan.released_rows:
            self.rows.release(row)
            self._sampler.release(row)
        for new in plan.new_rows:
            self.rows.enter(new)
            self._sampler.enter(new)
            self._pooler.enter(new)
        self.rows.replace_blocks(plan.replace_rows_C, plan.replace_places_C, plan.replace_ids_C)
        self.rows.append_blocks(plan.append_rows_B, plan.append_ids_B)
        if len(plan.copy_src):
            for ticket in self.board.tickets(plan.tickets):
                ticket.wait(ticket.num_layers - 1)
        self.kv_cache.copy_blocks(plan.copy_src, plan.copy_dst)

    def _propose(self, plan: ScheduleOutput) -> tuple[np.ndarray, np.ndarray]:
        """Ask the proposer for drafts and write them after the known tokens. Returns (drafts [S, R], R may be 0; their
        counts)."""
        if self.proposer is not None and plan.max_drafts_S.any():
            self._finish_last()
            room_S = self.rows.room_for_drafts(plan.rows_S)
            max_drafts_S = np.where(plan.samples_S, np.minimum(plan.max_drafts_S, room_S), 0)
            drafts_SR, num_drafts_S = self.proposer.propose(plan.rows_S, max_drafts_S, self.rows)
            if num_drafts_S.any():
                self.rows.write_drafts(plan.rows_S, drafts_SR)
                return drafts_SR, num_drafts_S
        return np.zeros((plan.num_rows, 0), dtype=np.int32), np.zeros(plan.num_rows, dtype=np.int32)

    def _forward(self, host: HostBatch, plan: ScheduleOutput) -> Forwarded:
        """Run the forward pass through a captured graph if there is one for the step, else eagerly."""
        if self.graphs is not None:
            done = self.graphs.run(host, plan.rows_S, layer_by_layer=bool(plan.tickets or plan.publish_ticket))
            if done is not None:
                return done
        layers: KVCaches = self.kv_cache.layers
        if plan.tickets:
            layers = gated(self.kv_cache.layers, self.board.tickets(plan.tickets))
        if not plan.publish_ticket:
            return self._eager.run(host, layers)
        ticket = self.departing[plan.publish_ticket]
        try:
            done = self._eager.run(host, published(layers, ticket))
            ticket.finish()
        except BaseException as error:
            ticket.fail(error)
            raise
        finally:
            self.departing.close(ticket)
        return done

    def _queue_sampling(self, plan: ScheduleOutput, batch: HostBatch, done: Forwarded) -> QueuedTokens | None:
        """Queue plain sampling after an eager forward pass, so that the tokens stay on the device; None if some slot
        wants more or the device does not work on its own."""
        if (self.feed is None or done.hidden_TD is None or self._sampler.slices(batch.num_slots)[1:]
                or wants_hidden_states(self.rows, plan.rows_S) or not samples_plainly(self.rows, batch.rows_Q)):
            return None
        return self._eager.sample(self.rows, batch, done.hidden_TD)

    def _prompt_logprobs(self, plan: ScheduleOutput, batch: HostBatch,
                         done: Forwarded) -> dict[int, list[TokenLogprobs]]:
        """For each row that asked for them (by its index in the plan): the log-probabilities of the prompt tokens that
        this chunk predicts."""
        rows, found = self.rows, {}
        asked_S = rows.num_prompt_logprobs[plan.rows_S] != NO_LOGPROBS
        for i in np.flatnonzero(asked_S).tolist():
            row = int(plan.rows_S[i])
            first = int(rows.num_computed[row]) + 1
            end = min(first + int(plan.num_tokens_S[i]), int(rows.num_prompt_tokens[row]))
            if end <= first:
                continue
            indices = int(batch.query_start_S1[i]) + np.arange(end - first)
            token_ids = rows.token_ids[row, first:end]
            found[i] = self._logprobs_at(done, indices, token_ids, int(rows.num_prompt_logprobs[row]))
        return found

    def _logprobs_at(self, done: Forwarded, indices: np.ndarray, token_ids: np.ndarray,
                     num_top: int) -> list[TokenLogprobs]:
        """Logprobs of given tokens at places of the T axis, in slices of bounded memory."""
        entries: list[TokenLogprobs] = []
        for part in slices(len(indices), self._model.config.vocab_size, PROMPT_LOGITS_BYTES):
            logits_XV = done.logits(indices[part], self._model)
            entries += token_logprobs(logits_XV, token_ids[part], np.full(len(logits_XV), num_top))
        return entries

    def _settle(self, plan: ScheduleOutput, drafts_SR: np.ndarray, num_drafts_S: np.ndarray, batch: HostBatch,
                token_ids_Q: np.ndarray, reasons: dict[int, str], entries: dict[int, TokenLogprobs]) -> StepOutput:
        """Accept drafts, advance the rows, and make the step's output of what was drawn (`Sampler.draw`).

        A failed row reports the tokens before the place that failed but takes that one in too: an overlapped scheduler
        has planned its next step already, and that step needs something to compute.
        """
        drawn_SR = np.full((plan.num_rows, drafts_SR.shape[1] + 1), -1, dtype=np.int32)
        drawn_SR[batch.steps_Q, batch.offsets_Q] = token_ids_Q
        accepted_S = num_accepted(drawn_SR, drafts_SR)
        num_sampled_S = np.where(plan.samples_S, accepted_S + 1, 0).astype(np.int32)
        self.rows.advance(plan.rows_S, plan.num_tokens_S + accepted_S, drawn_SR, num_sampled_S)

        failed: dict[int, str] = {}
        for q, reason in reasons.items():
            i, offset = int(batch.steps_Q[q]), batch.offsets_Q[q]
            if offset < num_sampled_S[i]:
                failed[i], num_sampled_S[i] = reason, offset
        drawn_SR[np.arange(drawn_SR.shape[1]) >= num_sampled_S[:, None]] = -1
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for q, entry in entries.items():
            i = int(batch.steps_Q[q])
            if batch.offsets_Q[q] < num_sampled_S[i]:
                logprobs.setdefault(i, []).append(entry)
        return StepOutput(step=plan.step, num_sampled_S=num_sampled_S, token_ids_SR=drawn_SR,
                          num_drafts_S=num_drafts_S, logprobs=logprobs, failed=failed)
