"""What a layer of experts queues on the device: each operator by name, on numbers that AI cores compute with.

An operator without a kernel for its numbers' dtype runs on the device's few CPU cores (AICPU), milliseconds a call:
so do sorts, sums and products of int64 (CANN's `AICORE910B_DTYPE_SUPPORT_LIST`s). One that waits for a number of the
device, as the count of an expert's rows, could not be captured.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backends.expert_choice import ExpertChoice, RouteRule
from npu_ops.recording import TaskRecorder, recording
from tests.npu.device import npu, randn
from tests.npu.launches import launches
from tests.ops.test_experts import RULES

T, E, D, F = 5, 40, 64, 96
# What a choice costs beside its operator: the weights' sum of softmax; what is done about NaN.
GATE, NAN = ["to_copy", "npu_moe_gating_top_k"], ["isnan", "any", "arange", "where"]
ROUTES = {
    "softmax": [*GATE, *NAN, "masked_fill"],
    "qwen3": [*GATE, *NAN, "sum", "add", "div", "masked_fill"],
    "deepseek-v2": [*GATE, *NAN, "masked_fill"],
    "deepseek-v3": [*GATE, *NAN, "masked_fill"],
}
FORMS: dict[str | None, list[str]] = {
    None: ["npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "npu_grouped_matmul",
           "npu_moe_token_unpermute"],
    "w8a8": ["npu_moe_init_routing_v2", "npu_grouped_matmul_swiglu_quant_v2", "npu_grouped_matmul",
             "npu_moe_token_unpermute"],
}
# Where gate and up together are no whole tiles.
NOT_JOINED = ["npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "npu_dynamic_quant", "npu_grouped_matmul",
              "npu_moe_token_unpermute"]


@pytest.mark.parametrize("name", ROUTES)
def test_route(name: str) -> None:
    logits_TE = randn(T, E, dtype=torch.bfloat16)
    bias_E = randn(E) if name == "deepseek-v3" else None
    assert launches(npu().ops.route, logits_TE, RULES[name], bias_E) == ROUTES[name]


def test_sigmoids_as_they_are() -> None:
    rule, logits_TE = RouteRule(num_chosen=2, sigmoid=True, scale=2.0), randn(T, E)
    assert launches(npu().ops.route, logits_TE, rule) == [
        GATE[1], *NAN, "to_copy", "gather", "mul", "masked_fill"]


def test_the_gate_of_a_shared_expert() -> None:
    rule, logits_T1 = RouteRule(num_chosen=1, sigmoid=True), randn(T, 1, dtype=torch.bfloat16)
    assert launches(npu().ops.route, logits_T1, rule) == ["to_copy", "sigmoid", "zeros_like"]


def layer(quantization: str | None, width: int = F) -> Callable[[Tensor, ExpertChoice], Tensor]:
    """A mixture of gated mlps."""
    ops = npu().ops
    gate_up, down = (pack([randn(*size, dtype=torch.bfloat16) for _ in range(E)], quantization=quantization)
                     for pack, size in ((ops.pack_gated_experts, (2 * width, D)), (ops.pack_experts, (D, width))))

    def run(x_TD: Tensor, choice: ExpertChoice) -> Tensor:
        inner = ops.gated_grouped_linear(x_TD, gate_up, choice)
        return ops.combine(ops.grouped_linear(inner, down, choice, from_tokens=False), choice)

    return run


@pytest.mark.parametrize("quantization", FORMS)
def test_a_layer(quantization: str | None) -> None:
    run, x_TD = layer(quantization), randn(T, D, dtype=torch.bfloat16)
    choice = npu().ops.route(randn(T, E), RULES["qwen3"])
    assert launches(run, x_TD, choice) == FORMS[quantization]


def test_a_layer_that_is_no_whole_tiles() -> None:
    x_TD, choice = randn(T, D, dtype=torch.bfloat16), npu().ops.route(randn(T, E), RULES["qwen3"])
    assert launches(layer("w8a8", F + 8), x_TD, choice) == NOT_JOINED


@pytest.mark.parametrize("rule", [RULES["qwen3"], RULES["deepseek-v3"], RouteRule(num_chosen=3, num_groups=20,
                                                                                num_kept_groups=2)], ids=str)
@pytest.mark.parametrize("quantization", [None, "int8", "w8a8"])
def test_a_graph_holds_it_whoever_is_chosen(quantization: str | None, rule: RouteRule) -> None:
    """Also by a rule that the operator does not know."""
    ops, run, logits_TE, x_TD = npu().ops, layer(quantization), randn(T, E), randn(T, D, dtype=torch.bfloat16)
    graph = torch.npu.NPUGraph()
    with recording(TaskRecorder()), torch.npu.graph(graph):
        out_TD = run(x_TD, ops.route(logits_TE, rule))
    for scale in (0.0, 1.0, 8.0):
        logits_TE.copy_(randn(T, E) * scale)
        x_TD.copy_(randn(T, D))
        graph.replay()
        assert torch.equal(out_TD.cpu(), run(x_TD, ops.route(logits_TE, rule)).cpu())
