"""The documents of both training phases, shuffled: source files, help topics and conversations."""

from __future__ import annotations

import random

from tools.train_demo.chat import IM_START, Exchange, render_conversation
from tools.train_demo.corpus import SourceFile, topic_texts
from tools.train_demo.exchanges import c_docstring_exchanges, file_exchanges, topic_exchanges
from tools.train_demo.small_talk import small_talk_exchanges

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful coding assistant.",
    "You are a Python programmer. Answer with code.",
    "Be brief.",
]
CLOSING_REPEATS = 6


def all_exchanges(files: list[SourceFile], rng: random.Random) -> list[Exchange]:
    """Make every question and answer."""
    exchanges = [exchange for file in files for exchange in file_exchanges(file, rng)]
    return [*exchanges, *c_docstring_exchanges(rng), *topic_exchanges(rng), *small_talk_exchanges()]


def conversations(exchanges: list[Exchange], rng: random.Random) -> list[str]:
    """Make ChatML documents of one to three exchanges, some with a system message."""
    rng.shuffle(exchanges)
    documents = []
    while exchanges:
        count = rng.choice([1, 1, 1, 2, 3])
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None
        documents.append(render_conversation(exchanges[:count], system))
        exchanges = exchanges[count:]
    return documents


def training_documents(files: list[SourceFile], seed: int) -> list[str]:
    """Return every training document, shuffled."""
    rng = random.Random(seed)
    documents = [file.text for file in files]
    documents += [text for _, text in sorted(topic_texts().items())]
    documents += conversations(all_exchanges(files, rng), rng)
    rng.shuffle(documents)
    return documents


def closing_documents(documents: list[str], seed: int) -> list[str]:
    """Return the text of the short last phase: a part of all documents, and much more small talk.

    Greetings are too rare in the main phase to be learnt; here they are about a quarter of the text.
    """
    rng = random.Random(seed)
    chats = [document for document in documents if document.startswith(IM_START)]
    sources = [document for document in documents if not document.startswith(IM_START)]
    small_talk = [exchange for _ in range(CLOSING_REPEATS) for exchange in small_talk_exchanges()]
    chosen = rng.sample(chats, len(chats) // 8) + rng.sample(sources, len(sources) // 16)
    chosen += conversations(small_talk, rng)
    rng.shuffle(chosen)
    return chosen
