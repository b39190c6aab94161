"""The keys of the sockets that carry events of the KV cache (CURVE): whoever has the shared secret has them all.

The end that is bound has a key pair that follows from the secret. The other end has one of its own, and must know the
public key to be heard; it is never sent (http://curvezmq.org: HELLO hides it), so it is the proof of the secret.
"""

from __future__ import annotations

import hashlib
from typing import Any

import zmq
from zmq.utils import z85

_PERSON = b"xllm-kv-events"


def secure_bound(socket: zmq.Socket[Any], key: bytes) -> None:
    """Before a socket is bound: only those who have the key may connect, and what is sent is encrypted."""
    public, secret = _pair(key)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def secure_connected(socket: zmq.Socket[Any], key: bytes) -> None:
    """Before a socket is connected: the other end must have the key."""
    public, secret = zmq.curve_keypair()
    socket.setsockopt(zmq.CURVE_SERVERKEY, _pair(key)[0])
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def _pair(key: bytes) -> tuple[bytes, bytes]:
    secret = z85.encode(hashlib.blake2b(key, digest_size=32, person=_PERSON).digest())
    return zmq.curve_public(secret), secret
