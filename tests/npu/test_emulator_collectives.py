"""The emulated HCCL is strict: arguments, order, what ranks must agree on, and those that leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.npu.test_collectives import cards
from tests.parallel.ranks import Ranks

RULES = "tests.npu.hccl_rules"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"), "torch_npu", "torch._dynamo", RULES)
    yield started
    started.close()


@pytest.mark.parametrize(
    ("rule", "env"),
    [
        ("arguments", {}),
        ("devices", {"EMULATED_NPU_DEVICES": "2"}),
        ("visible_devices", {"EMULATED_NPU_DEVICES": "4"}),
        ("openings", {"HCCL_CONNECT_TIMEOUT": "1"}),
        ("memory", {"HCCL_BUFFSIZE": "100", "EMULATED_NPU_HBM_BYTES": str(400 << 20)}),
        ("captures", {}),
        ("queued", {}),
        ("two_at_once", {}),
        ("runs_beside", {}),
    ],
)
def test_alone(ranks: Ranks, rule: str, env: dict[str, str]) -> None:
    ranks.check(f"{RULES}:{rule}", 1, env=env)


@pytest.mark.parametrize(("mode", "behind"), [("AI_CPU", False), ("AIV", True)])
def test_collectives_beside_task_groups(ranks: Ranks, mode: str, behind: bool) -> None:
    fails = {"before": False, "within": True, "behind": behind}
    ranks.check(f"{RULES}:task_groups", 1, env={"HCCL_OP_EXPANSION_MODE": mode}, fails=fails)


def test_a_collective_within_a_task_group(ranks: Ranks) -> None:
    ranks.check(f"{RULES}:task_group_error", 2, **cards(2))


@pytest.mark.parametrize("order", ["", "1", "2"])
def test_a_device_goes_on_by_itself(ranks: Ranks, order: str) -> None:
    ranks.check(f"{RULES}:late", 2, **cards(2, EMULATED_NPU_ORDER=order))


def test_two_ranks_on_one_device(ranks: Ranks) -> None:
    ranks.check(f"{RULES}:same_device", 2, env={"HCCL_CONNECT_TIMEOUT": "5"})


def test_rounding(ranks: Ranks) -> None:
    ranks.check(f"{RULES}:rounding", 2, **cards(2))


def test_ranks_that_differ(ranks: Ranks) -> None:
    texts = ranks.check(f"{RULES}:ranks_differ", 2, **cards(2, TORCH_HCCL_ASYNC_ERROR_HANDLING="0"))
    said = "507048: EI0005 the arguments for collective communication are inconsistent between ranks"
    assert [text.count(said) for text in texts] == [8, 8]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("dies", "heartbeat lost"),
        ("destroys", "its communicator has failed or is destroyed"),
        ("sleeps", "the Notify register times out"),
    ],
)
def test_a_rank_that_leaves(ranks: Ranks, how: str, reason: str) -> None:
    given = cards(2, TORCH_HCCL_ASYNC_ERROR_HANDLING="0", HCCL_EXEC_TIMEOUT="3" if how == "sleeps" else "30")
    left, gone = ranks.run(f"{RULES}:peer_leaves", 2, how=how, **given)
    assert (left.code, gone.code) == (3, 7) and "507048: EI0002" in left.text and reason in left.text, left


def test_torch_npu_ends_a_process_whose_communicator_failed(ranks: Ranks) -> None:
    left, _ = ranks.run(f"{RULES}:peer_leaves", 2, how="dies", **cards(2))
    assert left.code in (3, -signal.SIGABRT) and "EI0002" in left.text
