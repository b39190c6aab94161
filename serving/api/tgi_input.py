"""The bodies of TGI's forms, and what they ask for in the words of a completion."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from serving.api.errors import invalid
from serving.api.types import CompletionBody, StrictBody
from xllm.request import check_number

# How errors about a completion are called here: patterns of its fields, see `errors.renaming`.
NAMES = {"max_tokens": "max_new_tokens", "logprobs": "top_n_tokens", "prompt_logprobs": "decoder_input_details",
         "structured_outputs": "grammar", "prompt": "inputs", "echo": "return_full_text", "n": "best_of"}
MAX_NEW_TOKENS = 100  # where a body does not say it, as TGI's clients have it
SEED_BITS = 53  # of a seed that is chosen here. Chosen: readers of JSON that know only doubles give it back as it is


class TGIGrammar(StrictBody):
    """value: a JSON schema, as an object or as text; of `regex` the expression; of `json_schema` {"name", "schema"}."""

    type: Literal["json", "regex", "json_schema"]
    value: Any


class TGIParameters(StrictBody):
    """typical_p, watermark: there are none; these values ask for nothing."""

    adapter_id: str | None = None
    best_of: int | None = None
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: float | None = None
    grammar: TGIGrammar | None = None
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    return_full_text: bool | None = None
    seed: int | None = None
    stop: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_n_tokens: int | None = None
    top_p: float | None = None
    truncate: int | None = None
    typical_p: float | None = None
    watermark: bool | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn. Otherwise each is the likeliest, whatever the model's own defaults are."""
        return bool(self.do_sample or self.temperature not in (None, 0, 1) or self.top_k or self.top_p not in (None, 1))

    @property
    def num_choices(self) -> int:
        return 1 if self.best_of is None else self.best_of


class TGIBody(StrictBody):
    inputs: str
    parameters: TGIParameters | None = None
    stream: bool | None = None

    @property
    def wish(self) -> TGIParameters:
        return self.parameters or TGIParameters()

    @property
    def model(self) -> str | None:
        """An adapter is named where other APIs name the model."""
        return self.wish.adapter_id


def check(body: TGIBody, *, streams: bool) -> None:
    """Raise ApiError or RequestError for what TGI refuses, and for what is not built here."""
    wish = body.wish
    if not body.inputs:
        raise invalid("inputs must not be empty", "inputs")
    if wish.typical_p not in (None, 1):
        raise invalid("typical_p is not supported", "typical_p")
    if wish.watermark:
        raise invalid("watermark is not supported", "watermark")
    if wish.truncate is not None:
        check_number("truncate", wish.truncate, 1, 2**31 - 1, whole=True)
    check_number("best_of", wish.num_choices, 1, 2**31 - 1, whole=True)
    if wish.num_choices > 1 and not wish.samples:
        raise invalid("best_of needs do_sample: without it all choices are the same", "best_of")
    if wish.num_choices > 1 and wish.seed is not None:
        raise invalid("best_of does not go with a seed", "best_of")
    if streams and wish.num_choices > 1:
        raise invalid("best_of does not go with a stream: the best is known at the end", "best_of")
    if streams and wish.decoder_input_details:
        raise invalid("decoder_input_details does not go with a stream", "decoder_input_details")


def completion_body(body: TGIBody) -> CompletionBody:
    """The body of a completion that asks for the same; its prompt and log-probabilities are left out. Raises ApiError.

    The parameters that a model brings itself are set to values that do nothing: TGI does not know them.
    """
    wish = body.wish
    seed = wish.seed
    if wish.samples and seed is None and wish.num_choices == 1:
        seed = secrets.randbits(SEED_BITS)  # told in the details, so that the answer can be had again
    return CompletionBody(
        model=wish.adapter_id, n=wish.num_choices, seed=seed, stop=wish.stop, include_stop_str_in_output=True,
        temperature=(1.0 if wish.temperature is None else wish.temperature) if wish.samples else 0.0,
        top_p=1.0 if wish.top_p is None else wish.top_p, top_k=wish.top_k or 0, min_p=0.0, presence_penalty=0.0,
        frequency_penalty=wish.frequency_penalty or 0.0,
        repetition_penalty=1.0 if wish.repetition_penalty is None else wish.repetition_penalty,
        structured_outputs=None if wish.grammar is None else _form(wish.grammar))


def _form(grammar: TGIGrammar) -> dict[str, Any]:
    value = grammar.value
    if grammar.type == "regex":
        if not isinstance(value, str):
            raise invalid("grammar.value must be a text where type is 'regex'", "grammar")
        return {"regex": value}
    if grammar.type == "json_schema":
        if not isinstance(value, dict) or not value.keys() <= {"name", "schema"}:
            raise invalid("grammar.value must be {\"name\", \"schema\"} where type is 'json_schema'", "grammar")
        value = value.get("schema")
    if not isinstance(value, (dict, str)):
        raise invalid("grammar.value must be a JSON schema, an object or its text", "grammar")
    return {"json": value}
