"""A real `vllm serve` on the CPU, with the bundled model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.serving.server_process import ROOT, wait_for
from tests.serving.test_master import free_ports

MODEL, START_S, STOP_S = ROOT / "xllm" / "bundled", 300.0, 60.0
BLOCK_SIZE = 32  # the smallest that vLLM's kernels for CPUs take


class VllmProcess:
    """Up when constructed. Use it in a `with`: it is told to stop at the end, and must."""

    def __init__(self, command: Path, log: Path, *flags: str, key: str = "", env: Mapping[str, str] | None = None):
        (port,) = free_ports(1)
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [command, "serve", MODEL, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo",
                 "--max-model-len", "512", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8",
                 "--block-size", str(BLOCK_SIZE), "--enable-prompt-tokens-details",
                 *(["--api-key", key] if key else []), *flags],
                cwd=log.parent, stdout=out, stderr=out, start_new_session=True,
                env=self.environment(env or {}))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers)
        wait_for(self._is_up, START_S, "vLLM")

    @staticmethod
    def environment(more: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **more}

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return self.http.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))

    def complete(self, prompt: str, **wishes: Any) -> dict[str, Any]:
        body = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0, "return_token_ids": True,
                **wishes}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = json.loads(answer.text)
        return found

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Tell it to stop, and wait until it has."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(STOP_S)

    def __enter__(self) -> VllmProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            if self.process.poll() is None:
                self.kill()
