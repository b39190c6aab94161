"""`EngineConfig`: every setting of the engine, as a tree of frozen keyword-only dataclasses.

The command line and the settings table in the docs are generated from the fields: name, type,
default, help and aliases stand here and nowhere else. `resolve()` fills derived values once.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from xllm.errors import ConfigError


def option(default: Any, help: str, *, aliases: tuple[str, ...] = (), choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with what the command line needs. `aliases`: other engines' names for it."""
    return field(default=default, metadata={"help": help, "aliases": aliases, "choices": choices})


POLICIES = ("fcfs", "priority", "deadline", "sjf", "prefill-first", "decode-first", "online-first")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    model: str | None = option(None, "local folder or Hub id; none: the bundled demo model")
    tokenizer: str | None = option(None, "folder or Hub id of the tokenizer, if it is not the model's")
    dtype: str = option("auto", "compute type; auto: the device's best for this checkpoint", choices=DTYPES)
    quantization: str | None = option(None, "quantise weights while loading", choices=("int8",))
    max_model_len: int | None = option(None, "longest sequence, prompt and output; none: the model's own limit")
    seed: int = option(0, "seed for requests that bring none", aliases=("random_seed",))
    skip_tokenizer_init: bool = option(False, "token ids in and out; no tokenizer is loaded")
    revision: str | None = option(None, "branch, tag or commit on the Hub")


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    block_size: int | None = option(None, "tokens per KV block; none: the device's own (CPU 16)")
    num_kv_blocks: int | None = option(None, "KV blocks, instead of a share of memory",
                                       aliases=("num_gpu_blocks_override",))
    kv_cache_memory_bytes: int | None = option(None, "bytes for the KV cache, instead of a share of memory",
                                               aliases=("max_cache_size",))
    gpu_memory_utilization: float = option(0.9, "share of free device memory for the KV cache (CPU: half of it)",
                                           aliases=("max_memory_utilization",))
    enable_prefix_caching: bool = option(True, "reuse the KV blocks of shared prefixes",
                                         aliases=("enable_prefix_cache",))
    watermark: float = option(0.02, "share of blocks that admission leaves free, against preemption")


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    max_num_seqs: int = option(256, "sequences that run at once", aliases=("max_seqs_per_batch",))
    max_num_batched_tokens: int | None = option(None, "tokens computed in one step; none: 2048 with chunked prefill, "
                                                "else the longest sequence", aliases=("max_tokens_per_batch",))
    enable_chunked_prefill: bool = option(True, "split long prompts over several steps")
    long_prefill_token_threshold: int = option(0, "longest prefill chunk of one sequence; 0: no limit",
                                               aliases=("max_tokens_per_chunk_for_prefill",))
    scheduling_policy: str = option("fcfs", "who goes first", aliases=("priority_strategy",), choices=POLICIES)
    online_preempts_offline: bool = option(True, "running offline requests give way to waiting online ones",
                                           aliases=("enable_online_preempt_offline",))
    async_scheduling: bool = option(True, "schedule the next step while the device runs this one",
                                    aliases=("enable_schedule_overlap",))
    max_waiting_requests: int = option(100_000, "requests in the queue; more are refused",
                                       aliases=("request_queue_size",))


@dataclass(frozen=True, kw_only=True)
class SpeculativeSettings:
    speculative_method: str | None = option(None, "proposer of draft tokens", aliases=("speculative_algorithm",),
                                            choices=("ngram",))
    num_speculative_tokens: int = option(0, "draft tokens per step; 0 with a method: 4")
    prompt_lookup_max: int = option(4, "longest suffix that the n-gram proposer looks up")
    prompt_lookup_min: int = option(2, "shortest such suffix")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "npu"),
                         aliases=("backend", "devices"))
    num_threads: int | None = option(None, "CPU threads; none: one per core")
    strict_ops: bool | None = option(None, "refuse to run an operator that the device inherits from the reference; "
                                     "none: yes on cuda and npu")
    tensor_parallel_size: int = option(1, "devices that share one model", aliases=("tp_size",))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All settings of one engine. Make it with `from_flat`, complete it with `resolve`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    speculative: SpeculativeSettings = field(default_factory=SpeculativeSettings)
    device: DeviceSettings = field(default_factory=DeviceSettings)

    @classmethod
    def from_flat(cls, **settings: Any) -> EngineConfig:
        """Build the tree from flat names (aliases too). Unknown names raise ConfigError with the nearest one."""
        return build_tree(cls, settings)

    def resolve(self, *, model_max_len: int, default_block_size: int) -> EngineConfig:
        """The same tree with every derived value filled in and every pair of settings checked.

        model_max_len: the longest sequence that the checkpoint allows.
        Raises ConfigError, naming the setting, for a value or a pair that cannot work.
        """
        max_model_len = self.model.max_model_len or model_max_len
        if max_model_len > model_max_len:
            raise ConfigError(f"max_model_len {max_model_len} is longer than the model allows ({model_max_len})")
        chunked = self.scheduler.enable_chunked_prefill
        max_tokens = self.scheduler.max_num_batched_tokens or (2048 if chunked else max(2048, max_model_len))
        resolved = dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, max_model_len=max_model_len),
            cache=dataclasses.replace(self.cache, block_size=self.cache.block_size or default_block_size),
            scheduler=dataclasses.replace(self.scheduler, max_num_batched_tokens=max_tokens),
            speculative=self._resolve_speculative(),
        )
        check(resolved)
        return resolved

    def _resolve_speculative(self) -> SpeculativeSettings:
        s = self.speculative
        if s.speculative_method is None and s.num_speculative_tokens:
            return dataclasses.replace(s, speculative_method="ngram")
        if s.speculative_method and not s.num_speculative_tokens:
            return dataclasses.replace(s, num_speculative_tokens=4)
        return s


def check(config: EngineConfig) -> None:
    """Refuse values and pairs that cannot work; the message names the setting."""
    c, s, spec = config.cache, config.scheduler, config.speculative
    assert config.model.max_model_len and c.block_size and s.max_num_batched_tokens, "resolve() first"
    _at_least("max_model_len", config.model.max_model_len, 2)
    _at_least("block_size", c.block_size, 1)
    _at_least("max_num_seqs", s.max_num_seqs, 1)
    _at_least("max_num_batched_tokens", s.max_num_batched_tokens, 1)
    _at_least("max_waiting_requests", s.max_waiting_requests, 1)
    _at_least("long_prefill_token_threshold", s.long_prefill_token_threshold, 0)
    _at_least("num_speculative_tokens", spec.num_speculative_tokens, 0)
    _at_least("prompt_lookup_min", spec.prompt_lookup_min, 1)
    for name, value in (("num_kv_blocks", c.num_kv_blocks), ("kv_cache_memory_bytes", c.kv_cache_memory_bytes),
                        ("num_threads", config.device.num_threads)):
        if value is not None:
            _at_least(name, value, 1)
    if not 0.0 <= c.watermark < 0.5:
        raise ConfigError(f"watermark must be in [0, 0.5), got {c.watermark}")
    if not 0.0 < c.gpu_memory_utilization <= 1.0:
        raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {c.gpu_memory_utilization}")
    if not s.enable_chunked_prefill and s.max_num_batched_tokens < config.model.max_model_len:
        raise ConfigError(f"without chunked prefill max_num_batched_tokens ({s.max_num_batched_tokens}) must be at "
                          f"least max_model_len ({config.model.max_model_len})")
    if spec.prompt_lookup_min > spec.prompt_lookup_max:
        raise ConfigError("prompt_lookup_min must not be larger than prompt_lookup_max")
    if s.max_num_batched_tokens < 1 + spec.num_speculative_tokens:
        raise ConfigError("max_num_batched_tokens must hold one token and its drafts "
                          f"({1 + spec.num_speculative_tokens})")
    if config.device.tensor_parallel_size != 1:
        raise ConfigError("tensor_parallel_size: only 1 is built")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


def all_options(tree: type) -> dict[str, tuple[str, dataclasses.Field]]:
    """Every leaf setting of a tree of dataclasses: name -> (name of its group, its field)."""
    found: dict[str, tuple[str, dataclasses.Field]] = {}
    for group in dataclasses.fields(tree):
        for leaf in dataclasses.fields(group.default_factory):  # type: ignore[arg-type]
            assert leaf.name not in found, leaf.name
            found[leaf.name] = (group.name, leaf)
    return found


def build_tree(tree: type, settings: dict[str, Any]) -> Any:
    """Distribute flat settings over the groups of `tree`; see `EngineConfig.from_flat`."""
    options = all_options(tree)
    by_alias = {alias: name for name, (_, f) in options.items() for alias in f.metadata["aliases"]}
    groups: dict[str, dict[str, Any]] = {}
    for given, value in settings.items():
        name = by_alias.get(given, given)
        if name not in options:
            raise ConfigError(f"unknown setting {given!r}{nearest(given, [*options, *by_alias])}")
        group, leaf = options[name]
        choices = leaf.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{given} must be one of {', '.join(choices)}; got {value!r}")
        groups.setdefault(group, {})[name] = value
    factories: dict[str, Any] = {g.name: g.default_factory for g in dataclasses.fields(tree)}
    return tree(**{name: factories[name](**values) for name, values in groups.items()})


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean ...?' or nothing."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
