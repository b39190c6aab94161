"""Requests as real clients sent them, and their answers taken apart as those clients do it.

`recorded/<tool>.json` holds what a tool sent to a server, cut short: its version, and by a name of ours the path, the
headers that matter and the body, every field of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.serving.server_process import ServerProcess

FOLDER = Path(__file__).parent / "recorded"


@dataclass(frozen=True)
class Recorded:
    """One request. `body` is None for a GET."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None

    def send(self, server: ServerProcess, **changes: Any) -> httpx.Response:
        """The answer, read to its end. changes: fields of the body that differ from the recording."""
        body = None if self.body is None else json.dumps({**self.body, **changes}).encode()
        return server.http.request(self.method, self.path, content=body, headers=self.headers)

    def events(self, server: ServerProcess, **changes: Any) -> list[dict[str, Any]]:
        """A stream's events; the answer must be one, end with the mark, and hold nothing else but comments."""
        answer = self.send(server, **changes)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = answer.text.split("\n\n")
        assert blocks.pop() == ""
        lines = [line for block in blocks for line in block.split("\n") if not line.startswith((":", "event: "))]
        assert all(line.startswith("data: ") for line in lines), lines
        data = [line.removeprefix("data: ") for line in lines]
        if self.path != "/v1/responses":
            assert data.pop() == "[DONE]"
        return [json.loads(item) for item in data if item != "[DONE]"]

    def json(self, server: ServerProcess, **changes: Any) -> dict[str, Any]:
        answer = self.send(server, **changes)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("application/json")
        return answer.json()


def recorded(tool: str) -> dict[str, Recorded]:
    found = json.loads((FOLDER / f"{tool}.json").read_text(encoding="utf-8"))
    return {name: Recorded(item["method"], item["path"], item.get("headers", {}), item.get("body"))
            for name, item in found["requests"].items()}
