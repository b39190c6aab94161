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
from tools.trace_request.__main__ import Trace, Visit, merged
from tools.trace_request.docs import TARGET, section
from tools.trace_request.recorder import Recorder
from tools.trace_request.stations import STATIONS, Station, complaints, num_crossings, owner_of

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
    assert [visit.function for visit in found.visits] == ["f", "k", "h", "g"]
    assert found.types == ["serving.a.Body", "xllm.Request", "xllm.Plan"]
    counted = {"functions": 4, "modules": 3, "rooms_entered": 4, "returns": 1, "types_met": 3, "left_out": 1}
    assert counted.items() <= found.numbers().items()
    assert Trace([Visit("api", "m", "f"), Visit("engine", "n", "k"), Visit("api", "m", "g")], [], 0).rooms == ["m", "n"]


WAY = (Station("api", "door", at=("s.door:open",), holds=("s.door",), makes=("s.Body",)),
       Station("engine", "room", at=("x.room:enter",), waits=("x.loop:run",), holds=("x.room", "x.kv.*")),
       Station("api", "thanks", at=("s.door:thank",), is_answer=True),
       Station("api", "back", at=("s.door:close",), makes=("s.Piece",)))
VISITS = [("api", "s.door", "open"), ("api", "s.door", "look"), ("engine", "x.loop", "run"),
          ("engine", "x.room", "enter"), ("engine", "x.kv.pool", "Pool.take"),
          ("api", "s.door", "thank"), ("api", "s.door", "close")]


def found_wrong(visits=VISITS, types=("s.Body", "s.Piece", "s.Part"), way=WAY) -> list[str]:
    return complaints(visits, types, way, {"a part": ("s.Part",)}, by_the_clock=("s.beat",))


def test_a_way_as_it_is_listed() -> None:
    assert found_wrong() == []
    assert found_wrong([*VISITS, ("api", "s.beat", "beat")]) == []
    assert owner_of("s.door", "close.inner", WAY) is WAY[3] and owner_of("s.door", "look", WAY) is WAY[0]
    assert num_crossings(WAY) == 2 and num_crossings(WAY[:2]) == 1


@pytest.mark.parametrize(("change", "complaint"), [
    ({"visits": [*VISITS, ("api", "s.yard", "walk")]}, "s.yard:walk belongs to no station"),
    ({"visits": VISITS[:-1]}, "back: s.door:close is not visited"),
    ({"visits": [*VISITS[:2], *VISITS[3:]]}, "room: x.loop:run is not visited"),
    ({"visits": [VISITS[-1], *VISITS[:-1]]}, "back: s.door:close is visited before s.door:thank"),
    ({"types": ("s.Body", "s.Piece", "s.Crate")}, "s.Crate carries the request or does not: it is in no list"),
    ({"types": ("s.Piece",)}, "s.Body is made at 'door' and did not come"),
    ({"way": (*WAY, Station("api", "hall", at=("s.door:open", "a:f", "b:f"), waits=("c:f",)))},
     "hall: more than 3 modules are no single station"),
    ({"way": (*WAY[:3], Station("api", "back", at=("s.door:close",), makes=("s.Piece", "s.Body")))},
     "s.Body is listed twice"),
])
def test_what_is_said_of_a_way_that_is_another(change: dict[str, object], complaint: str) -> None:
    assert complaint in found_wrong(**change)


def test_the_length_of_the_way() -> None:
    assert len(STATIONS) <= 32
    assert sum(len(station.makes) for station in STATIONS) <= 18
    assert num_crossings(STATIONS) == 2
    assert section() in TARGET.read_text(encoding="utf-8"), "run python -m tools.trace_request.docs"


def test_a_request_to_the_real_server(tmp_path: Path) -> None:
    """It goes by the stations, all of them and no other: else the tool fails."""
    out = tmp_path / "trace.json"
    done = subprocess.run([sys.executable, "-m", "tools.trace_request", "--json", str(out), "--", "--max-model-len",
                           "256", "--num-kv-blocks", "64"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["numbers"]["functions"] == len(found["functions"]) > found["numbers"]["modules"] > 40
    assert found["numbers"]["hops"] == len(STATIONS)
    assert f"hops          {len(STATIONS):5}" in done.stdout
