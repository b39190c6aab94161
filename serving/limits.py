"""Every bound on what a caller may send, in one table: flags, docs/limits.md and tests are made from it.

A row with `flag` is a setting, `--max-...`; the others are constants of the code that checks them, named here so that
they are seen. What is beyond a bound is refused with `status`, naming the field; nothing is cut in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from xllm import request
from xllm.errors import ConfigError
from xllm.option import option


@dataclasses.dataclass(frozen=True)
class Limit:
    """field: the member of a request body that it bounds, whose length (or value) is checked before anything is
    built from it; None: it is checked where `what` says. at_least: the smallest sensible setting."""

    name: str
    default: int
    what: str
    status: int = 400
    flag: bool = True
    field: str | None = None
    at_least: int = 1


HEAD = (
    Limit("max_header_bytes", 64 * 2**10, "bytes of a request's headers, names and values", 431, at_least=1024),
    Limit("max_headers", 100, "headers of a request", 431, at_least=10),
    Limit("max_url_bytes", 8 * 2**10, "bytes of a request's path and query", 414, at_least=256),
)
BODY = (
    Limit("max_body_bytes", 8 * 2**20, "bytes of a request body", 413),
    Limit("max_json_depth", 64, "nesting in a request body"),
    Limit("max_json_nodes", 2**20, "values in a request body; counted before it is parsed", at_least=16),
    Limit("max_json_containers", 2**17, "lists and objects in a request body; a small text can hold millions",
          at_least=16),
)
GENERATION = (
    Limit("max_sequences_per_request", 1024, "sequences of one call: its prompts times n"),
    Limit("max_call_weight", 2**28, "bytes that a call weighs, by what it multiplies (below)", at_least=2**14),
    Limit("max_text_chars", 2**20, "characters of a text that is tokenised; more where eight for each token of the "
          "model's longest sequence are more"),
    Limit("max_messages", 4096, "messages of a conversation", field="messages"),
    Limit("max_stop_strings", request.MAX_STOP_STRINGS, "stop strings", field="stop", at_least=0),
    Limit("max_bad_words", request.MAX_BAD_WORDS, "bad words", field="bad_words", at_least=0),
    Limit("max_logit_bias", request.MAX_LOGIT_BIAS, "tokens with a bias", field="logit_bias", at_least=0),
    Limit("max_logprobs", request.MAX_LOGPROBS, "top log-probabilities of a token", field="logprobs", at_least=0),
    Limit("max_queue_tokens", 2**24, "prompt tokens that wait for their first output, over all calls; beyond it calls "
          "are turned away with Retry-After", 503),
)
CHATS = (
    Limit("max_tools", 512, "tools of a call", field="tools"),
    Limit("max_template_variables", 32, "variables for the chat template", field="chat_template_kwargs"),
    Limit("max_template_variable_chars", 2**14, "characters of these as JSON (`chat_template_kwargs`)"),
    Limit("max_template_chars", 2**18, "characters of a request's own template (`chat_template`), where it may have "
          "one"),
    Limit("max_rendered_chars", request.MAX_RENDERED_CHARS, "characters that a template makes of a conversation, "
          "counted before tokenising"),
)
FIXED = (
    Limit("MAX_CHOICES", request.MAX_CHOICES, "n: choices of a prompt", flag=False, field="n"),
    Limit("MAX_STOP_STRING_CHARS", request.MAX_STOP_STRING_CHARS, "characters of a stop string or bad word",
          flag=False),
    Limit("MAX_ALLOWED_TOKEN_IDS", request.MAX_ALLOWED_TOKEN_IDS, "token ids that alone may come", flag=False,
          field="allowed_token_ids"),
    Limit("MAX_STOP_TOKEN_IDS", request.MAX_STOP_TOKEN_IDS, "stop token ids", flag=False, field="stop_token_ids"),
)
MEDIA = (
    Limit("MAX_MEDIA_BYTES", 16 * 2**20, "bytes of a fetched or inlined medium, counted while it comes", flag=False),
    Limit("MAX_MEDIA_PIXELS", 2**24, "pixels of an image, from its header, before any decoder sees it", flag=False),
    Limit("MAX_MEDIA_REDIRECTS", 3, "redirects that fetching follows, each checked as the first address was",
          flag=False),
    Limit("MAX_MEDIA_SECONDS", 10, "seconds for fetching a medium, redirects included", flag=False),
    Limit("MAX_MEDIA_URL_CHARS", 2048, "characters of a medium's http(s) address", flag=False),
)
TABLE = (*HEAD, *BODY, *GENERATION, *CHATS, *FIXED, *MEDIA)
BY_NAME = {limit.name: limit for limit in TABLE}

# Besides its own field a bound holds for these.
SAME_AS = {"top_logprobs": "max_logprobs", "prompt_logprobs": "max_logprobs"}


def _check_settings(settings: Any) -> None:
    for limit in TABLE:
        if limit.flag and getattr(settings, limit.name) < limit.at_least:
            raise ConfigError(f"{limit.name} must be at least {limit.at_least}, got {getattr(settings, limit.name)}")
    for limit in (*GENERATION, *CHATS):
        hard = HARD_MAXIMA.get(limit.name)
        if hard is not None and getattr(settings, limit.name) > hard:
            raise ConfigError(f"{limit.name} must be at most {hard}, got {getattr(settings, limit.name)}")


# What the engine itself was built for; a setting may only be stricter.
HARD_MAXIMA = {"max_stop_strings": request.MAX_STOP_STRINGS, "max_bad_words": request.MAX_BAD_WORDS,
               "max_logit_bias": request.MAX_LOGIT_BIAS, "max_logprobs": request.MAX_LOGPROBS,
               "max_rendered_chars": request.MAX_RENDERED_CHARS}


def _settings(limits: Iterable[Limit]) -> Any:
    fields = [(limit.name, int, option(limit.default, f"limit: {limit.what}")) for limit in limits if limit.flag]
    return dataclasses.make_dataclass("LimitSettings", fields, frozen=True, kw_only=True,
                                      namespace={"__post_init__": _check_settings, "__doc__": "Limits as settings.",
                                                 "__module__": __name__})


LimitSettings = _settings(TABLE)
FIELD_LIMITS = {**{limit.field: limit.name for limit in TABLE if limit.flag and limit.field}, **SAME_AS}
