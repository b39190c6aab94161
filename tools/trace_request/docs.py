"""Write the stations of a request into docs/structure.md: `python -m tools.trace_request.docs [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from tools.trace_request.recorder import FOREIGN
from tools.trace_request.stations import ASIDE, MAX_MODULES, STATIONS, Station, num_crossings

TARGET = Path(__file__).resolve().parents[2] / "docs" / "structure.md"
HEAD, TAIL = "## One request traced\n", "## Processes\n"
PROCESSES = {"api": "API", "engine": "engine"}
TEXT = """
The way of one streamed chat request has {hops} stations, {types} types that carry it, and {crossings} crossings between
processes. The list is `tools/trace_request/stations.py`, from which `python -m tools.trace_request.docs` writes this
section. `make trace` holds it against the real server, and fails if a function of ours was called that belongs to no
station, if a station was not visited or not in its order, or if a type came that is not listed;
`python -m tools.trace_request` can show every function, too.

A station is a place where the data is handed on or takes a new form: one or a few functions in at most {modules}
modules, with what they call on the way. What comes back to a module for something else is another station. A type
carries the request if it holds it, or its output, as it goes from station to station. Not counted are plain values, and

{aside}

| | station | where | born there |
| --- | --- | --- | --- |
{rows}

- Most of what is wrong with a request ends before it is submitted, always as a 4xx that names the field.
- The engine's answer that it has taken a request (station {answer}) is waited for, because a refusal is a status and
  not an event. It is no crossing of the request. Here the answer's assembly begins.
- If the prefix of a request goes on in host memory or on disk it waits for those blocks first
  (`scheduler/kv_waits.py`).
- Deltas go back in one list for each step, and are the same objects from the scheduler to `Assembly`, which detokenises
  them behind the prompt's last tokens ([text.md](text.md)) and holds back what may become a stop string. `LLM` and
  `AsyncLLM` use the same `InputProcessor`, `EngineCore` and `Assembly`.
- A closed connection, a stop string or a cancelled iterator becomes `abort(request_id)`; its blocks are free once
  the step in flight has settled. Every request ends in exactly one terminal output.

"""


def section() -> str:
    """From its heading to the next."""
    return HEAD + TEXT.format(
        hops=len(STATIONS), types=sum(len(station.makes) for station in STATIONS), crossings=num_crossings(STATIONS),
        modules=MAX_MODULES, aside="\n".join(f"- {why}: {_types(names)}" for why, names in ASIDE.items()),
        rows="\n".join(_row(number, station) for number, station in enumerate(STATIONS, 1)),
        answer=next(number for number, station in enumerate(STATIONS, 1) if station.is_answer))


def _row(number: int, station: Station) -> str:
    where = ", ".join(map(_place, (*station.at, *station.waits)))
    return f"| {number} | {PROCESSES[station.process]}: {station.name} | {where} | {_types(station.makes)} |"


def _types(names: Iterable[str]) -> str:
    """Those of ours without their modules."""
    return ", ".join(f"`{name if name in FOREIGN else name.rpartition('.')[2]}`" for name in names)


def _place(place: str) -> str:
    module, _, function = place.partition(":")
    return f"`{module.replace('.', '/')}.py` `{function}`"


def main(argv: list[str]) -> int:
    text = TARGET.read_text(encoding="utf-8")
    before, _, rest = text.partition(HEAD)
    page = before + section() + rest[rest.index(TAIL):]
    if "--check" in argv:
        return 0 if page == text else 1
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
