"""Failpoints: what can be armed, when it acts, and that the list of names is the truth."""

import ast
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xllm.errors import ConfigError
from xllm.kv import failpoints

XLLM = Path(failpoints.__file__).parent.parent


@pytest.fixture(autouse=True)
def nothing_stays_armed():
    yield
    failpoints.disarm()


def test_nothing_is_armed_by_itself():
    assert failpoints.armed is None
    failpoints.hit("disk.write")


def test_a_point_acts_from_its_turn_on():
    failpoints.arm("disk.write", "ENOSPC", 3)
    failpoints.hit("disk.write")
    failpoints.hit("disk.read")
    failpoints.hit("disk.write")
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            failpoints.hit("disk.write")
        assert caught.value.errno == errno.ENOSPC
    failpoints.disarm("disk.write")
    assert failpoints.armed is None


def test_points_are_armed_and_disarmed_one_by_one():
    seen = []
    failpoints.arm("disk.read", lambda: seen.append("read"))
    failpoints.arm("disk.write", lambda: seen.append("write"))
    failpoints.disarm("disk.read")
    failpoints.hit("disk.read")
    failpoints.hit("disk.write")
    assert seen == ["write"]


def test_a_pass_takes_longer():
    failpoints.arm_all("disk.write=30ms:2")
    took_s = []
    for _ in range(2):
        began_s = time.monotonic()
        failpoints.hit("disk.write")
        took_s.append(time.monotonic() - began_s)
    assert took_s[1] >= 0.03 > took_s[0]


def test_an_unknown_point_is_a_bug_where_it_is_passed():
    failpoints.arm("disk.read", "EIO")
    with pytest.raises(AssertionError):
        failpoints.hit("disk.raed")


@pytest.mark.parametrize("spec", ["disk.nothing=kill", "disk.read", "disk.read=", "disk.read=EFOO", "disk.read=die",
                                  "disk.read=kill:0", "disk.read=kill:-1", "disk.read=kill:x",
                                  "disk.read=ms"])  # fmt: skip
def test_what_cannot_be_armed(spec):
    with pytest.raises(ConfigError):
        failpoints.arm_all(spec)
    assert failpoints.armed is None


def test_a_list_is_armed_at_once():
    failpoints.arm_all(" disk.read=EIO:2, disk.write=kill ,")
    assert set(failpoints.armed) == {"disk.read", "disk.write"}


def passed_by_a_child(spec: str) -> int:
    code = "from xllm.kv import failpoints as f; [f.hit('disk.read') for _ in range(2)]"
    environment = {**os.environ, "XLLM_FAILPOINTS": spec}
    return subprocess.run([sys.executable, "-c", code], cwd=XLLM.parent, env=environment).returncode


def test_a_child_is_armed_through_its_environment():
    assert passed_by_a_child("disk.read=kill:3") == 0
    assert passed_by_a_child("disk.read=kill:2") == -signal.SIGKILL


def test_every_name_is_passed_somewhere_and_no_other():
    literals = set()
    for path in XLLM.rglob("*.py"):
        if path.name != "failpoints.py":
            constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            literals |= {value for value in constants if isinstance(value, str)}
    families = {name.split(".")[0] for name in failpoints.NAMES}
    assert set(failpoints.NAMES) <= literals
    pattern = re.compile(rf"({'|'.join(families)})\.[a-z_]+")
    assert {text for text in literals if pattern.fullmatch(text)} <= set(failpoints.NAMES)
