"""The byte-level BPE tokenizer, and the stream of tokens that it makes of the documents."""

from __future__ import annotations

import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.train_demo.chat import END_OF_TEXT, SPECIAL_TOKENS

# A run of two or more blanks (indentation) is a piece of its own, and a newline never swallows the
# indentation after it: a prompt that ends in "\n" or in "    " is then split as the
# training text was.
SPLIT_PATTERN = (r"[ \t]{2,}|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer without normalisation, so that every text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    plain = (re.sub(r"<\|\w+\|>", "\n", document) for document in documents)
    tokenizer.train_from_iterator(plain, trainer)
    return tokenizer


def encode_stream(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Encode all documents into one stream, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[int] = [end]
    for encoding in tokenizer.encode_batch_fast(documents):
        stream += [*encoding.ids, end]
    return np.array(stream, dtype=np.int64)
