"""The only reader of environment variables. They are for debugging; settings are flags."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from xllm.errors import ConfigError
from xllm.suggestion import nearest

NAMES = ("XLLM_LOG", "XLLM_LOG_FORMAT", "XLLM_CACHE", "XLLM_NO_COMPILED_KERNELS", "XLLM_CHECK", "XLLM_NPU_CHECK",
         "XLLM_FAILPOINTS", "XLLM_API_KEY", "XLLM_ADMIN_API_KEY", "XLLM_CLUSTER_SECRET", "XLLM_CLUSTER_STORE",
         "XLLM_OPENAI_API_KEY")
# From processes that have no callers.
_KEPT = ("XLLM_API_KEY", "XLLM_ADMIN_API_KEY", "XLLM_CLUSTER_SECRET", "XLLM_CLUSTER_STORE",
         "XLLM_OPENAI_API_KEY", "ETCD_USERNAME", "ETCD_PASSWORD")
# What torchrun, and other launchers of torch.distributed, say to the processes that they start.
LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "NNODES", "GROUP_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE",
            "TORCHELASTIC_USE_AGENT_STORE")
_STORE_KEY_CHARS = 40  # a key of CURVE, 32 bytes in Z85
_passed_on: dict[str, str] = {}  # what this process's own settings say to its children
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH")


def one_of(name: str, choices: Sequence[str]) -> str | None:
    """A variable that holds one of these words in whichever case: XLLM_LOG, the level of log lines, and
    XLLM_LOG_FORMAT. None: it is not set. Raises ConfigError for another word."""
    found = os.environ.get(name, "").strip().lower()
    if found and found not in choices:
        raise ConfigError(f"the environment variable {name} must be one of {', '.join(choices)}, got {found!r}")
    return found or None


def pass_on_logging(level: str, form: str) -> None:
    """XLLM_LOG and XLLM_LOG_FORMAT for the processes that this one starts (`for_child`)."""
    _passed_on.update(XLLM_LOG=level, XLLM_LOG_FORMAT=form)


def cache_dir() -> Path:
    """XLLM_CACHE: where compiled kernels are kept (default ~/.cache/xllm)."""
    configured = os.environ.get("XLLM_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(configured) if configured else base / "xllm"


def config_dir() -> Path:
    """XDG_CONFIG_HOME: below which this user's own files are kept (default ~/.config/xllm)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "xllm"


def compiled_kernels_allowed() -> bool:
    """XLLM_NO_COMPILED_KERNELS=1: run the CPU backend on plain torch."""
    return os.environ.get("XLLM_NO_COMPILED_KERNELS", "") not in ("1", "true")


def check_integrity() -> bool:
    """XLLM_CHECK=1: audit the KV pool and the scheduler after every step (slow)."""
    return os.environ.get("XLLM_CHECK", "") in ("1", "true")


def check_contracts() -> bool:
    """XLLM_NPU_CHECK=1: check the arguments of every operator of an NPU against its documentation (slow)."""
    return os.environ.get("XLLM_NPU_CHECK", "") in ("1", "true")


def ascend_home() -> Path | None:
    """ASCEND_HOME_PATH: where the CANN toolkit is, once its set_env.sh was sourced."""
    found = os.environ.get("ASCEND_HOME_PATH")
    return Path(found) if found else None


def leave_torch_backends_asleep() -> None:
    """TORCH_DEVICE_BACKEND_AUTOLOAD=0 for this process and its children, unless it is set: with torch_npu installed and
    no CANN, `import torch` fails otherwise. Backends are imported when they are asked for."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def let_openmp_sleep() -> None:
    """GOMP_SPINCOUNT=3000 (a tenth of a millisecond) for this process and its children, unless it or
    OMP_WAIT_POLICY is set: torch's OpenMP threads else spin for milliseconds on cores that others could use. It is read
    when torch is imported: where that has happened, nothing is set."""
    if "torch" not in sys.modules and not openmp_sleeps():
        os.environ["GOMP_SPINCOUNT"] = "3000"


def keep_exchanges_local() -> None:
    """GLOO_SOCKET_IFNAME for this process, unless it is set: ranks of one machine exchange over its loopback, where no
    other machine can reach them."""
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        if loopback is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = loopback


def exchange_interface() -> str:
    """GLOO_SOCKET_IFNAME: over which interface ranks on the CPU exchange; empty: gloo's own choice."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "")


def exchange_variables() -> dict[str, str]:
    """The variables that are set and say how ranks exchange, for `xllm doctor`."""
    prefixes = ("GLOO_", "HCCL_", "NCCL_", "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def hccl_runs_on_vector_cores() -> bool:
    """HCCL_OP_EXPANSION_MODE=AIV: whether Ascend's collectives run as kernels of the vector cores."""
    return os.environ.get("HCCL_OP_EXPANSION_MODE", "").strip().upper().startswith("AIV")


def bound_hccl(seconds: int) -> None:
    """HCCL_EXEC_TIMEOUT for this process, unless it is set: how long Ascend's collectives wait for the other ranks.
    Without it, that is half an hour."""
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(seconds))


def exchange_over(interface: str | None) -> None:
    """GLOO_SOCKET_IFNAME for this process, unless it is set: the network interface by which ranks of several machines
    exchange. None: as gloo chooses."""
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def launcher() -> dict[str, str]:
    """torchrun's variables that are set, as `node_settings.resolve_nodes` reads them."""
    return {name: os.environ[name] for name in LAUNCHER if os.environ.get(name)}


def openmp_sleeps() -> bool:
    """Whether the environment says how long OpenMP's threads wait before they sleep."""
    return "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ


@contextmanager
def openmp_number_unset() -> Iterator[None]:
    """Inside, OMP_NUM_THREADS is not set, for processes that are started there: their settings alone decide."""
    found = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        yield
    finally:
        if found is not None:
            os.environ["OMP_NUM_THREADS"] = found


def failpoints() -> str:
    """XLLM_FAILPOINTS: where this process shall die or fail, for tests (`xllm/kv/failpoints.py`)."""
    return os.environ.get("XLLM_FAILPOINTS", "")


def api_keys() -> tuple[str, ...]:
    """XLLM_API_KEY: keys for `xllm serve`, separated by commas; unlike a flag it does not show in a process list."""
    return _keys("XLLM_API_KEY")


def admin_api_keys() -> tuple[str, ...]:
    """XLLM_ADMIN_API_KEY: the same for --admin-api-key."""
    return _keys("XLLM_ADMIN_API_KEY")


def openai_api_key() -> str | None:
    """XLLM_OPENAI_API_KEY: what a master sends to the servers of --openai-server that have no api-key-file. Raises
    ConfigError, which does not show it, if it is empty or holds blanks."""
    found = os.environ.get("XLLM_OPENAI_API_KEY")
    if found is not None and (not found or not found.isascii() or any(char.isspace() for char in found)):
        raise ConfigError("the environment variable XLLM_OPENAI_API_KEY must be one key")
    return found


def cluster_secret() -> bytes | None:
    """XLLM_CLUSTER_SECRET: what --cluster-secret-file would hold. None: it is not set; set but empty is refused."""
    found = os.environ.get("XLLM_CLUSTER_SECRET")
    return None if found is None else found.encode()


def cluster_store() -> tuple[int, str] | None:
    """XLLM_CLUSTER_STORE, PORT:KEY: the metadata store that another process of this machine serves, as `xllm cluster
    up` tells its instances. None: it is not set. Raises ConfigError, which does not show the key."""
    if (found := os.environ.get("XLLM_CLUSTER_STORE")) is None:
        return None
    port, _, key = found.partition(":")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16 or len(key) != _STORE_KEY_CHARS:
        raise ConfigError("the environment variable XLLM_CLUSTER_STORE must be PORT:KEY, with a port of 127.0.0.1 and "
                          f"a key of {_STORE_KEY_CHARS} characters; `xllm cluster up` sets it for its instances")
    return int(port), key


def etcd_login() -> tuple[str | None, str | None]:
    """ETCD_USERNAME and ETCD_PASSWORD, as upstream's. None: not set, or empty."""
    return os.environ.get("ETCD_USERNAME") or None, os.environ.get("ETCD_PASSWORD") or None


def mistyped_names() -> list[str]:
    """The variables that are set, are none of `NAMES`, and look like one of them."""
    known = [name.removeprefix("XLLM_") for name in NAMES]
    return [name for name in sorted(os.environ) if name.startswith("XLLM_") and name not in NAMES
            and nearest(name.removeprefix("XLLM_"), known)]


def for_child() -> dict[str, str]:
    """This process's environment without API keys and the secrets of the cluster, for a process that it starts and that
    has no callers."""
    found = {name: value for name, value in os.environ.items() if name not in _KEPT}
    return found | _passed_on


def for_untrusted_child() -> dict[str, str]:
    """This process's environment for a process that works on what strangers send: nothing that may be a secret."""
    return {name: value for name, value in for_child().items() if not _SECRET.search(name.upper())}


def for_instance(*, secret: str, port: int, key: str, api_key: str, log_level: str | None) -> dict[str, str]:
    """This process's environment for an `xllm serve` of a cluster with this secret, whose metadata store is served at
    that port with that key; its own HTTP API takes `api_key` alone. log_level: None: as the environment says, or info,
    whatever that of this process is."""
    return for_child() | {"XLLM_CLUSTER_SECRET": secret, "XLLM_CLUSTER_STORE": f"{port}:{key}", "XLLM_API_KEY": api_key,
                          "XLLM_LOG": log_level or os.environ.get("XLLM_LOG") or "info"}


def with_api_key(key: str) -> dict[str, str]:
    """This process's environment, for a server that takes this key alone."""
    return {name: value for name, value in os.environ.items() if name != "XLLM_ADMIN_API_KEY"} | {"XLLM_API_KEY": key}


def _keys(name: str) -> tuple[str, ...]:
    """Set but empty is not the same as not set: the former gives an empty key, which the server refuses."""
    value = os.environ.get(name)
    return () if value is None else tuple(value.split(","))
