"""`SharedIndex`: which blocks a shared store holds and where, as far as this process has read it.

A look-up reads this process's memory alone. `refresh` reads what is new: it lists the writers' folders, and of each
writer the headers that were added to its last segment.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from xllm.kv import failpoints
from xllm.kv.disk_format import CORRUPT, FOREIGN, TORN
from xllm.kv.disk_seal import Seal
from xllm.kv.shared_segment import GONE, SUFFIX, SharedSegment, read_segment

_KIND_NAMES = {TORN: "torn", CORRUPT: "corrupt", FOREIGN: "foreign"}

_log = logging.getLogger(__name__)


class SharedIndex:
    """`find`, `forget` and `refresh` may be called by any thread; refreshes wait for each other, look-ups for nothing.

    count: called with the kind (`shared_store.MISS_KINDS`) and the number of bad blocks and files that were found.
    """

    def __init__(self, folder: Path, fingerprint: bytes, payload_bytes: int, seal: Seal,
                 count: Callable[[str, int], None]):
        self._folder, self._fingerprint, self._payload_bytes, self._seal = folder, fingerprint, payload_bytes, seal
        self._count = count
        self._places: dict[bytes, tuple[SharedSegment, int]] = {}
        self._spares: dict[bytes, list[tuple[SharedSegment, int]]] = {}  # where blocks lie a second time
        self._segments: dict[Path, SharedSegment] = {}
        self._refused: set[Path] = set()  # files that are no segments of this store
        self._refreshing, self._changing = threading.Lock(), threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, digest: bytes) -> tuple[SharedSegment, int] | None:
        """(the segment, the index in it) of a block, or None."""
        return self._places.get(digest)

    def forget(self, digest: bytes, place: tuple[SharedSegment, int]) -> None:
        """Stop listing a block at this place, where it was not good; another place where it lies takes its turn."""
        with self._changing:
            if self._places.get(digest) == place:
                spares = self._spares.get(digest)
                if spares:
                    self._places[digest] = spares.pop()
                else:
                    del self._places[digest]

    def refresh(self) -> None:
        """Take in what has been added and deleted. Raises OSError if the store cannot be listed; a store that is not
        there is an empty one."""
        with self._refreshing:
            if failpoints.armed is not None:
                failpoints.hit("store.list")
            files = self._list()
            self._drop([path for path in self._segments if path not in files])
            self._refused &= files.keys()
            for path, is_last in files.items():
                self._read(path, is_last=is_last)

    def _list(self) -> dict[Path, bool]:
        """Every writer's segments, each with whether it is the writer's last."""
        found: dict[Path, bool] = {}
        for writer in _entries(self._folder):
            names = sorted(name for name in _entries(self._folder / writer) if name.endswith(SUFFIX))
            found.update((self._folder / writer / name, name == names[-1]) for name in names)
        return found

    def _read(self, path: Path, *, is_last: bool) -> None:
        segment = self._segments.get(path)
        if path in self._refused or (segment is not None and segment.is_full):
            return
        try:
            segment = segment or read_segment(path, self._fingerprint, self._payload_bytes)
            if segment is None:
                self._refuse(path, "it is damaged or of another store")
                return
            self._segments[path] = segment
            news, bad = segment.read_news(self._seal, is_last=is_last)
        except PermissionError as error:
            self._refuse(path, str(error))
            return
        except OSError as error:  # of this file alone; it is tried again at the next refresh, unless it is deleted
            if error.errno not in GONE:
                self._count("unreadable", 1)
            return
        with self._changing:
            for index, digest in news:
                if self._places.setdefault(digest, (segment, index)) != (segment, index):
                    self._spares.setdefault(digest, []).append((segment, index))
        for kind, num in bad.items():
            self._count(_KIND_NAMES[kind], num)

    def _refuse(self, path: Path, reason: str) -> None:
        self._refused.add(path)
        self._count("foreign", 1)
        _log.warning("%s is left alone: %s", path, reason)

    def _drop(self, paths: list[Path]) -> None:
        """Stop listing the blocks of segments that were deleted."""
        for path in paths:
            segment = self._segments.pop(path)
            for digest in segment.digests:
                with self._changing:
                    spares = [place for place in self._spares.pop(digest, []) if place[0] is not segment]
                    if spares:
                        self._spares[digest] = spares
                place = self._places.get(digest)
                if place is not None and place[0] is segment:
                    self.forget(digest, place)


def _entries(folder: Path) -> list[str]:
    """The names in a folder; none if it is not there, or no folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
