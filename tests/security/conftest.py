from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.wire import ALICE, BOB, CAROL, ROOT_KEY
from tests.serving.server_process import ServerProcess

# carol's key stands there as a digest, as an operator would have it
KEY_FILE = f"""
# who       key
alice       {ALICE}    weight=2   # twice the share
bob         {BOB}
carol       sha256:{hashlib.sha256(CAROL.encode()).hexdigest()}  requests_per_minute=3 tokens_per_minute=600
"""


@pytest.fixture(scope="session")
def open_server(server: ServerProcess) -> ServerProcess:
    """A server as it starts without any flag: on loopback, without keys."""
    return server


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with three callers and an administrator; its own client is alice."""
    folder = Path(tmp_path_factory.mktemp("keyed"))
    (folder / "keys").write_text(KEY_FILE)
    with ServerProcess(folder / "log.txt", "--api-key-file", str(folder / "keys"), "--admin-api-key", ROOT_KEY,
                       "--scheduling-policy", "fair", "--max-num-seqs", "8", key=ALICE,
                       monitor_key=ROOT_KEY) as running:
        yield running
