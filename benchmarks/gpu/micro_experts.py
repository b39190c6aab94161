"""What section `micro` measures of mixtures of experts: the parts of a layer of Qwen3-30B-A3B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from backends.expert_choice import ExpertChoice, RouteRule
from benchmarks.gpu.bank import Bank, MicroCase, each
from benchmarks.gpu.device import Call
from benchmarks.gpu.roofline import Work
from benchmarks.gpu.shapes import ExpertLayer

QUANTIZATIONS = (None, "int8", "fp8", "w8a8")


def expert_cases(bank: Bank, layer: ExpertLayer, tokens: int) -> Iterator[MicroCase]:
    """The product is gate's and up's, and with it rows are sorted; experts are equally likely, so that the bytes of the
    weights are those of as many experts as that hits on average."""
    E, K, X, Y, item = layer.num_experts, layer.num_chosen, layer.hidden, 2 * layer.ffn, bank.itemsize
    at, rows, cfg = f"{layer.name}/T{tokens}", tokens * K, {"T": tokens, "E": E, "K": K}
    yield MicroCase(id=f"route/{at}", work=Work(float(tokens * E * item + rows * 8), 0.0), cfg=cfg,
                    num_bytes=tokens * E * item, calls=each(partial(route_call, bank, layer, tokens)))  # fmt: skip
    num_hit = E * (1 - (1 - K / E) ** tokens)
    for quantization in QUANTIZATIONS:
        one_bytes = Y * X * (1 if quantization else item)
        moved = num_hit * one_bytes + (tokens * X + rows * Y) * item
        yield MicroCase(id=f"grouped_linear/{layer.name}/gate_up/{quantization or 'plain'}/T{tokens}",
                        num_bytes=E * one_bytes, work=Work(moved, 2.0 * rows * X * Y),
                        cfg=cfg | {"Y": Y, "X": X, "quantization": quantization}, may_refuse=quantization is not None,
                        calls=each(partial(product_call, bank, layer, tokens, quantization)),
                        rate="rate_int8" if quantization == "w8a8" else "rate")  # fmt: skip
    for quantization in QUANTIZATIONS:
        one_bytes = Y * X * (1 if quantization else item)
        moved = num_hit * one_bytes + (tokens * X + rows * (2 * Y + layer.ffn)) * item
        yield MicroCase(id=f"gated_grouped_linear/{layer.name}/{quantization or 'plain'}/T{tokens}",
                        num_bytes=E * one_bytes, work=Work(moved, 2.0 * rows * X * Y),
                        cfg=cfg | {"Y": Y, "X": X, "quantization": quantization}, may_refuse=quantization is not None,
                        calls=each(partial(gated_call, bank, layer, tokens, quantization)),
                        rate="rate_int8" if quantization == "w8a8" else "rate")  # fmt: skip
    yield MicroCase(id=f"combine/{at}", work=Work(float((rows + tokens) * X * item), 0.0), num_bytes=rows * X * item,
                    cfg=cfg, calls=each(partial(combine_call, bank, layer, tokens)))  # fmt: skip


def pack_case(bank: Bank, layer: ExpertLayer, name: str = "pack_experts") -> MicroCase:
    """What quantising a layer's weights costs while they are loaded. name: of the operator."""
    numbers = layer.num_experts * 2 * layer.ffn * layer.hidden

    def one() -> Call:
        weights = weights_of(bank, layer)
        return lambda: getattr(bank.ops, name)(weights, quantization="int8")

    return MicroCase(id=f"{name}/{layer.name}/gate_up/int8", work=Work(numbers * (bank.itemsize + 1.0), 0.0),
                     num_bytes=numbers * bank.itemsize, cfg={"E": layer.num_experts}, waited=True, calls=each(one),
                     may_refuse=True)  # fmt: skip


def weights_of(bank: Bank, layer: ExpertLayer) -> list[torch.Tensor]:
    return [bank.randn(2 * layer.ffn, layer.hidden) for _ in range(layer.num_experts)]


def chosen(bank: Bank, layer: ExpertLayer, tokens: int) -> ExpertChoice:
    return bank.ops.route(bank.randn(tokens, layer.num_experts), RouteRule(num_chosen=layer.num_chosen))


def route_call(bank: Bank, layer: ExpertLayer, tokens: int) -> Call:
    logits, rule = bank.randn(tokens, layer.num_experts), RouteRule(num_chosen=layer.num_chosen, renormalise=True)
    return lambda: bank.ops.route(logits, rule)


def product_call(bank: Bank, layer: ExpertLayer, tokens: int, quantization: str | None) -> Call:
    packed = bank.ops.pack_experts(weights_of(bank, layer), quantization=quantization)
    x, choice = bank.randn(tokens, layer.hidden), chosen(bank, layer, tokens)

    def call() -> Any:
        choice.order = None
        return bank.ops.grouped_linear(x, packed, choice, from_tokens=True)

    return call


def gated_call(bank: Bank, layer: ExpertLayer, tokens: int, quantization: str | None) -> Call:
    packed = bank.ops.pack_gated_experts(weights_of(bank, layer), quantization=quantization)
    x, choice = bank.randn(tokens, layer.hidden), chosen(bank, layer, tokens)

    def call() -> Any:
        choice.order = None
        return bank.ops.gated_grouped_linear(x, packed, choice)

    return call


def combine_call(bank: Bank, layer: ExpertLayer, tokens: int) -> Call:
    """Rows are the results of a narrow product, so that they have an order."""
    choice, narrow = chosen(bank, layer, tokens), [bank.randn(layer.hidden, 16) for _ in range(layer.num_experts)]
    y = bank.ops.grouped_linear(bank.randn(tokens, 16), bank.ops.pack_experts(narrow), choice, from_tokens=True)
    return lambda: bank.ops.combine(y, choice)
