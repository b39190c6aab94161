"""`TokenFeed`: sampled tokens stay on the device, so that the next step can be queued before the host knows them.

A step whose rows sample plainly writes its tokens into one of two buffers, used in turn. The step behind it, queued
while that one runs, takes from there the tokens that the host could not give it; the host reads them when they have
arrived. Host work and the device's work thus overlap, and the device never waits for the host.

Letters: T tokens of a step, Q slots to sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from backends.backend import Backend, Capturer
from backends.opset import OpSet
from xllm.runner.row_state import NO_LOGPROBS, RowState
from xllm.runner.sampler import NOT_FINITE

NUM_BUFFERS = 2  # one is written by the running step while the next step, which reads it, is queued
NOT_A_TOKEN = -1  # sampled from logits that were not finite


class TokenFeed:
    """Two token buffers on the device (`buffers`, int64), used in turn: the step being queued writes buffer `turn` and
    reads the other, which the step before it wrote."""

    def __init__(self, backend: Backend, capturer: Capturer, num_places: int):
        """num_places: the most tokens that a step samples, padding included."""
        self.buffers = [torch.zeros(num_places, dtype=torch.int64, device=backend.device) for _ in range(NUM_BUFFERS)]
        self._hosts = [backend.allocate_host(8 * num_places).view(torch.int64) for _ in range(NUM_BUFFERS)]
        self.capturer = capturer
        self.turn = 0
        self.num_fed = 0  # steps that were queued before the host knew the tokens of the one before

    @property
    def source(self) -> Tensor:
        """The tokens of the step before."""
        return self.buffers[1 - self.turn]

    @property
    def sink(self) -> Tensor:
        """The buffer that the step being queued writes its tokens to."""
        return self.buffers[self.turn]

    def next_step(self) -> None:
        """Begin to queue the next step: the buffers change their roles."""
        self.turn = 1 - self.turn

    def queue_read(self, num_places: int, places_Q: np.ndarray) -> QueuedTokens:
        """Queue the copy of the sink's first places to the host; places_Q: where the slots' tokens stand."""
        host = self._hosts[self.turn][:num_places]
        host.copy_(self.sink[:num_places], non_blocking=True)
        return QueuedTokens(host.numpy(), places_Q, self.capturer.fence())


class QueuedTokens:
    """The tokens of a step's slots, on their way to the host. Must be read before the buffer is written again, two
    steps on."""

    def __init__(self, tokens: np.ndarray, places_Q: np.ndarray, wait: Callable[[], None]):
        self.places_Q = places_Q
        self._tokens, self._wait = tokens, wait

    def read(self) -> tuple[np.ndarray, dict[int, str]]:
        """Wait until the tokens have arrived, and return them as `Sampler.draw` does."""
        self._wait()
        token_ids_Q = self._tokens[self.places_Q]
        bad = np.flatnonzero(token_ids_Q == NOT_A_TOKEN)
        return np.maximum(token_ids_Q, 0), dict.fromkeys(bad.tolist(), NOT_FINITE)


def sample_into(sink: Tensor, ops: OpSet, logits_TV: Tensor, parameters: Iterable[Tensor]) -> None:
    """Queue the drawing of a token for every row of logits, which may be overwritten."""
    finite_T = torch.isfinite(logits_TV.sum(dim=-1))
    token_ids_T = ops.sample(logits_TV, *parameters)
    sink.copy_(torch.where(finite_T, token_ids_T, NOT_A_TOKEN))


def wants_hidden_states(rows: RowState, rows_S: np.ndarray) -> bool:
    """Whether the step computes places of a prompt for which a row asked logprobs or an embedding."""
    asks_S = (rows.num_prompt_logprobs[rows_S] != NO_LOGPROBS) | rows.pools[rows_S]
    return bool((asks_S & (rows.num_computed[rows_S] < rows.num_prompt_tokens[rows_S])).any())


def samples_plainly(rows: RowState, rows_Q: np.ndarray) -> bool:
    """Whether no slot wants more than SAMPLE_INPUTS: no logprobs, nothing that edits logits."""
    plain_Q = ((rows.num_logprobs[rows_Q] == NO_LOGPROBS) & ~rows.edits_logits[rows_Q]
               & (rows.min_output_tokens[rows_Q] == 0))
    return bool(plain_Q.all())
