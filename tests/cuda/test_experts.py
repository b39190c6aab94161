"""Mixtures of experts where the numbers are the device's own: the map of the grid, and bits of sums."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backends.expert_choice import ExpertChoice, RouteRule
from backends.opset import EXPERT_OPS, OpSet
from backends.reference import REFERENCE
from backends.reference import experts as reference
from cuda_ops.experts import BLOCK_ROWS, block_rows, most_blocks, sort_rows
from tests.ops.test_experts import chosen, experts, token_rows
from xllm.worker.loading import _check_ops

# Tokens, experts, experts a token; blocks of 16 rows, of 64 and of 128.
SIZES = [(1, 9, 3), (13, 40, 4), (70, 6, 2), (700, 3, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_row_has_a_place_in_a_block_of_its_expert(size: tuple[int, int, int]) -> None:
    num_tokens, num_experts, num_chosen = size
    ids_TK = chosen(num_tokens, num_experts, num_chosen).ids_TK
    order = sort_rows(ids_TK, num_experts)
    rows = torch.arange(num_tokens)[:, None].expand_as(ids_TK)
    assert torch.equal(order.tokens_R[order.places_TK.long()], rows.int())
    assert order.places_TK.flatten().sort().values.tolist() == list(range(ids_TK.numel()))
    own = {int(e): order.places_TK[ids_TK == e] for e in ids_TK.unique()}
    found: dict[int, list[int]] = {expert: [] for expert in own}
    for expert, first, end in order.blocks_3B.T.tolist():
        if expert >= 0:
            found[expert] += range(first, min(first + order.block_rows, end))
    assert found == {expert: places.tolist() for expert, places in own.items()}  # by token, and no other expert's


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_choice_needs_more_blocks(size: tuple[int, int, int]) -> None:
    """And one needs as many: all rows that can be are one expert's, one each is the others'."""
    num_tokens, num_experts, _ = size
    rows = block_rows(num_tokens, num_experts)
    ids_T1 = torch.full((num_tokens, 1), 1 % num_experts, dtype=torch.int32)
    num_hit = min(num_tokens, num_experts)
    ids_T1[:num_hit, 0] = torch.arange(num_hit)
    order = sort_rows(ids_T1, num_experts)
    assert order.blocks_3B.shape[1] == most_blocks(num_tokens, num_experts, rows)
    rest = num_tokens - num_hit
    assert (order.blocks_3B[0] >= 0).sum() == num_hit + -(-(1 + rest) // rows) - 1


def test_blocks_are_as_large_as_experts_have_rows() -> None:
    assert [block_rows(rows, 8) for rows in (1, 128, 129, 512, 513, 10**6)] == [
        BLOCK_ROWS[i] for i in (0, 0, 1, 1, 2, 2)]
    assert most_blocks(0, 8, 16) == 0


@pytest.mark.parametrize("size", [(1, 9, 3), (70, 2, 1)], ids=str)
def test_bits_of_int8_products_and_of_sums(ops: OpSet, size: tuple[int, int, int]) -> None:
    """A row is what `linear` makes of it with the expert's weight, and tokens are the reference's sums."""
    num_tokens, num_experts, _ = size
    choice, x_TX, weights = chosen(*size), torch.randn(num_tokens, 50), experts(num_experts, (33, 50))
    y_RY = ops.grouped_linear(x_TX, ops.pack_experts(weights, quantization="w8a8"), choice, from_tokens=True)
    y_TKY = token_rows(y_RY, ops, choice)
    for expert in choice.ids_TK.unique().tolist():
        t, k = (choice.ids_TK == expert).nonzero(as_tuple=True)
        alone = ops.pack_linear(weights[expert], quantization="w8a8")
        assert torch.equal(y_TKY[t, k], ops.linear(x_TX[t], alone))
    assert torch.equal(ops.combine(y_RY, choice), reference.weighted_sum(y_TKY, choice.weights_TK))


class Allocations(TorchDispatchMode):
    """Sees that nothing but kernels, views and fresh memory is asked for: what a graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info
        if alias is None or alias.is_write:
            assert func.name().split(".")[0] in ("aten::empty", "aten::new_empty", "aten::empty_like"), func.name()
            self.sizes.append(out.shape)
        return out


@pytest.mark.usefixtures("unseen_kernels")
@pytest.mark.parametrize("quantization", [None, "w8a8"])
def test_a_step_is_the_same_whatever_is_chosen(ops: OpSet, quantization: str | None) -> None:
    """Nothing is read on the host, and no size depends on what was chosen: one graph serves all."""
    rule, weights = RouteRule(num_chosen=2, renormalise=True), experts(12, (32, 16))
    gate_up, down = (ops.pack_experts(w, quantization=quantization) for w in (weights, experts(12, (16, 32))))

    def step(logits_TE: Tensor, x_TX: Tensor) -> tuple[ExpertChoice, list[torch.Size]]:
        with Allocations() as seen:
            choice = ops.route(logits_TE, rule)
            y_RY = ops.grouped_linear(x_TX, gate_up, choice, from_tokens=True)
            ops.combine(ops.grouped_linear(y_RY, down, choice, from_tokens=False), choice)
        return choice, seen.sizes

    x_TX, spread_TE = torch.randn(6, 16), torch.eye(12)[:6] * 3 + torch.eye(12)[6:] * 2
    spread, sizes = step(spread_TE, x_TX)
    same, sizes_of_same = step(torch.ones(6, 12), x_TX)
    assert spread.ids_TK.unique().numel() == 12 and same.ids_TK.unique().numel() == 2
    assert sizes == sizes_of_same and len(sizes) > 5


def test_weights_that_begin_anywhere(ops: OpSet) -> None:
    """Kernels count on 16 bytes; what does not begin there is copied. Blocks are of 128 rows."""
    memory = torch.randn(2 * 33 * 50 + 1)
    weights = memory[1:].unflatten(0, (2, 33, 50)).unbind()
    choice, x_TX = chosen(130, 2, 1), torch.randn(130, 50)
    packed = ops.pack_experts(weights)
    assert all(weight.data_ptr() % 16 == 0 for weight, _ in packed.tensors)
    y_TKY = token_rows(ops.grouped_linear(x_TX, packed, choice, from_tokens=True), ops, choice)
    expected = torch.stack([weights[e] @ x for x, ids in zip(x_TX, choice.ids_TK.tolist()) for e in ids])
    torch.testing.assert_close(y_TKY.flatten(0, 1), expected, rtol=0, atol=1e-5)


def test_models_with_experts_start(ops: OpSet) -> None:
    """None of what a step calls is the reference's."""
    assert not EXPERT_OPS.intersection(ops.inherited_from(REFERENCE))
    device: Any = SimpleNamespace(name="cuda", ops=ops, strict_ops=True)
    assert _check_ops(device, None, EXPERT_OPS) == []
