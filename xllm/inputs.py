"""`InputProcessor`: makes `Request`s of a user's prompt and sampling parameters.

Everything that can be wrong with a request and does not depend on the queue is found here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm.config import ModelSettings
from xllm.engine.facts import EngineFacts
from xllm.errors import ModelError, RequestError
from xllm.hub import resolve_model_path
from xllm.model_files import read_json
from xllm.pooling import PoolingParams
from xllm.request import MAX_BAD_WORDS, Request, SamplingParams
from xllm.structured.checker import GrammarChecker
from xllm.structured.spec import StructuredOutput
from xllm.structured.token_trie import VocabularySource, vocabulary_source
from xllm.text.tokenizer import Tokenizer, load_tokenizer
from xllm.token_ids import are_integers, are_within, check_prompt_length, token_array

# Text, token ids, {"prompt": text}, or {"prompt_token_ids": ids}, which may bring its "prompt" along to be shown.
Prompt = str | Sequence[int] | Mapping[str, Any]

EMBEDDING_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that no two choices of one request share a seed
_UINT64 = 2**64 - 1  # the largest seed: seeds are uint64 on the device


@dataclass(frozen=True, kw_only=True)
class ProcessedInput:
    """One prompt, ready to run: `requests` has one entry a choice."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling: SamplingParams
    requests: tuple[Request, ...]


class InputProcessor:
    """Checks, tokenises and fans out. Usable from several threads."""

    def __init__(self, tokenizer: Tokenizer | None, *, vocab_size: int, max_model_len: int,
                 eos_token_ids: tuple[int, ...]):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        known_eos = tokenizer.eos_token_ids if tokenizer else ()
        self.eos_token_ids = tuple(dict.fromkeys((*eos_token_ids, *known_eos)))
        self.grammars = GrammarChecker(self._vocabulary_source)
        self._serial = itertools.count()
        # One list of bad words serves all prompts of a call, and often all calls of a client.
        self._token_ids_of_words = functools.lru_cache(maxsize=8)(self._encode_words)
        self._completed = (SamplingParams(), SamplingParams())  # the last that was completed, and what it became

    @classmethod
    def of(cls, facts: EngineFacts, tokenizer: Tokenizer | None) -> InputProcessor:
        """For requests to this engine."""
        return cls(tokenizer, vocab_size=facts.vocab_size, max_model_len=facts.max_model_len,
                   eos_token_ids=facts.eos_token_ids)

    def process(self, request_id: str, prompt: Prompt, sampling: SamplingParams, **options: Any) -> ProcessedInput:
        """Everything the engine needs to run `prompt`; options: those of `requests`.

        Raises:
            RequestError: names the parameter that is wrong.
        """
        text, token_ids = self.encode_prompt(prompt)
        check_prompt_length(len(token_ids), self.max_model_len)
        requests = self.requests(request_id, token_ids, sampling, **options)
        return ProcessedInput(request_id=request_id, prompt=text, prompt_token_ids=token_ids, sampling=sampling,
                              requests=requests)

    def requests(self, request_id: str, token_ids: Sequence[int], sampling: SamplingParams, *, priority: int = 0,
                 offline: bool = False, deadline_s: float | None = None, cache_salt: str = "",
                 session_id: str | None = None, pooling: PoolingParams | None = None, lora: str = "", tenant: str = "",
                 tenant_weight: float = 1.0, shares_prompt_logprobs: bool = True) -> tuple[Request, ...]:
        """The engine's requests for a prompt whose length was checked; `sampling.n` becomes that many.

        shares_prompt_logprobs: of the `n`, the first alone computes those of the prompt.

        Raises:
            RequestError: names the parameter that is wrong.
        """
        packed_ids = self._packed(token_ids)
        sampling = self._complete(sampling)
        arrival_s = time.monotonic()
        return tuple(
            Request(request_id=child_id, prompt_token_ids=packed_ids, sampling=choice,
                    eos_token_ids=self.eos_token_ids, arrival_s=arrival_s, priority=priority, offline=offline,
                    deadline_s=deadline_s, cache_salt=cache_salt, session_id=session_id, pooling=pooling, lora=lora,
                    tenant=tenant, tenant_weight=tenant_weight)
            for child_id, choice in zip(self._engine_ids(request_id, sampling.n),
                                        _choices(sampling, shares_prompt_logprobs))
        )

    def encode_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text if there is one, token ids)."""
        if isinstance(prompt, Mapping):
            return self._encode_mapping(prompt)
        if isinstance(prompt, str):
            return prompt, self._needs_tokenizer("prompt", "a text prompt").encode(prompt)
        return None, as_token_ids(prompt)

    def _encode_mapping(self, prompt: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        token_ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
        if unknown := prompt.keys() - {"prompt", "prompt_token_ids"}:
            raise RequestError(f"prompt: unknown key {min(unknown)!r}; known are prompt and prompt_token_ids",
                               field="prompt")
        if token_ids is not None:
            return text if isinstance(text, str) else None, as_token_ids(token_ids)
        if not isinstance(text, str):
            raise RequestError("prompt: give {'prompt': text} or {'prompt_token_ids': [...]}", field="prompt")
        return text, self._needs_tokenizer("prompt", "a text prompt").encode(text)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raise RequestError for an id outside the vocabulary."""
        self._packed(token_ids)

    def _packed(self, token_ids: Sequence[int]) -> array[int]:
        """The ids as `Request.prompt_token_ids`. Raises RequestError for one outside the vocabulary."""
        packed: array[int] | None = None
        with contextlib.suppress(OverflowError):
            packed = token_array(token_ids)
        if packed is None or not are_within(packed, self.vocab_size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise RequestError(f"prompt: token id {wrong} is outside the vocabulary (0 to {self.vocab_size - 1})",
                               field="prompt")
        return packed

    def _complete(self, sampling: SamplingParams) -> SamplingParams:
        """The result of `_checked`, computed once for all sequences of a call with the same parameters."""
        given, completed = self._completed
        if sampling.detokenize != given.detokenize or not sampling.shares_collections(given):
            completed = self._checked(sampling)
            self._completed = sampling, completed
        if completed.bad_words_token_ids is sampling.bad_words_token_ids:
            return sampling
        return sampling.varied(bad_words_token_ids=completed.bad_words_token_ids)

    def _checked(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters with bad words tokenised. Raises RequestError for stop strings without a tokenizer, and for
        ids outside the vocabulary."""
        if sampling.stop:
            self._needs_tokenizer("stop", "a stop string")
            if not sampling.detokenize:
                raise RequestError("stop needs detokenize=True", field="stop")
        if sampling.structured is not None:
            self.check_structured(sampling.structured)
        sampling = self._with_bad_words(sampling)
        sampling.check_vocabulary(self.vocab_size)
        return sampling

    def _with_bad_words(self, sampling: SamplingParams) -> SamplingParams:
        if not sampling.bad_words:
            return sampling
        found = dict.fromkeys((*sampling.bad_words_token_ids, *self._token_ids_of_words(sampling.bad_words)))
        if len(found) > MAX_BAD_WORDS:
            raise RequestError(f"bad_words: more than {MAX_BAD_WORDS} token sequences", field="bad_words")
        return sampling.varied(bad_words_token_ids=tuple(found))

    def check_structured(self, spec: StructuredOutput) -> None:
        """Compile a form in another process, unless that was done lately; blocks until it is done, for seconds perhaps.

        Raises: RequestError: it cannot be honoured.
        """
        self._needs_tokenizer("structured", "a structured output")
        self.grammars.check(spec)

    def _vocabulary_source(self) -> VocabularySource:
        tokenizer = self._needs_tokenizer("structured", "a structured output")
        return vocabulary_source(tokenizer, self.vocab_size, self.eos_token_ids)

    def close(self) -> None:
        """End the processes that compile forms."""
        self.grammars.close()

    def _encode_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        tokenizer = self._needs_tokenizer("bad_words", "a bad word")
        # By themselves and behind a blank, which often is part of the token.
        texts = [text for word in words for text in (word.lstrip(" "), " " + word.lstrip(" "))]
        encoded = (tuple(tokenizer.encode_continuation(text, field="bad_words")) for text in texts)
        return tuple(ids for ids in encoded if ids)

    def _engine_ids(self, request_id: str, n: int) -> list[str]:
        """Ids for `n` sequences that the engine has never seen, even when a user's id is used again."""
        serial = next(self._serial)
        return [f"{request_id}/{serial}"] if n == 1 else [f"{request_id}/{serial}/{index}" for index in range(n)]

    def _needs_tokenizer(self, field: str, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and skip_tokenizer_init is set; use token ids", field=field)
        return self.tokenizer


def as_token_ids(given: Any) -> list[int]:
    """A list of ints of any sequence, numpy array or tensor. Raises RequestError for what is none, or holds anything
    but integers."""
    if hasattr(given, "tolist"):  # numpy arrays and tensors
        given = given.tolist()
    if isinstance(given, (bytes, str)) or not isinstance(given, Sequence):
        raise RequestError(f"prompt must be text or token ids, got {type(given).__name__}", field="prompt")
    token_ids = list(given)
    if not are_integers(token_ids):
        wrong = next((token_id for token_id in token_ids if type(token_id) is not int), token_ids)
        raise RequestError(f"prompt: token ids must be integers, got {wrong!r}", field="prompt")
    return token_ids


def _choices(sampling: SamplingParams, shares_prompt_logprobs: bool) -> list[SamplingParams]:
    """One for each of the `n`, the same object where they are alike. Choice 0 is what n=1 would give.

    Without a seed the engine seeds each by its order of arrival, so they differ.
    """
    if sampling.n == 1:
        return [sampling]
    first = other = sampling.varied(n=1)
    if shares_prompt_logprobs and sampling.prompt_logprobs is not None:
        other = first.varied(prompt_logprobs=None)
    seed = sampling.seed
    if seed is None:
        return [first, *[other] * (sampling.n - 1)]
    return [first, *(other.varied(seed=(seed + index * _SEED_STEP) & _UINT64) for index in range(1, sampling.n))]


def chat_prompt(tokenizer: Tokenizer | None, messages: Sequence[Any], *, add_generation_prompt: bool = True,
                continue_final_message: bool = False, chat_template: str | None = None,
                tools: Sequence[Mapping[str, Any]] | None = None,
                chat_template_kwargs: Mapping[str, Any] | None = None) -> Prompt:
    """A conversation as a prompt: the text that the model's chat template makes of it, and its token ids.

    Raises:
        RequestError: there is no tokenizer, or the template refuses the messages. ModelError: there is no template.
    """
    if tokenizer is None:
        raise RequestError("chat needs a tokenizer, and skip_tokenizer_init is set", field="messages")
    text, token_ids = tokenizer.encode_chat(
        messages, add_generation_prompt=add_generation_prompt, tools=tools,
        continue_final_message=continue_final_message, chat_template=chat_template, **(chat_template_kwargs or {}))
    return {"prompt": text, "prompt_token_ids": token_ids}


def model_tokenizer(model: ModelSettings) -> Tokenizer | None:
    """The tokenizer that the settings ask for, its chat templates compiled; None with skip_tokenizer_init.

    It needs no engine: call it before the weights are read, so that what is wrong is said within a second or two.
    Raises ModelError, naming the file.
    """
    if model.skip_tokenizer_init:
        return None
    path = resolve_model_path(model.model, model.revision)
    read_json(path / "config.json")  # what is no model's folder at all is refused as that
    if model.tokenizer is not None:
        path = resolve_model_path(model.tokenizer)
    tokenizer = load_tokenizer(path)
    try:
        tokenizer.compile_templates()
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return tokenizer
