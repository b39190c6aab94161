"""`origin_of`: what the cost model of a loaded engine holds for."""

from __future__ import annotations

import hashlib
from pathlib import Path

from xllm.config import EngineConfig
from xllm.cost.cost_file import CostOrigin
from xllm.model_files import read_bounded
from xllm.version import __version__
from xllm.worker.messages import Loaded


def origin_of(loaded: Loaded) -> CostOrigin:
    """Reads the checkpoint's config.json, which its engine has read before."""
    config, placed = loaded.config, loaded.placement
    return CostOrigin(version=__version__, model=config.model.model or "bundled",
                  config=_digest(Path(loaded.model_path), config), quantization=config.model.quantization,
                  device=placed.device, device_name=placed.device_name, dtype=placed.dtype, kv_dtype=placed.kv_dtype,
                  num_threads=placed.num_threads, tensor_parallel_size=config.device.tensor_parallel_size)


def _digest(folder: Path, config: EngineConfig) -> str:
    """Of what decides how much there is to compute. Weights do not: those of one config cost the same."""
    state = hashlib.blake2b(read_bounded(folder / "config.json"), digest_size=16)
    state.update((config.model.hf_overrides or "").encode())
    return state.hexdigest()
