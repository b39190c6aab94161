"""`EtcdSettings`: where etcd is, and who one is there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from xllm.errors import ConfigError
from xllm.host_port import host_and_port, is_loopback
from xllm.private_files import read_secret

DEFAULT_PORT = 2379  # etcd's own for clients, by IANA
_MAX_PEM_BYTES = 2**20  # of a certificate chain or key. Chosen: hundreds of times what they take


@dataclass(frozen=True, kw_only=True)
class EtcdSettings:
    """Raises ConfigError for values that do not go together.

    addresses: of its members, each `host:port`, `http://host:port` or `https://host:port`; all with or all without TLS.
    cert, key: of this client, PEM files. ca_cert: of the authority of etcd's certificate; none: the system's.
    """

    addresses: tuple[str, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_cert: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ConfigError("etcd needs an address, such as 127.0.0.1:2379")
        schemes = {self._split(address)[0] for address in self.addresses}
        if (self.user is None) != (self.password is None):
            raise ConfigError("etcd: a user and a password are given together or not at all")
        if (self.cert is None) != (self.key is None):
            raise ConfigError("etcd: a client's certificate and its key are given together or not at all")
        files = [path for path in (self.ca_cert, self.cert, self.key) if path is not None]
        if "http" in schemes and ("https" in schemes or files):
            raise ConfigError(f"etcd: {', '.join(self.addresses)}: certificates, or https:// in one address, mean TLS, "
                              "which then is for all of them: none may begin with http://")

    @property
    def targets(self) -> tuple[str, ...]:
        """The addresses as `host:port`."""
        return tuple(self._split(address)[1] for address in self.addresses)

    @property
    def has_tls(self) -> bool:
        """Whether connections are encrypted."""
        return bool(self.ca_cert or self.cert) or any(address.startswith("https://") for address in self.addresses)

    @property
    def is_local(self) -> bool:
        """Whether all members are reached over the loopback."""
        return all(is_loopback(host_and_port(target)[0]) for target in self.targets)

    @property
    def exposes_password(self) -> bool:
        """Whether a password would leave this machine in clear text."""
        return self.password is not None and not self.has_tls and not self.is_local

    def pem_files(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """What is in `ca_cert`, `key` and `cert`. Raises ConfigError, also for a key that others may read."""
        key = None if self.key is None else read_secret("etcd's client key", self.key, _MAX_PEM_BYTES)
        return self._read("CA certificate", self.ca_cert), key, self._read("client certificate", self.cert)

    @staticmethod
    def _read(name: str, path: Path | None) -> bytes | None:
        try:
            return None if path is None else path.read_bytes()
        except OSError as error:
            raise ConfigError(f"etcd's {name} {path} cannot be read: {error.strerror}") from None

    @staticmethod
    def _split(address: str) -> tuple[str, str]:
        """The scheme, which may be empty, and `host:port`."""
        found = re.fullmatch(r"(?:(https?)://)?(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]@]+)(?::(\d+))?/?", address)
        if found is None or not 0 < int(found[3] or DEFAULT_PORT) < 2**16:
            raise ConfigError(f"etcd: {address!r} is no address; one is host:port, http://host:port or "
                              "https://host:port, several are parted by commas")
        return found[1] or "", f"{found[2]}:{found[3] or DEFAULT_PORT}"
