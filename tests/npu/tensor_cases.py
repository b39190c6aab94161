"""What ranks do in test_tensor_parallel.py: steps of a shared model through graphs, whose collectives are counted."""

from __future__ import annotations

from pathlib import Path

import torch

from backends import get_backend
from backends.place import Place
from tests.emulated_npu.collectives import Begin
from tests.emulated_npu.install import machine
from tests.emulated_npu.tasks import Group as TaskGroup
from tests.models.checkpoints import PROMPT
from tests.runner.harness import Driver, make_config
from xllm.models.loader import load_model
from xllm.parallel.groups import open_group
from xllm.parallel.parallel_context import ParallelContext
from xllm.runner.model_runner import ModelRunner


def graphs(rank: int, size: int, store: str, folder: str, *, are_lost: bool) -> None:
    """Decode steps. Two collectives a layer and two more are in each graph, and none in a task group; `are_lost`: no
    capture came about."""
    backend = get_backend("npu", place=Place(rank, size))
    assert backend.device == torch.device("npu", rank)
    group = open_group(backend, rank=rank, size=size, store=store, timeout_s=30.0)
    model = load_model(Path(folder), backend=backend, dtype=torch.bfloat16, max_model_len=128,
                       parallel=ParallelContext(tp=group))
    runner = ModelRunner(make_config(dtype="bfloat16", block_size=128, async_scheduling=False), backend, model,
                         num_blocks=8)
    driver = Driver(runner, num_blocks=8)
    driver.add("a", PROMPT)
    for _ in range(6):
        driver.step()
    assert runner.graphs is not None
    stats = runner.graphs.stats()
    if are_lost:
        assert not stats.num_graphs and stats.fallbacks_total["capture_failed"] > 0
    else:
        assert sum(stats.replays_total.values()) > 2
    captured = [[node for nodes in each.nodes.values() for node in nodes] for each in machine().models.values()]
    assert len(captured) == stats.num_graphs
    for nodes in captured:
        groups = [node for node in nodes if isinstance(node, TaskGroup)]
        assert len(groups) == len(model.kv_specs)
        assert not any(isinstance(kernel, Begin) for each in groups for kernel in each.kernels)
        assert sum(isinstance(node, Begin) for node in nodes) == 2 * len(model.kv_specs) + 2
    print(driver.seqs["a"].output)
    group.close()
