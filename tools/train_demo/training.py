"""A training phase: its schedule, its steps, and a running mean of the weights."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.train_demo.network import DemoModel
from tools.train_demo.optimisers import make_optimisers
from tools.train_demo.rows import RowSampler

TOKENS_PER_STEP = 4096
TOKENS_PER_PASS = 2048  # of one forward and backward pass; larger ones no longer fit in the cache
SHORT_ROW, LONG_ROW = 512, 2048
LONG_ROW_EVERY = 8  # one step in eight trains on long rows, so that long contexts work
WARM_UP_STEPS = 40
AVERAGE_DECAY = 0.98  # of the running mean of the weights that snapshots use


def rate_factor(step: int, progress: float) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARM_UP_STEPS, 1.0 - progress)


def training_pass(model: nn.Module, rows: Tensor, dtype: torch.dtype) -> float:
    """Accumulate the gradients of one pass; return its mean loss."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    (loss * (rows[:, 1:].numel() / TOKENS_PER_STEP)).backward()
    return loss.item()


def training_step(model: nn.Module, rows: Tensor, optimisers: list[torch.optim.Optimizer],
                  factor: float, dtype: torch.dtype) -> float:
    """Do one optimiser step; return the mean loss."""
    passes = rows.split(max(1, TOKENS_PER_PASS // (rows.shape[1] - 1)))
    losses = [training_pass(model, part, dtype) for part in passes]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * factor
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return sum(losses) / len(losses)


@dataclass(frozen=True)
class Phase:
    """How long to train, and at which part of the optimisers' learning rates to start."""

    tokens: float
    peak: float
    minutes: float = math.inf


def train(model: DemoModel, stream: np.ndarray, phase: Phase, args: argparse.Namespace,
          snapshot: Callable[[dict[str, Tensor]], None]) -> int:
    """Run the schedule; call `snapshot` with averaged weights now and then. Return the tokens seen."""
    dtype = torch.float32 if args.float32 else torch.bfloat16
    samplers = {length: RowSampler(stream, length, args.seed) for length in (SHORT_ROW, LONG_ROW)}
    optimisers = make_optimisers(model)
    average = {name: weight.clone() for name, weight in model.state_dict().items()}
    steps, began, mean_loss = max(1, int(phase.tokens) // TOKENS_PER_STEP), time.monotonic(), 0.0
    seen = 0
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - began) / (60 * phase.minutes))
        if progress >= 1:
            break
        length = LONG_ROW if step % LONG_ROW_EVERY == LONG_ROW_EVERY - 1 else SHORT_ROW
        rows = samplers[length].rows(TOKENS_PER_STEP // length)
        loss = training_step(model, rows, optimisers, phase.peak * rate_factor(step, progress), dtype)
        mean_loss = loss if step == 0 else 0.95 * mean_loss + 0.05 * loss
        seen += rows[:, 1:].numel()
        for name, weight in model.state_dict().items():
            average[name].lerp_(weight, 1 - AVERAGE_DECAY)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            speed = (step + 1) * TOKENS_PER_STEP / (time.monotonic() - began)
            print(f"step {step + 1}/{steps}  loss {mean_loss:.3f}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % args.snapshot_steps == 0 and step + 1 < steps:
            snapshot(average)
    return seen
