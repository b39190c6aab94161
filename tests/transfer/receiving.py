"""What the tests of transfers share at the receiver."""

from __future__ import annotations

import secrets
import time

from tests.transfer.senders import LocalSender, RemoteSender, wait_for
from xllm.transfer.transport import Arrived, Ended, Window

KEY = secrets.token_bytes(32)
SIZE = 1 << 20
LEASE_S = 60.0  # longer than any test


def take(window: Window, count: int) -> list[Arrived | Ended]:
    """So many events; more must not come with them."""
    found: list[Arrived | Ended] = []
    wait_for(lambda: found.extend(window.take(0.05)) or len(found) >= count)
    assert len(found) == count, found
    return found


def put_until_refused(sender: LocalSender | RemoteSender, number: int) -> None:
    """Bytes that are on their way when a grant ends are refused with the next put."""
    for _ in range(20):
        sender.put("a", number, KEY.hex(), [(0, 10, 9)], "late")
        time.sleep(0.01)
