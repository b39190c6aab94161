"""A real server in checked graph mode: answers as without, and what it did in /metrics."""

from __future__ import annotations

from pathlib import Path

from tests.serving.server_process import ServerProcess, wait_for

PROMPT = "def read_lines(path):\n"


def answer(server: ServerProcess) -> str:
    with server.client() as client:
        return client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=12).choices[0].text


def test_metrics_of_graphs(server: ServerProcess, tmp_path: Path) -> None:
    """On a CPU `server` is without graphs."""
    with ServerProcess(tmp_path / "log", "--graph-mode", "checked") as checked:
        text = answer(checked)
        wait_for(lambda: "graph_replays_total{" in checked.http.get("/metrics").text, what="a heartbeat with replays")
        families = checked.http.get("/metrics").text
        series = {line.split(" ")[0]: float(line.rpartition(" ")[2]) for line in families.splitlines()
                  if line.startswith("xllm:graph")}
        assert sum(value for name, value in series.items() if name.startswith("xllm:graph_replays_total")) == 11
        assert [value for name, value in series.items() if 'reason="no_bucket"' in name] == [1]  # the prompt
        assert [value for name, value in series.items() if 'change="capture"' in name] == [2]  # one for each set
        assert checked.gauge("xllm:graphs") == 2
        assert checked.gauge("xllm:graph_memory_bytes") > 0
    assert answer(server) == text
    assert "xllm:graph" not in server.http.get("/metrics").text
