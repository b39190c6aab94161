"""`Tokenizer`: text to token ids and back, chats to prompts.

A checkpoint's `tokenizer.json` is loaded directly, which spares the seconds that importing
transformers costs. Checkpoints without one go through transformers, which converts them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm.errors import ModelError, RequestError
from xllm.model_files import MAX_TOKENIZER_BYTES, check_size, is_there, read_json, read_text
from xllm.text.chat_template import ChatTemplate, Message, select_template
from xllm.text.tokenizer_config import apply_members

if TYPE_CHECKING:
    import tokenizers

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_TOKEN_FIELDS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# from which tokenising lets other threads run; chosen: releasing the interpreter costs shorter texts more than it helps
_LONG_TEXT_CHARS = 2048
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Where a part says what it puts before a text, and what it says for nothing.
_FIRST_BLANKS = {"ByteLevel": ("add_prefix_space", False), "Metaspace": ("prepend_scheme", "never"),
                 "Prepend": ("prepend", "")}
_LOCAL_PARTS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"}  # see `has_fixed_bytes`


class Tokenizer:
    """A tokenizer and the chat templates that came with it. Immutable after loading, usable from several threads.

    special_tokens: name -> text, as the chat template sees them (`bos_token`, ...).
    templates: name -> Jinja source; `default` is the usual one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str],
                 templates: Mapping[str, str]):
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self._template_sources = dict(templates)
        self._templates: dict[str, ChatTemplate] = {}
        self.token_bytes: Callable[[int], bytes] = functools.cache(self._token_bytes)
        eos = self.special_tokens.get("eos_token")
        eos_id = backend.token_to_id(eos) if eos else None
        self.eos_token_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)
        self.special_token_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, added ones too; a model's own vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True, *, field: str = "prompt") -> list[int]:
        """Token ids of `text`. `field` names the parameter in the error.

        Raises:
            RequestError: `text` holds a lone surrogate, which is no Unicode text, or the tokenizer's own patterns
                cannot split it.
        """
        with _refusals(text, field):
            if len(text) > _LONG_TEXT_CHARS:  # unlike `encode` this lets other threads run meanwhile
                return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_continuation(self, text: str, *, field: str = "prompt") -> list[int]:
        """Token ids of a text that goes on another one: no blank is put before it, and no special token is added.
        Raises RequestError as `encode` does."""
        with _refusals(text, field):
            return self._continuing.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        parts = (self.backend.normalizer, self.backend.pre_tokenizer)
        states = [json.loads(part.__getstate__()) for part in parts if part is not None]
        if not any(_drop_first_blank(state) for state in states):
            return self.backend
        return type(self.backend).from_str(self.continuing_json())

    def continuing_json(self) -> str:
        """The backend, serialised, but that it puts no blank before a text."""
        content = json.loads(self.backend.to_str())
        for part in (content["normalizer"], content["pre_tokenizer"]):
            _drop_first_blank(part)
        return json.dumps(content)

    def encode_with_spans(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, and of each the characters [start, end) that it stands for; none for special tokens that
        were added. Raises RequestError as `encode` does."""
        with _refusals(text, "prompt"):
            if len(text) > _LONG_TEXT_CHARS:  # as in `encode`
                found = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
            else:
                found = self.backend.encode(text, add_special_tokens=add_special_tokens)
            return found.ids, found.offsets

    def offsets(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Where each of `text`'s tokens begins, in characters; one that was added stands where the one before it ends.
        A token that is part of a character points at it. Raises RequestError as `encode` does."""
        found, end_before = [], 0
        for start, end in self.encode_with_spans(text, add_special_tokens)[1]:
            # Some tokenizers leave blanks out of the spans of tokens that hold them.
            found.append(min(start, end_before) if end else end_before)
            end_before = max(end, end_before)
        return found

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`; ids that it does not know add nothing."""
        if len(token_ids) > _LONG_TEXT_CHARS:  # as in `encode`
            return self.backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True,
                    tools: Sequence[Mapping[str, Any]] | None = None, chat_template: str | None = None,
                    **kwargs: Any) -> str:
        """The prompt text of a conversation; see `ChatTemplate.render`. `chat_template`: Jinja source to use instead.

        Raises:
            RequestError: the messages are malformed, or the template refuses them.
            ModelError: the checkpoint has no chat template, or it does not compile.
        """
        source = chat_template or select_template(self._template_sources, with_tools=bool(tools))
        if source is None:
            raise ModelError("this model's tokenizer has no chat template; pass one, or use plain prompts")
        compiled = self._templates.get(source)
        if compiled is None:
            compiled = ChatTemplate(source, self.special_tokens)
            if chat_template is None:  # what a caller sends is not kept: the cache must not grow with requests
                self._templates[source] = compiled
        return compiled.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs)

    def compile_templates(self) -> None:
        """Compile all that came with the checkpoint now. Raises ModelError, naming the one that does not compile."""
        for name, source in self._template_sources.items():
            if source not in self._templates:
                try:
                    self._templates[source] = ChatTemplate(source, self.special_tokens)
                except ModelError as error:
                    raise ModelError(f"{error} (template {name!r})") from error

    def encode_chat(self, messages: Sequence[Message], check: Callable[[str], None] = lambda text: None,
                    add_special_tokens: bool = False, /, **kwargs: Any) -> tuple[str, list[int]]:
        """The prompt text of a conversation, as `render_chat` makes it, and its token ids. The template writes bos and
        the like itself, so none are added. check: called with the text before it is tokenised; raises for one that is
        too long. Variables of the template may have any of these names."""
        text = self.render_chat(messages, **kwargs)
        check(text)
        return text, self.encode(text, add_special_tokens, field="messages")

    @property
    def chat_template_sources(self) -> tuple[str, ...]:
        """The Jinja texts of all of its chat templates."""
        return tuple(self._template_sources.values())

    @functools.cached_property
    def special_token_texts(self) -> frozenset[str]:
        """What `skip_special_tokens` hides, as it would show."""
        return frozenset(map(self.token_text, self.special_token_ids))

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._template_sources

    def token_text(self, token_id: int) -> str:
        """The token's text within a text; part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def text_after(self, before: int | None, token_id: int) -> str:
        """The token's text behind the token `before`; None: at the beginning of a text."""
        if before is None:
            return self.decode([token_id])
        return self.decode([before, token_id])[len(self.decode([before])):]

    def _token_bytes(self, token_id: int) -> bytes:
        """The token's bytes as they stand within a decoded text (a `▁` is the space that it means)."""
        token = self.backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self.is_byte_level:
            return byte_level_bytes(token)
        if self.has_byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return self.text_after(self._ordinary_token, token_id).encode()

    @functools.cached_property
    def _ordinary_token(self) -> int | None:
        """One that is a word or part of one: a place for others to stand behind."""
        ordinary = (i for i in range(self.vocab_size) if i not in self.special_token_ids and not self.is_byte_token(i))
        return next((i for i in ordinary if self.decode([i]).isalnum()), None)

    def all_token_bytes(self) -> list[bytes]:
        """`token_bytes` of every token, by id."""
        return [self._token_bytes(token_id) for token_id in range(self.vocab_size)]

    @functools.cached_property
    def _decoder_parts(self) -> frozenset[str]:
        """Kinds of the steps that decoding takes; none: tokens are put together with blanks."""
        if self.backend.decoder is None:
            return frozenset()
        return frozenset(_kinds(json.loads(self.backend.decoder.__getstate__())))

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """Whether decoding is: concatenate each token's bytes, then read them as UTF-8."""
        return self._decoder_parts in ({"ByteLevel"}, {"ByteLevel", "Fuse"})

    @functools.cached_property
    def has_byte_fallback(self) -> bool:
        """Whether tokens like <0xE2> stand for single bytes."""
        return "ByteFallback" in self._decoder_parts and self.backend.token_to_id("<0x00>") is not None

    @functools.cached_property
    def has_fixed_bytes(self) -> bool:
        """Whether a token stands for the same bytes wherever it is within a text; at its beginning a blank may be
        dropped."""
        return bool(self._decoder_parts) and self._decoder_parts <= _LOCAL_PARTS

    def knows(self, token_id: int) -> bool:
        """False for the ids with which a model's vocabulary is padded."""
        return self.backend.id_to_token(token_id) is not None

    def is_byte_token(self, token_id: int) -> bool:
        token = self.backend.id_to_token(token_id) if self.has_byte_fallback else None
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None


def _drop_first_blank(part: dict[str, Any] | None) -> bool:
    """Change a serialised normalizer or pre-tokenizer so that it puts nothing before a text; whether it did."""
    if part is None:
        return False
    if part["type"] == "Sequence":
        members = part.get("normalizers") or part.get("pretokenizers") or ()
        return sum(map(_drop_first_blank, members)) > 0
    name, none = _FIRST_BLANKS.get(part["type"], ("", None))
    if not name or part[name] == none:
        return False
    part[name] = none
    return True


def _kinds(decoder: Mapping[str, Any]) -> list[str]:
    if decoder["type"] != "Sequence":
        return [decoder["type"]]
    return [kind for part in decoder["decoders"] for kind in _kinds(part)]


@contextlib.contextmanager
def _refusals(text: object, field: str) -> Iterator[None]:
    """Raises RequestError for what the Rust side says of a text that it does not take."""
    try:
        yield
    except TypeError:  # all that it says of a string that is not Unicode
        raise RequestError(_why_no_text(text, field), field=field) from None
    except BaseException as error:  # its panics are no Exceptions
        if type(error).__name__ != "PanicException":
            raise
        raise RequestError(f"{field} cannot be tokenised: {error}", field=field) from None


def _why_no_text(text: object, field: str) -> str:
    if not isinstance(text, str):
        return f"{field} must be a string, got {type(text).__name__}"
    position = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), -1)
    return f"{field} is not valid Unicode: lone surrogate at character {position}"


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable bytes stand for themselves, the others for U+0100 and up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


_ALPHABET = _byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; a token with a foreign character (an added one) stands for its own UTF-8."""
    try:
        return bytes([_ALPHABET[c] for c in token])
    except KeyError:
        return token.encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder.

    `tokenizer.json` is taken at its word. From `tokenizer_config.json` come the named special tokens,
    tokens that were added later, the chat template (`chat_template.jinja` wins over it), and `split_special_tokens`.

    Raises:
        ModelError: files are missing or corrupt; names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder; no tokenizer there")
    config = {**_read_json(path / "special_tokens_map.json"), **_read_json(path / "tokenizer_config.json")}
    special_tokens = {name: _content(value) for name, value in config.items()
                      if name.endswith("_token") and _content(value)}
    if is_there(path / "tokenizer.json"):
        backend = _load_backend(path / "tokenizer.json")
        try:
            _add_missing_tokens(backend, config, special_tokens)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"{path / 'tokenizer_config.json'}: added_tokens_decoder or the special tokens are "
                             f"malformed: {error}") from None
    else:
        backend, special_tokens = _convert_with_transformers(path)
    backend.no_truncation()
    backend.no_padding()
    apply_members(backend, config, path / "tokenizer_config.json")
    return Tokenizer(backend, special_tokens, _read_templates(path, config))


def _load_backend(file: Path) -> tokenizers.Tokenizer:
    import tokenizers

    check_size(file, MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelError(f"{file} cannot be read as a tokenizer: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    return read_json(file) if is_there(file) else {}


def _content(value: Any) -> str:
    """The text of a token that is written as a string or as a serialised AddedToken."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any],
                        special_tokens: Mapping[str, str]) -> None:
    """Add the tokens that only tokenizer_config.json knows, and make the named ones special."""
    import tokenizers

    known = backend.get_added_tokens_decoder()
    for _, entry in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        if isinstance(entry, dict) and backend.token_to_id(_content(entry)) is None:
            fields = {k: v for k, v in entry.items() if k in _ADDED_TOKEN_FIELDS}
            backend.add_tokens([tokenizers.AddedToken(_content(entry), **fields)])
    already_special = {token.content for token in known.values() if token.special}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    named = [special_tokens[name] for name in NAMED_SPECIAL_TOKENS if name in special_tokens]
    wanted = dict.fromkeys([*named, *map(_content, _values(extra))])
    backend.add_special_tokens([
        tokenizers.AddedToken(text, special=True, normalized=False)
        for text in wanted if text and text not in already_special
    ])


def _values(collection: Any) -> Iterable[Any]:
    return collection.values() if isinstance(collection, Mapping) else collection


def _convert_with_transformers(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, KeyError, ... here
        raise ModelError(f"no usable tokenizer in {path}: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"the tokenizer in {path} ({type(loaded).__name__}) has no form that the tokenizers "
                         "library can run; save it with a tokenizer.json")
    return backend, {name: str(text) for name, text in loaded.special_tokens_map.items() if isinstance(text, str)}


def _read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files win over the entry in tokenizer_config.json, which is one text or a list of named ones."""
    found: dict[str, str] = {}
    if is_there(path / "chat_template.jinja"):
        found["default"] = read_text(path / "chat_template.jinja")
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = read_text(file)
    if found:
        return found
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list):
        return {t["name"]: t["template"] for t in entry if isinstance(t, dict)
                and all(isinstance(t.get(member), str) for member in ("name", "template"))}
    return {}
