"""Files with keys that other users of the machine can read or change: a warning, or no start."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.config import HttpSettings
from serving.security.exposure import check_key_files
from tests.serving.server_process import ROOT, ServerProcess
from xllm.errors import ConfigError

DIGEST = "sha256:" + hashlib.sha256(b"k").hexdigest()
SETTINGS = ("api_key_file", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs")


def file(folder: Path, mode: int, text: str = "alice secret-key\n") -> str:
    path = folder / "file"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", [0o602, 0o666, 0o777, 0o622])
def test_what_every_user_can_change_is_refused(tmp_path: Path, setting: str, mode: int) -> None:
    path = file(tmp_path, mode)
    with pytest.raises(ConfigError, match=f"{setting} {path} has mode {mode:04o}: every user can change.*chmod go-w"):
        check_key_files(HttpSettings(**{setting: path}))


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_group_can_change_is_said(tmp_path: Path, setting: str) -> None:
    path = file(tmp_path, 0o660)
    assert check_key_files(HttpSettings(**{setting: path})) == [
        f"{setting} {path} has mode 0660: others can change it; chmod go-w {path}"]


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o400, False), (0o644, True), (0o604, True)])
def test_a_secret_that_others_can_read_is_said(tmp_path: Path, mode: int, warns: bool) -> None:
    path = file(tmp_path, mode)
    for http in (HttpSettings(api_key_file=path), HttpSettings(ssl_certfile="none", ssl_keyfile=path),
                 HttpSettings(ssl_certfile=path)):
        found = check_key_files(http)
        assert len(found) == warns and all("others can read it; chmod 600" in text for text in found)
        assert "secret-key" not in str(found)


def test_a_group_may_read_what_is_roots(tmp_path: Path) -> None:
    """As secrets are mounted into containers."""
    path = file(tmp_path, 0o640)
    assert len(check_key_files(HttpSettings(api_key_file=path))) == (os.stat(path).st_uid != 0)


@pytest.mark.parametrize(("text", "warns"), [
    (f"alice {DIGEST} admin\n# comment\n\n{DIGEST}\n", False), (f"alice {DIGEST}\nbob plain\n", True),
    ("plain\n", True), (f"{DIGEST} {DIGEST[:-1]}\n", True),
])
def test_a_file_of_digests_is_no_secret(tmp_path: Path, text: str, warns: bool) -> None:
    assert len(check_key_files(HttpSettings(api_key_file=file(tmp_path, 0o644, text)))) == warns


def test_a_certificate_beside_its_key_is_no_secret(tmp_path: Path) -> None:
    path = file(tmp_path, 0o644)
    assert check_key_files(HttpSettings(ssl_certfile=path, ssl_keyfile="none", ssl_ca_certs=path)) == []


def test_keys_that_come_through_a_pipe_are_read_once(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        assert check_key_files(HttpSettings(api_key_file=f"/dev/fd/{reader}")) == []
    finally:
        os.close(reader)
        os.close(writer)


def test_the_command_says_so(tmp_path: Path) -> None:
    path = file(tmp_path, 0o666)
    command = [sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0", "--api-key-file", path]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1 and "every user can change it" in refused.stderr.splitlines()[-1]
    os.chmod(path, 0o644)
    with ServerProcess(tmp_path / "log.txt", "--api-key-file", path, key="secret-key") as server:
        assert f"api_key_file {path} has mode 0644: others can read it" in server.log
        assert "secret-key" not in server.log
