"""What ranks do in the tests of tensor parallelism: each computes its share, and the whole beside it to compare with.

kernels: a folder with the compiled operators.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from backends import get_backend
from backends.cpu.cpu import CpuBackend
from backends.expert_choice import RouteRule
from backends.reference import REFERENCE
from graph.checking import CheckingCapturer
from tests.models.checkpoints import PROMPT
from tests.models.harness import PagedRunner, greedy, weight_bytes
from tests.parallel.cases import TIMEOUT_S
from tests.parallel.memory_weights import MemoryWeights
from tests.runner.harness import Driver, make_config
from xllm.layers.experts import Experts, ExpertShape, SharedExpert
from xllm.layers.layer_context import LayerContext
from xllm.layers.linear import column_linear, row_linear
from xllm.layers.mlp import GatedMLP
from xllm.layers.vocabulary import LMHead, make_embedding, take_vocabulary
from xllm.models.loader import load_model
from xllm.parallel.groups import ALONE, Group, open_group
from xllm.parallel.parallel_context import ParallelContext
from xllm.parallel.shard import Shard
from xllm.runner.model_runner import ModelRunner

D, INNER, V = 24, 36, 211
CPU = torch.device("cpu")


def context(group: Group, quantization: str | None = None) -> LayerContext:
    return LayerContext(ops=REFERENCE, device=CPU, max_model_len=64, parallel=ParallelContext(tp=group),
                        quantization=quantization)


def close(found: Tensor, expected: Tensor, most: float = 1e-5) -> None:
    error = float((found - expected).norm() / expected.norm())
    assert found.shape == expected.shape and error <= most, f"off by {error}"


def column_and_row(rank: int, size: int, store: str) -> None:
    """Two products with biases, one sum; then the mlp, in each format of the weights."""
    group = open_group(CpuBackend(compiled=False), rank=rank, size=size, store=store, timeout_s=TIMEOUT_S)
    x_TD = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    weights, ours = MemoryWeights(), context(group)
    shard = Shard(0, rank, size)
    up = column_linear(ours, weights, {"a": (INNER, shard), "b": (12, shard)}, D, bias=True)
    down = row_linear(ours, weights, "down", D, INNER, bias=True)
    assert weights.taken == {"a.weight": (INNER // size, D), "b.weight": (12 // size, D), "a.bias": (INNER // size,),
                             "b.bias": (12 // size,), "down.weight": (D, INNER // size), "down.bias": (D,)}
    y_TX = up(x_TD)
    a_TX, b_TX = (x_TD @ weights.whole[f"{name}.weight"].T + weights.whole[f"{name}.bias"] for name in "ab")
    close(group.all_gather(y_TX[:, : INNER // size]), a_TX)
    close(group.all_gather(y_TX[:, INNER // size :]), b_TX)
    close(down(y_TX[:, : INNER // size]), a_TX @ weights.whole["down.weight"].T + weights.whole["down.bias"])
    for quantization, most in ((None, 1e-5), ("int8", 0.02), ("fp8", 0.06), ("w8a8", 0.03)):
        whole, rounded = (GatedMLP(context(ALONE, each), MemoryWeights(), "mlp", D, INNER, bias=True)(x_TD)
                          for each in (None, quantization))
        mine = GatedMLP(context(group, quantization), MemoryWeights(), "mlp", D, INNER, bias=True)(x_TD)
        close(mine, whole, most)
        close(mine, rounded)  # the same codes, of weights and of inputs, as on one rank
    group.close()


def experts_in_parts(rank: int, size: int, store: str) -> None:
    """Each rank has a part of every expert, and of the one that is shared, in each format of the weights."""
    group = open_group(CpuBackend(compiled=False), rank=rank, size=size, store=store, timeout_s=TIMEOUT_S)
    shape = ExpertShape(hidden_size=D, ffn_size=INNER, num_experts=6, rule=RouteRule(num_chosen=2, renormalise=True))
    x_TD = torch.randn(7, D, generator=torch.Generator().manual_seed(1))

    def layer(ours: LayerContext) -> Experts:
        weights = MemoryWeights()
        shared = SharedExpert(ours, weights, "mlp.shared_expert", D, 2 * INNER, gate="mlp.shared_expert_gate")
        made = Experts(ours, weights, "mlp", shape, shared)
        width = INNER // ours.parallel.tp.size
        assert weights.taken["mlp.experts.5.gate_proj.weight"] == (width, D)
        assert weights.taken["mlp.experts.5.down_proj.weight"] == (D, width)
        return made

    for quantization, most in ((None, 1e-5), ("int8", 0.02), ("w8a8", 0.03)):
        whole, rounded = (layer(context(ALONE, each))(x_TD) for each in (None, quantization))
        mine = layer(context(group, quantization))(x_TD)
        close(mine, whole, most)
        close(mine, rounded)  # the same codes, of weights and of inputs, as on one rank
    group.close()


def both_ends(rank: int, size: int, store: str) -> None:
    """Embedding and lm_head of a vocabulary that no group size divides."""
    group = open_group(CpuBackend(compiled=False), rank=rank, size=size, store=store, timeout_s=TIMEOUT_S)
    weights = MemoryWeights()
    table_UD = take_vocabulary(context(group), weights, "table", V, D)
    width = -(-V // size)
    assert table_UD.shape == (width, D) and weights.taken["table.weight"] == (min(width, V - rank * width), D)
    whole_VD, ids_T = weights.whole["table.weight"], torch.arange(V, dtype=torch.int32).flip(0)
    assert torch.equal(make_embedding(context(group), table_UD)(ids_T), whole_VD.flip(0))
    hidden_SD = torch.randn(3, D, generator=torch.Generator().manual_seed(2))
    logits_SV = LMHead(context(group), table_UD, V)(hidden_SD)
    close(logits_SV, hidden_SD @ whole_VD.T)
    assert logits_SV.is_contiguous() and logits_SV.dtype is torch.float32
    group.close()


def whole_model(rank: int, size: int, store: str, kernels: str, folder: str,
                load_format: str = "auto") -> None:
    """A checkpoint that each rank reads its share of: logits of prefill and decoding, and bytes held."""
    backend = get_backend("cpu", cache_dir=Path(kernels))
    group = open_group(backend, rank=rank, size=size, store=store, timeout_s=TIMEOUT_S)
    torch.set_num_threads(1)
    alone, shared = (load_model(Path(folder), backend=backend, dtype=torch.float32, max_model_len=64,
                                load_format=load_format, parallel=ParallelContext(tp=each)) for each in (ALONE, group))
    heads = alone.kv_specs[0].num_heads
    assert [spec.num_heads for spec in shared.kv_specs] == [max(1, heads // size)] * len(alone.kv_specs)
    assert weight_bytes(shared) < (1 / size + 0.15) * weight_bytes(alone)  # kv heads, norms and tables are not split
    (tokens, logits_TV), (expected, truth_TV) = (
        greedy(PagedRunner(model, backend), "a", PROMPT[:20], (7, 13), 12) for model in (shared, alone))
    assert tokens == expected
    close(logits_TV, truth_TV)
    print(tokens, hashlib.sha256(logits_TV.numpy().tobytes()).hexdigest())
    group.close()


def through_the_runner(rank: int, size: int, store: str, kernels: str, folder: str,
                       settings: dict[str, object]) -> None:
    """The same plans on every rank give the tokens of one rank, whatever the runner does with a step."""
    backend = get_backend("cpu", cache_dir=Path(kernels))
    group = open_group(backend, rank=rank, size=size, store=store, timeout_s=TIMEOUT_S)
    torch.set_num_threads(1)
    found = []
    for each in (ALONE, group):
        model = load_model(Path(folder), backend=backend, dtype=torch.float32, max_model_len=128,
                           parallel=ParallelContext(tp=each))
        driver = Driver(ModelRunner(make_config(**settings), backend, model, num_blocks=64, group=each), num_blocks=64)
        driver.add("a", PROMPT)
        driver.step({"a": 13})
        driver.add("b", PROMPT[5:16])
        for _ in range(10):
            driver.step()
        found.append({name: seq.output for name, seq in driver.seqs.items()})
    assert found[1] == found[0] and all(found[0].values())
    graphs = driver.runner.graphs
    if graphs is not None:  # of the last replay, a decode step that ends with tokens
        assert isinstance(graphs.capturer, CheckingCapturer)
        kinds = [exchange.split()[0] for exchange in graphs.capturer.exchanges]
        assert kinds == ["all_reduce"] * (1 + 2 * len(model.kv_specs)) + ["all_gather"]
    print(found[1], 0 if graphs is None else sum(graphs.stats().replays_total.values()))
    group.close()
