"""Flags of the C++ xLLM's server. Those that have our names or are aliases of our settings stand in the settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from xllm.errors import ConfigError
from xllm.foreign.flag import ForeignFlag, accepted, ignored, ignored_switch, refused, refused_switch, sets

_ONE_DEVICE = "of the ways to use several devices tensor and data parallelism are built"
_NO_COLOCATION = "requests that yield to others across instances are not built yet"
_OWN_PORTS = "KV travels by shared memory, or TCP at ports that the system chooses: --kv-transfer-host, -ways"
_NO_EP = "expert parallelism is not built yet: ranks share every expert"
_ONE_LOOP = "one event loop answers HTTP"
_NO_PROFILE = "steps are not planned by a profile"
_TUNING = "it tunes what is not in this engine; answers are the same"


def _devices(value: Any) -> list[str]:
    return [device.strip() for device in str(value).split(",")]


def _device(value: Any) -> str:
    """`npu:0,npu:1` is `npu`. Others than the first devices of one kind stay as they are, and are refused by the
    setting."""
    kind = _devices(value)[0].removesuffix(":0")
    return kind if _devices(value) in ([kind], [f"{kind}:{i}" for i in range(len(_devices(value)))]) else str(value)


def ranks_of_devices(settings: Mapping[str, Any]) -> int | None:
    """The tensor-parallel size that xLLM in C++ takes from its flags: the devices of all nodes, divided among
    `dp_size` replicas. None: `devices` names one device of one node, or is not there. Raises ConfigError."""
    def number(*names: str) -> int:
        given = next((str(settings[name]) for name in names if settings.get(name) is not None), "1")
        return int(given) if re.fullmatch("[1-9][0-9]*", given) else 1  # the setting refuses what is no number

    world = len(_devices(settings.get("devices", ""))) * number("nnodes")
    replicas = number("dp_size", "data_parallel_size")
    if "devices" not in settings or world == 1:
        return None
    if world % replicas:
        raise ConfigError(f"devices: {world} of all nodes cannot be divided among {replicas} engines (dp_size)")
    return world // replicas


UPSTREAM_ENGINE: tuple[ForeignFlag, ...] = (
    sets("devices", "device", "the first devices of one kind, npu:0,npu:1; their number times nnodes, divided by "
         "dp_size, is tensor_parallel_size", convert=_device),
    sets("enable_graph", "graph_mode", "as --graph-mode auto or off", takes="switch",
         convert=lambda value: "auto" if value in (True, "true") else "off"),
    refused("backend", "only language models are built", unless=("llm",)),
    refused("draft_model", "draft models are not built yet; n-gram drafts: --speculative-method ngram", unless=("",)),
    refused("draft_devices", "draft models are not built yet", unless=("", "auto")),
    refused("cp_size", _ONE_DEVICE, unless=("1",)),
    refused("ep_size", _NO_EP, unless=("1",)),
    refused("expert_parallel_degree", _NO_EP, unless=("0",)),
    ignored("redundant_experts_num", _NO_EP),
    ignored("eplb_update_interval", _NO_EP),
    ignored("eplb_update_threshold", _NO_EP),
    refused("rank_tablefile", "ranks find each other at master_node_addr, without a table", unless=("",)),
    ignored("communication_backend", "ranks exchange as torch.distributed does on their device"),
    refused("node_id", _ONE_DEVICE, unless=("0",)),
    ignored("npu_kernel_backend", "operators are torch_npu's"),
    ignored("prefill_scheduling_memory_usage_threshold", "admission leaves a share of the blocks free: --watermark"),
    refused_switch("use_zero_evict", "who would be preempted is not simulated; see --watermark"),
    refused_switch("use_mix_scheduler", "see --scheduling-policy"),
    ignored("max_decode_token_per_sequence", "it belongs to use_zero_evict"),
    *(ignored(name, _TUNING) for name in ("aggressive_coeff", "starve_threshold", "flashinfer_workspace_buffer_size")),
    *(ignored_switch(name, _TUNING) for name in (
        "enable_starve_prevent", "enable_block_copy_kernel", "enable_topk_sorted", "enable_intralayer_addnorm",
        "enable_interlayer_addnorm", "enable_split_rmsnorm_rope", "enable_aclnn_matmul", "enable_aclnn_swiglu",
        "enable_customize_mla_kernel", "enable_prefetch_weight", "enable_atb_spec_kernel", "enable_shm")),
    *(ignored_switch(name, _NO_PROFILE) for name in ("enable_profile_step_time", "enable_profile_token_budget",
                                                     "enable_profile_kv_blocks", "disable_ttft_profiling")),
    *(ignored(name, _NO_PROFILE) for name in ("profile_max_prompt_length", "max_global_ttft_ms",
                                              "max_global_tpot_ms")),
    refused_switch("enable_latency_aware_schedule", "see --scheduling-policy deadline"),
    refused_switch("enable_prefill_sp", _ONE_DEVICE),
    refused_switch("enable_beam_search_kernel", "beam search is not built"),
    refused("beam_width", "beam search is not built", unless=("1",)),
    refused("limit_image_per_prompt", "models of images are not built yet"),
    refused_switch("enable_qwen3_reranker", "scores and rankings are those of embeddings"),
)

UPSTREAM_SERVER: tuple[ForeignFlag, ...] = (
    *(ignored(name, _ONE_LOOP) for name in ("num_request_handling_threads", "num_response_handling_threads")),
    *(ignored(name, "there are no remote calls between processes") for name in (
        "rpc_channel_timeout_ms", "rpc_idle_timeout_s", "max_reconnect_count")),
    ignored("health_check_interval_ms", "the engine sends a heartbeat; --health-timeout is how long it may be silent"),
    accepted("etcd_addr", "several members parted by commas; without --cluster-listen on the machine of etcd only"),
    accepted("etcd_namespace"),
    accepted("enable_service_routing", "on by default where etcd_addr is given (upstream: off)"),
    accepted("instance_name", "host:port of HTTP by default"),
    accepted("instance_role", "DEFAULT, PREFILL, DECODE and MIX; ENCODE is not built yet and refused"),
    accepted("enable_cache_upload", "on by default; digests of what is cached, to masters that are connected"),
    refused_switch("enable_pd_ooc", _NO_COLOCATION),
    *(refused(name, _OWN_PORTS) for name in ("disagg_pd_port", "kv_cache_transfer_type",
                                                     "kv_cache_transfer_mode", "transfer_listen_port")),
    refused("xservice_addr", "instances and masters find each other by --etcd-addr"),
    ignored_switch("use_cpp_chat_template", "templates are rendered as Hugging Face writes them"),
    refused("config_json_file", "settings are flags; there is no configuration file"),
    refused_switch("enable_online_profile", "profiles are not taken over HTTP yet"),
)
