"""Adapters are read by the workers beside the steps; what is not used in the end is forgotten there."""

from __future__ import annotations

import time

import pytest

from tests.adapters import write_adapter
from tests.engine.test_core import make_core
from xllm.engine.core import EngineCore
from xllm.errors import EngineStateError, RequestError


@pytest.fixture
def core():
    core = make_core(enable_lora=True, max_loras=1)
    yield core
    core.shutdown()


def wait(core: EngineCore, answers: list, count: int) -> None:
    until = time.monotonic() + 30
    while len(answers) < count and time.monotonic() < until:
        time.sleep(0.01)
        core.tick()
    assert len(answers) == count


def test_of_two_that_come_at_once_one_gets_the_slot(core, tmp_path):
    folder, answers = tmp_path / "a", []
    write_adapter(folder, 1)
    core.load_adapter("a", folder, answers.append)
    core.load_adapter("b", folder, answers.append)
    wait(core, answers, 2)
    assert answers[0] is None and isinstance(answers[1], EngineStateError)
    core.link.wait(0.2)
    assert core.link.worker._adapters == {}, "what got no slot is not kept"
    assert core.adapters.names == ("a",)


def test_a_sleeping_engine_takes_no_adapters_and_does_not_die_of_it(core, tmp_path):
    folder, answers = tmp_path / "a", []
    write_adapter(folder, 1)
    core.control.sleep(1)
    with pytest.raises(EngineStateError, match="sleeps"):
        core.load_adapter("a", folder, answers.append)
    core.control.wake_up()
    core.load_adapter("a", folder, answers.append)
    with pytest.raises(EngineStateError, match="adapters are being read"):
        core.control.sleep(1)
    wait(core, answers, 1)
    core.control.sleep(2)
    with pytest.raises(EngineStateError, match="sleeps"):
        core.unload_adapter("a")
    core.control.wake_up()
    core.unload_adapter("a")
    with pytest.raises(RequestError):
        core.unload_adapter("a")
