"""What section `micro` measures of a step beside its layers: what is done to logits, and the tokens on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.bank import Bank, MicroCase, each
from benchmarks.gpu.device import Call
from benchmarks.gpu.roofline import Work

SAMPLING = {"greedy": (0.0, 0, 1.0), "temperature": (0.8, 0, 1.0), "top_k_top_p": (0.8, 50, 0.9)}
HISTORY = 1024  # tokens of each row that is penalised
ALLOWED = 0.02  # of the vocabulary, by a grammar


def step_cases(bank: Bank, vocab: int, rows: int) -> Iterator[MicroCase]:
    moved, cfg = rows * vocab * 4, {"B": rows}
    for name, limits in SAMPLING.items():
        yield MicroCase(id=f"sample.{name}/B{rows}/V{vocab}", work=Work(float(moved), 0.0), num_bytes=moved, cfg=cfg,
                        calls=each(partial(sample_call, bank, rows, vocab, *limits)))
    yield MicroCase(id=f"argmax/B{rows}/V{vocab}", work=Work(float(moved), 0.0), num_bytes=moved, cfg=cfg,
                    calls=each(lambda: argmax_call(bank, rows, vocab)))
    history = min(HISTORY, vocab // 2)
    # Ids are read; of each token's logit (nearly all differ) the number is read and written.
    yield MicroCase(id=f"penalise/B{rows}/V{vocab}", work=Work(rows * history * 12.0, 0.0), num_bytes=moved,
                    cfg=cfg | {"history": history}, calls=each(lambda: penalise_call(bank, rows, vocab, history)))
    words = -(-vocab // 32)
    yield MicroCase(id=f"apply_token_bitmask/B{rows}/V{vocab}", num_bytes=moved, cfg=cfg | {"allowed": ALLOWED},
                    work=Work(rows * (words * 4 + (1 - ALLOWED) * vocab * 4), 0.0),
                    calls=each(lambda: bitmask_call(bank, rows, vocab)))  # fmt: skip
    yield MicroCase(id=f"feed_tokens/T{rows}", work=Work(rows * 20.0, 0.0), num_bytes=rows * 20, cfg={"T": rows},
                    calls=each(lambda: feed_call(bank, rows)))


def sample_call(bank: Bank, rows: int, vocab: int, temperature: float, top_k: int, top_p: float) -> Call:
    logits, device = bank.logits(rows, vocab), bank.device.torch
    temperatures, top_ps, min_ps = (torch.full((rows,), value, device=device) for value in (temperature, top_p, 0.0))
    top_ks = torch.full((rows,), top_k, device=device, dtype=torch.int32)
    uniform = torch.rand(rows, device=device, generator=bank.generator)
    return lambda: bank.ops.sample(logits, temperatures, top_ks, top_ps, min_ps, uniform)


def argmax_call(bank: Bank, rows: int, vocab: int) -> Call:
    logits = bank.logits(rows, vocab)
    return lambda: bank.ops.argmax(logits)


def penalise_call(bank: Bank, rows: int, vocab: int, history: int) -> Call:
    """Factors next to none, so that logits stay numbers however often they are penalised."""
    logits, device = bank.logits(rows, vocab), bank.device.torch
    tokens, at = bank.randint(vocab, rows * history), torch.arange(rows, device=device)
    starts = (torch.arange(rows + 1, device=device) * history).int()
    output_starts = starts[:-1] + history // 2
    repetition = torch.full((rows,), 1 + 2.0**-20, device=device)
    frequency, presence = (torch.full((rows,), 1e-7, device=device, dtype=torch.float64) for _ in range(2))
    return lambda: bank.ops.penalise(logits, at, tokens, starts, output_starts, repetition, frequency, presence)


def bitmask_call(bank: Bank, rows: int, vocab: int) -> Call:
    logits, device, words = bank.logits(rows, vocab), bank.device.torch, -(-vocab // 32)
    allowed = torch.rand(rows, words, 32, device=device, generator=bank.generator) < ALLOWED
    weights = torch.tensor([1 << i for i in range(31)] + [-(1 << 31)], device=device)
    mask = (allowed.long() * weights).sum(-1).int()
    at = torch.arange(rows, device=device)
    return lambda: bank.ops.apply_token_bitmask(logits, mask, at)


def feed_call(bank: Bank, rows: int) -> Call:
    """Half of them the last step's."""
    ids, sampled = bank.randint(1000, rows), bank.randint(1000, rows).long()
    feed = bank.randint(2 * rows, rows) - rows
    return lambda: bank.ops.feed_tokens(ids, feed, sampled)
