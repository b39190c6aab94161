"""What names a KV block: a running 128-bit digest of every token up to its end.

The digest of block i is BLAKE2b-128 over the cache's salt and tokens [0, (i + 1) * P), so that equal
digests mean equal prefixes. It is the digest of a running hash state rather than a hash of hashes:
the boundaries between which nothing differs can be skipped, which makes a long prefix hit cheap
(`PrefixIndex.match`). BLAKE2: RFC 7693.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np

DIGEST_BYTES = 16  # 128 bits: among 2^40 blocks a collision has a chance of 2^-49; chosen for small index entries
ROOT = bytes(DIGEST_BYTES)  # stands for the parent of a sequence's first block
TOKEN_DTYPE = np.dtype("<i4")
TIERS = ("device", "host", "disk")  # where a block may be found, the nearest first


class Hasher(Protocol):
    """A running hash state of `hashlib`."""

    def update(self, data: memoryview | bytes, /) -> None: ...

    def digest(self) -> bytes: ...

    def copy(self) -> Hasher: ...


def root_hasher(block_size: int, cache_salt: str = "") -> Hasher:
    """The hash state before the first token. Different salts or block sizes share no digest."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"xllm-kv-block")
    salt = cache_salt.encode("utf-8", "surrogatepass")
    hasher.update(f"{block_size}:{len(salt)}:".encode() + salt)
    return hasher


def salt_with_adapter(cache_salt: str, adapter_digest: str) -> str:
    """The salt of requests that compute with the adapter whose files have this digest: their KV is of its own."""
    return f"{cache_salt}\0lora:{adapter_digest}"


def token_bytes(token_ids: np.ndarray) -> memoryview:
    """The tokens as the bytes that are hashed: little-endian int32."""
    return np.ascontiguousarray(token_ids, dtype=TOKEN_DTYPE).data.cast("B")


def block_digests(token_ids: np.ndarray, block_size: int, cache_salt: str = "") -> list[bytes]:
    """The digests of every full block of a sequence. For routers, and for what another instance computes; else the
    engine goes step by step."""
    hasher, data, width = root_hasher(block_size, cache_salt), token_bytes(token_ids), block_size * 4
    digests = []
    for start in range(0, len(data) - width + 1, width):
        hasher.update(data[start : start + width])
        digests.append(hasher.digest())
    return digests
