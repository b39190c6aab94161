"""Members of `tokenizer_config.json` that change ids or texts, beside a `tokenizer.json` that is taken at its word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm.errors import ModelError

if TYPE_CHECKING:
    import tokenizers

FORCED_CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
# With this class transformers keeps the pre-tokenizer of tokenizer.json as well.
PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")


def apply_members(backend: tokenizers.Tokenizer, config: Mapping[str, Any], file: Path) -> None:
    """Change `backend` as the config asks. Raises ModelError, naming file and member, for what is not built."""
    for name in ("split_special_tokens", "clean_up_tokenization_spaces", FORCED_CLEAN_UP, "add_prefix_space"):
        if not isinstance(config.get(name), bool | None):
            raise ModelError(f"{file}: {name} must be true or false, got {config[name]!r}")
    if config.get("split_special_tokens"):  # texts are never read as special tokens
        backend.encode_special_tokens = True
    is_bpe = type(backend.model).__name__ == "BPE"
    if config.get("clean_up_tokenization_spaces") and (not is_bpe or config.get(FORCED_CLEAN_UP)):
        raise ModelError(f"{file}: clean_up_tokenization_spaces true is not built; the text would lose spaces that the "
                         "model wrote")
    if config.get("add_prefix_space") and config.get("tokenizer_class") not in PLAIN_CLASSES and _lacks_space(backend):
        raise ModelError(f"{file}: add_prefix_space true, and the pre_tokenizer in tokenizer.json adds none; "
                         "tokenizer.json is taken at its word, so it must say so itself")


def _lacks_space(backend: tokenizers.Tokenizer) -> bool:
    """Whether texts are split into bytes without a space in front."""
    pre_tokenizer = backend.pre_tokenizer
    written = pre_tokenizer.__getstate__() if pre_tokenizer is not None else b""
    return b'"ByteLevel","add_prefix_space":false' in written
