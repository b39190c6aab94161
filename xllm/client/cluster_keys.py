"""`ClusterKeys`: the key pairs of a cluster's connections, made of the one secret that its processes share.

Both ends of a connection (CURVE) prove that they know the secret: an instance by the key pair of instances, whoever
connects to it by that of clients. Each side expects exactly the other one's public key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from xllm.errors import ConfigError

MIN_SECRET_BYTES = 16  # Chosen: 128 bits if it is random; what can be guessed must not be a secret
# Cost of a guess (scrypt, RFC 7914): 16 MiB of memory and about 50 ms, once at the start of a process. These are the
# parameters that OWASP recommends for interactive use.
_N, _R, _P = 2**14, 8, 1
_KEY_BYTES = 32  # of a key of Curve25519 (RFC 7748)


@dataclass(frozen=True, slots=True)
class ClusterKeys:
    """Public and secret keys in Z85, as zmq takes them."""

    instance_public: bytes
    client_public: bytes
    instance_secret: bytes = field(repr=False)
    client_secret: bytes = field(repr=False)


def cluster_keys(secret: bytes) -> ClusterKeys:
    """The keys of a cluster. Blanks around the secret do not count. Raises ConfigError for one that is too short."""
    secret = secret.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"the cluster's secret must have {MIN_SECRET_BYTES} bytes at least, and be random: "
                          "openssl rand -hex 32 makes one")
    drawn = hashlib.scrypt(secret, salt=b"xllm cluster keys 1", n=_N, r=_R, p=_P, dklen=2 * _KEY_BYTES)
    instance, client = z85.encode(drawn[:_KEY_BYTES]), z85.encode(drawn[_KEY_BYTES:])
    return ClusterKeys(zmq.curve_public(instance), zmq.curve_public(client), instance, client)
