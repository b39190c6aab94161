"""`EngineConfig`: every setting of the engine, as a tree of frozen keyword-only dataclasses.

The command line and the settings table in the docs are generated from the fields: name, type,
default, help and aliases stand here and nowhere else. `resolve()` fills derived values once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from xllm.errors import ConfigError
from xllm.json_setting import parse_object
from xllm.kv_events_settings import check_kv_events
from xllm.kv_store_settings import check_kv_store
from xllm.node_settings import NodeSettings
from xllm.option import option
from xllm.pooling import KINDS
from xllm.setting_tree import build_tree
from xllm.sizes import is_zero, parse_amount
from xllm.transfer_settings import LANDING_BLOCKS_FACTOR, TransferSettings, check_transfer

POLICIES = ("fcfs", "priority", "deadline", "sjf", "prefill-first", "decode-first", "online-first", "fair")
EVICTION_POLICIES = ("duel", "lru", "lru-k", "lfu", "fifo", "arc", "s3-fifo")
PREEMPTION_MODES = ("auto", "recompute", "swap")
WORKERS = ("auto", "inline", "thread", "codec", "processes")
MOST_RANKS = 128  # of one engine. Chosen, far above the cards of any machine: a typing error must not start thousands
GRAPH_MODES = ("auto", "off", "checked")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
# Ours, and behind them what other engines call the same (`fp8_e4m3` is `fp8`, `float32` is `fp32`).
KV_CACHE_DTYPES = ("auto", "int8", "fp8", "fp8_e4m3")
KV_STORE_DTYPES = ("auto", "fp32", "bf16", "fp16", "int8", "fp8", "float32", "bfloat16", "float16", "fp8_e4m3")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which checkpoint is served, and how it is read."""

    model: str | None = option(None, "local folder or Hub id; none: the bundled demo model")
    tokenizer: str | None = option(None, "folder or Hub id of the tokenizer, if it is not the model's")
    dtype: str = option("auto", "compute type; auto: the device's best for this checkpoint", choices=DTYPES)
    quantization: str | None = option(None, "quantise weights while loading", choices=("int8", "fp8", "w8a8"))
    max_model_len: int | None = option(None, "longest sequence, prompt and output; none: the model's own limit")
    seed: int = option(0, "seed for requests that bring none", aliases=("random_seed",))
    skip_tokenizer_init: bool = option(False, "token ids in and out; no tokenizer is loaded")
    revision: str | None = option(None, "branch, tag or commit on the Hub")
    pooling_type: str = option("auto", "how the hidden states of a text become its embedding, instead of what the "
                               "checkpoint says; auto: as its modules.json or 1_Pooling/config.json says, else last",
                               choices=("auto", *KINDS))
    generation_config: str = option("auto", "where sampling defaults come from: auto (the model's "
                                    "generation_config.json), vllm (none), or a folder")
    hf_overrides: str | None = option(None, "JSON object that is merged into the checkpoint's config.json",
                                      aliases=("json_model_override_args",), is_json=True)
    rope_scaling: str | None = option(None, "JSON object instead of config.json's rope scaling, such as "
                                      '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}',
                                      is_json=True)
    allow_inexact_rope: bool = option(False, "with rope type dynamic: take texts beyond the original length, although "
                                      "their result depends on how they were cut into prompts")
    load_format: str = option("auto", "where weights come from; dummy: random ones, made on the device, for "
                              "measurements: only config.json is needed", choices=LOAD_FORMATS)

    def __post_init__(self) -> None:
        parse_object("hf_overrides", self.hf_overrides)
        parse_object("rope_scaling", self.rope_scaling)


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The KV cache on the device, and the tiers below it."""

    block_size: int | None = option(None, "tokens per KV block; none: the device's own (CPU 16)")
    num_kv_blocks: int | None = option(None, "KV blocks, instead of a share of memory",
                                       aliases=("num_gpu_blocks_override",))
    kv_cache_memory_bytes: int | None = option(None, "bytes for the KV cache, instead of a share of memory",
                                               aliases=("max_cache_size",))
    gpu_memory_utilization: float = option(0.9, "share of free device memory for the KV cache (CPU: half of it)",
                                           aliases=("max_memory_utilization",))
    enable_prefix_caching: bool = option(True, "reuse the KV blocks of shared prefixes",
                                         aliases=("enable_prefix_cache",))
    kv_layout: str = option("paged", "where a sequence's blocks lie: anywhere, by a block table, or in one contiguous "
                            "range of virtual memory", choices=("paged", "xtensor"))
    xtensor_max_mappings: int | None = option(None, "live mappings of the xtensor layout; sequences beyond it run on "
                                              "block tables; none: what the system allows")
    watermark: float = option(0.02, "share of blocks that admission leaves free, against preemption")
    eviction_policy: str = option("duel", "which cached blocks go first; duel: LRU or LRU-K, whichever would have had "
                                  "more hits lately", choices=EVICTION_POLICIES)
    lru_k: int = option(2, "K of lru-k and the duel: what counts is the K-th last use")
    eviction_history: float = option(10.0, "how many evicted blocks lru-k and the duel remember, over the tier's own")
    l1_share: float = option(0.0, "share of the device's blocks (tier L1) protected for prefixes used at least twice")
    host_cache_size: str = option("0", "host memory for KV blocks below the device (tier L3), such as 4GiB, or a share "
                                  "of the available memory such as 25%")
    host_blocks_factor: float = option(0.0, "the same as a multiple of the device's KV blocks")
    disk_cache_size: str = option("0", "disk space for KV blocks below host memory (tier L4), such as 50GiB, or a "
                                  "share of the free space such as 25%")
    disk_cache_dir: str | None = option(None, "folder of the disk tier; survives restarts and crashes")
    disk_cache_key_file: str | None = option(None, "file of at least 32 random bytes, readable by its owner alone: "
                                             "blocks on disk and in the shared store are authenticated with it; what "
                                             "others wrote is a miss", is_guard=True)
    kv_store: str | None = option(None, "folder on a file system that several servers share: KV blocks that one has "
                                  "computed are found by all with the same model and settings (tier L5)")
    kv_store_size: str = option("10%", "how much each worker may add to the shared store, such as 50GiB, or a share of "
                                "the free space there; 0: it only reads")
    host_bytes_per_s: str = option("0", "limit for copies between device and host memory, each way; 0: none")
    disk_bytes_per_s: str = option("0", "limit for copies between host memory and disk, each way; 0: none")
    preemption_mode: str = option("auto", "what happens to the KV of a preempted request; auto: swapped to host memory "
                                  "where that is sooner than computing it again", choices=PREEMPTION_MODES)
    kv_cache_dtype: str = option("auto", "number format of KV on the device; auto: the compute type; int8, fp8: one "
                                 "byte a number, with a scale per head and position", choices=KV_CACHE_DTYPES)
    kv_store_dtype: str = option("auto", "number format of KV in the host and disk tiers; auto: as on the device",
                                 choices=KV_STORE_DTYPES)
    kv_prefetch: bool = option(True, "with a host tier: bring a conversation's blocks back before its next turn")
    kv_events_config: str | None = option(None, "JSON object: publish changes of the KV cache for routers, such as "
                                          '{"enable_kv_cache_events": true, "endpoint": "tcp://127.0.0.1:5557"}',
                                          is_json=True)
    kv_events_token_ids: bool = option(False, "publish the token ids of stored blocks with them: they are users' "
                                       "prompts and answers", is_guard=True)
    kv_events_key_file: str | None = option(None, "file of at least 32 random bytes, readable by its owner alone: who "
                                            "reads KV events must have it, and they are encrypted with it",
                                            is_guard=True)

    @property
    def has_host_tier(self) -> bool:
        """Whether host memory is to stand below the device, and perhaps disk below that."""
        return self.host_blocks_factor > 0 or not is_zero("host_cache_size", self.host_cache_size)

    @property
    def outlives_the_process(self) -> bool:
        """Whether KV is stored where another process finds it."""
        return self.disk_cache_dir is not None or self.kv_store is not None


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """How many requests and tokens are computed at a time, and in which order."""

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
    max_concurrent_requests: int = option(0, "requests in the engine, running and waiting (every prompt and every one "
                                          "of n counts); more are refused; 0: no limit")
    cost_profile: str | None = option(None, "file of `xllm profile --json` for this model, device and version: the "
                                      "engine begins with these costs of steps and copies, and goes on learning")


@dataclass(frozen=True, kw_only=True)
class SpeculativeSettings:
    """Which drafts are proposed, and how many."""

    speculative_method: str | None = option(None, "proposer of draft tokens", aliases=("speculative_algorithm",),
                                            choices=("ngram",))
    num_speculative_tokens: int = option(0, "draft tokens per step; 0 with a method: 4")
    prompt_lookup_max: int = option(4, "longest suffix that the n-gram proposer looks up")
    prompt_lookup_min: int = option(2, "shortest such suffix")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Where the model computes: device, graphs, workers, threads."""

    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "npu"))
    num_threads: int | None = option(None, "CPU threads; none: one per core that the process may keep busy")
    adaptive_threads: bool = option(True, "compute with fewer CPU threads while other processes keep the cores busy; "
                                    "num_threads is the most")
    strict_ops: bool | None = option(None, "refuse to run an operator that the device inherits from the reference; "
                                     "none: yes on cuda and npu")
    graph_mode: str = option("auto", "whether decode steps are captured once and replayed; auto: where the device can; "
                             "checked: steps run in poisoned memory and are checked, for tests, slow",
                             choices=GRAPH_MODES)
    graph_max_seqs: int | None = option(None, "longest step that is captured, in sequences; none: max_num_seqs",
                                        aliases=("acl_graph_decode_batch_size_limit",))
    graph_max_prefill_tokens: int = option(0, "steps with chunks of prompts are captured up to that many tokens; "
                                           "0: never")
    graph_max_graphs: int = option(64, "captured graphs kept at once, the least recently used go first")
    graph_warmup_seqs: int | None = option(None, "decode steps of up to that many sequences are captured, and kernels "
                                           "compiled, before the first request; 0: none; none: 16 on an accelerator")
    graph_memory: str = option("50%", "memory for captured graphs, such as 2GiB, or a share of what weights and KV "
                               "cache leave")
    worker: str = option("auto", "where the model computes: in the thread that schedules, in one beside it, or in "
                         "processes; codec: beside it, with every message encoded, for tests; auto: processes "
                         "for ranks that share a model, thread with async_scheduling, else inline", choices=WORKERS)
    worker_ranks: int = option(1, "processes that compute the same steps; needs worker processes. More than one is for "
                               "checks: each computes everything")
    tensor_parallel_size: int = option(1, "ranks that share one model, each in a process of its own; on an accelerator "
                                       "each on a device of its own", aliases=("tp_size",))
    data_parallel_size: int = option(1, "engines behind one server, each with a model, a queue and a KV cache of its "
                                     "own; on the CPU of one machine", aliases=("dp_size",))

    @property
    def num_ranks(self) -> int:
        """Workers of an engine that compute every step: shares of it, or all of it each."""
        return max(self.tensor_parallel_size, self.worker_ranks)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Which adapters may be loaded, and how many."""

    enable_lora: bool = option(False, "take adapters; also set by --lora-modules")
    lora_modules: tuple[str, ...] = option((), "NAME=FOLDER of an adapter (PEFT format) that requests may name as "
                                           "their model; may be given several times")
    max_loras: int = option(4, "adapters that are loaded at once")
    max_lora_rank: int = option(64, "largest rank of an adapter")

    @property
    def is_on(self) -> bool:
        return self.enable_lora or bool(self.lora_modules)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All settings of one engine. Make it with `from_flat`, complete it with `resolve`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    speculative: SpeculativeSettings = field(default_factory=SpeculativeSettings)
    device: DeviceSettings = field(default_factory=DeviceSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    nodes: NodeSettings = field(default_factory=NodeSettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)

    @property
    def ranks_a_node(self) -> int:
        """Workers of this engine on one machine."""
        return self.device.num_ranks // (self.nodes.nnodes or 1)

    @property
    def workers_a_node(self) -> int:
        """Workers that share the memory and the processors of one machine: of all engines of this server."""
        return self.device.data_parallel_size * self.ranks_a_node

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
            cache=self._resolve_cache(default_block_size),
            scheduler=dataclasses.replace(self.scheduler, max_num_batched_tokens=max_tokens),
            speculative=self._resolve_speculative(),
        )
        check(resolved)
        return resolved

    def _resolve_cache(self, default_block_size: int) -> CacheSettings:
        c, lands = self.cache, self.transfer.enable_disagg_pd and not self.cache.has_host_tier
        return dataclasses.replace(c, block_size=c.block_size or default_block_size,
                                   host_blocks_factor=LANDING_BLOCKS_FACTOR if lands else c.host_blocks_factor)

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
    _at_least("max_concurrent_requests", s.max_concurrent_requests, 0)
    _at_least("long_prefill_token_threshold", s.long_prefill_token_threshold, 0)
    _at_least("num_speculative_tokens", spec.num_speculative_tokens, 0)
    _at_least("prompt_lookup_min", spec.prompt_lookup_min, 1)
    if c.xtensor_max_mappings is not None:
        _at_least("xtensor_max_mappings", c.xtensor_max_mappings, 0)
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
    if config.model.load_format == "dummy" and c.disk_cache_dir is not None:
        raise ConfigError("disk_cache_dir and load_format dummy do not go together: the folder outlives the weights")
    _check_tiers(c)
    check_kv_store(c.kv_store, c.kv_store_size, c.disk_cache_dir, has_host_tier=c.has_host_tier,
                   is_dummy=config.model.load_format == "dummy")
    check_kv_events(c.kv_events_config, has_token_ids=c.kv_events_token_ids, key_file=c.kv_events_key_file,
                    has_prefix_cache=c.enable_prefix_caching)
    _check_graphs(config.device)
    check_workers(config.device)
    _check_lora(config.lora)
    check_transfer(config.transfer, has_prefix_cache=c.enable_prefix_caching)


def _check_tiers(c: CacheSettings) -> None:
    _at_least("lru_k", c.lru_k, 2)
    if not 0.0 <= c.eviction_history <= 1000.0:
        raise ConfigError(f"eviction_history must be in [0, 1000], got {c.eviction_history}")
    if not 0.0 <= c.l1_share < 1.0:
        raise ConfigError(f"l1_share must be in [0, 1), got {c.l1_share}")
    has_host = c.has_host_tier
    has_disk = not is_zero("disk_cache_size", c.disk_cache_size)
    parse_amount("host_bytes_per_s", c.host_bytes_per_s)
    parse_amount("disk_bytes_per_s", c.disk_bytes_per_s)
    if not 0.0 <= c.host_blocks_factor <= 1e6:
        raise ConfigError(f"host_blocks_factor must be in [0, 1e6], got {c.host_blocks_factor}")
    if c.host_blocks_factor > 0 and not is_zero("host_cache_size", c.host_cache_size):
        raise ConfigError("host_cache_size and host_blocks_factor say the same thing: set one of them")
    if has_host and not c.enable_prefix_caching:
        raise ConfigError("host_cache_size needs enable_prefix_caching: blocks are found by their prefix")
    if has_disk and not has_host:
        raise ConfigError("disk_cache_size needs host_cache_size: blocks go to disk through host memory")
    if has_disk != (c.disk_cache_dir is not None):
        raise ConfigError("disk_cache_size and disk_cache_dir go together: set both or neither")
    if c.disk_cache_key_file is not None and not has_disk and c.kv_store is None:
        raise ConfigError("disk_cache_key_file needs disk_cache_size and disk_cache_dir, or kv_store: it is their key")
    if c.kv_store_dtype != "auto" and not has_host:
        raise ConfigError(f"kv_store_dtype {c.kv_store_dtype} needs host_cache_size: it is the format of stored KV")
    if c.kv_cache_dtype != "auto" and c.kv_store_dtype not in ("auto", c.kv_cache_dtype):
        raise ConfigError(f"kv_store_dtype {c.kv_store_dtype}: KV that is {c.kv_cache_dtype} on the device is stored "
                          "as it is")
    if c.preemption_mode == "swap" and not has_host:
        raise ConfigError("preemption_mode swap needs host_cache_size")


def _check_graphs(d: DeviceSettings) -> None:
    _at_least("graph_max_graphs", d.graph_max_graphs, 1)
    _at_least("graph_max_prefill_tokens", d.graph_max_prefill_tokens, 0)
    parse_amount("graph_memory", d.graph_memory)
    if d.graph_warmup_seqs is not None:
        _at_least("graph_warmup_seqs", d.graph_warmup_seqs, 0)
    if d.graph_max_seqs is not None:
        _at_least("graph_max_seqs", d.graph_max_seqs, 1)


def check_workers(d: DeviceSettings) -> None:
    """Refuse numbers of ranks and ways to them that cannot be; asked before any process is started."""
    size, ranks = d.tensor_parallel_size, d.worker_ranks
    _at_least("worker_ranks", ranks, 1)
    _at_least("tensor_parallel_size", size, 1)
    if ranks > 1 and d.worker != "processes":
        raise ConfigError(f"worker_ranks {ranks} needs worker processes, and worker is {d.worker}")
    if size > MOST_RANKS:
        raise ConfigError(f"tensor_parallel_size must be at most {MOST_RANKS}, got {size}")
    if size > 1 and d.worker not in ("auto", "processes"):
        raise ConfigError(f"tensor_parallel_size {size} needs a process a rank, and worker is {d.worker}")
    if size > 1 and ranks > 1:
        raise ConfigError(f"tensor_parallel_size {size} and worker_ranks {ranks}: ranks share a model or compute all "
                          "of it each, set one of them")


def _check_lora(lora: LoraSettings) -> None:
    _at_least("max_loras", lora.max_loras, 1)
    _at_least("max_lora_rank", lora.max_lora_rank, 1)
    names = [module.partition("=")[0] for module in lora.lora_modules]
    for module, name in zip(lora.lora_modules, names):
        if not name or not module.partition("=")[2]:
            raise ConfigError(f"lora_modules: {module!r} is not NAME=FOLDER")
    if len(set(names)) < len(names):
        raise ConfigError("lora_modules: two adapters have the same name")
    if len(names) > lora.max_loras:
        raise ConfigError(f"lora_modules: {len(names)} adapters, and max_loras is {lora.max_loras}")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")
