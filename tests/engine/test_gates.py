"""Requests that wait before the scheduler are seen in the gauges, by what they wait for, and keep their order."""

from __future__ import annotations

import threading

import pytest

from tests.engine.test_core import drain, make_core
from xllm.engine.gates import PauseGate, PauseMode
from xllm.errors import RequestError
from xllm.request import FinishReason, Request, SamplingParams
from xllm.structured.spec import StructuredOutput
from xllm.worker.messages import GrammarDone

FORM = StructuredOutput(regex="(ab){4}")


def request(name: str, form: StructuredOutput | None = None, **options) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=6, structured=form, ignore_eos=form is None)
    return Request(request_id=name, prompt_token_ids=[5, 6, 7, *name.encode()], eos_token_ids=(2,), sampling=sampling,
                   **options)


@pytest.fixture
def core():
    core = make_core(max_num_seqs=1)
    yield core
    core.shutdown()


def test_waiting_requests_are_counted_by_what_they_wait_for(core):
    go = threading.Event()
    store = core.link.worker.grammars
    make = store._source
    store._source = lambda: go.wait(60) and make()
    core.add(request("runs"))
    core.add(request("queued"))
    core.add(request("form", FORM))
    core.step()
    core.control.pause(PauseMode.KEEP)
    core.add(request("late"))
    stats = core.stats()
    assert stats.num_running == 1 and stats.num_waiting == 3
    assert stats.num_waiting_by_reason == {"capacity": 1, "kv": 0, "paused": 1, "grammar": 1, "transfer": 0}
    go.set()
    core.control.resume()
    outputs = drain(core)
    assert set(outputs) == {"runs", "queued", "form", "late"}
    assert core.stats().num_waiting_by_reason == {"capacity": 0, "kv": 0, "paused": 0, "grammar": 0, "transfer": 0}


def test_a_request_passes_from_the_pause_to_the_next_gate(core):
    core.control.pause(PauseMode.WAIT)
    core.add(request("a", FORM))
    assert core.stats().num_waiting_by_reason["paused"] == 1
    core.control.resume()
    assert core.has_work()
    assert drain(core)["a"][-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_nobody_overtakes_those_that_still_wait_for_the_resumed_engine():
    gate = PauseGate(lambda num_held: None)
    gate.mode = PauseMode.KEEP
    assert gate.hold(request("first"))
    gate.mode = None
    assert gate.hold(request("second"))
    assert [r.request_id for r in gate.take_passed()] == ["first", "second"]
    assert not gate.hold(request("third"))


def test_a_held_request_that_no_longer_fits_ends_with_the_reason(core):
    core.control.pause(PauseMode.WAIT)
    core.add(request("a"))
    core.loop.scheduler._max_waiting = 0
    core.control.resume()
    (delta,) = drain(core)["a"]
    assert delta.finish_reason is FinishReason.ERROR and "queue is full" in delta.error


def test_an_unknown_form_is_refused_by_name_when_it_is_asked_for_again(core):
    bad = StructuredOutput(grammar="start: nowhere")
    core.add(request("a", bad))
    (delta,) = drain(core)["a"]
    assert delta.finish_reason is FinishReason.ERROR and "unknown name" in delta.error
    with pytest.raises(RequestError, match="unknown name"):
        core.add(request("b", bad))
    assert core.num_open == 0


def test_every_answer_of_the_workers_is_taken(core):
    for name in "abc":  # the workers are asked each time, so that they keep what is used
        core.add(request(name, FORM))
        drain(core)
    while core.idle_s() is not None and core.has_work():
        core.step()
    core.link.wait(1.0)
    core.tick()
    assert core.link.take(GrammarDone) == []
    assert not core.link._taken
