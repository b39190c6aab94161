"""The stores that the same tests run on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.etcd_link import open_etcd
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.served_link import ServedLink
from serving.cluster.store_server import StorePlace
from tests.cluster.etcd_process import EtcdProcess

KINDS = ("etcd", "embedded", "served")
_numbers = itertools.count(1)


@dataclass(frozen=True)
class StoreSite:
    """lease_s: the shortest lease that it grants. compact(revision): have it forget changes up to there."""

    lease_s: int
    make: Callable[[bytes], KeyValueStore]
    compact: Callable[[int], object]
    namespace: bytes

    def open(self, namespace: bytes | None = None) -> KeyValueStore:
        """A store of its own, that is, another client of the same one."""
        return self.make(self.namespace if namespace is None else namespace)


def etcd_site(etcd: EtcdProcess) -> StoreSite:
    return StoreSite(1, lambda namespace: open_etcd(etcd.settings, namespace=namespace),
                     lambda revision: etcd.ctl("compact", str(revision)), b"test-%d/" % next(_numbers))


def embedded_site(store: EmbeddedStore) -> StoreSite:
    return StoreSite(1, lambda namespace: KeyValueStore(store, namespace=namespace), store.compact, b"test/")


def served_site(store: EmbeddedStore, place: StorePlace) -> StoreSite:
    return StoreSite(1, lambda namespace: KeyValueStore(ServedLink(place), namespace=namespace), store.compact,
                     b"test/")
