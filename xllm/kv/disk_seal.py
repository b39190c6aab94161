"""`Seal`: keyed tags over headers and payloads on disk, which cannot be made without the key.

A checksum finds accidents only: anybody who can write to the disk can compute one. With a key every payload and every
header has a tag of keyed BLAKE2b (RFC 7693; hashlib's releases the GIL on payloads). The payload's tag is a field of
the header, and the header's tag covers all fields before it. So neither is accepted in another slot, under another
digest or parent, in another store, or beside another payload. A header is checked without its payload: a scan lists no
planted one.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from xllm.errors import ConfigError
from xllm.private_files import read_secret

MIN_KEY_BYTES, MAX_KEY_BYTES = 32, 4096  # 256 bits of a random file; the upper bound refuses a file given by mistake
PAYLOAD_TAG_BYTES = 16  # 128 bits, as a digest has
HEADER_TAG_BYTES = 12  # what is left of the 128 bytes of a header: 96 bits, as truncated MACs have (RFC 2404)


class Seal:
    """Makes the tags of one store. Thread-safe.

    key: None for a store without one, whose tags are zeros; such a store believes no header that has others.
    purpose: what the store is for (the worker's rank, say): tags of another purpose are not believed.
    """

    def __init__(self, key: bytes | None = None, purpose: bytes = b""):
        self.has_key = key is not None
        self._key = b""
        if key is not None:
            master = hashlib.blake2b(key, person=b"xLLM-KV key").digest()
            self._key = hashlib.blake2b(purpose, key=master, person=b"xLLM-KV store").digest()

    def payload_tag(self, payload: memoryview) -> bytes:
        """The tag of a payload: PAYLOAD_TAG_BYTES long, zeros without a key."""
        return self._tag(payload, PAYLOAD_TAG_BYTES, b"xLLM-KV payload")

    def header_tag(self, fields: bytes | memoryview) -> bytes:
        """The tag of a header's fields: HEADER_TAG_BYTES long, zeros without a key."""
        return self._tag(fields, HEADER_TAG_BYTES, b"xLLM-KV header")

    def fits_payload(self, payload: memoryview, tag: bytes) -> bool:
        return hmac.compare_digest(self.payload_tag(payload), tag)

    def fits_header(self, fields: bytes | memoryview, tag: bytes) -> bool:
        return hmac.compare_digest(self.header_tag(fields), tag)

    def _tag(self, data: bytes | memoryview, num_bytes: int, person: bytes) -> bytes:
        if not self.has_key:
            return bytes(num_bytes)
        return hashlib.blake2b(data, digest_size=num_bytes, key=self._key, person=person).digest()


def read_key(path: Path, name: str = "disk_cache_key_file") -> bytes:
    """The content of a key file, every byte of it. Raises ConfigError if it is too short or others can read it. name:
    of the setting, for the message."""
    key = read_secret(name, path, MAX_KEY_BYTES)
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(f"{name} {path} has {len(key)} bytes, and a key has at least {MIN_KEY_BYTES}: "
                          f"head -c {MIN_KEY_BYTES} /dev/urandom > {path}")  # fmt: skip
    return key
