"""The tokenizer in the form that llguidance reads: every token's bytes, in a trie."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from xllm.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_RESERVED = b"\xff"  # llguidance marks special tokens with it; no text has it


@dataclass(frozen=True, kw_only=True)
class VocabularySource:
    """The facts that a vocabulary is built from, as plain JSON values, so that they can be sent to another process.

    tokenizer_json: a `tokenizers.Tokenizer` that puts no blank before a text, serialised. token_bytes: in hexadecimal,
    one a logit: none where the model knows a token that the tokenizer does not know, or must never be drawn.
    eos_token_ids: all that end an output.
    """

    tokenizer_json: str
    token_bytes: Sequence[str]
    special_token_ids: Sequence[int]
    eos_token_ids: Sequence[int]

    def build(self) -> LLTokenizer:
        """The trie; takes about a second for 150 000 tokens."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Wrapped(self)), eos_token=list(self.eos_token_ids))


class TextTokenizer(Protocol):
    """`xllm.text.tokenizer.Tokenizer`."""

    @property
    def backend(self) -> Any: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    @property
    def has_fixed_bytes(self) -> bool: ...

    def all_token_bytes(self) -> list[bytes]: ...

    def continuing_json(self) -> str: ...


def vocabulary_source(tokenizer: TextTokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> VocabularySource:
    """For masks over `vocab_size` logits; the tokenizer's own end tokens count as well.

    Raises:
        RequestError: there is no end token, or this kind of tokenizer cannot be used.
    """
    eos = tuple(i for i in dict.fromkeys((*eos_token_ids, *tokenizer.eos_token_ids)) if i < vocab_size)
    if not eos:
        raise RequestError("structured outputs need a model with an end token", field="structured")
    if not tokenizer.has_fixed_bytes:
        decoder = type(tokenizer.backend.decoder).__name__
        raise RequestError(f"structured outputs do not work with this model's tokenizer ({decoder})",
                           field="structured")
    known = ["" if token.startswith(_RESERVED) else token.hex() for token in tokenizer.all_token_bytes()[:vocab_size]]
    special = sorted(i for i in {*tokenizer.special_token_ids, *eos} if i < vocab_size)
    return VocabularySource(tokenizer_json=tokenizer.continuing_json(), eos_token_ids=eos, special_token_ids=special,
                            token_bytes=known + [""] * (vocab_size - len(known)))


class _Wrapped:
    """What llguidance asks of a tokenizer.

    It reads `tokenizer.json` by itself as well, but then takes a forced text that looks like a special token for that
    token, an end token even.
    """

    def __init__(self, source: VocabularySource):
        import tokenizers

        content = json.loads(source.tokenizer_json)
        content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < len(source.token_bytes)]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._backend.encode_special_tokens = True  # special tokens in a text are text
        self.tokens = [bytes.fromhex(token) for token in source.token_bytes]
        self.special_token_ids = list(source.special_token_ids)
        self.eos_token_id, self.bos_token_id = source.eos_token_ids[0], None

    def __call__(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def need_llguidance() -> None:
    """Raise RequestError that says how to install it."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise RequestError("structured outputs need the package llguidance: pip install 'xllm-engine[structured]'",
                           field="structured") from None
