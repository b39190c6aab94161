"""Where keys come from, and that a server which should be closed never starts open."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from serving.security.keys import build_key_ring, read_key_file
from tests.serving.server_process import ROOT
from xllm.errors import ConfigError


def written(folder: Path, text: str) -> str:
    (folder / "keys").write_text(text)
    return str(folder / "keys")


def test_a_key_file(tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"third").hexdigest()
    ring = build_key_ring(file=written(tmp_path, f"""
        # a comment
        alice first weight=2.5 requests_per_minute=10
        alice second  # rotated: both are alice
        bob   sha256:{hashed} tokens_per_minute=1000
        lonely-key-without-a-name
        root  boss admin
        oncall pager urgent
    """))
    alice = ring.find(b"first")
    assert alice is ring.find(b"second")
    assert alice is not None and (alice.name, alice.weight, alice.quota.limits) == ("alice", 2.5, (10, None))
    bob = ring.find(b"third")
    assert bob is not None and (bob.name, bob.quota.limits) == ("bob", (None, 1000))
    lonely = ring.find(b"lonely-key-without-a-name")
    assert lonely is not None and lonely.name.startswith("key-")
    root = ring.find(b"boss")
    assert root is not None and root.is_admin
    oncall = ring.find(b"pager")
    assert oncall is not None
    assert [caller.is_urgent for caller in (alice, bob, lonely, root, oncall)] == [False, False, False, True, True]
    assert [ring.find(key) for key in (b"", b"alice", b"fourth", hashed.encode(), f"sha256:{hashed}".encode())] == [
        None] * 5
    assert "first" not in repr(vars(ring))


@pytest.mark.parametrize(("line", "says"), [
    ("a b c", "unknown or malformed option 'c'"), ("a admin", "the key is missing"),
    ("a urgent", "the key is missing"),
    ("a weight=2", "the key is missing"), ("a k weight=0", "weight must be"), ("a k weight=nan", "weight must be"),
    ("a k weight=x", "could not convert"), ("a k requests_per_minute=0", "malformed"),
    ("a k requests_per_minute=-1", "malformed"), ("a k tokens_per_minute=1.5", "malformed"),
    ("a/b k", "a name has"), (f"{'n' * 65} k", "a name has"), ("é k", "a name has"), ("a ké", "printable ASCII"),
    ("a k\nb k", "given twice"), ("a k weight=2\na l weight=3", "described otherwise"),
    ("a k requests_per_minute=2\na l requests_per_minute=3", "described otherwise"),
    ("a k\na l admin", "described otherwise"), ("", "holds no key"), ("# k", "holds no key"),
])
def test_a_wrong_key_file_stops_the_start(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        build_key_ring(file=written(tmp_path, line))
    assert " k" not in str(raised.value).replace(" key", "").replace(" known", ""), "no key in the message"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_key_file(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"a \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_file(tmp_path / "latin")


@pytest.mark.parametrize(("user", "admin"), [([""], []), ([" "], []), (["a "], []), (["a\nb"], []), (["é"], []),
                                             ([], [""]), (["same"], ["same"]), (["same", "same"], [])])
def test_keys_that_cannot_be(user: list[str], admin: list[str]) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        build_key_ring(api_keys=user, admin_keys=admin)


@pytest.mark.parametrize(("variables", "says"), [
    ({"XLLM_API_KEY": ""}, "api_key must not be empty"), ({"XLLM_API_KEY": "a,,b"}, "api_key must not be empty"),
    ({"XLLM_ADMIN_API_KEY": " "}, "admin_api_key must not be empty"),
    ({"XLLM_API_KEY": "a", "XLLM_ADMIN_API_KEY": "a"}, "given twice"),
])
def test_the_environment_fails_closed_too(variables: dict[str, str], says: str) -> None:
    result = subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0"], cwd=ROOT,
                            timeout=60, capture_output=True, text=True, check=False,
                            env={"PATH": "/usr/bin", **variables})
    assert result.returncode == 1
    assert says in result.stderr.splitlines()[-1]
