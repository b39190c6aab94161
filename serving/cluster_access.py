"""`ClusterAccess`: the settings by which any process of a cluster, instance or master, gets to the others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from xllm import env
from xllm.errors import ConfigError
from xllm.option import option


@dataclass(frozen=True, kw_only=True)
class ClusterAccess:
    """The cluster's secret, and etcd: where it is, who one is there, and over which certificates."""

    cluster_secret_file: str | None = option(None, "file with the secret that all processes of a cluster share; none: "
                                             "what XLLM_CLUSTER_SECRET says, or else, on the loopback only, this "
                                             "user's ~/.config/xllm/cluster.secret, made if it is not there",
                                             is_guard=True)
    etcd_addr: str | None = option(None, "etcd, in which the instances register: host:port, http:// or https://, "
                                   "several members parted by commas", is_guard=True)
    etcd_namespace: str = option("", "before the cluster's keys there, as /NAMESPACE/")
    etcd_user: str | None = option(None, "user of etcd; none: what ETCD_USERNAME says", is_guard=True)
    etcd_password_file: str | None = option(None, "file with etcd_user's password; none: what ETCD_PASSWORD says",
                                            is_guard=True)
    etcd_ca_cert: str | None = option(None, "certificate of etcd's authority (PEM), and TLS; none: the system's, with "
                                      "https://", is_guard=True)
    etcd_cert: str | None = option(None, "this process's certificate for etcd (PEM)", is_guard=True)
    etcd_key: str | None = option(None, "its private key (PEM)", is_guard=True)

    def check_etcd(self) -> None:
        """Raises ConfigError for options of etcd that do not go together."""
        if self.etcd_addr is not None and env.cluster_store() is not None:
            raise ConfigError("etcd_addr and the environment variable XLLM_CLUSTER_STORE both say where this instance "
                              "registers: give one of them")
        if self.etcd_addr is None:
            for name in ACCESS_OPTIONS:
                if name.startswith("etcd_") and getattr(self, name):
                    raise ConfigError(f"{name} needs etcd_addr")
        if (self.etcd_cert is None) != (self.etcd_key is None):
            raise ConfigError("etcd_cert and etcd_key go together")


ACCESS_OPTIONS = tuple(field.name for field in dataclasses.fields(ClusterAccess))
