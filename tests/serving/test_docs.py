"""The commands in the pages about serving do what they say, and their examples can be read."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.commands.cli import build_parser
from serving.security.keys import read_key_file
from tests.adapters import write_adapter
from tests.serving.server_process import ROOT, ServerProcess
from xllm.foreign.table import FOREIGN

KEY, ADMIN = "a-user-key-of-some-length", "an-admin-key-of-some-length"
PAGES = ("clients", "lora", "observability", "security")
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^curl (?:.*\\\n)*.*$", re.MULTILINE)


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    return [command for block in BLOCK.findall(page(name)) for command in COMMAND.findall(block)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("docs")
    write_adapter(folder / "adapters" / "sql", 1)
    with ServerProcess(folder / "log.txt", "--api-key", KEY, "--admin-api-key", ADMIN, "--enable-lora", "--lora-folder",
                       str(folder / "adapters"), key=KEY) as running:
        yield running


def test_there_are_commands() -> None:
    assert [len(commands(name)) for name in PAGES] == [0, 3, 2, 3]


@pytest.mark.parametrize("name", PAGES)
def test_every_curl_is_answered_well(server: ServerProcess, name: str) -> None:
    """As they stand, in their order."""
    for command in commands(name):
        done = subprocess.run(["bash", "-c", command.replace("curl ", "curl -fsS ", 1)], capture_output=True, text=True,
                              env={**os.environ, "URL": server.url, "KEY": KEY, "ADMIN_KEY": ADMIN}, timeout=60,
                              check=False)
        assert done.returncode == 0 and done.stdout, f"{command}: {done.stderr}"


def result_of(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_soak_and_the_scheduler_are_told_as_they_were_measured() -> None:
    soak, text = result_of("soak"), " ".join(page("clients").split())
    for process, kept in soak["memory"].items():
        files = soak["counts"][f"{process}_files"]
        assert f"{kept['start_mib']}, {kept['middle_mib']}, {kept['end_mib']} MiB" in text
        assert f"{kept['last_half_slope_kib_per_1000_requests']:.0f} KiB" in text
        assert f"{files['before']}, {files['after']} ({files['peak']})" in text
    assert f"{soak['requests']:,} requests in {soak['seconds']:.0f} seconds, {soak['requests_per_s']:.0f} a s" in text
    scheduler, text = result_of("scheduler"), page("performance")
    assert f"256 running | {scheduler['us_per_request_step']['256']:.2f} |" in text
    assert f"all cached | {scheduler['prefix_hit_32k_ms']:.2f} ms |" in text
    assert f"cached leaves | {scheduler['evict_64_us']:.1f} us |" in text


def test_the_key_file_can_be_read(tmp_path: Path) -> None:
    text = next(block for block in page("security").split("```")[1::2] if "alice" in block)
    (tmp_path / "keys").write_text(text)
    callers = [caller for _, caller in read_key_file(tmp_path / "keys")]
    assert [caller.name for caller in callers[:3]] == ["alice", "bob", "bob"] and callers[1] is callers[2]
    assert callers[1].quota.limits == (60, None) and callers[-2].is_admin and callers[-1].name.startswith("key-")


# The others name flags of other programs, of benchmarks, or what a flag may look like.
OURS = sorted({path.stem for path in (ROOT / "docs").glob("*.md")}
              - {"ascend", "clients", "cluster", "disaggregation", "gpu", "integrations", "performance", "routing",
                 "settings", "flags"})


@pytest.mark.parametrize("name", OURS)
def test_every_flag_that_is_named_exists(name: str) -> None:
    """Of any of our commands, and it has an effect."""
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    known = {flag for parser in commands.choices.values() for flag in parser._option_string_actions}
    without_effect = {entry.flag for entry in FOREIGN.values() if entry.verdict != "accepted"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page(name)))
    assert named or name not in PAGES
    assert not named - (known - without_effect)
