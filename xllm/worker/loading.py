"""`LoadedModel`: backend, checkpoint and settings of a worker, and the runners that are made of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from xllm import env
from xllm.config import EngineConfig
from xllm.errors import ConfigError, DeviceError, ModelError, shown_error
from xllm.json_setting import parse_object
from xllm.parallel.seat import ALONE_SEAT, Seat
from xllm.pooling import PoolingDefaults
from xllm.processor import processor_name
from xllm.progress import Progress
from xllm.sizes import resolve_amount
from xllm.worker.messages import Placement

if TYPE_CHECKING:
    import torch

    from backends.backend import Backend
    from xllm.layers.adapter_slots import AdapterSlots
    from xllm.models.causal_lm import CausalLM
    from xllm.models.embedding_modules import EmbeddingModules
    from xllm.models.fp8_format import Fp8Format
    from xllm.models.model_config import ModelConfig
    from xllm.models.overrides import Overrides
    from xllm.runner.model_runner import ModelRunner
    from xllm.worker.memory_plan import MemoryPlan

_log = logging.getLogger(__name__)

# For all ranks to have read their weights. Chosen: longer than a slow disk takes; a rank that ends meanwhile is noticed
# by the engine, which ends the others.
READ_S = 3600.0
READING = "weights that were read"


class LoadedModel:
    """A loaded checkpoint and the backend that it runs on; makes runners of it. path, model_config, config (resolved),
    num_blocks and backend are what loading found out. All methods are called in the thread that runs the steps."""

    def __init__(self, config: EngineConfig, report: Progress, seat: Seat = ALONE_SEAT):
        """Import torch, choose the backend, meet the ranks that share the model, read this one's share of it.

        Raises:
            ConfigError, ModelError, DeviceError: what is wrong with setting, checkpoint or device.
        """
        from backends.cpu.threads import RunDelays, ThreadControl
        from xllm.hub import resolve_model_path
        from xllm.models.model_registry import read_model_config
        from xllm.runner.kv_cache import cache_dtype, compute_dtype
        from xllm.worker.memory_plan import MemoryPlan

        num_threads = _take_threads(config)
        self._report = report
        self.backend = _open_backend(config, seat)
        self.path = resolve_model_path(config.model.model, config.model.revision)
        self.model_config = read_model_config(self.path, _overrides(config))
        _check_special_ops(self.backend, self.model_config, config)
        self._slow_ops = _check_ops(self.backend, config.device.strict_ops, self.model_config.special_ops)
        limit = _length_limit(config, self.model_config)
        self.config = _with_text_length(config, self.path, limit).resolve(
            model_max_len=limit, default_block_size=self.backend.default_block_size)
        self._dtype = compute_dtype(self.config, self.backend, self.model_config)
        _check_expert_graphs(self.backend, self.model_config, self.config, self._dtype)
        self._warn_of_slow_dtype()
        kv_dtype = cache_dtype(self.config, self.backend, self.model_config)
        self.threads = ThreadControl(num_threads, self._set_threads, RunDelays() if self._is_adaptive else None)
        self.embedding = self._read_embedding()
        memory = MemoryPlan(self.config, self.backend, self.path, self.model_config, dtype=self._dtype,
                            kv_dtype=kv_dtype, kept=self._kept_fp8)
        memory.check()  # what cannot fit is said before the weights are read
        self._join(seat)
        self.adapters = self._make_adapter_slots()
        self._model: CausalLM | None = self._read()
        self.num_blocks = memory.num_blocks(self.config)
        self.placement = self._describe(memory, kv_dtype)

    @property
    def generates(self) -> bool:
        """Whether the model that was read has a head."""
        return self._model is None or self._model.generates

    @property
    def _is_adaptive(self) -> bool:
        return self.config.device.adaptive_threads and self.backend.computes_on_host

    def _set_threads(self, number: int) -> None:
        """Set how many threads steps use. Where torch's threads would spin for milliseconds after each of its few
        operators beside ours, torch gets one."""
        import torch

        torch_spins = self._dtype is torch.float32 and self.backend.computes_on_host and not env.openmp_sleeps()
        self.backend.set_num_threads(number, torch_number=1 if torch_spins else number)

    def make_runner(self) -> ModelRunner:
        """Make a runner with empty KV caches and warm it up. Reads the weights again if they were dropped."""
        from xllm.runner.model_runner import ModelRunner

        if self._model is None:
            self._model = self._read()
        runner = ModelRunner(self.config, self.backend, self._model, self.num_blocks, self.adapters,
                             self.embedding.layers, self.parallel.tp)
        self._report("warm-up", 0.0)
        runner.warm_up()
        self._report("ready", 1.0)
        return runner

    def free(self, *, keep_weights: bool) -> None:
        """Free the memory that no runner uses any more; with `keep_weights` False the weights too."""
        if not keep_weights:
            self._model = None
            if self.adapters is not None:
                self.adapters.forget_layers()
        self.backend.release_memory()

    def _join(self, seat: Seat) -> None:
        """Meet the ranks that share the model, if it is shared."""
        device = self.config.device
        self.parallel = seat.join(self.backend, device.tensor_parallel_size, captures=device.graph_mode == "auto")
        if device.tensor_parallel_size > 1:
            self.config = self._with_equal_graph_memory()

    def _make_adapter_slots(self) -> AdapterSlots | None:
        if not self.config.lora.is_on:
            return None
        from xllm.layers.adapter_slots import AdapterSlots

        return AdapterSlots(self.backend.ops, num_slots=self.config.lora.max_loras, dtype=self._dtype,
                            device=self.backend.device)

    def _describe(self, memory: MemoryPlan, kv_dtype: torch.dtype) -> Placement:
        import torch

        block_size = self.config.cache.block_size
        assert block_size is not None, "a resolved config says it"
        return Placement(device=self.backend.name, device_name=_device_name(self.backend), dtype=_name(self._dtype),
                         kv_dtype=_name(kv_dtype),
                         num_threads=torch.get_num_threads() if self.backend.computes_on_host else 0,
                         weights_bytes=memory.need.weights, kv_bytes=self.num_blocks * memory.block_bytes,
                         kv_token_bytes=memory.block_bytes // block_size, advice=self._advice())

    def _with_equal_graph_memory(self) -> EngineConfig:
        """The config with as much memory for graphs as the poorest rank has: all must keep and drop the same ones, as
        exchanges are in them."""
        import torch

        device = self.config.device
        own = resolve_amount("graph_memory", device.graph_memory, self.backend.available_memory_bytes())
        least = -int(self.parallel.tp.all_reduce_max(torch.tensor([-own], device=self.backend.device)).item())
        return replace(self.config, device=replace(device, graph_memory=str(least)))

    def leave(self) -> None:
        """Leave the group of the ranks that share the model. The last that is done here."""
        self.parallel.tp.close()

    @property
    def _kept_fp8(self) -> Fp8Format | None:
        """The form of the checkpoint's fp8 where products keep it."""
        fp8, takes_it = self.model_config.fp8, self.backend.takes_scaled_weights
        return fp8 if fp8 is not None and fp8.is_kept(self.config.model.quantization, takes_it) else None

    def _warn_of_slow_dtype(self) -> None:
        backend, name = self.backend, _name(self._dtype)
        if self._dtype in backend.kernel_dtypes:
            return
        own = " or ".join(map(_name, backend.kernel_dtypes))
        _log.warning("dtype %s is slow on this device: %s's own kernels compute in %s only, so that operators come "
                     "from plain torch, whatever %s arithmetic the processor has (docs/performance.md). It saves "
                     "memory and nothing else: --dtype %s is faster, and with --quantization w8a8 or int8 smaller as "
                     "well", name, backend.name, own, name, own)

    def _advice(self) -> str:
        """What would be faster here, measured; empty where nothing is known. See docs/performance.md."""
        is_quantised = self.config.model.quantization is not None or self._kept_fp8 is not None
        is_plain = not is_quantised and self._dtype in self.backend.kernel_dtypes
        return self.backend.quantization_advice if is_plain and not self._slow_ops else ""

    def _read_embedding(self) -> EmbeddingModules:
        from xllm.models.embedding_modules import EmbeddingModules, read_embedding_modules

        setting, width = self.config.model.pooling_type, self.model_config.hidden_size
        if self.config.model.load_format == "dummy" and setting == "auto":
            return EmbeddingModules(defaults=PoolingDefaults(width=width))
        return read_embedding_modules(self.path, setting, width)

    def _read(self) -> CausalLM:
        """Read the weights; returns once all ranks have read theirs, as what follows may take an exchange's time only.
        Raises ModelError where another one could not."""
        try:
            loaded = self._read_own()
        except Exception as error:
            self.parallel.tp.cast(READING, shown_error(error))
            raise
        for rank, reason in enumerate(self.parallel.tp.vote(READING, "", READ_S)):
            if reason:
                raise ModelError(f"worker rank {rank}: {reason}")
        return loaded

    def _read_own(self) -> CausalLM:
        from xllm.layers.workspace import Workspace
        from xllm.models.checkpoint_mark import change_mark, check_same_contents
        from xllm.models.loader import load_model

        model = self.config.model
        is_eager_host = self.backend.computes_on_host and self.config.device.graph_mode != "checked"
        self._report("weights", 0.0)
        before = change_mark(self.path)
        check_same_contents(self.path, self.parallel.tp, self.backend.device)
        loaded = load_model(self.path, config=self.model_config, backend=self.backend, dtype=self._dtype,
                            quantization=model.quantization,
                            max_model_len=model.max_model_len, load_format=model.load_format, adapters=self.adapters,
                            parallel=self.parallel, workspace=Workspace() if is_eager_host else None,
                            progress=lambda done, total: self._report("weights", done / max(total, 1)))
        if self.parallel.tp.size > 1 and change_mark(self.path) != before:  # another rank may have read others
            raise ModelError(f"the files in {self.path} changed while they were read")
        if self.adapters is not None:
            self.adapters.apply()
        return loaded


def _overrides(config: EngineConfig) -> Overrides:
    from xllm.models.overrides import Overrides

    return Overrides(members=parse_object("hf_overrides", config.model.hf_overrides) or {},
                     rope_scaling=parse_object("rope_scaling", config.model.rope_scaling))


def _with_text_length(config: EngineConfig, path: Path, limit: int) -> EngineConfig:
    """The config with `max_model_len` set to what sentence-transformers would read of a text, if it is not set: longer
    texts are then refused rather than cut."""
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


def _take_threads(config: EngineConfig) -> int:
    """Give torch its threads; returns how many. It knows OMP_NUM_THREADS and the processors, but neither a container's
    share of them nor the other workers."""
    import torch

    from backends.control_groups import usable_cpus

    share = max(1, usable_cpus() // config.workers_a_node)
    num_threads = config.device.num_threads or min(torch.get_num_threads(), share)
    torch.set_num_threads(num_threads)
    return num_threads


def _open_backend(config: EngineConfig, seat: Seat) -> Backend:
    """Raises DeviceError, or ConfigError where each of several engines would need a card."""
    from backends import get_backend
    from backends.backend import BackendError

    place = seat.place(config.ranks_a_node if config.device.tensor_parallel_size > 1 else 1)
    try:
        backend = get_backend(config.device.device, cache_dir=env.cache_dir(), compiled=env.compiled_kernels_allowed(),
                              check_contracts=env.check_contracts(), place=place)
    except BackendError as error:
        raise DeviceError(str(error)) from error
    if config.device.data_parallel_size > 1 and not backend.computes_on_host:
        raise ConfigError(f"data_parallel_size {config.device.data_parallel_size}: several engines share a CPU; a "
                          f"card for each of them is not built yet, and the device is {backend.name}. Run a "
                          "server a card behind a balancer")
    return backend


def _device_name(backend: Backend) -> str:
    return processor_name() if backend.computes_on_host else backend.describe()["device"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_ops(backend: Backend, strict: bool | None, special_ops: frozenset[str]) -> list[str]:
    """List the hot operators that the backend takes from the reference (slow), and log them. Raises ConfigError instead
    with `strict`. special_ops: of the model."""
    from backends.opset import COLD_OPS, SPECIAL_OPS
    from backends.reference import REFERENCE

    unused = COLD_OPS | (SPECIAL_OPS - special_ops)
    slow = [name for name in backend.ops.inherited_from(REFERENCE) if name not in unused]
    if not slow:
        return slow
    message = f"{backend.name} takes these operators from the slow reference: {', '.join(slow)}"
    if backend.strict_ops if strict is None else strict:
        raise ConfigError(f"{message}. --no-strict-ops allows it")
    _log.warning(message)
    return slow


def _check_special_ops(backend: Backend, model: ModelConfig, config: EngineConfig) -> None:
    """Raise ConfigError for a model with latents on a strict device that takes their operators from the reference: that
    knows the CPU's layout of the KV cache only, so that nothing allows it. A launch whose lengths the host gives has
    those of a few queries a sequence, so that a graph of longer chunks would have more of them in one step than in
    another; a CPU's chooses by the lengths what it does for longer chunks."""
    from backends.cpu.latent import FEW
    from backends.opset import LATENT_OPS
    from backends.reference import REFERENCE

    latent_ops = model.special_ops & LATENT_OPS
    slow = sorted(latent_ops.intersection(backend.ops.inherited_from(REFERENCE)))
    if slow and backend.strict_ops:
        raise ConfigError(f"{model.architecture} is not built for {backend.name} yet, which lacks "
                          f"{' and '.join(slow)}; it runs with --device cpu")
    if latent_ops and backend.computes_on_host and config.device.graph_mode == "checked":
        for setting, num_queries in (("graph_max_prefill_tokens", config.device.graph_max_prefill_tokens),
                                     ("num_speculative_tokens", 1 + config.speculative.num_speculative_tokens)):
            if num_queries > FEW:
                raise ConfigError(f"{setting} with graph_mode checked: graphs of {model.architecture} with more than "
                                  f"{FEW} tokens of a sequence are not built for {backend.name}")
    if (latent_ops and config.device.graph_max_prefill_tokens and config.device.graph_mode == "auto"
            and backend.capturer is not None and not backend.capturer.plans_in_graph):
        raise ConfigError(f"graph_max_prefill_tokens {config.device.graph_max_prefill_tokens}: graphs of chunks of "
                          f"{model.architecture} are not built for {backend.name}")


def _check_expert_graphs(backend: Backend, model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> None:
    """Raise ConfigError where a CPU's experts are products of torch, one for each expert that a step hits, which no
    graph can hold: the compiled kernels know fp32 alone."""
    import torch

    if (backend.computes_on_host and config.device.graph_mode == "checked" and model.experts_a_token
            and (dtype != torch.float32 or backend.describe().get("kernels") == "plain torch")):
        raise ConfigError(f"graph_mode checked: graphs of experts in {_name(dtype)} are not built for {backend.name}")
