"""`KeyRing`: the keys of a server, each with its caller. Keys are held as SHA-256 digests only, and compared in
constant time.

Keys come from flags, from the environment and from a file; an empty key, a key that is both a user's and an
administrator's, or a file that says nothing is a ConfigError: a server that was meant to be closed must not start open.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from serving.security.quotas import Quota
from xllm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})", re.ASCII)
_FLAGS = ("admin", "urgent", "metrics")
_QUOTAS = ("requests_per_minute", "tokens_per_minute")


@dataclass(frozen=True)
class Caller:
    """The owner of a key: the unit of cache isolation, fair share and quotas. Keys of one name are one caller."""

    name: str = ""  # "": nobody in particular, on a server without keys
    is_admin: bool = False
    is_urgent: bool = True  # may send a negative priority, which goes before those of all others
    may_monitor: bool = True  # may see what all callers together do
    weight: float = 1.0
    quota: Quota = field(default_factory=Quota, compare=False)

    @property
    def kind(self) -> str:
        """The class of its key, which says nothing about whose it is: none, user or admin."""
        return "none" if not self.name else "admin" if self.is_admin else "user"

    def cache_salt(self, wish: str | None) -> str:
        """The text that is mixed into the digests of this caller's KV blocks, so that no other caller can find them.

        wish: the request's own `cache_salt`, which separates a caller's users from each other.
        """
        if not self.name and wish is None:
            return ""
        text = f"{len(self.name)}:{self.name}:{'-' if wish is None else '+' + wish}"
        return hashlib.sha256(text.encode()).hexdigest()


NOBODY = Caller()


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class KeyRing:
    """Digest -> caller, users and administrators together. Immutable after it is built."""

    def __init__(self, entries: Iterable[tuple[bytes, Caller]] = ()):
        self._entries = list(entries)
        users = {caller.name for _, caller in self._entries if not caller.is_admin}
        if len(users) == 1:  # there is no other caller to hide from it
            self._entries = [(known, replace(caller, may_monitor=True)) for known, caller in self._entries]
        digests = [known for known, _ in self._entries]
        if len(set(digests)) != len(digests):
            raise ConfigError("api_key: a key is given twice; a key belongs to one caller, and to either users or "
                              "administrators")

    @property
    def has_user_keys(self) -> bool:
        return any(not caller.is_admin for _, caller in self._entries)

    @property
    def has_admin_keys(self) -> bool:
        return any(caller.is_admin for _, caller in self._entries)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Classes of the callers that there can be; see `Caller.kind`."""
        found = {caller.kind for _, caller in self._entries}
        return tuple(sorted(found if self.has_user_keys else found | {NOBODY.kind}))

    def find(self, key: bytes) -> Caller | None:
        """The owner of a key, or None. Takes as long whether and wherever it matches: all are compared."""
        given, found = hashlib.sha256(key).digest(), None
        for known, caller in self._entries:
            if hmac.compare_digest(given, known):
                found = caller
        return found


def build_key_ring(*, api_keys: Sequence[str] = (), admin_keys: Sequence[str] = (),
                   file: str | None = None) -> KeyRing:
    """All keys of a server. Raises ConfigError."""
    entries = []
    for name, keys, is_admin in (("api_key", api_keys, False), ("admin_api_key", admin_keys, True)):
        for key in keys:
            known = digest(_usable(name, key))
            # Without a name of its own a key is its own caller; part of the digest tells them apart in metrics.
            caller = "admin" if is_admin else f"key-{known.hex()[:8]}"
            entries.append((known, Caller(caller, is_admin, may_monitor=is_admin)))
    if file is not None:
        entries += read_key_file(Path(file))
    return KeyRing(entries)


def _usable(name: str, key: str) -> str:
    if not key.strip():
        raise ConfigError(f"{name} must not be empty")
    if key != key.strip() or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{name} must be printable ASCII without blanks around it, as an HTTP header can carry it")
    return key


def read_key_file(file: Path) -> list[tuple[bytes, Caller]]:
    """One key a line: `NAME KEY`, then of `admin`, `urgent`, `metrics`, `weight=X`, `requests_per_minute=N` and
    `tokens_per_minute=N` what applies; or `KEY` alone.

    KEY may be `sha256:` and the digest in hex, so that the file holds no secret. `#` begins a comment. Lines of one
    name are one caller, and say the same about it or nothing. Raises ConfigError, naming the line and never a key.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    entries: list[tuple[bytes, Caller]] = []
    callers: dict[str, Caller] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            known, caller = _read_line(words)
        except ValueError as error:
            raise ConfigError(f"api_key_file {file}, line {number}: {error}") from None
        first = callers.setdefault(caller.name, caller)
        if len(words) > 2 and (first, first.quota.limits) != (caller, caller.quota.limits):
            raise ConfigError(f"api_key_file {file}, line {number}: {caller.name} was described otherwise before")
        entries.append((known, first))
    if not entries:
        raise ConfigError(f"api_key_file {file} holds no key")
    return entries


def holds_plain_keys(file: Path) -> bool:
    """Whether a readable key file holds any key in clear rather than its digest: reading the file is then having the
    key."""
    lines = (line.partition("#")[0].split() for line in file.read_text(encoding="utf-8").splitlines())
    return any(not _HASHED.fullmatch(words[min(1, len(words) - 1)]) for words in lines if words)


def _read_line(words: list[str]) -> tuple[bytes, Caller]:
    name, key, options = (words[0], words[1], words[2:]) if len(words) > 1 else ("", words[0], [])
    if words[1:] and not _NAME.fullmatch(name):
        raise ValueError("a name has 1 to 64 letters, digits, '_', '.' or '-'")
    if key in _FLAGS or key.partition("=")[0] in ("weight", *_QUOTAS):
        raise ValueError("the key is missing: NAME KEY, then the options")
    hashed = _HASHED.fullmatch(key)
    known = bytes.fromhex(hashed[1]) if hashed else digest(_usable("the key", key))
    return known, _read_options(name or f"key-{known.hex()[:8]}", options)


def _read_options(name: str, options: list[str]) -> Caller:
    flags, weight, limits = dict.fromkeys(_FLAGS, False), 1.0, dict[str, int]()
    for option in options:
        what, equals, value = option.partition("=")
        if option in flags:
            flags[option] = True
        elif what == "weight" and equals:
            weight = float(value)
            if not 0.001 <= weight <= 1000.0:
                raise ValueError("weight must be in 0.001 to 1000")
        elif what in _QUOTAS and value.isdecimal() and int(value) > 0:
            limits[what] = int(value)
        else:
            raise ValueError(f"unknown or malformed option {what[:64]!r}; known are "
                             f"{', '.join(_FLAGS)}, weight=, "
                             f"{'=, '.join(_QUOTAS)}=")
    return Caller(name, flags["admin"], flags["admin"] or flags["urgent"], flags["admin"] or flags["metrics"], weight,
                  Quota(limits.get("requests_per_minute"), limits.get("tokens_per_minute")))
