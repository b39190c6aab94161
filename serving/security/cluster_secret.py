"""Reads the secret that the processes of a cluster share."""

from __future__ import annotations

import logging
from pathlib import Path

from xllm import env
from xllm.client.cluster_keys import ClusterKeys, cluster_keys
from xllm.errors import ConfigError
from xllm.private_files import check_not_everybodys, exposure_of

logger = logging.getLogger("xllm.cluster")


def read_cluster_keys(file: str | None) -> ClusterKeys:
    """The keys of the secret in the file, or else in the environment. Raises ConfigError: there is none, it is too
    short, or every user can change the file."""
    secret = env.cluster_secret() if file is None else _read(Path(file))
    if secret is None:
        raise ConfigError("cluster_listen needs the cluster's secret: --cluster-secret-file or XLLM_CLUSTER_SECRET "
                          "(openssl rand -hex 32 makes one)")
    return cluster_keys(secret)


def _read(file: Path) -> bytes:
    try:
        secret = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cluster_secret_file {file} cannot be read: {error.strerror}") from None
    if file.is_file():  # it may come through a pipe, once
        check_not_everybodys("cluster_secret_file", file)
        if (problem := exposure_of(file, is_secret=True)) is not None:
            logger.warning("cluster_secret_file %s %s", file, problem)
    return secret
