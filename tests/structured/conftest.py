"""Fixtures: the bundled model and a checker, loaded once; a server process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import xllm.bundled
from tests.serving.conftest import client  # noqa: F401
from xllm import LLM
from xllm.structured.checker import GrammarChecker
from xllm.structured.token_trie import VocabularySource, vocabulary_source
from xllm.text.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE, EOS = 4096, 2


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", num_kv_blocks=512, max_model_len=512, num_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(xllm.bundled.__file__).parent)


@pytest.fixture(scope="session")
def source(tokenizer: Tokenizer) -> VocabularySource:
    return vocabulary_source(tokenizer, VOCAB_SIZE, (EOS,))


@pytest.fixture(scope="session")
def checker(source: VocabularySource) -> Iterator[GrammarChecker]:
    made = GrammarChecker(lambda: source)
    yield made
    made.close()
