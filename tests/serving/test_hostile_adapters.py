"""Adapters that were published to do harm: refused in words, soon, in little memory, and with nobody held up."""

from __future__ import annotations

import json
import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import write_adapter
from tests.serving.server_process import ServerProcess

ADMIN = "an-admin-key-of-some-length"
LAYER = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{LAYER}"
NEVER = r"((\w+\.?)+)+!"
LONGEST_GAP_S, MAX_GROWTH_BYTES = 0.5, 512 * 2**20  # the machine of the tests is busy: the rule itself says 0.2 s
BODY = {"prompt": "def f(", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    root = tmp_path_factory.mktemp("hostile")
    (root / "loras").mkdir()
    with ServerProcess(root / "log.txt", "--enable-lora", "--lora-folder", str(root / "loras"), "--admin-api-key",
                       ADMIN) as server:
        yield server, root / "loras"
        assert "Traceback" not in server.log
        server.wait_idle()


def refusal(hostile: tuple[ServerProcess, Path], folder: Path) -> str:
    """The error's message. Fails if anybody was held up meanwhile, or the processes grew."""
    server, _ = hostile
    gaps, done = [], threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not gaps or not done.is_set():
                began_s = time.monotonic()
                client.post("/v1/completions", json=BODY).raise_for_status()
                gaps.append(time.monotonic() - began_s)

    before = sum(psutil.Process(pid).memory_info().rss for pid in (server.process.pid, server.engine_pid))
    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = server.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": folder.name},
                              headers={"Authorization": f"Bearer {ADMIN}"})
    after = sum(psutil.Process(pid).memory_info().rss for pid in (server.process.pid, server.engine_pid))
    done.set()
    watcher.join()
    assert after - before < MAX_GROWTH_BYTES and max(gaps) < LONGEST_GAP_S, (after - before, max(gaps))
    assert answer.status_code == 400 and len(answer.text) < 4000, answer.text[:4000]
    message: str = answer.json()["error"]["message"]
    return message


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "target_modules": ({"target_modules": NEVER}, "its expressions"),
    "exclude_modules": ({"exclude_modules": NEVER}, "its expressions"),
    "rank_pattern": ({"rank_pattern": {NEVER: 4}}, "its expressions"),
    "alpha_pattern": ({"alpha_pattern": {NEVER: 4}}, "its expressions"),
    "layers_pattern": ({"target_modules": ["x"], "layers_to_transform": [0], "layers_pattern": NEVER}, "x"),
    "many-patterns": ({"rank_pattern": {f"(a|b)*{i}": 4 for i in range(60_000)}}, "larger than|its expressions"),
    "many-names": ({"target_modules": [f"layer{i}" for i in range(60_000)]}, "does not name it|larger than"),
    "rank": ({"r": 10**9}, "says rank 1000000000"),
    "rank-of-400-digits": ({"r": 10**400}, "r must be a whole number"),
    "alpha-of-400-digits": ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
    "alpha-not-finite": ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
    "long-text": ({"r": "A" * 900_000}, "r must be a whole number"),
    "megabytes": ({"r": "A" * 5_000_000}, "larger than"),
}


# Each takes the seconds that expressions may take, on the way of a case that is left.
NIGHTLY = set() if os.environ.get("HOSTILE_ALL") == "1" else {"exclude_modules", "alpha_pattern"}


@pytest.mark.parametrize("case", [case for case in SETTINGS if case not in NIGHTLY])
def test_settings(hostile: tuple[ServerProcess, Path], case: str) -> None:
    members, message = SETTINGS[case]
    folder = hostile[1] / case
    write_adapter(folder, 1)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **members}))
    assert re.search(message, refusal(hostile, folder))


def test_an_alpha_that_makes_numbers_infinite(hostile: tuple[ServerProcess, Path]) -> None:
    folder = hostile[1] / "infinite"
    write_adapter(folder, 1)
    tensors = {name: tensor * (1e30 if "lora_B" in name else 1)
               for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 1e12}))
    assert "not finite" in refusal(hostile, folder)


@pytest.mark.parametrize("rank", [70_000, 2_000_000])
def test_matrices_larger_than_the_model(hostile: tuple[ServerProcess, Path], rank: int) -> None:
    """Up to 4 GB of zeros, which the disk does not have: nothing of them is read."""
    folder = hostile[1] / f"rank-{rank}"
    folder.mkdir()
    sizes = [rank * 256 * 4] * 2
    header = json.dumps({f"{KEY}.lora_A.weight": {"dtype": "F32", "shape": [rank, 256], "data_offsets": [0, sizes[0]]},
                         f"{KEY}.lora_B.weight": {"dtype": "F32", "shape": [256, rank],
                                                  "data_offsets": [sizes[0], sum(sizes)]}}).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + sum(sizes))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    assert f"has rank {rank}, and max_lora_rank" in refusal(hostile, folder)


def test_a_header_larger_than_all_layers(hostile: tuple[ServerProcess, Path]) -> None:
    folder = hostile[1] / "header"
    folder.mkdir()
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": nothing for i in range(10**5)}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    assert "its header claims" in refusal(hostile, folder)


def test_integers_are_no_weights(hostile: tuple[ServerProcess, Path]) -> None:
    folder = hostile[1] / "integers"
    folder.mkdir()
    save_file({f"{KEY}.lora_A.weight": torch.ones(4, 256, dtype=torch.int8),
               f"{KEY}.lora_B.weight": torch.ones(256, 4, dtype=torch.int8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    assert "is of type I8" in refusal(hostile, folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("target", ["../../log.txt", "/dev/zero", "/etc/passwd", "adapter_config.json"])
def test_files_that_lead_out(hostile: tuple[ServerProcess, Path], name: str, target: str) -> None:
    folder = hostile[1] / f"{name}-{abs(hash(target))}"
    write_adapter(folder, 1)
    os.replace(folder / name, folder / "kept")
    (folder / name).symlink_to(target)
    message = refusal(hostile, folder)
    assert "--lora-folder" in message or "corrupt" in message, message
    assert "root:" not in message


def test_a_config_that_never_ends(hostile: tuple[ServerProcess, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody writes to, as a disk that does not answer."""
    from xllm.errors import ModelError
    from xllm.models import adapter_layers

    monkeypatch.setattr(adapter_layers, "WALL_TIMEOUT_S", 1.0)
    folder = hostile[1] / "silent"
    folder.mkdir()
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(ModelError, match="cannot be read within"):
        adapter_layers.read_layers(folder, [LAYER])
