"""What needs no engine: an operator, two families, an eviction policy, a tool parser, a proposer, a policy."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from backends import get_backend
from backends.reference import REFERENCE
from serving.commands import doctor
from serving.parsers.parser_registry import guess_tool_parser
from tests.kv.eviction_owner import Content, Model, Owner, drive
from tests.models.checkpoints import PROMPT, Variant, save_checkpoint, transformers_greedy
from tests.models.harness import PagedRunner, greedy
from tests.models.toy_checkpoint import Naive, save_toy
from tests.scheduler.harness import Simulation
from tests.serving.parsers.feeding import answer, make
from xllm import env
from xllm.config import SpeculativeSettings
from xllm.kv.eviction import make_policy
from xllm.models.loader import load_model
from xllm.runner.row_state import RowState
from xllm.speculative.proposer_registry import make_proposer


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 33), (40, 900)], ids=str)
def test_operator(name: str, shape: tuple[int, int]) -> None:
    ops = REFERENCE if name == "reference" else get_backend("cpu", cache_dir=env.cache_dir()).ops
    assert name == "reference" or ops.softcap is not REFERENCE.softcap
    x = torch.randn(shape) * 40
    truth = 30 * torch.tanh(x.double() / 30)
    ops.softcap(x, 30.0)
    torch.testing.assert_close(x.double(), truth, rtol=1e-5, atol=1e-5)


def test_doctor_looks_at_the_backend() -> None:
    assert [(found.state, found.what) for found in doctor._others()] == [(doctor.OK, "plain backend")]


@pytest.mark.parametrize("changes", [{}, {"attention_out_bias": True, "attention_bias": False}], ids=str)
def test_dense_family(tmp_path: Path, changes: dict[str, bool]) -> None:
    folder = save_checkpoint(Variant("seed-oss", "SeedOss", {"head_dim": 16, **changes}), tmp_path)
    truth, backend = transformers_greedy(folder), get_backend("cpu", cache_dir=env.cache_dir())
    model = load_model(folder, backend=backend, dtype=torch.float32, max_model_len=128)
    found, logits_TV = greedy(PagedRunner(model, backend), "a", PROMPT, (1, 5, 11), len(truth.tokens))
    assert found == truth.tokens
    assert float((logits_TV - truth.logits_TV).abs().max() / truth.logits_TV.abs().max()) < 1e-4


def test_family_that_is_not_dense(tmp_path: Path) -> None:
    folder, backend = save_toy(tmp_path / "toy"), get_backend("cpu", cache_dir=env.cache_dir())
    model = load_model(folder, backend=backend, dtype=torch.float32)
    assert type(model).__module__ != "tests.models.toy_family"
    found, _ = greedy(PagedRunner(model, backend), "a", [3, 1, 4, 1, 5], (5,), 12)
    assert found == Naive(folder).greedy([3, 1, 4, 1, 5], 12)


class NewestFirst(Model):
    """Keeps the order in which contents came in."""

    def __init__(self) -> None:
        self.order: list[Content] = []

    def admitted(self, content: Content) -> None:
        self.order.append(content)

    def gone(self, content: Content) -> None:
        self.order.remove(content)

    def choose(self, idle: list[Content]) -> Content:
        leaves = [content for content in idle if not self.owner.children(content)]
        return max(leaves, key=self.order.index)


def test_eviction_policy_evicts_leaves() -> None:
    """`Owner` checks each victim."""
    evicted = 0
    for seed in range(10):
        owner = Owner(make_policy("lifo", 8), 8)
        drive(owner, random.Random(seed), 120)
        evicted += owner.num_evicted
    assert evicted > 100


def test_eviction_policy_takes_the_newest() -> None:
    owner = Owner(make_policy("lifo", 3), 3, NewestFirst())
    for content in [(1,), (2,), (3,), (4,), (5,), (1,)]:
        owner.enter(content)
        owner.leave(0)
    assert owner.num_hits == 1 and set(owner.place_of) == {(1,), (2,), (5,)}


def test_tool_parser() -> None:
    text = 'Well. <|tool_call|> [{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]'
    whole = answer(lambda: make("granite"), [text])
    assert [(call.name, call.arguments) for call in whole.calls] == [("add", '{"a": 1}'), ("now", "{}")]
    assert whole.content.strip() == "Well."
    assert answer(lambda: make("granite"), list(text)) == whole
    assert guess_tool_parser("{{ '<|tool_call|>' }}") == "granite"


def test_proposer() -> None:
    proposer = make_proposer(SpeculativeSettings(speculative_method="repeat", num_speculative_tokens=3))
    assert proposer is not None
    rows = RowState(max_num_seqs=4, max_model_len=16, block_size=4)
    rows.token_ids[2, :3], rows.num_tokens[2] = [4, 5, 6], 3
    drafts, counts = proposer.propose(np.array([2, 2]), np.array([3, 1]), rows)
    assert drafts.tolist() == [[6, 6, 6], [6, -1, -1]] and counts.tolist() == [3, 1]


def test_scheduling_policy() -> None:
    simulation = Simulation(scheduling_policy="ljf", max_num_seqs=1)
    for name, length in (("short", 3), ("long", 30), ("middle", 12)):
        simulation.add(name, [5] * length)
    simulation.run()
    assert list(simulation.finished) == ["long", "middle", "short"]
