"""The arguments of vLLM's HTTP server, those that it has now and those that it had in the last years."""

from __future__ import annotations

import json
from typing import Any

from xllm.errors import ConfigError
from xllm.foreign.flag import (
    ForeignFlag,
    accepted,
    always_on,
    ignored,
    ignored_switch,
    refused,
    refused_switch,
    sets,
    text_of,
)

_ONE_FRONT = "one process answers HTTP; run several servers behind a balancer"
_NO_CODE = "no code of others is loaded into the server"
_REPEATED = "one value a flag; give it several times"


def _origins(value: Any) -> tuple[str, ...]:
    try:
        origins = json.loads(value)
    except (TypeError, ValueError):
        origins = value if isinstance(value, list) else [value]
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise ConfigError(f"allowed_origins must be a JSON list of texts, got {value!r}")
    return tuple(origins)


VLLM_SERVER: tuple[ForeignFlag, ...] = (
    accepted("host", "127.0.0.1 by default, and not another machine's address without keys (vLLM: all interfaces)"),
    accepted("port"),
    accepted("api_key", f"{_REPEATED}; guards every route but health and the console's files"),
    accepted("served_model_name", _REPEATED),
    accepted("ssl_certfile"),
    accepted("ssl_keyfile"),
    accepted("ssl_ca_certs", "then every client must show a certificate"),
    accepted("otlp_traces_endpoint", "over HTTP, not gRPC"),
    accepted("uvicorn_log_level", "warning by default; without trace"),
    accepted("tool_call_parser", "auto by default; the names are those of docs/tools.md"),
    accepted("reasoning_parser", "auto by default; the names are those of docs/tools.md"),
    accepted("trust_request_chat_template"),
    accepted("max_logprobs", "64 by default, and at most"),
    sets("allowed_origins", "cors_origin", "a JSON list of sites; '*' is refused (vLLM: the default)",
         convert=_origins),
    sets("h11_max_header_count", "max_headers", convert=int),
    sets("max_num_queued_tokens", "max_queue_tokens", convert=int),
    sets("shutdown_timeout", "drain_timeout", "30 by default (vLLM: 0)", convert=float),
    always_on("enable_auto_tool_choice", "tool_choice auto works wherever the format of calls is known"),
    always_on("exclude_tools_when_tool_choice_none", "the model is never shown tools that it may not call"),
    always_on("enable_prompt_tokens_details", "usage always has prompt_tokens_details"),
    always_on("enable_server_load_tracking", "/load is always there"),
    always_on("enable_tokenizer_info_endpoint", "/tokenizer_info is always there, for users"),
    accepted("enable_log_requests", "on by default; neither prompts nor answers"),
    sets("disable_log_requests", "enable_log_requests", "its opposite", convert=lambda value: text_of(value) != "true",
         takes="switch"),
    accepted("disable_log_stats"),
    always_on("enable_request_id_headers", "every answer has an X-Request-Id"),
    always_on("disable_uvicorn_access_log", "there is one line a call, of our own (--no-enable-log-requests)"),
    refused("chat_template", "put it into the model's folder as chat_template.jinja"),
    refused("chat_template_content_format", "each template gets the content that it reads", unless=("auto",)),
    refused("default_chat_template_kwargs", "say it in the requests: chat_template_kwargs", unless=("{}",)),
    refused("response_role", "answers are the assistant's", unless=("assistant",)),
    refused_switch("return_tokens_as_token_ids", "say it in the requests: return_tokens_as_token_ids"),
    refused_switch("enable_force_include_usage", "say it in the requests: stream_options.include_usage"),
    refused_switch("enable_per_request_metrics", "answers have no times; /v1/stats and traces do"),
    refused("tool_parser_plugin", f"{_NO_CODE}; formats: docs/tools.md", unless=("",)),
    refused("tool_server", "the server runs no tools: it gives calls back to the client"),
    refused("middleware", f"{_NO_CODE}; put a proxy before it"),
    refused("root_path", "let the proxy strip its prefix", unless=("", "/")),
    refused("uds", "it listens on TCP only: --host, --port"),
    refused("config", "settings are flags; there is no configuration file"),
    refused_switch("allow_credentials", "a page's cookies are never used; keys are bearer tokens"),
    refused("allowed_methods", "pages of --cors-origin may use every method", unless=('["*"]',)),
    refused("allowed_headers", "pages of --cors-origin may send every header", unless=('["*"]',)),
    refused("ssl_cert_reqs", "with --ssl-ca-certs every client must show a certificate", unless=("2",)),
    refused("ssl_ciphers", "the ciphers are those of Python's ssl module"),
    refused_switch("enable_ssl_refresh", "a new certificate is read at the next start"),
    refused("h11_max_incomplete_event_size", "a request's head is bounded by --max-header-bytes, its body by "
            "--max-body-bytes"),
    ignored_switch("disable_fastapi_docs", "there is no Swagger UI and no ReDoc; /openapi.json is for users"),
    ignored_switch("enable_offline_docs", "there is no Swagger UI and no ReDoc"),
    ignored("max_log_len", "prompts are never logged"),
    refused_switch("enable_log_outputs", "answers are never logged"),
    ignored_switch("enable_log_deltas", "answers are never logged"),
    refused("log_config_file", "use --log-level and --log-format"),
    ignored_switch("log_error_stack", "the stack of an error of the server's is logged, those of requests are not"),
    refused("api_server_count", _ONE_FRONT, unless=("1",), short=("-asc",)),
    ignored_switch("disable_frontend_multiprocessing", "HTTP and engine are always two processes"),
    refused("data_parallel_supervisor_port", _ONE_FRONT),
    refused_switch("tokens_only", "texts and token ids are both taken, see docs/members.md"),
    refused("fingerprint_mode", "answers carry no system_fingerprint", unless=("none",)),
    refused("fingerprint_value", "answers carry no system_fingerprint"),
    refused("prompt_adapters", "prompt adapters are not built; LoRA is: --lora-modules", takes="list"),
    ignored_switch("enable_flash_late_interaction", "scores are those of one vector a text"),
    ignored_switch("cohere_is_reasoning_model", "Cohere's routes are not built"),
    ignored("cohere_format", "Cohere's routes are not built"),
    refused_switch("grpc", "it speaks HTTP only"),
)
