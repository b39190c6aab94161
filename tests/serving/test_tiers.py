"""A real server with host memory and disk below the device: usage, metrics, restarts, crashes, a disk that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.serving.server_process import ROOT, ServerProcess, wait_for

# A device that holds one long conversation and little more.
SMALL = ("--num-kv-blocks", "36", "--max-model-len", "512", "--max-num-seqs", "2")
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 24}


def tier_flags(folder: Path, *more: str) -> tuple[str, ...]:
    return (*SMALL, "--host-cache-size", "8MiB", "--disk-cache-size", "64MiB", "--disk-cache-dir", str(folder), *more)


class Chat:
    """One conversation, turn by turn, through the OpenAI client."""

    def __init__(self, name: str):
        self.name = name
        self.messages: list[dict[str, str]] = []

    def say(self, client: openai.OpenAI, text: str) -> dict[str, int]:
        """One turn; returns where its cached tokens were."""
        self.messages.append({"role": "user", "content": text})
        answer = client.chat.completions.create(messages=self.messages, extra_body={"session_id": self.name},
                                                **GREEDY)  # type: ignore[call-overload]
        self.messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        details = answer.usage.prompt_tokens_details
        by_tier = details.cached_tokens_by_tier
        assert set(by_tier) == {"l1", "l2", "l3", "l4", "l5"}
        assert sum(by_tier.values()) == details.cached_tokens <= answer.usage.prompt_tokens - 1
        return by_tier

    def again(self, client: openai.OpenAI) -> tuple[str, dict[str, int]]:
        """The last turn once more: its answer, and where its cached tokens were."""
        answer = client.chat.completions.create(messages=self.messages[:-1], **GREEDY)  # type: ignore[call-overload]
        return answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens_by_tier


def words(name: str, turn: int) -> str:
    return f"{name}: write function number {turn} that adds, subtracts and multiplies lists of {name} and numbers. " * 2


def lane_jobs(server: ServerProcess) -> float:
    return sum(server.value(series_of(server, "xllm:kv_lane_queued_jobs", f'lane="{lane}"'))
               for lane in ("save", "load", "write", "read"))


def series_of(server: ServerProcess, name: str, *labels: str) -> str:
    """The full name of the one series that has these labels."""
    lines = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith(name + "{")]
    (found,) = [line.rpartition(" ")[0] for line in lines if all(label in line for label in labels)]
    return found


def metric(server: ServerProcess, name: str, *labels: str) -> float:
    return server.value(series_of(server, name, *labels))


def converse(server: ServerProcess) -> list[Chat]:
    """Three conversations by turns, so that each has left the device when it goes on."""
    chats = [Chat(name) for name in ("apples", "bridges", "clouds")]
    seen = dict.fromkeys(("l1", "l2", "l3", "l4", "l5"), 0)
    with server.client() as client:
        for turn in range(3):
            for chat in chats:
                for tier, num in chat.say(client, words(chat.name, turn)).items():
                    seen[tier] += num
    assert seen["l3"] > 0, "nothing came back from host memory"
    assert seen["l4"] == 0, "host memory has room for all of it"
    return chats


def check_families(server: ServerProcess) -> None:
    for tier in ("device", "host", "disk"):
        label = f'tier="{tier}"'
        used, room = (metric(server, f"xllm:{name}", label) for name in ("kv_tier_used_blocks", "kv_tier_blocks"))
        assert 0 < used <= room
        assert metric(server, "xllm:kv_tier_evicted_blocks_total", label) >= 0
    assert metric(server, "xllm:kv_tier_evicted_blocks_total", 'tier="device"') > 0
    for lane in ("save", "load", "write"):
        label = f'lane="{lane}"'
        assert metric(server, "xllm:kv_lane_bytes_total", label) > 0
        assert metric(server, "xllm:kv_lane_jobs_total", label) > 0
        assert 0 < metric(server, "xllm:kv_lane_busy_seconds_total", label) <= metric(
            server, "xllm:kv_lane_wait_seconds_total", label)
    assert metric(server, "xllm:kv_tier_hit_tokens_total", 'tier="l3"') > 0
    assert metric(server, "xllm:kv_disk_up") == 1
    for kind in ("torn", "corrupt", "foreign", "wrong_digest", "forged"):
        assert metric(server, "xllm:kv_disk_broken_blocks_total", f'kind="{kind}"') == 0


def check_served_from_disk(server: ServerProcess, chats: list[Chat]) -> None:
    """The last turns again: the same answers, and all that was cached came from disk, which has more than a little."""
    from_disk = 0
    with server.client() as client:
        for chat in chats:
            answer, by_tier = chat.again(client)
            assert answer == chat.messages[-1]["content"]
            from_disk += by_tier["l4"]
    assert from_disk >= 160
    wait_for(lambda: metric(server, "xllm:kv_tier_hit_tokens_total", 'tier="l4"') >= from_disk, what="the counters")
    assert metric(server, "xllm:kv_tier_hit_tokens_total", 'tier="l4"') == from_disk
    assert metric(server, "xllm:kv_disk_up") == 1


def kill_all(server: ServerProcess) -> None:
    """-9 to every process of the server."""
    pids = [server.engine_pid, server.process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server.process.wait(10)
    wait_for(lambda: not psutil.pid_exists(pids[0]) or psutil.Process(pids[0]).status() == psutil.STATUS_ZOMBIE,
             what="the engine's end")


def test_conversations_outlive_the_device_a_restart_and_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    with ServerProcess(tmp_path / "first.txt", *tier_flags(folder)) as server:
        chats = converse(server)
        check_families(server)
        check_second_server_is_refused(folder)
        assert server.stop() == 0
        assert "Traceback" not in server.log
    with ServerProcess(tmp_path / "second.txt", *tier_flags(folder)) as server:
        check_served_from_disk(server, chats)
        with server.client() as client:
            for chat in chats:
                chat.say(client, words(chat.name, 3))
        kill_all(server)  # while the last turns are on their way down
    with ServerProcess(tmp_path / "third.txt", *tier_flags(folder)) as server:
        check_served_from_disk(server, chats)


def check_second_server_is_refused(folder: Path) -> None:
    refused = serve("--port", "0", *tier_flags(folder))
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert "is in use by process" in last and str(folder) in last
    assert "Traceback" not in refused.stderr


def test_serving_goes_on_without_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_FAILPOINTS", "disk.write=ENOSPC:40")
    with ServerProcess(tmp_path / "log.txt", *tier_flags(tmp_path / "kv")) as server:
        wait_for(lambda: "xllm:kv_disk_up{" in server.http.get("/metrics").text, what="the engine's first report")
        assert metric(server, "xllm:kv_disk_up") == 1
        converse(server)
        wait_for(lambda: metric(server, "xllm:kv_disk_up") == 0, what="the end of the disk")
        assert server.health().status_code == 200
        with server.client() as client:
            assert Chat("after").say(client, words("after", 0))["l4"] == 0
        wait_for(lambda: lane_jobs(server) == 0, what="the end of all moves")
        server.wait_idle()
        assert server.log.count("switched off") == 1
        assert "No space left on device" in server.log
        assert server.stop() == 0
        assert "Traceback" not in server.log


def serve(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", *flags], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)


def test_a_folder_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused = serve("--port", "0", *tier_flags(tmp_path / "file"))
    assert refused.returncode == 1
    assert str(tmp_path / "file") in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
