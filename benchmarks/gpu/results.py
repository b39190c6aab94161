"""`ResultFile`: everything that was found, in one JSON that is whole on disk after every addition.

    {"schema": 1, "commit", "source", "profile", "device", "env": {}, "ceilings": {}, "predictions": {},
     "sections": {name: {"status", "seconds", "error", "traceback"}}, "rows": [row, ...]}

A row is a dict with at least `section`, `id` and `status`: "ok", "failed" (a check that did not pass, or an error),
"absent" (not on this device, does not fit) or "skipped" (the deadline was too near). See `Bench.row` for the rest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
FILE_NAME = "gpu.json"
OK, FAILED, ABSENT, SKIPPED, RUNNING = "ok", "failed", "absent", "skipped", "running"


class ResultFile:
    """Opens the file of a folder, or starts one. A section that begins again loses its old rows."""

    def __init__(self, folder: Path, **header: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self.data: dict[str, Any] = {"schema": SCHEMA, "env": {}, "ceilings": {}, "predictions": {}, "sections": {},
                                     "rows": []}  # fmt: skip
        if self.path.exists():
            self.data.update(json.loads(self.path.read_text()))
        self.data.update(header)
        self._encoded: dict[int, tuple[dict[str, Any], str]] = {}  # by id; the row is kept, so that it stays its own

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        return self.data["sections"]

    def begin(self, section: str, *, keep_rows: bool = False, **facts: Any) -> None:
        if not keep_rows:
            self.data["rows"] = [row for row in self.rows if row["section"] != section]
        self.sections[section] = {"status": RUNNING, **facts}
        self.write()

    def add(self, *rows: dict[str, Any]) -> None:
        """They stay as they are from now on. Raises TypeError or ValueError, and adds none, if JSON cannot say it."""
        self._encoded |= {id(row): (row, _encode(row)) for row in rows}
        self.rows.extend(rows)
        self.write()

    def end(self, section: str, status: str, **facts: Any) -> None:
        self.sections.setdefault(section, {}).update(status=status, **facts)
        self.write()

    def _text(self) -> str:
        """A line a row. Each is encoded once: hundreds of rows are written hundreds of times, beside measurements."""
        lines = [f"{json.dumps(key)}: {_encode(value)}" for key, value in self.data.items() if key != "rows"]
        encoded = {id(row): self._encoded.get(id(row)) or (row, _encode(row)) for row in self.rows}
        self._encoded = encoded
        rows = ",\n".join(line for _, line in encoded.values())
        return "{\n" + ",\n".join([*lines, f'"rows": [\n{rows}\n]']) + "\n}\n"

    def put(self, key: str, value: Any) -> None:
        """Set one entry of the top level."""
        self.data[key] = value
        self.write()

    def write(self) -> None:
        """Into a new file that then takes the old one's place: a reader sees either, whole."""
        draft = self.path.with_suffix(".tmp")
        with draft.open("w") as file:
            file.write(self._text())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _encode(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def load(path: Path) -> dict[str, Any]:
    """The contents of a result file, given itself or its folder."""
    return json.loads((path / FILE_NAME if path.is_dir() else path).read_text())


def faults(data: dict[str, Any]) -> list[str]:
    """What went wrong: sections that broke off, and rows that failed."""
    broken = [f"section {name}: {facts.get('error', facts['status'])}" for name, facts in data["sections"].items()
              if facts["status"] in (FAILED, RUNNING)]
    return broken + [f"{row['section']}: {row['id']}: {row.get('why', '')}" for row in data["rows"]
                     if row["status"] == FAILED]


def smoke_failure(data: dict[str, Any]) -> str:
    """Why nothing else is worth running, by what `smoke` found; empty if it found nothing, or did not run."""
    facts = data["sections"].get("smoke", {"status": SKIPPED})
    if facts["status"] == SKIPPED:
        return ""
    found = [str(facts["error"])] if facts["status"] == FAILED else []
    found += [f"{row['id']}: {row.get('why', '')}" for row in data["rows"]
              if row["section"] == "smoke" and row["status"] == FAILED]
    return f"smoke failed: {found[0]}"[:500] if found else ""
