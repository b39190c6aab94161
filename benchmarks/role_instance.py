"""An instance of `xllm cluster up` without a model: `python -m benchmarks.role_instance DEVICE_FILE FLAG...`, with the
flags of `xllm serve`.

It registers in the cluster's store in its role, and its gate, scheduler, KV store and transfers are those of `xllm
serve`; its engine is a thread of this process whose steps sleep for what `priced_device.py` says. KV is that of a tiny
model: it is sent, landed and loaded like any, at rates that make a prompt's take as long as the real one's.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

from benchmarks.disaggregation import SlowPeer
from benchmarks.priced_device import TOKEN_BYTES, PricedDevice, read_device
from serving.cluster.model_fingerprint import model_fingerprint
from serving.commands.bench.null_instance import BEAT_S, MODEL, NullCore, NullEngine
from serving.commands.cli import build_parser, engine_config
from serving.commands.cluster_instance import ClusterInstance
from serving.commands.cluster_plan import ClusterPlan, cluster_plan
from serving.commands.flags import tree_from
from serving.commands.gated_calls import GatedCalls
from serving.commands.owned_server import end_with_owner
from serving.config import ServerConfig
from xllm import logs
from xllm.client.gate_wire import ServedModel
from xllm.client.process import ProcessClient
from xllm.config import EngineConfig
from xllm.errors import ConfigError
from xllm.foreign.table import SERVER
from xllm.transfer.transport import Peer
from xllm.transfer.transports import connect

NOWHERE = ("127.0.0.1", 1)  # its record says where its HTTP API is; it has none


def main(argv: list[str]) -> int:
    """Until SIGTERM comes, or stdin ends."""
    end_with_owner()
    device, namespace = read_device(Path(argv[0])), build_parser().parse_args(["serve", *argv[1:]])
    server: ServerConfig = tree_from(namespace, ServerConfig, SERVER)
    logs.configure("api", level=server.log.log_level, form=server.log.log_format)
    if (plan := cluster_plan(server.cluster)) is None:
        raise ConfigError("role_instance is started by `benchmarks.owned_cluster`, which says where the store is")
    with mock.patch("xllm.transfer.way.connect", _slow_connect(device)):
        core = NullCore(device.prices, _config(namespace, device))
        tiers = core._loaded.tiers
        assert tiers is None or tiers.payload_bytes == TOKEN_BYTES * cast(int, core.config.cache.block_size)
        asyncio.run(_serve(core, plan))
    return 0


def _config(namespace: argparse.Namespace, device: PricedDevice) -> EngineConfig:
    config = engine_config(namespace)
    cache = dataclasses.replace(config.cache, host_bytes_per_s=str(int(device.host_bytes_per_s)))
    return dataclasses.replace(config, cache=cache)


def _slow_connect(device: PricedDevice) -> Callable[..., Peer]:
    """Peers that take as long as the device's network."""
    SlowPeer.bytes_per_s = device.link_bytes_per_s

    def slow(*arguments: Any, **options: Any) -> Peer:
        return SlowPeer(connect(*arguments, **options))

    return slow


async def _serve(core: NullCore, plan: ClusterPlan) -> None:
    engine, stop = NullEngine(core), asyncio.Event()
    engine.bind()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    instance = ClusterInstance(plan, cast(ProcessClient, engine), NOWHERE, None, GatedCalls(None, log_requests=False))
    instance.listen()
    await instance.find_store()
    await instance.join(ServedModel((MODEL,), model_fingerprint(core.config.model, core.facts)))
    beating = asyncio.create_task(_beat(engine))
    await stop.wait()
    beating.cancel()
    await instance.leave()
    await asyncio.to_thread(engine.shutdown)


async def _beat(engine: NullEngine) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        engine.beat()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
