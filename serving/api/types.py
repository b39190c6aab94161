"""The bodies that requests may have, and what is refused by name because it is not built.

A field that is neither known, harmless nor refused is an error: nothing is ignored in silence.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

from serving.api.errors import invalid
from xllm.request import SAMPLING_FIELDS
from xllm.suggestion import nearest

Body = TypeVar("Body", bound="StrictBody")

# Bookkeeping for the services of OpenAI and Anthropic: what each is for, and why an engine needs not act on it. A body
# type says which of them it takes.
HARMLESS = {
    "user": "names the end user for the service's own monitoring",
    "safety_identifier": "names the end user for the service's own monitoring",
    "metadata": "labels a stored answer for its owner, and asks nothing of this one",
    "prompt_cache_retention": "an upper bound; a prefix stays cached for as long as there is room",
}

# Name -> the values that ask for nothing. Any other value asks for something that is not built.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "modalities": (["text"],), "audio": (), "prediction": (),
    "use_beam_search": (False,), "length_penalty": (1.0, 1), "beam_width": (0, 1), "num_return_sequences": (1,),
    "suffix": ("",), "documents": ([],), "chat_template": (), "reasoning_effort": (), "verbosity": ("medium",),
    "web_search_options": (),
    "truncate_prompt_tokens": (), "truncation_side": (), "spaces_between_special_tokens": (True,),
    "prompt_embeds": (), "mm_processor_kwargs": ({},), "media_io_kwargs": ({},), "logprob_token_ids": (),
    "kv_transfer_params": (), "ec_transfer_params": (), "vllm_xargs": ({},), "repetition_detection": (),
    "store": (False,), "service_tier": ("auto", "default", "standard_only"),
    "prompt": (), "conversation": (), "moderation": (), "context_management": ([],), "access_programs": (),
    "prompt_cache_options": (), "image": (), "mcp_servers": ([],), "container": (), "fallbacks": ([],),
    "diagnostics": (), "inference_geo": (), "thread": (), "compaction": (), "billing_policy": (),
    "fallback_credit_token": (),
    "output_format": (), "user_profile_id": (), "workspace_id": (),
    "thinking_token_budget": (), "return_token_offsets": (False,), "prompt_logprob_token_ids": (),
}


class StrictBody(BaseModel):
    """Types are taken as they stand: no string becomes a number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    harmless: ClassVar[frozenset[str]] = frozenset({"user"})


class StreamOptions(StrictBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] | None = None  # padding against listeners; there is none to switch off


class GenerationBody(StrictBody):
    """What chat and completion requests share. Ranges are checked by `SamplingParams`."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    priority: int = 0
    offline: bool = False
    ttlt_slo_ms: float | None = None  # upstream's name: when the last token should be there
    timeout_s: float | None = None  # when the call fails if it is not done
    cache_salt: str | None = None
    session_id: str | None = None
    prompt_cache_key: str | None = None
    request_id: str | None = None
    add_special_tokens: bool | None = None


# Fields that a body hands on to `SamplingParams` as they are. `n` and `max_tokens` are decided by more than them.
PASSED_ON = tuple(name for name in SAMPLING_FIELDS
                  if name in GenerationBody.model_fields and name not in ("n", "max_tokens"))


class CompletionBody(GenerationBody):
    prompt: Any = None  # str, list[str], list[int] or list[list[int]]; see completions.read_prompts
    echo: bool | None = False
    logprobs: int | None = None
    best_of: int | None = None


class ChatMessage(BaseModel):
    """Other members (`name`, `reasoning_content`, ...) are for the model's chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(GenerationBody):
    harmless: ClassVar[frozenset[str]] = frozenset(HARMLESS)

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    echo: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    reasoning_effort: str | None = None
    verbosity: str | None = None


class PoolingBody(StrictBody):
    """What requests for embeddings and scores share."""

    model: str | None = None
    pooling: str | None = None  # none: the server's --pooling-type
    normalize: bool | None = None  # none: as the checkpoint's modules.json says, else yes
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    priority: int = 0
    offline: bool = False
    ttlt_slo_ms: float | None = None
    timeout_s: float | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    prompt_cache_key: str | None = None
    request_id: str | None = None


class EmbeddingBody(PoolingBody):
    input: Any  # as `CompletionBody.prompt`
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class ScoreBody(PoolingBody):
    text_1: str | list[str]
    text_2: str | list[str]


class RerankBody(PoolingBody):
    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool = True


class Selector(StrictBody):
    type: Literal["literal"] = "literal"
    value: str


class SampleBody(PoolingBody):
    prompt: str
    selector: Selector
    logprobs: int = 5


class PauseBody(StrictBody):
    mode: str = "abort"


class SleepBody(StrictBody):
    level: int = 1


class LoadAdapterBody(StrictBody):
    lora_name: str
    lora_path: str


class UnloadAdapterBody(StrictBody):
    lora_name: str


class AbortBody(StrictBody):
    request_ids: list[str] | None = None
    request_id: str | None = None
    rid: str | None = None
    abort_all: bool = False


class ResponsesStreamOptions(StrictBody):
    """The last event brings the usage whatever these say; load tools ask for it all the same."""

    include_obfuscation: Literal[False] | None = None
    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class ResponsesReasoning(StrictBody):
    """summary: reasoning comes whole, as the content of its item; "auto" is content with that."""

    effort: str | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponsesText(StrictBody):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesBody(StrictBody):
    """max_tool_calls: bounds the calls that the service makes itself, and there are none. client_metadata: Codex's
    bookkeeping. reasoning.encrypted_content: reasoning comes in clear, and is taken back in clear."""

    harmless: ClassVar[frozenset[str]] = frozenset(HARMLESS)

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: ResponsesStreamOptions | None = None
    store: bool | None = True
    background: bool | None = False
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: ResponsesText | None = None
    reasoning: ResponsesReasoning | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: int | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    user: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    timeout_s: float | None = None


class AnthropicMessage(StrictBody):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]
    clear_at: Literal["never"] | None = None


class AnthropicCacheControl(StrictBody):
    """Says where a prefix ends that shall be cached. Here every prefix is, for as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class AnthropicThinking(StrictBody):
    """budget_tokens: what thinking should take at most; Anthropic's own models may take less or more, and only
    `max_tokens` is a bound. display: "omitted" leaves the thinking out."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = pydantic.Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class AnthropicOutputConfig(StrictBody):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class AnthropicToolChoice(StrictBody):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicContextManagement(StrictBody):
    edits: list[dict[str, Any]] | None = None


class CountTokensBody(StrictBody):
    harmless: ClassVar[frozenset[str]] = frozenset({"metadata"})

    model: str | None = None
    messages: list[AnthropicMessage]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: AnthropicOutputConfig | None = None
    context_management: AnthropicContextManagement | None = None
    cache_control: AnthropicCacheControl | None = None
    speed: Literal["standard"] | None = None


class MessagesBody(CountTokensBody):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class TokenizeBody(StrictBody):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(StrictBody):
    model: str | None = None
    tokens: list[int]


def parse(content: dict[str, Any], kind: type[Body]) -> Body:
    """Check a JSON object against a body type. Raises ApiError 400 naming the field."""
    known = kind.model_fields
    kept: dict[str, Any] = {}
    for name, value in content.items():
        if name in known:
            kept[name] = value
        elif name in NOT_BUILT:
            if value is not None and value not in NOT_BUILT[name]:
                raise invalid(f"{name} is not supported", name)
        elif name not in kind.harmless:
            raise invalid(f"unknown field {name[:64]!r}{nearest(name[:64], list(known))}", name[:64])
    try:
        return kind.model_validate(kept)
    except pydantic.ValidationError as error:
        raise _as_invalid(error) from None


def _as_invalid(error: pydantic.ValidationError) -> Exception:
    """The first finding, with the path to it: `messages.0.role: Field required`."""
    finding = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in finding["loc"]]
    return invalid(f"{'.'.join(path)}: {finding['msg']}", path[0] if path else None)
