"""Reads the secret that the processes of a cluster share, or makes one for those of this user on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from pathlib import Path

from xllm import env
from xllm.client.cluster_keys import ClusterKeys, cluster_keys
from xllm.errors import ConfigError
from xllm.private_files import check_not_everybodys, exposure_of, open_private_folder, read_secret

OWN_SECRET = "cluster.secret"  # in the user's folder of settings
_SECRET_BYTES = 32  # Chosen: as what openssl is told to make
_MAX_SECRET_BYTES = 4096  # of the user's own file. Chosen: far more than a secret has
logger = logging.getLogger("xllm.cluster")


def read_cluster_keys(file: str | None, *, is_local: bool = False, whose: str = "cluster_listen") -> ClusterKeys:
    """The keys of the secret in the file, or else in the environment, or else, where all of the cluster is on this
    machine's loopback (is_local), in this user's own file. whose: what cannot do without. Raises ConfigError: there is
    none, it is too short, or others can change the file."""
    secret = env.cluster_secret() if file is None else _read(Path(file))
    if secret is None and is_local:
        secret = own_secret()
    if secret is None:
        raise ConfigError(f"{whose} needs the cluster's secret: --cluster-secret-file or XLLM_CLUSTER_SECRET "
                          "(openssl rand -hex 32 makes one)")
    return cluster_keys(secret)


def own_secret() -> bytes:
    """What is in this user's own file, which whichever process needs it first makes, for this user alone.

    Raises ConfigError if it cannot be made, or if others own it or can read or write it or its folder.
    """
    try:
        path = env.config_dir() / OWN_SECRET
        os.close(open_private_folder(path.parent))
        if not path.exists():
            _make(path)
    except (OSError, RuntimeError) as error:  # the latter: there is no home
        raise ConfigError(f"this user's own secret for a cluster on this machine cannot be made: {error}; "
                          "--cluster-secret-file names another file") from None
    return read_secret("the cluster's secret", path, _MAX_SECRET_BYTES)


def _make(path: Path) -> None:
    """Appears with its content or not at all, and never in the place of one that another process has made."""
    fd, name = tempfile.mkstemp(prefix=".cluster-", dir=path.parent)  # for this user alone (0600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_hex(_SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
            logger.info("%s: a new secret for this user's clusters on this machine", path)
    finally:
        os.unlink(name)


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
