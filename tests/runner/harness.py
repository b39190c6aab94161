"""`Driver`: makes plans by hand, as a scheduler without policies would, and keeps what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xllm.config import EngineConfig
from xllm.request import SamplingParams, TokenLogprobs
from xllm.runner.model_runner import ModelRunner
from xllm.step import NewRow, ScheduleOutput, StepOutput

BLOCK_SIZE = 8
MAX_MODEL_LEN = 128
GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


def make_config(**settings: Any) -> EngineConfig:
    """A resolved config of small sizes."""
    flat = {"dtype": "float32", "max_num_seqs": 8, "max_model_len": MAX_MODEL_LEN, "block_size": BLOCK_SIZE,
            "num_kv_blocks": 64, **settings}
    return EngineConfig.from_flat(**flat).resolve(model_max_len=256, default_block_size=16)


@dataclass
class Running:
    """What the driver knows of a row: its tokens, how many are computed, and its blocks."""

    row: int
    tokens: list[int]
    num_prompt: int
    num_computed: int
    blocks: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt:]


class Driver:
    """Sequences are named. Blocks are dealt out shuffled, rows from the top, so that 0 is no lucky default."""

    def __init__(self, runner: ModelRunner, num_blocks: int):
        self.runner = runner
        self.free_blocks: list[int] = np.random.default_rng(5).permutation(num_blocks).tolist()
        self.free_rows = list(range(len(runner.rows.num_tokens)))
        self.seqs: dict[str, Running] = {}
        self.num_steps = 0
        self.num_drafts = 0
        self.num_accepted = 0
        self._entering: list[NewRow] = []
        self._leaving: list[int] = []
        self.copies: list[tuple[int, int]] = []

    def add(self, name: str, tokens: Sequence[int], sampling: SamplingParams = GREEDY, *, seed: int = 0,
            num_prompt: int | None = None, num_computed: int = 0, blocks: Iterable[int] = (),
            eos: tuple[int, ...] = ()) -> Running:
        """Enter a sequence with the next step. `blocks`: those that hold the computed tokens."""
        seq = Running(row=self.free_rows.pop(), tokens=list(tokens), num_prompt=num_prompt or len(tokens),
                        num_computed=num_computed, blocks=list(blocks))
        self.seqs[name] = seq
        self._entering.append(NewRow(
            row=seq.row, request_id=name, token_ids=np.array(tokens, dtype=np.int32), num_prompt_tokens=seq.num_prompt,
            num_computed_tokens=num_computed, block_ids=np.array(seq.blocks, dtype=np.int32), sampling=sampling,
            eos_token_ids=eos, seed=seed))
        return seq

    def remove(self, name: str) -> Running:
        """Release a row with the next step; its blocks are free for others in that very step."""
        seq = self.seqs.pop(name)
        self._leaving.append(seq.row)
        self.free_blocks += seq.blocks
        self.free_rows.append(seq.row)
        return seq

    def step(self, chunks: dict[str, int] | None = None, *, max_drafts: int = 0) -> StepOutput:
        """Run the named sequences (None: all) for that many known tokens (0: all that are left)."""
        chunks = dict.fromkeys(self.seqs, 0) if chunks is None else chunks
        seqs = [self.seqs[name] for name in chunks]
        sizes = [size or len(seq.tokens) - seq.num_computed for seq, size in zip(seqs, chunks.values())]
        samples = [seq.num_computed + size == len(seq.tokens) for seq, size in zip(seqs, sizes)]
        drafts = [max_drafts] * len(seqs)
        appended = [(seq.row, block) for seq, size, num in zip(seqs, sizes, drafts)
                    for block in self._grow(seq, seq.num_computed + size + num)]
        appended_B2 = np.array(appended, dtype=np.int32).reshape(-1, 2)
        copies_B2 = np.array(self.copies, dtype=np.int32).reshape(-1, 2)
        plan = ScheduleOutput(
            step=self.num_steps, rows_S=_int32([seq.row for seq in seqs]), num_tokens_S=_int32(sizes),
            max_drafts_S=_int32(drafts), samples_S=np.array(samples, dtype=bool), new_rows=tuple(self._entering),
            released_rows=tuple(self._leaving), append_rows_B=appended_B2[:, 0], append_ids_B=appended_B2[:, 1],
            copy_src=copies_B2[:, 0], copy_dst=copies_B2[:, 1])
        self._entering, self._leaving, self.copies = [], [], []
        self.num_steps += 1
        output = self.runner.run(plan)
        self._take_in(seqs, sizes, output)
        return output

    def _grow(self, seq: Running, length: int) -> list[int]:
        missing = -(-min(length, MAX_MODEL_LEN) // self.runner.rows.block_size) - len(seq.blocks)
        new = [self.free_blocks.pop() for _ in range(missing)]
        seq.blocks += new
        return new

    def _take_in(self, seqs: list[Running], sizes: list[int], output: StepOutput) -> None:
        for i, (seq, size) in enumerate(zip(seqs, sizes)):
            num = int(output.num_sampled_S[i])
            assert (output.token_ids_SR[i, num:] == -1).all()
            seq.tokens += output.token_ids_SR[i, :num].tolist()
            seq.num_computed += size + max(0, num - 1)
            seq.logprobs += output.logprobs.get(i, [])
            seq.prompt_logprobs += output.prompt_logprobs.get(i, [])
            self.num_accepted += max(0, num - 1)
        self.num_drafts += int(output.num_drafts_S.sum())

    def generate(self, name: str, num_tokens: int, *, max_drafts: int = 0) -> list[int]:
        """Run one sequence alone until it has (at least) that many output tokens; returns so many of them."""
        while len(self.seqs[name].output) < num_tokens:
            self.step({name: 0}, max_drafts=max_drafts)
        return self.seqs[name].output[:num_tokens]


def _int32(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)
