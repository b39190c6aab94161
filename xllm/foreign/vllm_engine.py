"""vLLM's engine arguments, those that it has now and those that it had in the last years."""

from __future__ import annotations

import json
from typing import Any

from xllm.foreign.flag import (
    ForeignFlag,
    accepted,
    always_on,
    ignored,
    ignored_switch,
    refused,
    refused_switch,
    sets,
)

_ONE_DEVICE = "of the ways to use several devices tensor and data parallelism are built"

_ONE_FRONT = "a server starts all of its engines, on its own machine, and balances among them itself"
_NO_MEDIA = "models of images, video and audio are not built yet"
_NO_EP = "expert parallelism is not built yet: ranks share every expert"
_NO_MAMBA = "models with state-space layers are not built yet"
_NO_CODE = "no code of others is loaded into the server"
_NO_TRANSFER = "encoders on instances of their own are not built yet"
_NO_DRAFT_MODEL = "draft models are not built yet; n-gram drafts: --speculative-method ngram"
_NO_PROMPT_ADAPTERS = "prompt adapters are not built; LoRA is: --lora-modules"
_NO_COMPILE = "torch.compile is not used; graph_mode and graph_max_seqs say what is captured"
_ONE_WAY = "there is one way in which ranks load, exchange and hold adapters"
_TUNING = "it tunes what is not in this engine; answers are the same"
_K = "k, m and g are powers of 1024 in either case (vLLM: small letters are powers of 1000)"


def _gibibytes(value: Any) -> str:
    return f"{value}GiB"


MODEL = (
    accepted("model"),
    accepted("tokenizer"),
    accepted("dtype", "half and float are float16 and float32; auto takes the device's best for the checkpoint",
             values={"half": "float16", "float": "float32"}),
    accepted("quantization", "int8, fp8 (weights only) and w8a8 quantise while loading; of quantised checkpoints those "
             "of fp8 in blocks are read, others (awq, gptq, compressed-tensors) are not built yet", short=("-q",)),
    accepted("max_model_len", _K),
    accepted("seed", "of requests that bring none"),
    accepted("skip_tokenizer_init"),
    accepted("revision"),
    accepted("generation_config"),
    accepted("hf_overrides"),
    accepted("rope_scaling"),
    accepted("load_format", "safetensors is what auto reads; of the others dummy", values={"safetensors": "auto"}),
    refused_switch("trust_remote_code", "a checkpoint's Python code is never run; its family must be one of ours"),
    ignored("code_revision", "a checkpoint's Python code is never run"),
    refused("tokenizer_revision", "--revision holds for the tokenizer too; for another one give --tokenizer a folder"),
    refused("tokenizer_mode", "the tokenizer is the checkpoint's tokenizer.json", unless=("auto", "hf", "fast")),
    refused("config_format", "config.json in Hugging Face's format is read", unless=("auto", "hf")),
    refused("hf_config_path", "config.json is read from the model's folder; --hf-overrides changes members of it"),
    refused("hf_token", "a token in the command line shows in the process list: set HF_TOKEN, or log in with "
            "`hf auth login`"),
    refused("download_dir", "the Hub's own cache is used: set HF_HUB_CACHE to move it"),
    refused("rope_theta", "say it in the configuration: --hf-overrides '{\"rope_theta\": 1000000.0}'"),
    refused("override_generation_config", "write a generation_config.json, and give --generation-config its folder"),
    refused("task", "every server generates, embeds and scores; classes and rewards are not built",
            unless=("auto", "generate", "embed", "embedding", "score")),
    refused("runner", "every server generates and embeds", unless=("auto", "generate", "pooling")),
    refused("convert", "every server embeds; classes and rewards are not built", unless=("auto", "none", "embed")),
    refused("model_impl", "the model families are our own", unless=("auto",)),
    refused("pooler_config", "say how embeddings are pooled by --pooling-type"),
    refused("override_pooler_config", "say how embeddings are pooled by --pooling-type"),
    refused("override_attention_dtype", "attention computes in the compute type, see --dtype"),
    refused_switch("enable_prompt_embeds", "prompts are texts or token ids"),
    refused("logits_processors", _NO_CODE, takes="list"),
    refused("logits_processor_pattern", _NO_CODE),
    refused("io_processor_plugin", _NO_CODE),
    refused("logprobs_mode", "log-probabilities are those of the model, before penalties and temperature",
            unless=("raw_logprobs",)),
    refused_switch("disable_sliding_window", "set --max-model-len to the window's length instead"),
    ignored_switch("disable_cascade_attn", _TUNING),
    refused("model_loader_extra_config", "there is one loader, without options", unless=("", "{}")),
    ignored("ignore_patterns", "of a Hub repository only safetensors and its small files are fetched"),
    ignored("safetensors_load_strategy", "weights are mapped and read tensor by tensor"),
    ignored("pt_load_map_location", "no .pt files are read"),
    ignored_switch("use_tqdm_on_load", "the start shows each phase, with a bar on a terminal"),
    always_on("enable_sleep_mode", "/sleep and /wake_up are always there, for admin keys"),
    refused("qlora_adapter_name_or_path", "quantise the model by --quantization and load adapters by --lora-modules"),
    refused("additional_config", "it is for vLLM's platform plugins"),
    refused("override_neuron_config", "that device is not supported"),
    accepted("device", values={"gpu": "cuda"}),
)

CACHE = (
    accepted("block_size"),
    accepted("gpu_memory_utilization", "a share of what is free beside the weights, for the KV cache alone (vLLM: of "
             "the whole device, for weights and all); half of it on a CPU"),
    accepted("num_gpu_blocks_override"),
    accepted("kv_cache_memory_bytes", _K),
    accepted("enable_prefix_caching"),
    accepted("kv_cache_dtype", "auto, int8, fp8 and fp8_e4m3, with a scale per head and position"),
    accepted("preemption_mode"),
    sets("kv_offloading_size", "host_cache_size", "in GiB", convert=_gibibytes),
    refused("kv_offloading_backend", "offloaded KV lies in host memory and on disk: --host-cache-size, "
            "--disk-cache-size", unless=("native",)),
    ignored("swap_space", "a preempted request is computed again, or swapped to the host tier if there is one "
            "(--host-cache-size)"),
    refused("cpu_offload_gb", "weights are not offloaded", unless=("0", "0.0")),
    ignored("prefix_caching_hash_algo", "blocks are found by BLAKE2b digests"),
    always_on("calculate_kv_scales", "scales of int8 and fp8 KV are always computed, per head and position"),
    refused_switch("kv_sharing_fast_prefill", "models whose layers share KV are not built yet"),
    refused("kv_transfer_config", "it is said by --enable-disagg-pd, and roles by --instance-role"),
    accepted("kv_events_config", "a loopback address is bound, not connected to; other machines need "
             "--kv-events-key-file, token ids --kv-events-token-ids; without an endpoint tcp://127.0.0.1:5557"),
    refused("ec_transfer_config", _NO_TRANSFER),
    ignored_switch("use_v2_block_manager", "there is one block manager"),
    ignored("num_lookahead_slots", "drafts take their slots when they are scheduled"),
    refused("mamba_cache_dtype", _NO_MAMBA, unless=("auto",)),
    refused("mamba_ssm_cache_dtype", _NO_MAMBA, unless=("auto",)),
    refused("mamba_block_size", _NO_MAMBA),
    ignored_switch("disable_hybrid_kv_cache_manager", "there is one KV cache manager"),
)

SCHEDULER = (
    accepted("max_num_seqs"),
    accepted("max_num_batched_tokens", _K),
    accepted("long_prefill_token_threshold"),
    accepted("enable_chunked_prefill"),
    accepted("scheduling_policy", "also deadline, sjf, prefill-first, decode-first, online-first and fair"),
    accepted("async_scheduling"),
    accepted("watermark"),
    sets("max_num_queued_reqs", "max_waiting_requests", convert=int),
    ignored("max_num_partial_prefills", "as many prompts are computed in a step as its tokens allow"),
    ignored("max_long_partial_prefills", "as many prompts are computed in a step as its tokens allow"),
    ignored_switch("scheduler_reserve_full_isl", "admission looks at the whole prompt, beside a --watermark"),
    ignored("stream_interval", "every step's tokens are sent at once"),
    ignored("num_scheduler_steps", "the next step is scheduled while this one runs"),
    ignored_switch("multi_step_stream_outputs", "every step's tokens are sent at once"),
    refused("scheduler_delay_factor", "prompts are not held back", unless=("0", "0.0")),
    refused("scheduler_cls", _NO_CODE),
    ignored_switch("disable_chunked_mm_input", _NO_MEDIA),
    ignored_switch("disable_async_output_proc", "texts are made in another process than the steps"),
)

DEVICE = (
    sets("enforce_eager", "graph_mode", "as --graph-mode off", takes="switch",
         convert=lambda value: "off" if value in (True, "true") else "auto"),
    accepted("tensor_parallel_size", "ranks of one machine or several", short=("-tp",)),
    refused("pipeline_parallel_size", _ONE_DEVICE, unless=("1",), short=("-pp",)),
    accepted("data_parallel_size", "on the CPU, engines of one machine; the front balances by what is cached",
             short=("-dp",)),
    *(refused(name, _ONE_FRONT) for name in (
        "data_parallel_rank", "data_parallel_start_rank", "data_parallel_address", "data_parallel_rpc_port")),
    accepted("master_addr", "no default where nnodes is above 1; HOST:PORT will do too"),
    accepted("master_port"),
    refused("data_parallel_size_local", f"{_ONE_FRONT}: --data-parallel-size is how many", unless=("1",)),
    refused("data_parallel_backend", _ONE_FRONT, unless=("mp",)),
    *(refused_switch(name, _ONE_FRONT) for name in ("data_parallel_hybrid_lb", "data_parallel_external_lb")),
    accepted("nnodes"),
    accepted("node_rank"),
    accepted("headless", "node 0 alone answers HTTP, with or without it; there it is refused"),
    refused("decode_context_parallel_size", _ONE_DEVICE, unless=("1",)),
    refused("prefill_context_parallel_size", _ONE_DEVICE, unless=("1",)),
    refused("distributed_executor_backend", "say where the model computes by --worker", unless=("mp", "uni")),
    refused("worker_cls", _NO_CODE, unless=("auto",)),
    refused("worker_extension_cls", _NO_CODE, unless=("",)),
    ignored("max_parallel_loading_workers", _ONE_WAY),
    ignored_switch("disable_custom_all_reduce", _ONE_WAY),
    refused_switch("ray_workers_use_nsight", "Ray is not used"),
    refused_switch("enable_expert_parallel", _NO_EP),
    refused_switch("enable_eplb", _NO_EP),
    *(ignored(name, _NO_EP) for name in ("eplb_config", "num_redundant_experts", "expert_placement_strategy",
                                        "all2all_backend")),
    ignored("moe_backend", "each device has one product of experts of ours; `xllm doctor` names what it inherits"),
    refused_switch("enable_dbo", "steps are not split into two halves yet"),
    *(ignored(name, "steps are not split into two halves") for name in ("dbo_decode_token_threshold",
                                                                        "dbo_prefill_token_threshold")),
    ignored("attention_backend", "each device has one attention of ours; `xllm doctor` names it"),
    ignored("attention_config", "each device has one attention of ours; `xllm doctor` names it"),
    ignored("compilation_config", _NO_COMPILE, short=("-O", "-cc")),
    ignored("optimization_level", _NO_COMPILE),
    ignored("max_seq_len_to_capture", "captured steps do not depend on the length of their sequences"),
    ignored("cuda_graph_sizes", _NO_COMPILE, takes="list"),
    ignored("cudagraph_capture_sizes", _NO_COMPILE, takes="list"),
    ignored("max_cudagraph_capture_size", _NO_COMPILE),
    ignored("performance_mode", _TUNING),
    ignored("kernel_config", _TUNING),
    ignored_switch("enable_flashinfer_autotune", "FlashInfer is not used"),
)

SPECULATIVE = (
    accepted("speculative_config", "method ngram, num_speculative_tokens, prompt_lookup_max, prompt_lookup_min"),
    accepted("num_speculative_tokens"),
    sets("ngram_prompt_lookup_max", "prompt_lookup_max", convert=int),
    sets("ngram_prompt_lookup_min", "prompt_lookup_min", convert=int),
    refused("speculative_model", _NO_DRAFT_MODEL, unless=("[ngram]",)),
    refused("speculative_model_quantization", _NO_DRAFT_MODEL),
    refused("speculative_draft_tensor_parallel_size", _NO_DRAFT_MODEL, unless=("1",)),
    refused("speculative_max_model_len", _NO_DRAFT_MODEL),
    ignored("speculative_disable_by_batch_size", "drafts are made at every batch size"),
    ignored_switch("speculative_disable_mqa_scorer", _TUNING),
    refused("spec_decoding_acceptance_method", "drafts are taken where they are what the model would have said",
            unless=("rejection_sampler",)),
    refused("typical_acceptance_sampler_posterior_threshold", "only the exact acceptance is built"),
    refused("typical_acceptance_sampler_posterior_alpha", "only the exact acceptance is built"),
    refused_switch("disable_logprobs_during_spec_decoding", "log-probabilities come with drafts too"),
)

LORA = (
    accepted("enable_lora"),
    accepted("lora_modules", "NAME=FOLDER, one a flag; give it several times"),
    accepted("max_loras", "adapters that are loaded at once; all of them may be in one batch"),
    accepted("max_lora_rank", "any number"),
    refused("lora_dtype", "adapters compute in the model's type", unless=("auto",)),
    refused("max_cpu_loras", "adapters are not kept in host memory: --max-loras is how many are loaded"),
    ignored_switch("fully_sharded_loras", _ONE_WAY),
    refused("default_mm_loras", _NO_MEDIA),
    refused_switch("enable_lora_bias", "adapters with biases are refused"),
    ignored("lora_extra_vocab_size", "adapters that add tokens are refused when they are loaded"),
    refused("long_lora_scaling_factors", "an adapter's scale is the one of its adapter_config.json"),
    refused_switch("enable_prompt_adapter", _NO_PROMPT_ADAPTERS),
    refused("max_prompt_adapters", _NO_PROMPT_ADAPTERS),
    refused("max_prompt_adapter_token", _NO_PROMPT_ADAPTERS),
)

STRUCTURED = (
    ignored("guided_decoding_backend", "llguidance holds every answer to its form; the forms are the same"),
    ignored_switch("guided_decoding_disable_fallback", "there is one backend, llguidance"),
    refused_switch("guided_decoding_disable_any_whitespace", "the form of JSON is the request's alone"),
    refused_switch("guided_decoding_disable_additional_properties", "say it in the schema: "
                   '"additionalProperties": false'),
    refused("structured_outputs_config", "llguidance is the one backend, without options",
            unless=("{}", json.dumps({"backend": "auto"}), json.dumps({"backend": "guidance"}))),
    always_on("enable_reasoning", "reasoning is taken apart wherever its format is known, see --reasoning-parser"),
    refused("reasoning_config", "see --reasoning-parser"),
    refused("reasoning_parser_plugin", _NO_CODE, unless=("",)),
)

MEDIA = (
    ignored("limit_mm_per_prompt", _NO_MEDIA),
    refused("allowed_local_media_path", _NO_MEDIA, unless=("",)),
    refused("allowed_media_domains", _NO_MEDIA, takes="list"),
    refused("media_io_kwargs", _NO_MEDIA, unless=("{}",)),
    refused("mm_processor_kwargs", _NO_MEDIA, unless=("{}",)),
    *(ignored(name, _NO_MEDIA) for name in ("mm_processor_cache_gb", "mm_processor_cache_type", "mm_encoder_tp_mode",
                                            "mm_shm_cache_max_object_size_mb", "mm_encoder_attn_backend")),
    *(ignored_switch(name, _NO_MEDIA) for name in ("disable_mm_preprocessor_cache", "skip_mm_profiling",
                                                   "language_model_only", "mm_encoder_only")),
    refused_switch("enable_mm_embeds", _NO_MEDIA),
    refused_switch("interleave_mm_strings", _NO_MEDIA),
    refused("video_pruning_rate", _NO_MEDIA),
)

OBSERVABILITY = (
    refused("collect_detailed_traces", "traces have the queue, the prompt and the answer of a request, no modules"),
    refused("show_hidden_metrics_for_version", "no metrics are hidden"),
    refused_switch("enable_layerwise_nvtx_tracing", "NVTX is not used"),
    refused_switch("enable_mfu_metrics", "there are no such metrics"),
    refused_switch("kv_cache_metrics", "how long a block stays is not measured; use and hits of the KV cache are"),
    ignored("kv_cache_metrics_sample", "how long a block stays is not measured"),
    always_on("cudagraph_metrics", "metrics of captured graphs are always there"),
    refused("profiler_config", "profiles are not taken over HTTP yet"),
)

VLLM_ENGINE: tuple[ForeignFlag, ...] = (*MODEL, *CACHE, *SCHEDULER, *DEVICE, *SPECULATIVE, *LORA, *STRUCTURED, *MEDIA,
                                        *OBSERVABILITY)
