"""What is added to the server: a route with its setting, a sampling parameter in the bodies of two APIs, a metric."""

from __future__ import annotations

from pathlib import Path

from tests.serving.server_process import ServerProcess


def test_route_setting_parameter_metric_and_backend(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.txt", "--device", "plain", "--max-echo-chars", "5", "--tool-call-parser",
                       "granite", key="none") as server:
        assert "device plain, num_threads" in server.log
        assert server.http.post("/v1/echo", json={"text": "hello"}).json() == {"echo": "hello"}
        refused = server.http.post("/v1/echo", json={"text": "hello!"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "text"
        assert "/v1/echo" in server.http.get("/openapi.json").json()["paths"]

        model = server.http.get("/v1/models").json()["data"][0]["id"]
        wishes = {"model": model, "temperature": 0, "max_gap": 1.0, "no_repeat_ngram_size": 2}
        said = server.http.post("/v1/completions", json={"prompt": "one one", "max_tokens": 8, **wishes})
        assert said.status_code == 200 and said.json()["usage"]["completion_tokens"] > 0, said.text
        wrong = server.http.post("/v1/responses", json={"input": "Hi", **wishes, "no_repeat_ngram_size": -1})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "no_repeat_ngram_size", wrong.text

        assert server.gauge("xllm:prefix_hit_sequences_total") == 0
        for _ in range(3):
            server.http.post("/v1/completions", json={"prompt": "a beginning that comes again " * 20, "max_tokens": 1})
        server.wait_idle()
        assert server.gauge("xllm:prefix_hit_sequences_total") == server.gauge("vllm:prefix_hit_sequences_total") == 2
        assert server.http.get("/v1/stats").json()["engine"]["prefix_hit_sequences"] == 2
