"""Random cases of every operator of an `OpSet`, each with its truth in float64.

Here those of dense layers; `op_cases_kv.py` and `op_cases_sampling.py` have the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import Tensor

from backends.reference.linear import quantise_tokens
from benchmarks.gpu.device import Device

Args = ParamSpec("Args")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Check:
    """run: calls the operator on inputs made anew, so that it can be called twice; truth: the same, from float64, of as
    many outputs as are known. tolerance: of the relative error by norms; 0: equal. absent: why there is nothing to run.
    may_refuse: a ValueError or NotImplementedError of `run` says that as well.
    """

    name: str
    run: Callable[[], Sequence[Tensor]] = lambda: ()
    truth: Callable[[], Sequence[Tensor]] = lambda: ()
    tolerance: float = 0.0
    absent: str = ""
    may_refuse: bool = False


class World:
    """Where the cases live: a device, its operators, and two sources of chance. cases: how many of each operator.
    longest: context of the longest sequence."""

    def __init__(self, device: Device, *, seed: int, cases: int, longest: int,
                 dtypes: tuple[torch.dtype, ...] | None = None):
        self.device, self.backend, self.ops = device, device.backend, device.backend.ops
        self.cases, self.longest = cases, longest
        self.rng, self.generator = random.Random(seed), device.generator(seed)
        self._host = torch.empty(0, dtype=torch.uint8)
        # The CPU's kernels know one dtype.
        usual = (torch.bfloat16, torch.float16, torch.float32) if device.is_cuda else (torch.float32,)
        self.dtypes = dtypes or usual

    def dtype(self, i: int) -> torch.dtype:
        """Mostly what models are served in; each of the others as well."""
        return self.dtypes[i % 5 % len(self.dtypes) if i % 5 < 3 else 0]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device.torch).to(dtype)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device.torch)

    def randint(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device.torch, dtype=dtype)

    def host_memory(self, num_bytes: int) -> Tensor:
        """The same each time, as far as that is enough: pinning takes long."""
        if len(self._host) < num_bytes:
            self._host = self.backend.allocate_host(num_bytes)
        return self._host[:num_bytes]

    def tensor(self, values: Sequence[float | int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device.torch)


Cases = Callable[[World], Iterator[Check]]


def later(function: Callable[Args, Tensor], *args: Args.args, **kwargs: Args.kwargs) -> Callable[[], Sequence[Tensor]]:
    """The call with what the arguments are now, made when it is asked for; its tensor is the only output."""
    return lambda: (function(*args, **kwargs),)


# Codes of the weight and the largest of them; with w8a8 x becomes such codes as well.
QUANTIZATIONS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0), "w8a8": (torch.int8, 127.0)}
NEXT_CODE = 2e-3  # of a sum in which a number of x may have the next code
LINEAR_ROWS = (1, 2, 7, 16, 17, 33, 64, 65, 200, 256)
LINEAR_SIZES = ((4096, 1024), (256, 128), (1024, 512), (100, 64), (33, 48), (512, 2048))


def linear_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases * 4):
        quantization = (None, *QUANTIZATIONS)[i % 4]
        sizes = LINEAR_SIZES if world.device.is_cuda else LINEAR_SIZES[1:]
        rows, (outputs, inputs) = world.rng.choice(LINEAR_ROWS), world.rng.choice(sizes)
        yield linear_check(world, quantization, rows, outputs, inputs, world.dtype(i // 4), with_bias=i // 4 % 2 == 0)


def linear_check(world: World, quantization: str | None, rows: int, outputs: int, inputs: int, dtype: torch.dtype, *,
                 with_bias: bool) -> Check:
    name = f"{quantization or 'plain'}/{rows}x{outputs}x{inputs}{'/bias' * with_bias}/{short(dtype)}"
    weight, bias = world.randn(outputs, inputs, dtype=dtype), world.randn(outputs, dtype=dtype) if with_bias else None
    x = world.randn(rows, inputs + 16, dtype=dtype)[:, :inputs]  # rows that lie apart
    try:
        packed = world.ops.pack_linear(weight.clone(), bias, quantization=quantization)
    except ValueError as error:
        return Check(name=name, absent=str(error))

    def truth() -> Sequence[Tensor]:
        exact = weight.double() if quantization is None else rounded(weight, quantization)
        exact_x = in_codes(x) if quantization == "w8a8" else x.double()
        return (exact_x @ exact.T + (0.0 if bias is None else bias.double()),)

    # Rows of x may be brought to fp8 as well.
    tolerance = 6e-2 if quantization == "fp8" and rows > 64 else TOLERANCE[dtype]
    tolerance = max(tolerance, NEXT_CODE if quantization == "w8a8" else 0.0)
    return Check(name=name, run=lambda: (world.ops.linear(x, packed),), truth=truth, tolerance=tolerance)


def in_codes(x_TX: Tensor) -> Tensor:
    """The numbers that "w8a8" makes of x, in float64."""
    codes_TX, scale_T = quantise_tokens(x_TX)
    return codes_TX.double() * scale_T.double()[:, None]


def rounded(weight_YX: Tensor, quantization: str) -> Tensor:
    """The numbers that a weight's codes stand for, in float64."""
    dtype, largest = QUANTIZATIONS[quantization]
    scale = weight_YX.float().abs().amax(1, keepdim=True) / largest
    codes = weight_YX.float() / scale
    return (codes.round() if dtype is torch.int8 else codes).to(dtype).double() * scale.double()


def pack_linear_cases(world: World) -> Iterator[Check]:
    """That codes are packed as the rounding says, by multiplying with the unit matrix."""
    for quantization in (None, *QUANTIZATIONS):
        weight = world.randn(96, 64)
        unit = torch.eye(64, device=world.device.torch)
        try:
            packed = world.ops.pack_linear(weight.clone(), quantization=quantization)
        except ValueError as error:
            yield Check(name=str(quantization), absent=str(error))
            continue
        exact = weight.double() if quantization is None else rounded(weight, quantization)
        yield Check(name=str(quantization), run=later(world.ops.linear, unit, packed),
                    truth=later(exact.t), tolerance=1e-6)  # fmt: skip


def embedding_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases):
        vocab, hidden = world.rng.choice(((1000, 64), (151_936 if world.device.is_cuda else 5000, 128), (7, 100)))
        table = world.randn(vocab, hidden, dtype=world.dtype(i))
        ids = world.randint(vocab, world.rng.choice((1, 3, 64, 257)), dtype=(torch.int32, torch.int64)[i % 2])
        yield Check(name=f"{vocab}x{hidden}/{len(ids)}", run=later(world.ops.embedding, ids, table),
                    truth=later(table.index_select, 0, ids.long()))  # fmt: skip


def feed_tokens_cases(world: World) -> Iterator[Check]:
    for _ in range(world.cases):
        rows, sampled = world.rng.choice((1, 5, 64, 300)), world.rng.choice((1, 17, 256))
        ids, feed = world.randint(1000, rows, dtype=torch.int32), world.randint(2 * sampled, rows, dtype=torch.int32)
        feed, tokens = feed - sampled, world.randint(900, sampled) - 100

        def truth(ids: Tensor = ids, feed: Tensor = feed, tokens: Tensor = tokens) -> Sequence[Tensor]:
            kept = [max(int(tokens[f]), 0) if f >= 0 else i for i, f in zip(ids.tolist(), feed.tolist())]
            return (world.tensor(kept, torch.int32),)

        yield Check(name=f"{rows}from{sampled}", truth=truth,
                    run=later(world.ops.feed_tokens, ids, feed, tokens))  # fmt: skip


def norm_truth(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def rms_norm_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases):
        dtype, rows, hidden = world.dtype(i), world.rng.choice((1, 3, 64, 259)), world.rng.choice(HIDDEN)
        x, weight = world.randn(rows, hidden, dtype=dtype), world.randn(hidden, dtype=dtype)
        yield Check(name=f"{rows}x{hidden}/{short(dtype)}", tolerance=TOLERANCE[dtype],
                    run=later(world.ops.rms_norm, x, weight, 1e-6), truth=later(norm_truth, x, weight, 1e-6))


def add_rms_norm_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases):
        dtype, rows, hidden = world.dtype(i), world.rng.choice((1, 3, 64, 259)), world.rng.choice(HIDDEN)
        x, residual = world.randn(rows, hidden, dtype=dtype), world.randn(rows, hidden, dtype=dtype)
        weight = world.randn(hidden, dtype=dtype)

        def run(x: Tensor = x, residual: Tensor = residual, weight: Tensor = weight) -> Sequence[Tensor]:
            added = residual.clone()
            return world.ops.add_rms_norm(x.clone(), added, weight, 1e-6), added

        def truth(x: Tensor = x, residual: Tensor = residual, weight: Tensor = weight) -> Sequence[Tensor]:
            added = x.double() + residual.double()
            return norm_truth(added, weight, 1e-6), added

        yield Check(name=f"{rows}x{hidden}/{short(dtype)}", run=run, truth=truth, tolerance=TOLERANCE[dtype])


def silu_mul_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases):
        dtype, rows, ffn = world.dtype(i), world.rng.choice((1, 5, 64, 130)), world.rng.choice((96, 3072, 14_336))
        x = world.randn(rows, 2 * ffn, dtype=dtype) * 3
        yield Check(name=f"{rows}x{ffn}/{short(dtype)}", tolerance=TOLERANCE[dtype],
                    run=later(world.ops.silu_mul, x), truth=later(silu_mul_truth, x))


def silu_mul_truth(x_TG: Tensor) -> Tensor:
    gate, up = x_TG.double().chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def lora_cases(world: World) -> Iterator[Check]:
    """Tokens of several adapters, and of none, mixed in a step; a layer of several parts."""
    for i in range(world.cases):
        dtype, rank, rng = world.dtype(i), world.rng.choice((8, 16, 64)), world.rng
        slots, rows, inputs = rng.choice((1, 2, 5)), rng.choice((1, 5, 64, 130)), rng.choice((64, 256, 1024))
        parts = rng.choice(((256,), (128, 64, 64), (96, 96)))
        a, b = world.randn(slots, len(parts) * rank, inputs), world.randn(slots, sum(parts), rank)
        a, b = (a / inputs**0.5).to(dtype), (b / rank**0.5).to(dtype)
        y, x = world.randn(rows, sum(parts), dtype=dtype), world.randn(rows, inputs, dtype=dtype)
        slots_T = world.randint(slots + 1, rows, dtype=torch.int32)
        present = sorted(set(slots_T.tolist()) - {0}) if i % 2 else None
        packed = world.ops.pack_lora(a, b, parts)

        def run(y: Tensor = y, x: Tensor = x, packed: object = packed, slots_T: Tensor = slots_T,
                present: list[int] | None = present) -> Sequence[Tensor]:
            added = y.clone()
            world.ops.lora_add(added, x, packed, slots_T, present)
            return (added,)

        yield Check(name=f"{rows}x{sum(parts)}x{inputs}/r{rank}/L{slots}/{short(dtype)}", run=run,
                    truth=later(lora_truth, y, x, a, b, slots_T, parts),
                    tolerance=2 * TOLERANCE[dtype])  # fmt: skip


def lora_truth(y_TY: Tensor, x_TX: Tensor, a_LRX: Tensor, b_LYR: Tensor, slots_T: Tensor,
               parts: tuple[int, ...]) -> Tensor:
    rank, rows = b_LYR.shape[2], []
    for y, x, slot in zip(y_TY.double(), x_TX.double(), slots_T.tolist()):
        if slot:
            inner = (a_LRX[slot - 1].double() @ x).split(rank)
            outer = b_LYR[slot - 1].double().split(parts)
            y = y + torch.cat([b @ h for b, h in zip(outer, inner)])
        rows.append(y)
    return torch.stack(rows)


HIDDEN = (64, 100, 1024, 2048, 4096, 5120)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


OPERATORS: dict[str, Cases] = {
    "pack_linear": pack_linear_cases, "linear": linear_cases, "embedding": embedding_cases,
    "feed_tokens": feed_tokens_cases, "rms_norm": rms_norm_cases, "add_rms_norm": add_rms_norm_cases,
    "silu_mul": silu_mul_cases, "pack_lora": lora_cases, "lora_add": lora_cases,
}  # fmt: skip
