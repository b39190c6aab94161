"""`LoadedModel`: backend, checkpoint and settings of a worker, and the runners that are made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from xllm import env
from xllm.config import EngineConfig, parse_object
from xllm.errors import ConfigError, DeviceError
from xllm.pooling import PoolingDefaults

if TYPE_CHECKING:
    from backends.backend import Backend
    from xllm.layers.adapters import AdapterSlots
    from xllm.models.causal_lm import CausalLM
    from xllm.models.config import ModelConfig
    from xllm.models.embedding_modules import EmbeddingModules
    from xllm.models.overrides import Overrides
    from xllm.runner.model_runner import ModelRunner

_log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]  # phase, share of it that is done


class LoadedModel:
    """path, model_config, config (resolved), num_blocks, backend: what loading found out. All methods are called in the
    thread that runs the steps."""

    def __init__(self, config: EngineConfig, report: Progress):
        """Import torch, choose the backend, read the checkpoint.

        Raises:
            ConfigError, ModelError, DeviceError: what is wrong with setting, checkpoint or device.
        """
        import torch

        from backends.control_groups import usable_cpus
        from backends.cpu_threads import RunDelays, ThreadControl
        from xllm.hub import resolve_model_path
        from xllm.models.registry import read_model_config
        from xllm.runner.kv_cache import cache_dtype, compute_dtype, plan_num_blocks

        # torch knows OMP_NUM_THREADS and the processors, but neither a container's share of them nor the other ranks.
        share = max(1, usable_cpus() // config.device.worker_ranks)
        num_threads = config.device.num_threads or min(torch.get_num_threads(), share)
        torch.set_num_threads(num_threads)
        self._report = report
        self.backend = _open_backend(config)
        self.path = resolve_model_path(config.model.model, config.model.revision)
        self.model_config = read_model_config(self.path, _overrides(config))
        limit = _length_limit(config, self.model_config)
        self.config = _with_text_length(config, self.path, limit).resolve(
            model_max_len=limit, default_block_size=self.backend.default_block_size)
        self._dtype = compute_dtype(self.config, self.backend, self.model_config)
        kv_dtype = cache_dtype(self.config, self.backend, self.model_config)
        self.threads = ThreadControl(num_threads, self._set_threads, RunDelays() if self._is_adaptive else None)

        def plan() -> int:
            return plan_num_blocks(self.config, self.backend, self.model_config.kv_specs, kv_dtype)

        self.embedding = self._read_embedding()
        plan()  # what cannot fit even without the weights is said before they are read
        self.adapters: AdapterSlots | None = None
        if self.config.lora.is_on:
            from xllm.layers.adapters import AdapterSlots

            self.adapters = AdapterSlots(self.backend.ops, num_slots=self.config.lora.max_loras, dtype=self._dtype,
                                         device=self.backend.device)
        self._model: CausalLM | None = self._read()
        self.num_blocks = plan()

    @property
    def generates(self) -> bool:
        """Whether the model that was read has a head."""
        return self._model is None or self._model.generates

    @property
    def _is_adaptive(self) -> bool:
        return self.config.device.adaptive_threads and self.backend.device.type == "cpu"

    def _set_threads(self, number: int) -> None:
        """For steps. Where torch's threads would spin for milliseconds after each of its few operators beside ours, it
        gets one."""
        import torch

        torch_spins = self._dtype is torch.float32 and self.backend.device.type == "cpu" and not env.openmp_sleeps()
        self.backend.set_num_threads(number, torch_number=1 if torch_spins else number)

    def make_runner(self) -> ModelRunner:
        """One with empty KV caches, warmed up. Reads the weights again if they were dropped."""
        from xllm.runner.model_runner import ModelRunner

        if self._model is None:
            self._model = self._read()
        runner = ModelRunner(self.config, self.backend, self._model, self.num_blocks, self.adapters,
                             self.embedding.layers)
        self._report("warm-up", 0.0)
        runner.warm_up()
        self._report("ready", 1.0)
        return runner

    def free(self, *, keep_weights: bool) -> None:
        """Give back what no runner uses any more."""
        if not keep_weights:
            self._model = None
            if self.adapters is not None:
                self.adapters.forget_layers()
        self.backend.release_memory()

    def _read_embedding(self) -> EmbeddingModules:
        from xllm.models.embedding_modules import EmbeddingModules, read_embedding_modules

        setting, width = self.config.model.pooling_type, self.model_config.hidden_size
        if self.config.model.load_format == "dummy" and setting == "auto":
            return EmbeddingModules(defaults=PoolingDefaults(width=width))
        return read_embedding_modules(self.path, setting, width)

    def _read(self) -> CausalLM:
        from xllm.models.loader import load_model

        model = self.config.model
        self._report("weights", 0.0)
        loaded = load_model(self.path, config=self.model_config, backend=self.backend, dtype=self._dtype,
                            quantization=model.quantization,
                            max_model_len=model.max_model_len, load_format=model.load_format, adapters=self.adapters,
                            progress=lambda done, total: self._report("weights", done / max(total, 1)))
        if self.adapters is not None:
            self.adapters.apply()
        return loaded


def _overrides(config: EngineConfig) -> Overrides:
    from xllm.models.overrides import Overrides

    return Overrides(members=parse_object("hf_overrides", config.model.hf_overrides) or {},
                     rope_scaling=parse_object("rope_scaling", config.model.rope_scaling))


def _with_text_length(config: EngineConfig, path: Path, limit: int) -> EngineConfig:
    """Where nobody says `max_model_len`: longer texts than sentence-transformers would read whole are refused."""
    from xllm.models.embedding_modules import max_text_tokens

    model = config.model
    if model.max_model_len is not None or model.load_format == "dummy":
        return config
    length = max_text_tokens(path, model.pooling_type)
    if length is None or length >= limit:
        return config
    _log.info("the longest text is %d tokens, as the checkpoint's max_seq_length says; --max-model-len allows more",
              length)
    return replace(config, model=replace(model, max_model_len=length + 1))  # a prompt and one token, as everywhere


def _length_limit(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence to allow. Raises ConfigError for one whose result would not be what transformers has."""
    asked, exact = config.model.max_model_len, model.exact_model_len
    if config.model.allow_inexact_rope or exact == model.max_model_len:
        return model.max_model_len
    if asked is None:
        _log.warning("the longest sequence is %d tokens and not %d: beyond that, the checkpoint's rope type rotates a "
                     "token by how many follow it, which no KV cache can follow. --allow-inexact-rope allows it", exact,
                     model.max_model_len)
    elif exact < asked <= model.max_model_len:
        raise ConfigError(f"max_model_len {asked}: beyond {exact} tokens the checkpoint's rope type rotates a token by "
                          "how many follow it, which no KV cache can follow. --allow-inexact-rope allows it")
    return exact


def _open_backend(config: EngineConfig) -> Backend:
    from backends import get_backend
    from backends.backend import BackendError

    try:
        backend = get_backend(config.device.device, cache_dir=env.cache_dir(), compiled=env.compiled_kernels_allowed(),
                              check_contracts=env.check_contracts())
    except BackendError as error:
        raise DeviceError(str(error)) from error
    _check_ops(backend, config.device.strict_ops)
    return backend


def _check_ops(backend: Backend, strict: bool | None) -> None:
    """No silent slow path: say which hot operators come from the reference, or refuse (`strict_ops`)."""
    from backends.opset import COLD_OPS
    from backends.reference import REFERENCE

    slow = [name for name in backend.ops.inherited_from(REFERENCE) if name not in COLD_OPS]
    if not slow:
        return
    message = f"{backend.name} takes these operators from the slow reference: {', '.join(slow)}"
    if strict or (strict is None and backend.name != "cpu"):
        raise ConfigError(f"{message}. --no-strict-ops allows it")
    _log.warning(message)
