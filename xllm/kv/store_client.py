"""`KVStoreClient`: a shared KV store for other programs: blocks of bytes by the tokens that they were computed from.

    from xllm import KVStoreClient

    with KVStoreClient("/mnt/kv", {"model": "m", "layout": "v1"}, block_size=16, block_bytes=65536) as store:
        store.put(token_ids, blocks)
        num_blocks = store.match(token_ids)
        store.get(token_ids[: 16 * num_blocks])

It reads and writes the same folders as `--kv-store DIR`, under a name that the caller chooses. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from xllm.errors import ConfigError
from xllm.kv.block import ROOT, block_digests
from xllm.kv.disk_seal import Seal, read_key
from xllm.kv.shared_store import SharedCounters, SharedStore
from xllm.kv.shared_writer import BlockToStore
from xllm.sizes import parse_amount

BlockBytes = bytes | bytearray | memoryview | np.ndarray
# Seconds after which a look-up reads again what others have added. Chosen: a prompt of a second ago is found, and a
# busy caller lists the folders once a second.
REFRESH_S = 1.0


class KVStoreClient:
    """Blocks of `block_bytes` for every `block_size` tokens. Thread-safe.

    folder: of the store, on a file system that all who share it see. namespace: what the bytes depend on: the model and
    its version, the number format, the layout, the rank; text or a mapping that JSON can hold. Blocks of another
    namespace, block size or number of bytes are never found. size: how much this process may add, such as "50GiB"
    (its oldest blocks are deleted first); "0": it only reads. key_file: at least 32 random bytes, readable by the owner
    alone; blocks that were not written with them are misses. refresh_s: how old the list of what others have added may
    be at a look-up.

    Raises ConfigError for settings that cannot be right or a folder that others may write to, and DiskError if the
    folder cannot be used. `put`, `get` and `match` raise ValueError for arguments that do not fit, and DiskError if the
    file system fails.
    """

    def __init__(self, folder: str | Path, namespace: str | Mapping[str, object], *, block_size: int, block_bytes: int,
                 size: str = "0", key_file: str | Path | None = None, refresh_s: float = REFRESH_S):
        if block_size < 1 or block_bytes < 1:
            raise ConfigError(f"block_size and block_bytes must be at least 1, got {block_size} and {block_bytes}")
        capacity_bytes, share = parse_amount("size", size)
        if share:
            raise ConfigError(f"size {size}: a number of bytes such as 50GiB, not a share")
        self.block_size, self.block_bytes, self._refresh_s = block_size, block_bytes, refresh_s
        seal = Seal() if key_file is None else Seal(read_key(Path(key_file), "key_file"), b"client")
        self._store = SharedStore(Path(folder), fingerprint=_fingerprint(namespace, block_size, block_bytes),
                                  payload_bytes=block_bytes, capacity_bytes=capacity_bytes, seal=seal)
        self._writes = capacity_bytes > 0

    def match(self, token_ids: Sequence[int] | np.ndarray, *, cache_salt: str = "") -> int:
        """How many blocks the store has of these tokens' full blocks, from the first on without a gap."""
        self._store.refresh(self._refresh_s)
        digests = self._digests(token_ids, cache_salt)
        return next((i for i, digest in enumerate(digests) if not self._store.has(digest)), len(digests))

    def get(self, token_ids: Sequence[int] | np.ndarray, *, first_block: int = 0,
            cache_salt: str = "") -> list[bytes | None]:
        """The bytes of the tokens' full blocks, from number `first_block` on; None for each that is not there or not
        good."""
        found: list[bytes | None] = []
        self._store.refresh(self._refresh_s)
        for digest in self._digests(token_ids, cache_salt)[first_block:]:
            data = bytearray(self.block_bytes)
            found.append(bytes(data) if self._store.read(digest, memoryview(data)) else None)
        return found

    def get_into(self, token_ids: Sequence[int] | np.ndarray, buffers: Sequence[BlockBytes], *, first_block: int = 0,
                 cache_salt: str = "") -> int:
        """Copy the blocks from number `first_block` on into writable buffers of `block_bytes` each, up to the first
        block that is not there or not good; returns how many. What the buffers after those hold is not defined."""
        self._store.refresh(self._refresh_s)
        digests = self._digests(token_ids, cache_salt)[first_block:]
        for num, (digest, buffer) in enumerate(zip(digests, buffers)):
            if not self._store.read(digest, self._view(buffer, num)):
                return num
        return min(len(digests), len(buffers))

    def put(self, token_ids: Sequence[int] | np.ndarray, blocks: Sequence[BlockBytes], *, first_block: int = 0,
            cache_salt: str = "") -> int:
        """Add the bytes of the tokens' full blocks from number `first_block` on, as many as `blocks` has; returns how
        many were not there yet. They are on their way to other readers when this returns. A block is found by `match`
        only behind all blocks before it, so put those first.

        blocks: buffers of `block_bytes` each: bytes, memoryviews, C-contiguous arrays.
        """
        if not self._writes:
            raise ValueError("this client only reads: give it a size")
        self._store.refresh(self._refresh_s)
        digests = self._digests(token_ids, cache_salt)
        if not 0 <= first_block <= len(digests) - len(blocks):
            raise ValueError(f"{len(blocks)} blocks from number {first_block} on, and the {len(token_ids)} tokens fill "
                             f"{len(digests)} blocks of {self.block_size}")
        chain = [ROOT, *digests]
        return self._store.write([
            BlockToStore(chain[first_block + i + 1], chain[first_block + i], self._view(block, i))
            for i, block in enumerate(blocks)])

    def _view(self, buffer: BlockBytes, place: int) -> memoryview:
        view = memoryview(buffer.data if isinstance(buffer, np.ndarray) else buffer)
        if view.nbytes != self.block_bytes or not view.c_contiguous:
            raise ValueError(f"block {place} has {view.nbytes} bytes{'' if view.c_contiguous else ', not contiguous'}; "
                             f"the blocks of this store have {self.block_bytes}, contiguous")
        return view.cast("B")

    def _digests(self, token_ids: Sequence[int] | np.ndarray, cache_salt: str) -> list[bytes]:
        tokens = np.asarray(token_ids)
        if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
            raise ValueError("token_ids must be a sequence of integers")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
            raise ValueError("token_ids must be in [0, 2**31)")
        return block_digests(tokens.astype(np.int32), self.block_size, cache_salt)

    @property
    def counters(self) -> SharedCounters:
        """Totals of this client: writes, reads, and misses by kind."""
        return self._store.counters

    def close(self) -> None:
        """Stop the client's signs of life; a second call does nothing. What was put stays."""
        self._store.close()

    def __enter__(self) -> KVStoreClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _fingerprint(namespace: str | Mapping[str, object], block_size: int, block_bytes: int) -> bytes:
    """Of what a caller names. Raises ConfigError for a namespace that is empty or that JSON cannot hold."""
    if not namespace:
        raise ConfigError("namespace must say what the bytes depend on: the model, the number format, the layout")
    try:
        text = json.dumps([namespace, block_size, block_bytes], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"namespace must be text or a mapping that JSON can hold: {error}") from None
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"xllm-kv-client").digest()
