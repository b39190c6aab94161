"""`GateLock`: tells zmq which connections to a gate are taken, as its authentication protocol has it (ZAP, RFC 27).

pyzmq's own authenticator lets go of its socket's descriptor some turns of the event loop after it was stopped. By then
another socket may have that number, whose reader it takes away: the next gate of the process never hears of anybody.
"""

from __future__ import annotations

import logging
import secrets

import zmq
from zmq.utils import z85

from xllm.client.frame_port import FramePort

DOMAIN = b"cluster"
_ENDPOINT = "inproc://zeromq.zap.01"  # where zmq asks, by that RFC
_VERSION = b"1.0"
logger = logging.getLogger("xllm.gate.authentication")


class GateLock:
    """Lets in who has the secret half of one public key, to all sockets of the context whose domain is `DOMAIN`. key:
    that public key, in Z85. Belongs to the running event loop; close it before the context is."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: bytes):
        self._key = z85.decode(key)
        socket = context.socket(zmq.REP)
        socket.bind(_ENDPOINT)
        self._port = FramePort(socket, self._answer)

    def close(self) -> None:
        """Let nobody in any more. Idempotent."""
        self._port.close()

    def _answer(self, parts: list[bytes]) -> None:
        """Of the parts: version, number of the question, domain, address, identity, mechanism, and the public key of
        which zmq has seen that the other end has the secret half."""
        is_let_in = (parts[0] == _VERSION and parts[2:3] == [DOMAIN] and parts[5:6] == [b"CURVE"] and len(parts) == 7
                     and secrets.compare_digest(parts[6], self._key))
        logger.debug("%s: %s", b" ".join(parts[3:4]).decode(errors="replace"), "let in" if is_let_in else "refused")
        status, text = (b"200", b"OK") if is_let_in else (b"400", b"Unknown key")
        self._port.send(_VERSION, b"".join(parts[1:2]), status, text, b"", b"")
