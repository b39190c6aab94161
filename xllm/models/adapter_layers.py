"""`read_layers`: evaluates an `adapter_config.json` for each layer, in a process beside this one.

Its members that choose layers are expressions of Python's `re`. Matching one can take for ever, and stops every other
thread meanwhile: `python -m xllm.models.adapter_layers` does it within the kernel's limits on CPU time and memory. JSON
on stdin and stdout.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm import env
from xllm.child_process import run_module
from xllm.errors import ModelError
from xllm.model_files import ADAPTER_CONFIG, as_object
from xllm.models.adapter_config import AdapterConfig

CPU_S = 2  # of CPU time for one adapter. Chosen: real configs take milliseconds after the start
MEMORY_BYTES = 2**29  # of address space. Chosen: Python and its imports need a small part of it
WALL_TIMEOUT_S = 60.0  # for a disk that does not answer. Chosen: far longer than CPU_S on a busy machine
MAX_CONFIG_BYTES = 2**20  # of adapter_config.json. Chosen: real ones have some KB


@dataclass(frozen=True, slots=True)
class AdapterLayer:
    """is_target: whether PEFT would adapt it. scale: of B @ A."""

    is_target: bool
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class AdapterLayers:
    """says_targets: whether the file names the layers that are adapted; else its tensors alone do. digest: of the
    file."""

    says_targets: bool
    layers: Mapping[str, AdapterLayer]
    digest: str


def read_layers(folder: Path, names: Sequence[str]) -> AdapterLayers:
    """What the folder's adapter_config.json says of the layers `names`. Takes WALL_TIMEOUT_S at most; other threads run
    meanwhile. Raises ModelError."""
    file = folder / ADAPTER_CONFIG
    process = subprocess.Popen([sys.executable, *run_module("xllm.models.adapter_layers")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                               env=env.for_untrusted_child())
    with process:
        try:
            answer, _ = process.communicate(json.dumps([str(file), list(names)]).encode(), WALL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ModelError(f"{file} cannot be read within {WALL_TIMEOUT_S:g} s") from None
        finally:
            process.kill()
    if process.returncode == -signal.SIGXCPU:
        raise ModelError(f"{file}: its expressions (target_modules, exclude_modules, layers_pattern, rank_pattern, "
                         f"alpha_pattern) take more than {CPU_S} s")
    if not answer:
        raise ModelError(f"{file} needs more than {MEMORY_BYTES} bytes of memory to be read")
    found = json.loads(answer)
    if "error" in found:
        raise ModelError(found["error"])
    layers = {name: AdapterLayer(*said) for name, said in zip(names, found["layers"], strict=True)}
    return AdapterLayers(says_targets=found["says_targets"], layers=layers, digest=found["digest"])


def main() -> None:
    path, names = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    soft_s = math.ceil(time.process_time() + CPU_S)
    resource.setrlimit(resource.RLIMIT_CPU, (soft_s, resource.RLIM_INFINITY))
    try:
        found = _read(Path(path), names)
    except ModelError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found))


def _read(file: Path, names: list[str]) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:  # of a disk, or of another process that writes the file just now
            content = opened.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ModelError(f"{file} is larger than {MAX_CONFIG_BYTES} bytes; no such file is")
    config = AdapterConfig(as_object(file, content), file)
    layers = [(config.targets(name), config.rank(name), config.scale(name)) for name in names]
    return {"says_targets": config.says_targets, "layers": layers,
            "digest": hashlib.blake2b(content, digest_size=16).hexdigest()}


if __name__ == "__main__":
    main()
