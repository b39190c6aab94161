"""A layer of experts on the CPU against loops over them, as JSON. Usage: python -m benchmarks.experts [--threads N]

The layer of `xllm bench throughput --shape moe`: 64 experts of 256 over hidden 512, of which a token has 8. The rivals
take turns, and the best of the rounds counts. Route and sum are in the times of all:

  loop_kernels  for each expert that was hit: its rows by index, our own packed `linear`, the sum by index_add_
  loop_torch    the same with torch's `linear` and weights as they are: what transformers calls "eager"
  grouped_mm    rows sorted by expert and torch's `grouped_mm`: what transformers does by default
  fp32, int8, w8a8   our operators; the loops are of fp32

Beside the times: bytes of fp32 weights that were read (pages, counted by the system), the speed of the arithmetic as
a share of the fastest product that torch makes here, and the memory of long prompts (`benchmarks.expert_memory`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backends import get_backend
from backends.cpu.expert_kernels import PanelExperts
from backends.expert_choice import RouteRule
from backends.opset import OpSet
from backends.reference import REFERENCE
from benchmarks.ops import race
from benchmarks.pages_read import watch_experts
from serving.commands.bench.report import environment
from xllm import env

D, FFN, NUM_EXPERTS, RULE = 512, 256, 64, RouteRule(num_chosen=8, renormalise=True)
BASELINES, OWN = ("loop_kernels", "loop_torch", "grouped_mm"), ("fp32", "int8", "w8a8")
Product = Callable[[Tensor, int], Tensor]  # of rows and the number of an expert


def loop(x: Tensor, logits: Tensor, silu_mul: Callable[[Tensor], Tensor], gate_up: Product, down: Product) -> Tensor:
    out, choice = torch.zeros_like(x), REFERENCE.route(logits, RULE)
    for expert in choice.ids_TK.unique().tolist():
        tokens, places = (choice.ids_TK == expert).nonzero(as_tuple=True)
        rows = down(silu_mul(gate_up(x[tokens], expert)), expert)
        out.index_add_(0, tokens, rows * choice.weights_TK[tokens, places, None])
    return out


def grouped_mm(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """gate_up, down: [E, Y, X]."""
    choice = REFERENCE.route(logits, RULE)
    ids, order = choice.ids_TK.flatten().sort()
    ends = torch.bincount(ids, minlength=NUM_EXPERTS).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // RULE.num_chosen], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    rows = rows * choice.weights_TK.flatten()[order, None]
    return torch.empty_like(rows).index_copy_(0, order, rows).view(len(x), RULE.num_chosen, -1).sum(1)


def grouped(ops: OpSet, x: Tensor, logits: Tensor, gate_up: Any, down: Any) -> Tensor:
    choice = ops.route(logits, RULE)
    inner = ops.silu_mul(ops.grouped_linear(x, gate_up, choice, from_tokens=True))
    return ops.combine(ops.grouped_linear(inner, down, choice, from_tokens=False), choice)


def bytes_read(ops: OpSet, x: Tensor, logits: Tensor, weights: tuple[Tensor, Tensor]) -> dict[str, int]:
    """Of the weights of both products."""
    packed = [ops.pack_experts(stacked.unbind()) for stacked in weights]
    assert all(type(each) is PanelExperts for each in packed)
    watched = [watch_experts(each) for each in packed]
    grouped(ops, x, logits, *packed)
    hit = len(ops.route(logits, RULE).ids_TK.unique())
    each = sum(p.nbytes for p in packed) // NUM_EXPERTS
    return {"experts_hit": hit, "weight_bytes_of_the_hit": hit * each,
            "weight_bytes_read": sum(pages.num_bytes() for pages in watched),
            "weight_bytes_of_all": NUM_EXPERTS * each}


def experts_case(ops: OpSet, num_tokens: int, layers: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """layers: weights to cycle through, as a model does."""
    x, logits = torch.randn(num_tokens, D), torch.randn(num_tokens, NUM_EXPERTS)
    own = [[[ops.pack_linear(w) for w in stacked] for stacked in layer] for layer in layers]
    turn = {name: cycle(range(len(layers))) for name in BASELINES}

    def loop_kernels() -> Tensor:
        gate_up, down = own[next(turn["loop_kernels"])]
        return loop(x, logits, ops.silu_mul, lambda rows, e: ops.linear(rows, gate_up[e]),
                    lambda rows, e: ops.linear(rows, down[e]))

    def loop_torch() -> Tensor:
        gate_up, down = layers[next(turn["loop_torch"])]
        return loop(x, logits, REFERENCE.silu_mul, lambda rows, e: F.linear(rows, gate_up[e]),
                    lambda rows, e: F.linear(rows, down[e]))

    rivals: dict[str, Callable[[], Any]] = {
        "loop_kernels": loop_kernels, "loop_torch": loop_torch,
        "grouped_mm": lambda: grouped_mm(x, logits, *layers[next(turn["grouped_mm"])])}
    expected = loop_torch()
    for name, quantization in zip(OWN, (None, "int8", "w8a8")):
        packed = cycle([tuple(ops.pack_experts(w.unbind(), quantization=quantization) for w in layer)
                        for layer in layers])
        rivals[name] = partial(lambda packed: grouped(ops, x, logits, *next(packed)), packed)
    for _ in layers[1:]:
        loop_torch()
    for name in ("loop_kernels", "grouped_mm", "fp32"):
        torch.testing.assert_close(rivals[name](), expected, rtol=0, atol=1e-4)
    times = race({name: rivals[name] for name in rivals}, rounds=5)
    ratios = {f"{name}_over_{base}": round(times[f"{base}_us"] / times[f"{name}_us"], 2)
              for name in OWN for base in BASELINES}
    operations = 2 * num_tokens * RULE.num_chosen * 3 * D * FFN
    speeds = {f"{name}_gflops": round(operations / times[f"{name}_us"] / 1e3, 1) for name in (*BASELINES, *OWN)}
    return {name: value for name, value in times.items() if name.endswith("_us")} | ratios | speeds


def machine_gflops() -> float:
    """Of the fastest large fp32 product of torch's."""
    a, best = torch.randn(2048, 2048), float("inf")
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return round(2 * 2048**3 / best / 1e9, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", default="1,8,32,128,512")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    ops = get_backend("cpu", cache_dir=env.cache_dir()).ops
    layers = [(torch.randn(NUM_EXPERTS, 2 * FFN, D) * D**-0.5, torch.randn(NUM_EXPERTS, D, FFN) * FFN**-0.5)
              for _ in range(2)]
    results: dict[str, Any] = {}
    for num_tokens in map(int, args.tokens.split(",")):
        results[f"tokens={num_tokens}"] = experts_case(ops, num_tokens, layers) | (
            bytes_read(ops, torch.randn(num_tokens, D), torch.randn(num_tokens, NUM_EXPERTS), layers[0])
            if num_tokens <= 8 else {})
    memory = subprocess.run([sys.executable, "-m", "benchmarks.expert_memory"], check=True, capture_output=True)
    print(json.dumps({"threads": args.threads, "torch": torch.__version__, "machine_gflops": machine_gflops(),
                      "results": results, "memory": json.loads(memory.stdout), "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
