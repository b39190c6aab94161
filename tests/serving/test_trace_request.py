"""`make trace`: what it counts, on functions made for it and on the real server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving.server_process import ROOT, wait_for
from tools.trace_request.__main__ import Hop, Trace, merged
from tools.trace_request.recorder import Recorder

SOURCE = '''
from dataclasses import dataclass
from enum import Enum

class Colour(Enum):
    RED = 1

@dataclass
class Letter:
    text: str

class Office:
    def __init__(self):
        self.letters = []
    def take(self, letters):
        self.letters += [letter for letter in letters]
        return Letter("receipt")
    def pulse(self, beat=None):
        return beat

def paint(colour, letter):
    return len("x")
'''


@pytest.fixture
def own() -> types.ModuleType:
    module = types.ModuleType("xllm.made_up")
    sys.modules[module.__name__] = module
    exec(compile(SOURCE, "made_up.py", "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def traced(recorder: Recorder, phase: str, work: Callable[[], object]) -> None:
    recorder.phase = phase
    before = sys.getprofile()
    sys.setprofile(recorder.see)
    try:
        work()
    finally:
        sys.setprofile(before)
        recorder.phase = ""


def test_what_a_recorder_counts(own: types.ModuleType, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    office = own.Office()
    traced(recorder, "", lambda: own.paint(own.Colour.RED, own.Letter("x")))
    assert not recorder.visits and not recorder.kept
    traced(recorder, "warm", lambda: office.take([own.Letter("a")]))
    traced(recorder, "idle", office.pulse)
    assert recorder.idle == {("xllm.made_up", "Office.pulse")}
    assert not recorder.visits and not recorder.types
    traced(recorder, "record", lambda: (office.take([own.Letter("b")]), office.pulse(), own.paint(own.Colour.RED, 1)))
    assert list(recorder.visits) == [("xllm.made_up", name) for name in ("Office.take", "Office.pulse", "paint")]
    assert list(recorder.types) == ["xllm.made_up.Letter"]  # not Office, which was there, and no Enum


def test_types_of_which_new_ones_come_anyway(own: types.ModuleType, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    office = own.Office()
    traced(recorder, "idle", lambda: office.pulse(own.Letter("beat")))
    assert recorder.idle_types == {"xllm.made_up.Letter", "xllm.made_up.Office"}


def test_a_recorder_follows_the_files(own: types.ModuleType, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    thread = threading.Thread(target=recorder.watch)
    thread.start()
    for phase in ("warm", "idle", "record"):
        (tmp_path / phase).touch()
        wait_for(lambda phase=phase: recorder.phase == phase)
    (tmp_path / "done").touch()
    thread.join(20)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["visits"] == []


def test_processes_are_merged_by_the_clock() -> None:
    found = merged({
        "api": {"idle": [["serving.a", "beat"]], "idle_types": ["serving.a.Beat"],
                "visits": [["serving.a", "f", 1], ["serving.a", "beat", 2], ["serving.a", "g", 9],
                           ["serving.b", "h", 7]],
                "types": {"serving.a.Body": 1, "serving.a.Beat": 2, "xllm.Request": 3}},
        "engine": {"idle": [], "idle_types": [], "visits": [["xllm.c", "k", 5]],
                   "types": {"xllm.Request": 5, "xllm.Plan": 6}}})
    assert [hop.function for hop in found.hops] == ["f", "k", "h", "g"]
    assert found.types == ["serving.a.Body", "xllm.Request", "xllm.Plan"]
    assert found.numbers() == {"hops": 4, "modules": 3, "rooms_entered": 4, "returns": 1, "types": 3, "left_out": 1}
    assert Trace([Hop("api", "m", "f"), Hop("engine", "n", "k"), Hop("api", "m", "g")], [], 0).rooms == ["m", "n"]


def test_a_request_to_the_real_server(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    done = subprocess.run([sys.executable, "-m", "tools.trace_request", "--json", str(out), "--", "--max-model-len",
                           "256", "--num-kv-blocks", "64"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    way = [["api", "serving.api.connection", "Connection.data_received"],
           ["api", "serving.api.routes.chat", "begin_chat"], ["engine", "xllm.scheduler.scheduler", "Scheduler.add"],
           ["engine", "xllm.models.decoder", "Decoder.forward"], ["api", "xllm.text.detokenizer", "Detokenizer.feed"]]
    assert sorted(way, key=found["hops"].index) == way
    assert {"serving.api.types.ChatBody", "xllm.request.Request", "xllm.step.ScheduleOutput", "xllm.step.StepOutput",
            "xllm.request.OutputDelta"} <= {*found["types"]}
    assert found["numbers"]["hops"] == len(found["hops"]) > found["numbers"]["modules"] > 40
    assert f"hops            {found['numbers']['hops']:5}" in done.stdout
