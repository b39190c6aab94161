"""`grouped_linear` alone on the CPU against loops over experts, as JSON.
Usage: python -m benchmarks.expert_products [--threads N]

Both products of a layer of 64 experts of 256 over hidden 512, of which a token has 8: gate and up from tokens, [512,
512] an expert, and down from rows, [512, 256]. What the loops do for each expert that was hit is what they have to:

  loop         its rows by comparing the ids, the product by torch's `linear`, its results written back by index
  sorted_loop  ids sorted once, its rows by one index, the product straight into its run of the results

fp32: of plain weights. int8: the loop makes an expert's weights of its codes in every step. w8a8: the loop makes codes
of an expert's rows and scales torch's product of int8. Rivals take turns and the medians of the rounds count; a ratio
is the median of the rounds' own. One thread's time is what it computed, two threads' what passed. The order of rows is
found anew in every call of all, as routing changes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backends import get_backend
from backends.expert_choice import ExpertChoice
from backends.opset import OpSet
from backends.reference import REFERENCE
from backends.reference.linear import quantize_rows
from benchmarks.experts import FFN, NUM_EXPERTS, RULE, D
from serving.commands.bench.report import environment
from xllm import env

NUM_CHOSEN = RULE.num_chosen
Product = Callable[[Tensor, int], Tensor]  # of rows and the number of an expert
FORMATS = {"fp32": None, "int8": "int8", "w8a8": "w8a8"}


def loop(x: Tensor, ids_TK: Tensor, num_outputs: int, product: Product, from_tokens: bool) -> Tensor:
    """[T, K, Y]; x is [T, X], or [T, K, X]."""
    y_TKY = torch.empty(*ids_TK.shape, num_outputs)
    for expert in ids_TK.unique().tolist():
        tokens, places = (ids_TK == expert).nonzero(as_tuple=True)
        y_TKY[tokens, places] = product(x[tokens] if from_tokens else x[tokens, places], expert)
    return y_TKY


def sorted_loop(x: Tensor, ids_TK: Tensor, num_outputs: int, product: Callable[[Tensor, int, Tensor], Any],
                from_tokens: bool) -> Tensor:
    """[R, Y] in the order of the experts; x is [T, X], or [R, X] in that order. product: into the third."""
    ids, order = ids_TK.flatten().sort(stable=True)
    ends = torch.bincount(ids, minlength=NUM_EXPERTS).cumsum(0).tolist()
    y_RY, tokens_R = torch.empty(len(ids), num_outputs), order // NUM_CHOSEN
    for expert, (begin, end) in enumerate(zip([0, *ends], ends)):
        if begin < end:
            product(x[tokens_R[begin:end]] if from_tokens else x[begin:end], expert, y_RY[begin:end])
    return y_RY


def loop_products(weights_EYX: Tensor, form: str) -> Product:
    if form == "fp32":
        return lambda rows, e: F.linear(rows, weights_EYX[e])
    codes, scales = zip(*(quantize_rows(weight_YX, form) for weight_YX in weights_EYX))
    if form == "int8":
        return lambda rows, e: F.linear(rows, codes[e] * scales[e][:, None])

    def multiply(rows: Tensor, e: int) -> Tensor:
        size = rows.abs().amax(1, keepdim=True)
        product = torch._int_mm((rows * (127 / size)).round_().char(), codes[e].t())
        return product * (size / 127) * scales[e]

    return multiply


def make_rivals(ops: OpSet, form: str, x: Tensor, ids_TK: Tensor, layers: list[Tensor], from_tokens: bool,
                ) -> dict[str, Callable[[], Tensor]]:
    """Of one product, over the weights [E, Y, X] of several layers in turns."""
    num_outputs = layers[0].shape[1]
    x_loop = x if from_tokens else x.unflatten(0, ids_TK.shape)
    products, weights = cycle([loop_products(each, form) for each in layers]), cycle(layers)
    packed = cycle([ops.pack_experts(each.unbind(), quantization=FORMATS[form]) for each in layers])
    weights_TK = torch.ones(ids_TK.shape)
    rivals = {
        "grouped_linear": lambda: ops.grouped_linear(x, next(packed), ExpertChoice(ids_TK, weights_TK),
                                                     from_tokens=from_tokens),
        "loop": lambda: loop(x_loop, ids_TK, num_outputs, next(products), from_tokens)}
    if form == "fp32":
        def multiply(stacked: Tensor, rows: Tensor, e: int, out: Tensor) -> None:
            torch.mm(rows, stacked[e].t(), out=out)

        rivals["sorted_loop"] = lambda: sorted_loop(x, ids_TK, num_outputs, partial(multiply, next(weights)),
                                                    from_tokens)
    return rivals


def interleaved(rivals: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round; the one that begins changes from round to round."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for call in rivals.values():
        call()
        call()
    for turn in range(rounds):
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            began = clock()
            rivals[name]()
            times[name].append(clock() - began)
    return times


def machine_gflops() -> float:
    """Of the fastest large fp32 product of torch's, by the same clock."""
    a = torch.randn(2048, 2048)
    return round(2 * 2048**3 / min(interleaved({"mm": lambda: torch.mm(a, a)}, 6)["mm"]) / 1e9, 1)


def check_products(ops: OpSet, form: str, x: Tensor, ids_TK: Tensor, weights: Tensor) -> None:
    """That all of them compute the same."""
    rivals = make_rivals(ops, form, x, ids_TK, [weights], True)
    choice = ExpertChoice(ids_TK, torch.rand(ids_TK.shape))
    y_RY = ops.grouped_linear(x, ops.pack_experts(weights.unbind(), quantization=FORMATS[form]), choice,
                              from_tokens=True)
    expected = (rivals["loop"]() * choice.weights_TK[..., None]).sum(1)
    torch.testing.assert_close(ops.combine(y_RY, choice), expected, rtol=0, atol=0.1 if form == "w8a8" else 1e-3)
    if "sorted_loop" in rivals:
        found = rivals["sorted_loop"]()[ids_TK.flatten().argsort(stable=True).argsort()].view(*ids_TK.shape, -1)
        torch.testing.assert_close(found, rivals["loop"](), rtol=0, atol=1e-3)


def measure(ops: OpSet, num_tokens: int, rounds: int) -> dict[str, Any]:
    shapes = {"up": (2 * FFN, D), "down": (D, FFN)}
    choice = REFERENCE.route(torch.randn(num_tokens, NUM_EXPERTS), RULE)
    inputs = {"up": torch.randn(num_tokens, D), "down": torch.randn(num_tokens * NUM_CHOSEN, FFN)}
    results: dict[str, Any] = {}
    for form in FORMATS:
        rivals: dict[str, Callable[[], Any]] = {}
        for part, (Y, X) in shapes.items():
            layers = [torch.randn(NUM_EXPERTS, Y, X) * X**-0.5 for _ in range(2)]
            if part == "up":
                check_products(ops, form, inputs[part], choice.ids_TK, layers[0])
            rivals |= {f"{part} {name}": call for name, call in make_rivals(
                ops, form, inputs[part], choice.ids_TK, layers, part == "up").items()}
        times = interleaved(rivals, rounds)
        names = [name.removeprefix("up ") for name in rivals if name.startswith("up ")]
        for name in names:
            times[f"both {name}"] = [a + b for a, b in zip(times[f"up {name}"], times[f"down {name}"])]
        flops = {part: 2 * num_tokens * NUM_CHOSEN * Y * X for part, (Y, X) in shapes.items()}
        flops["both"] = sum(flops.values())
        for part, count in flops.items():
            of = {name: times[f"{part} {name}"] for name in names}
            results[f"{form} {part}"] = {
                name: {"us": round(statistics.median(each) * 1e6, 1), "best_us": round(min(each) * 1e6, 1),
                       "gflops": round(count / statistics.median(each) / 1e9, 1),
                       "best_gflops": round(count / min(each) / 1e9, 1)} for name, each in of.items()} | {
                f"times_{name}": round(statistics.median(a / b for a, b in zip(each, of["grouped_linear"])), 2)
                for name, each in of.items() if name != "grouped_linear"}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    ops, before = get_backend("cpu", cache_dir=env.cache_dir()).ops, machine_gflops()
    results = measure(ops, args.tokens, args.rounds)
    print(json.dumps({"threads": args.threads, "torch": torch.__version__, "tokens": args.tokens,
                      "machine_gflops": max(before, machine_gflops()), "results": results,
                      "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
