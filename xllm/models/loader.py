"""From a model's name to a `CausalLM` in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from backends.backend import Backend
from xllm.errors import ConfigError
from xllm.layers.adapter_slots import AdapterSlots
from xllm.layers.layer_context import LayerContext
from xllm.layers.workspace import Workspace
from xllm.models.causal_lm import CausalLM
from xllm.models.dummy_weights import DummyWeights
from xllm.models.model_config import ModelConfig
from xllm.models.model_registry import family_of, read_model_config
from xllm.models.weights import ReadProgress, WeightSource
from xllm.parallel.parallel_context import ONE_RANK, ParallelContext

log = logging.getLogger(__name__)


def load_model(
    path: Path,
    *,
    config: ModelConfig | None = None,
    backend: Backend,
    dtype: torch.dtype,
    quantization: str | None = None,
    max_model_len: int | None = None,
    load_format: str = "auto",
    adapters: AdapterSlots | None = None,
    parallel: ParallelContext = ONE_RANK,
    progress: ReadProgress | None = None,
    workspace: Workspace | None = None,
) -> CausalLM:
    """Build the model of a checkpoint folder on the backend's device, its weights converted to `dtype`.

    config: the folder's own, if it has been read.
    quantization: applied to every matrix product, lm_head included; the embedding table keeps `dtype`. A checkpoint's
        own fp8 is kept where that is None or "fp8" and the backend takes it, and made plain first otherwise.
    load_format: "dummy" reads config.json alone and takes random weights.
    adapters: told of every layer that adapters may change; None: there will be none.
    max_model_len: positions are below it; None: the checkpoint's own limit.
    parallel: this process reads and holds its rank's share only; all ranks load at the same time.
    workspace: see `LayerContext`.
    Raises:
        ModelError: the checkpoint cannot be used.
        ConfigError: `max_model_len` is beyond the checkpoint's limit, the backend lacks `quantization`, or the model
            cannot be spread over so many ranks.
    """
    config = config or read_model_config(path)
    keeps_fp8 = config.fp8 is not None and config.fp8.is_kept(quantization, backend.takes_scaled_weights)
    context = LayerContext(ops=backend.ops, device=backend.device, max_model_len=_checked_len(config, max_model_len),
                           parallel=parallel, quantization=None if keeps_fp8 else quantization, adapters=adapters,
                           workspace=workspace)
    family = family_of(config.architecture)
    if load_format == "dummy":
        return family.build(context, config, DummyWeights(dtype=dtype, device=backend.device))
    with WeightSource(path, dtype=dtype, device=backend.device, progress=progress, fp8=config.fp8,
                      keeps_fp8=keeps_fp8) as weights:
        model = family.build(context, config, weights)
        weights.check_all_taken()
    return model


def _checked_len(config: ModelConfig, max_model_len: int | None) -> int:
    num_positions = config.max_model_len if max_model_len is None else max_model_len
    if not 1 <= num_positions <= config.max_model_len:
        raise ConfigError(f"max_model_len {num_positions} is outside what the model allows (1 to "
                          f"{config.max_model_len})")
    return num_positions
