"""The flags of `xllm cluster up`: of its master, and of its instances."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from serving.cluster_access import ACCESS_OPTIONS
from serving.master_config import MasterConfig
from xllm.errors import ConfigError

# Set for each instance by this command, or the master's: not to be given behind `--`.
OWN_FLAGS = ("host", "port", "api_key", "admin_api_key", "api_key_file", "insecure", "allowed_host", "cors_origin",
             "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "cluster_listen", *ACCESS_OPTIONS,
             "enable_service_routing", "instance_name", "nnodes", "node_rank", "master_addr", "master_port")
# Settings of `xllm master` that this command decides.
NOT_OF_UP = (*ACCESS_OPTIONS, "instances", "rpc_server_port", "tokenizer_path")


@dataclass(frozen=True, kw_only=True)
class ClusterUpConfig(MasterConfig):
    """Of the master of `xllm cluster up`, which brings its own store."""

    def _check_place(self) -> None:
        return


def check_instance_flags(namespace: argparse.Namespace) -> None:
    """Raises ConfigError for flags of `xllm serve` that are not for an instance of `xllm cluster up`."""
    for name in OWN_FLAGS:
        if name in vars(namespace):
            raise ConfigError(f"--{name.replace('_', '-')} is not for the instances of `xllm cluster up`: it is the "
                              "master's, or set for each of them")
