from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.store_server import StoreServer
from tests.cluster.etcd_process import EtcdProcess
from tests.cluster.members import Instances
from tests.cluster.sites import KINDS, StoreSite, embedded_site, etcd_site, served_site
from tests.llm.conftest import SETTINGS
from tests.llm.gated import WatchedLocal
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    """For tests that leave it as it is, but for keys of their own."""
    etcd = EtcdProcess(tmp_path_factory.mktemp("etcd"))
    try:
        yield etcd.start()
    finally:
        etcd.kill()


@pytest.fixture
def etcd(tmp_path) -> Iterator[EtcdProcess]:
    """For a test that does something to it; not started."""
    made = EtcdProcess(tmp_path)
    yield made
    made.kill()


@pytest.fixture(params=KINDS)
async def site(request: pytest.FixtureRequest) -> AsyncIterator[StoreSite]:
    if request.param == "etcd":
        yield etcd_site(request.getfixturevalue("shared_etcd"))
        return
    store = EmbeddedStore()
    if request.param == "embedded":
        yield embedded_site(store)
        return
    server = StoreServer(store)
    yield served_site(store, server.place)
    await server.close()


@pytest.fixture
async def store(site: StoreSite) -> AsyncIterator[KeyValueStore]:
    async with site.open() as opened:
        yield opened


@pytest.fixture
async def instances() -> AsyncIterator[Instances]:
    """Makes instances over one engine of this process; they end with the test."""
    engine = WatchedLocal(EngineCore(EngineConfig.from_flat(**SETTINGS, max_num_seqs=8)))
    found = Instances(engine)
    yield found
    for instance in found.made:
        await instance.close()
    engine.shutdown()
