"""A real server whose disk tier is written to by somebody else while it reads: every answer is the right one."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from tests.serving.server_process import ROOT, ServerProcess
from tests.serving.test_tiers import metric
from xllm.kv.disk_format import COMPLETE, HEADER_BYTES, PAGE_BYTES

# Six prompts of 400 tokens take more than the device and host memory hold together: most of each comes from disk.
NUM_PROMPTS, PROMPT_TOKENS, WANTED_TOKENS = 6, 400, 1500
WANTED_CHANGES = 20  # of each kind: enough that both kinds meet blocks that are read back
FLAGS = ("--num-kv-blocks", "34", "--max-model-len", "512", "--max-num-seqs", "1", "--host-cache-size", "1MiB",
         "--disk-cache-size", "64MiB", "--no-kv-prefetch")


def key_file(folder: Path) -> str:
    path = folder / "key"
    path.touch(0o600)
    path.write_bytes(os.urandom(32))
    return str(path)


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(10, 250) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]


def ask(server: ServerProcess, prompt: list[int]) -> tuple[list[int], int]:
    """(output tokens, prompt tokens that came from disk)"""
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = server.http.post("/v1/completions", json=body).json()
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens_by_tier"]["l4"]


class Attacker(threading.Thread):
    """Changes what lies on disk: one bit somewhere, or a payload with all checksums made to fit."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self._folder, self._rng, self._stop_now = folder, random.Random(5), threading.Event()
        self.num_flips = self.num_forged = 0

    @property
    def least(self) -> int:
        """Changes made so far of the kind of which there were fewer."""
        return min(self.num_flips, self.num_forged)

    def run(self) -> None:
        while not self._stop_now.wait(0.05):
            for path in self._folder.rglob("*.kv"):
                with path.open("r+b") as file:
                    self._forge(file.fileno()) if self._rng.random() < 0.5 else self._flip(file.fileno())

    def stop(self) -> None:
        self._stop_now.set()
        self.join(10)

    def _flip(self, fd: int) -> None:
        _, _, start, _ = self._geometry(fd)
        offset = self._rng.randrange(PAGE_BYTES, os.fstat(fd).st_size)
        byte = os.pread(fd, 1, offset)
        if offset > start or byte != b"\0":
            os.pwrite(fd, bytes([byte[0] ^ 1 << self._rng.randrange(8)]), offset)
            self.num_flips += 1

    def _forge(self, fd: int) -> None:
        payload_bytes, slot_bytes, start, num_slots = self._geometry(fd)
        table = os.pread(fd, num_slots * HEADER_BYTES, PAGE_BYTES)
        used = [i for i in range(num_slots) if table[i * HEADER_BYTES:].startswith(COMPLETE)]
        if not used:
            return
        index = self._rng.choice(used)
        payload = bytearray(os.pread(fd, payload_bytes, start + index * slot_bytes))
        payload[:1024] = bytes(1024)
        header = bytearray(table[index * HEADER_BYTES:(index + 1) * HEADER_BYTES])
        header[92:96] = struct.pack("<I", zlib.crc32(payload))
        header[-4:] = struct.pack("<I", zlib.crc32(header[:-4]) or 1)
        os.pwrite(fd, payload, start + index * slot_bytes)
        os.pwrite(fd, header, PAGE_BYTES + index * HEADER_BYTES)
        self.num_forged += 1

    @staticmethod
    def _geometry(fd: int) -> tuple[int, int, int, int]:
        """(payload bytes, slot bytes, where payloads begin, slots)"""
        payload_bytes, slot_bytes, num_slots = struct.unpack_from("<QQQ", os.pread(fd, PAGE_BYTES, 0), 48)
        table_bytes = -(-num_slots * HEADER_BYTES // PAGE_BYTES) * PAGE_BYTES
        return payload_bytes, slot_bytes, PAGE_BYTES + table_bytes, num_slots


def test_every_answer_is_the_right_one(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    flags = (*FLAGS, "--disk-cache-dir", str(folder), "--disk-cache-key-file", key_file(tmp_path))
    with ServerProcess(tmp_path / "first.txt", *flags) as server:
        wanted = [ask(server, prompt)[0] for prompt in prompts()]
        untouched = sum(ask(server, prompt)[1] for prompt in prompts())
        assert untouched > 1000, "there is no attack where nothing comes from disk"
        assert server.stop() == 0
    attacker = Attacker(folder)
    with ServerProcess(tmp_path / "second.txt", *flags) as server:
        attacker.start()
        from_disk = rounds = 0
        while rounds < 40 and (from_disk < WANTED_TOKENS or misses(server) < 10 or attacker.least < WANTED_CHANGES):
            rounds += 1
            for prompt, expected in zip(prompts(), wanted, strict=True):
                found, num_tokens = ask(server, prompt)
                assert found == expected
                from_disk += num_tokens
        attacker.stop()
        assert from_disk >= WANTED_TOKENS and misses(server) >= 10, (from_disk, misses(server))
        assert attacker.least >= WANTED_CHANGES, (attacker.num_flips, attacker.num_forged)
        assert server.stop() == 0
        assert "Traceback" not in server.log


def misses(server: ServerProcess) -> float:
    return sum(metric(server, "xllm:kv_disk_broken_blocks_total", f'kind="{kind}"')
               for kind in ("torn", "corrupt", "foreign", "wrong_digest", "forged"))


@pytest.mark.parametrize("what", ["folder", "key"])
def test_what_others_can_reach_ends_the_start(tmp_path: Path, what: str) -> None:
    folder, key = tmp_path / "kv", Path(key_file(tmp_path))
    folder.mkdir()
    public = folder if what == "folder" else key
    public.chmod(0o777 if what == "folder" else 0o644)
    flags = ("--port", "0", *FLAGS, "--disk-cache-dir", str(folder), "--disk-cache-key-file", str(key))
    refused = subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", *flags], cwd=ROOT,
                             capture_output=True, text=True, timeout=90, check=False)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert str(public) in last and "has mode 0" in last and "chmod" in last
