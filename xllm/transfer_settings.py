"""`TransferSettings`: whether and how KV goes from one instance to another."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.errors import ConfigError
from xllm.option import option

TRANSPORTS = ("shm", "tcp")
# Of the device's KV blocks: as many fit into host memory where KV of other instances lands, unless its size is set.
# Chosen: room for the prompts of a quarter of all running requests.
LANDING_BLOCKS_FACTOR = 0.25
MAX_LEASE_S = 3600.0  # chosen: nobody waits longer for a prompt


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """KV that is sent to, and taken from, other instances of a cluster."""

    enable_disagg_pd: bool = option(False, "send KV to other instances and take it from them: prompts may be "
                                    "computed by one instance and answered by another")
    kv_transfer_host: str = option("127.0.0.1", "address at which other instances reach the memory for their "
                                   "KV")
    kv_transfer_ways: str = option("shm,tcp", "ways for KV from other instances, the best first: shm (the same machine "
                                   "and user), tcp")
    kv_lease_s: float = option(60.0, "seconds for which room is kept for KV that another instance computes")

    @property
    def ways(self) -> tuple[str, ...]:
        """Names of transports, the best first."""
        return tuple(self.kv_transfer_ways.split(","))


def check_transfer(given: TransferSettings, *, has_prefix_cache: bool) -> None:
    """Raise ConfigError for a value that cannot be."""
    if given.enable_disagg_pd and not has_prefix_cache:
        raise ConfigError("enable_disagg_pd needs enable_prefix_caching: KV of other instances is found by its prefix")
    if unknown := [way for way in given.ways if way not in TRANSPORTS]:
        raise ConfigError(f"kv_transfer_ways: {unknown[0]!r} is none of {', '.join(TRANSPORTS)}")
    if not 0.0 < given.kv_lease_s <= MAX_LEASE_S:
        raise ConfigError(f"kv_lease_s must be in (0, {MAX_LEASE_S:g}], got {given.kv_lease_s}")
