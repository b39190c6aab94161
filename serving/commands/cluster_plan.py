"""`ClusterPlan`: what the flags say of this process's place in a cluster, checked before anything starts."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from serving.cluster.etcd_settings import EtcdSettings
from serving.cluster.instance_record import ROLES, check_name
from serving.cluster.store_server import LOOPBACK, StorePlace
from serving.cluster_access import ClusterAccess
from serving.config import ClusterSettings
from serving.security.cluster_secret import read_cluster_keys
from xllm import env
from xllm.client.cluster_keys import ClusterKeys
from xllm.errors import ConfigError
from xllm.host_port import host_and_port, is_loopback
from xllm.private_files import read_secret

_MAX_PASSWORD_BYTES = 4096  # Chosen: far more than a password has


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """listen: HOST:PORT of the gate. etcd, store: where the instance registers, in one of them at most. name: None: as
    HTTP's address. role: its number in `ROLES`."""

    keys: ClusterKeys
    listen: str
    etcd: EtcdSettings | None = None
    store: StorePlace | None = None
    namespace: bytes = b""
    name: str | None = None
    role: int = 0
    tells_cache: bool = True


def cluster_plan(settings: ClusterSettings) -> ClusterPlan | None:
    """None: this process is no instance of a cluster. Raises ConfigError."""
    etcd = etcd_settings(settings) if settings.registers and settings.etcd_addr is not None else None
    served = env.cluster_store() if settings.registers else None
    listen = settings.cluster_listen
    if listen is None and etcd is None and served is None:
        return None
    if listen is None:
        if etcd is not None and not etcd.is_local:
            raise ConfigError(f"etcd_addr {settings.etcd_addr} is not on this machine's loopback: say by "
                              "--cluster-listen HOST:PORT at which address of this machine the cluster's masters reach "
                              "the engine (port 0: any free one)")
        listen = "127.0.0.1:0"
    if settings.instance_name is not None:
        try:
            check_name(settings.instance_name)
        except ValueError as error:
            raise ConfigError(f"instance_name: {error}") from None
    keys = read_cluster_keys(settings.cluster_secret_file, is_local=is_loopback(host_and_port(listen)[0]))
    return ClusterPlan(keys=keys, listen=listen, etcd=etcd, store=None if served is None else StorePlace(*served),
                       namespace=namespace_of(settings.etcd_namespace), name=settings.instance_name,
                       role=ROLES.index(settings.instance_role), tells_cache=settings.enable_cache_upload)


def store_target(plan: ClusterPlan) -> str:
    """HOST:PORT of the store that an instance registers in."""
    if plan.store is not None:
        return f"{LOOPBACK}:{plan.store.port}"
    assert plan.etcd is not None
    return plan.etcd.targets[0]


def etcd_settings(settings: ClusterAccess) -> EtcdSettings:
    """Of flags and environment. Raises ConfigError."""
    assert settings.etcd_addr is not None
    user, password = env.etcd_login()
    user = settings.etcd_user or user
    if settings.etcd_password_file is not None:
        password = read_secret("etcd_password_file", Path(settings.etcd_password_file), _MAX_PASSWORD_BYTES).decode(
            errors="surrogateescape").removesuffix("\n")
    if (user is None) != (password is None):
        raise ConfigError("etcd's user and password go together: etcd_user or ETCD_USERNAME, and etcd_password_file or "
                          f"ETCD_PASSWORD; there is no {'user' if user is None else 'password'}")
    return EtcdSettings(addresses=tuple(address.strip() for address in settings.etcd_addr.split(",")), user=user,
                        password=password, ca_cert=_path(settings.etcd_ca_cert), cert=_path(settings.etcd_cert),
                        key=_path(settings.etcd_key))


def namespace_of(name: str) -> bytes:
    """What stands before all keys, as upstream writes it: between slashes, or nothing."""
    bare = name.strip("/")
    return f"/{bare}/".encode() if bare else b""


def advertised_host(listen_host: str, target: str) -> str:
    """By which host others reach what listens there: itself, or, of all addresses of this machine, the one by which
    `target` (host:port) is reached. In brackets if it is IPv6."""
    host = listen_host
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            host = _own_address(target)
    return f"[{host}]" if ":" in host else host


def _own_address(target: str) -> str:
    host, port = host_and_port(target)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as asking:  # nothing is sent
            asking.connect(address)
            return str(asking.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"by which address of this machine {target} is reached cannot be found: {error}; name it "
                          "in --cluster-listen") from None


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
