"""Random cases of the operators of mixtures of experts, each with its truth in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backends.expert_choice import ExpertChoice, RouteRule
from benchmarks.gpu.op_cases import (
    NEXT_CODE,
    QUANTIZATIONS,
    TOLERANCE,
    Cases,
    Check,
    World,
    in_codes,
    later,
    rounded,
    short,
)

# Of Qwen3-MoE, Mixtral, DeepSeek-V2 and DeepSeek-V3, with fewer experts.
RULES = (RouteRule(num_chosen=8, renormalise=True), RouteRule(num_chosen=2, renormalise=True),
         RouteRule(num_chosen=6, num_groups=8, num_kept_groups=3, scale=16.0),
         RouteRule(num_chosen=8, sigmoid=True, num_groups=8, num_kept_groups=4, summed_per_group=2, renormalise=True,
                   scale=2.5))
ROWS = (1, 2, 8, 33, 200)
SIZES = ((256, 128), (512, 1024), (100, 64), (33, 48))


def route_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases * 2):
        rule, rows = RULES[i % len(RULES)], world.rng.choice(ROWS)
        logits, bias = world.randn(rows, 64) * 2, world.randn(64) * 0.2 if i % 3 == 0 else None

        def run(logits: Tensor = logits, rule: RouteRule = rule, bias: Tensor | None = bias) -> Sequence[Tensor]:
            choice = world.ops.route(logits, rule, bias)
            order = choice.ids_TK.argsort(dim=1)  # experts that are as good as equal may change places
            return (choice.weights_TK.gather(1, order),)

        yield Check(name=f"{rows}/K{rule.num_chosen}{'/bias' * (bias is not None)}", run=run,
                    truth=later(route_truth, logits, rule, bias), tolerance=TOLERANCE[torch.float32])


def route_truth(logits_TE: Tensor, rule: RouteRule, bias_E: Tensor | None) -> Tensor:
    """Weights in the order of the experts' ids."""
    scores = logits_TE.double().sigmoid() if rule.sigmoid else logits_TE.double().softmax(1)
    wanted = scores if bias_E is None else scores + bias_E.double()
    groups = wanted.unflatten(1, (rule.num_groups, -1))
    merit = groups.topk(min(rule.summed_per_group, groups.shape[2]), dim=2).values.sum(2)
    least = merit.topk(rule.num_kept_groups, dim=1).values[:, -1:]
    wanted = groups.masked_fill((merit < least)[:, :, None], -torch.inf).flatten(1)
    ids = wanted.topk(rule.num_chosen, dim=1).indices.sort(dim=1).values
    weights = scores.gather(1, ids)
    return (weights / weights.sum(1, keepdim=True) if rule.renormalise else weights) * rule.scale


def expert_cases(world: World) -> Iterator[Check]:
    """Rows through experts and back to their tokens; some experts have none."""
    for i in range(world.cases * 4):
        quantization, dtype = (None, *QUANTIZATIONS)[i % 4], world.dtype(i // 4)
        rows, (outputs, inputs), num_chosen = world.rng.choice(ROWS), world.rng.choice(SIZES), world.rng.choice((1, 3))
        weights = tuple(world.randn(outputs, inputs, dtype=dtype) for _ in range(6))
        x, ids = world.randn(rows, inputs, dtype=dtype), world.rand(rows, 5).argsort(dim=1)[:, :num_chosen].int()
        ids = ids.contiguous()
        choice_weights = world.rand(rows, num_chosen)
        name = f"{quantization or 'plain'}/{rows}x{outputs}x{inputs}/K{num_chosen}/{short(dtype)}"
        try:
            packed = world.ops.pack_experts(weights, quantization=quantization)
        except ValueError as error:
            yield Check(name=name, absent=str(error))
            continue

        def run(x: Tensor = x, packed: object = packed, ids: Tensor = ids,
                choice_weights: Tensor = choice_weights) -> Sequence[Tensor]:
            choice = ExpertChoice(ids, choice_weights)
            return (world.ops.combine(world.ops.grouped_linear(x, packed, choice, from_tokens=True), choice),)

        yield Check(name=name, run=run, truth=later(experts_truth, x, weights, ids, choice_weights, quantization),
                    tolerance=2 * max(TOLERANCE[dtype], NEXT_CODE if quantization == "w8a8" else 0.0))


def gated_cases(world: World) -> Iterator[Check]:
    """All of a layer of gated experts: gate and up, their activation, down, and back to the tokens."""
    for i in range(world.cases * 4):
        quantization, dtype = (None, *QUANTIZATIONS)[i % 4], world.dtype(i // 4)
        rows, (inner, hidden), num_chosen = world.rng.choice(ROWS), world.rng.choice(SIZES), world.rng.choice((1, 3))
        ups = tuple(world.randn(2 * inner, hidden, dtype=dtype) / hidden**0.5 for _ in range(6))
        downs = tuple(world.randn(hidden, inner, dtype=dtype) / inner**0.5 for _ in range(6))
        x, ids = world.randn(rows, hidden, dtype=dtype), world.rand(rows, 5).argsort(dim=1)[:, :num_chosen].int()
        ids = ids.contiguous()
        choice_weights = world.rand(rows, num_chosen)
        name = f"{quantization or 'plain'}/{rows}x{inner}x{hidden}/K{num_chosen}/{short(dtype)}"
        try:
            packed_ups = world.ops.pack_gated_experts(ups, quantization=quantization)
            packed_downs = world.ops.pack_experts(downs, quantization=quantization)
        except ValueError as error:
            yield Check(name=name, absent=str(error))
            continue

        def run(x: Tensor = x, packed: tuple[object, object] = (packed_ups, packed_downs), ids: Tensor = ids,
                choice_weights: Tensor = choice_weights) -> Sequence[Tensor]:
            choice = ExpertChoice(ids, choice_weights)
            rows_RF = world.ops.gated_grouped_linear(x, packed[0], choice)
            return (world.ops.combine(world.ops.grouped_linear(rows_RF, packed[1], choice, from_tokens=False), choice),)

        yield Check(name=name, run=run, truth=later(gated_truth, x, ups, downs, ids, choice_weights, quantization),
                    tolerance=4 * max(TOLERANCE[dtype], NEXT_CODE if quantization == "w8a8" else 0.0))


def gated_truth(x_TX: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor], ids_TK: Tensor, weights_TK: Tensor,
                quantization: str | None) -> Tensor:
    def exact(weights: Sequence[Tensor]) -> list[Tensor]:
        return [weight.double() if quantization is None else rounded(weight, quantization) for weight in weights]

    def coded(x: Tensor) -> Tensor:
        return in_codes(x) if quantization == "w8a8" else x.double()

    x_TX, every = coded(x_TX), []
    for up, down in zip(exact(ups), exact(downs), strict=True):
        gate_TF, up_TF = (x_TX @ up.T).chunk(2, dim=1)
        every.append(coded(torch.nn.functional.silu(gate_TF) * up_TF) @ down.T)
    every_TEX = torch.stack(every, dim=1)
    chosen_TKX = every_TEX.gather(1, ids_TK.long()[:, :, None].expand(-1, -1, every_TEX.shape[2]))
    return (chosen_TKX * weights_TK.double()[:, :, None]).sum(1)


def experts_truth(x_TX: Tensor, weights: Sequence[Tensor], ids_TK: Tensor, weights_TK: Tensor,
                  quantization: str | None) -> Tensor:
    exact = [weight.double() if quantization is None else rounded(weight, quantization) for weight in weights]
    x_TX = in_codes(x_TX) if quantization == "w8a8" else x_TX.double()
    every_TEY = torch.stack([x_TX @ weight.T for weight in exact], dim=1)
    chosen_TKY = every_TEY.gather(1, ids_TK.long()[:, :, None].expand(-1, -1, every_TEY.shape[2]))
    return (chosen_TKY * weights_TK.double()[:, :, None]).sum(1)


OPERATORS: dict[str, Cases] = {
    "route": route_cases, "pack_experts": expert_cases, "grouped_linear": expert_cases, "combine": expert_cases,
    "pack_gated_experts": gated_cases, "gated_grouped_linear": gated_cases,
}  # fmt: skip
