"""What an instance's role asks of its engine, and where other instances reach the memory for their KV."""

from __future__ import annotations

import dataclasses

from serving.commands.cluster_plan import ClusterPlan, advertised_host, store_target
from serving.config import ClusterSettings
from xllm.config import EngineConfig
from xllm.errors import ConfigError
from xllm.host_port import host_and_port, is_loopback
from xllm.transfer_settings import TransferSettings


def with_window_host(config: EngineConfig, cluster: ClusterSettings, plan: ClusterPlan | None) -> EngineConfig:
    """The engine's settings, with the address at which masters reach this instance as that of its memory for KV, unless
    another one was set. Raises ConfigError for a role that sends KV, or takes it, without enable_disagg_pd."""
    transfer = config.transfer
    if cluster.instance_role in ("PREFILL", "DECODE") and not transfer.enable_disagg_pd:
        raise ConfigError(f"instance_role {cluster.instance_role} needs enable_disagg_pd: its KV comes from other "
                          "instances, or goes there")
    if plan is None or not transfer.enable_disagg_pd or transfer.kv_transfer_host != TransferSettings.kv_transfer_host:
        return config
    host = host_and_port(plan.listen)[0]
    if is_loopback(host):
        return config
    reached = advertised_host(host, store_target(plan)) if plan.etcd or plan.store else host
    return dataclasses.replace(config, transfer=dataclasses.replace(
        transfer, kv_transfer_host=reached.removeprefix("[").removesuffix("]")))
