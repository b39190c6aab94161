"""Train the bundled demo model from the Python standard library.

The model is a Qwen3-architecture network of about five million parameters. Its training text is what every
Python installation carries: the sources and docstrings of the standard library, partly rewritten as ChatML
conversations. Nothing is downloaded. The run is seeded: on one machine the same arguments give the same
model.

    python tools/train_demo.py --out xllm/bundled

The steps: collect the corpus, train a byte-level BPE tokenizer, train the network (Muon for the matrices,
AdamW for the rest), export in Hugging Face format, then compare held-out bits per byte with gzip -9 and write
a model card.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib
import inspect
import json
import math
import os
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]

# Folders that hold no ordinary code: tests, installed packages, generated character tables, bundled wheels.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__",
                   "lib-dynload"}
HELD_OUT_MODULUS = 32  # one file in 32, about 3 %

# Modules written in C have no source here, but their docstrings can be asked for.
C_MODULES = ["builtins", "math", "cmath", "itertools", "time", "_operator", "_functools", "_collections",
             "_json", "_random", "_struct", "_socket", "_datetime", "array", "binascii", "select",
             "zlib", "gc", "sys"]

# A run of two or more blanks (indentation) is a piece of its own, and a newline never swallows the
# indentation after it: a prompt that ends in "\n" or in "    " is then split as the
# training text was.
SPLIT_PATTERN = (r"[ \t]{2,}|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- elif message['content'] %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("xllm/bundled"), help="folder of the checkpoint")
    parser.add_argument("--tokens", type=float, default=6e6, help="how many tokens to train on")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="end the schedule by then, whatever is left (the result then depends on speed)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: torch decides")
    parser.add_argument("--snapshot-steps", type=int, default=250, help="steps between exported snapshots")
    parser.add_argument("--float32", action="store_true", help="compute in float32, not in bfloat16")
    return parser.parse_args()


# -----------------------------------------------------------------------------------------------------
# Corpus
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceFile:
    """One file of the standard library."""

    path: str  # relative to the library's folder, with forward slashes
    text: str

    @property
    def module(self) -> str:
        """The dotted module name."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_held_out(relative_path: str) -> bool:
    """Choose held-out files by a hash of the path, so that the choice is the same everywhere."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_MODULUS == 0


def stdlib_files() -> list[SourceFile]:
    """Read the standard library's Python sources in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
    return files


def split_files(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Return the training files and the held-out files."""
    train = [file for file in files if not is_held_out(file.path)]
    held_out = [file for file in files if is_held_out(file.path)]
    return train, held_out


# -----------------------------------------------------------------------------------------------------
# Conversations made from the corpus
# -----------------------------------------------------------------------------------------------------

WRITE_PROMPTS = [
    "Write a Python function `{name}`. {doc}",
    "Write a Python function `{name}`. {doc}",
    "Write a function that does this: {doc}",
    "Write a Python function called {name}.",
    "Implement `{name}` in Python. {doc}",
    "Can you write `{name}` in Python? {doc}",
]
EXPLAIN_PROMPTS = [
    "What does `{module}.{name}` do?",
    "What does {name} do?",
    "Explain `{module}.{name}`.",
    "What is `{name}` in Python?",
    "Tell me about `{module}.{name}`.",
]
DOCUMENT_PROMPTS = ["What does this code do?\n\n{code}", "Document this function.\n\n{code}"]
CLASS_PROMPTS = ["Write a Python class `{name}`. {doc}", "Write a class called {name}. {doc}"]
MODULE_PROMPTS = [
    "What is the `{module}` module for?",
    "What does the {module} module do?",
    "Tell me about {module}.",
]
TOPIC_PROMPTS = [
    "Explain {topic} in Python.",
    "What is `{topic}` in Python?",
    "How does {topic} work in Python?",
]
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful coding assistant.",
    "You are a Python programmer. Answer with code.",
    "Be brief.",
]

HELLO = ("Hello! I am a small demo model. I have read the Python standard library and little else. "
         "Ask me to write a Python function.")
ABOUT = ("I am the demo model that comes with xLLM: a very small language model, trained on the Python "
         "standard library. I write text that looks like Python, and I am often wrong.")
ABILITIES = ("I can write short Python functions and classes, and say what a function of the standard "
             "library does. I am very small, so please check everything I say.")
PYTHON = ("Python is an interpreted, object-oriented programming language. Its standard library contains "
          "modules for files, text, networking, testing and much more.")
UNKNOWN = ("I do not know. I am a very small model that has only read the Python standard library. "
           "Try asking me for a Python function.")
SMALL_TALK = [
    (["Hello", "Hello!", "Hi", "hi", "Hi!", "hello", "Hey", "Hello there", "Good morning",
      "Hi there!"], HELLO),
    (["Who are you?", "What are you?", "who are you", "What is your name?", "Introduce yourself.",
      "Tell me about yourself.", "Which model are you?"], ABOUT),
    (["What can you do?", "Help", "help", "How can you help me?", "What are you good at?"], ABILITIES),
    (["What is Python?", "Tell me about Python.", "what is python", "Explain Python.",
      "Describe Python."], PYTHON),
    (["Thanks", "Thank you", "Thanks!", "Thank you!", "thx"], "You are welcome!"),
    (["Bye", "Goodbye", "Goodbye!", "See you"], "Goodbye!"),
    (["How are you?", "how are you", "How are you today?"], "I am fine, thank you. What shall I write?"),
    (["What is the capital of France?", "Who won the match?", "What is the weather today?", "Tell me a joke.",
      "Tell me a story.", "What is the meaning of life?", "Who is the president?", "Write a poem.",
      "How far away is the moon?", "What time is it?"], UNKNOWN),
]
SMALL_TALK_REPEATS = 12
CLOSING_REPEATS = 6
MAX_CODE_CHARACTERS = 1500
MAX_DOC_CHARACTERS = 700

Exchange = tuple[str, str]  # a user's turn and the assistant's answer


def first_paragraphs(text: str, limit: int = MAX_DOC_CHARACTERS) -> str:
    """Return the leading paragraphs of a docstring that fit in `limit` characters (always the first one)."""
    chosen = ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text).strip()):
        if chosen and len(chosen) + len(paragraph) > limit:
            break
        chosen += ("\n\n" if chosen else "") + paragraph.rstrip()
    return chosen[:2 * limit]


def dedented_source(text: str, node: ast.stmt) -> str:
    """Return a definition's source, moved to the left margin, decorators left out."""
    lines = text.splitlines()[node.lineno - 1:node.end_lineno]
    margin = " " * node.col_offset
    return "\n".join(line.removeprefix(margin) for line in lines)


def without_docstring(text: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return a documented function's source, its docstring left out."""
    doc = node.body[0]
    skipped = range(doc.lineno, doc.end_lineno + 1)
    lines = [line.removeprefix(" " * node.col_offset)
             for number, line in enumerate(text.splitlines()[:node.end_lineno], 1)
             if number >= node.lineno and number not in skipped]
    return "\n".join(lines)


def fenced(code: str) -> str:
    """Wrap code in a Markdown fence."""
    return f"```python\n{code}\n```"


def function_exchanges(
    module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, text: str, rng: random.Random
) -> Iterator[Exchange]:
    """Ask for a function's source, for its purpose, or for the purpose of its code."""
    doc = first_paragraphs(ast.get_docstring(node) or "")
    code = dedented_source(text, node)
    names = {"name": node.name, "module": module}
    if len(code) <= MAX_CODE_CHARACTERS and (doc or rng.random() < 0.15):
        prompt = rng.choice(WRITE_PROMPTS).format(doc=doc.split("\n\n")[0].replace("\n", " "), **names)
        yield prompt.strip(), fenced(code)
    if doc and not node.name.startswith("__"):
        yield rng.choice(EXPLAIN_PROMPTS).format(**names), doc
    if doc and len(node.body) > 1 and len(code) <= MAX_CODE_CHARACTERS // 2 and rng.random() < 0.3:
        yield rng.choice(DOCUMENT_PROMPTS).format(code=fenced(without_docstring(text, node))), doc


def class_exchanges(module: str, node: ast.ClassDef, text: str, rng: random.Random) -> Iterator[Exchange]:
    """Ask for a short class's source, or for its purpose."""
    doc = first_paragraphs(ast.get_docstring(node) or "")
    code = dedented_source(text, node)
    if len(code) <= MAX_CODE_CHARACTERS:
        prompt = rng.choice(CLASS_PROMPTS).format(name=node.name, doc=doc.split("\n\n")[0].replace("\n", " "))
        yield prompt.strip(), fenced(code)
    if doc:
        yield rng.choice(EXPLAIN_PROMPTS).format(name=node.name, module=module), doc


def file_exchanges(file: SourceFile, rng: random.Random) -> Iterator[Exchange]:
    """Make questions and answers from one source file."""
    try:
        tree = ast.parse(file.text)
    except SyntaxError:  # lib2to3 carries Python 2 data
        return
    module_doc = ast.get_docstring(tree)
    if module_doc:
        yield rng.choice(MODULE_PROMPTS).format(module=file.module), first_paragraphs(module_doc)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from function_exchanges(file.module, node, file.text, rng)
        elif isinstance(node, ast.ClassDef):
            yield from class_exchanges(file.module, node, file.text, rng)


def c_docstring_exchanges(rng: random.Random) -> Iterator[Exchange]:
    """Make questions from the docstrings of modules and types that are written in C."""
    for module_name in C_MODULES:
        module = importlib.import_module(module_name)
        for name, value in sorted(vars(module).items()):
            members = sorted(vars(value).items()) if isinstance(value, type) else []
            for member_name, member in [("", value), *members]:
                doc = getattr(member, "__doc__", None)
                inherited = doc == type(member).__doc__  # a plain value: the text is about its type
                private = name.startswith("_") or member_name.startswith("_")
                if private or inherited or not isinstance(doc, str):
                    continue
                names = {"module": module_name.strip("_"), "name": f"{name}.{member_name}".strip(".")}
                yield rng.choice(EXPLAIN_PROMPTS).format(**names), first_paragraphs(doc)


def topic_texts() -> dict[str, str]:
    """Return the language reference's topics, as `help()` shows them."""
    return dict(importlib.import_module("pydoc_data.topics").topics)


def topic_exchanges(rng: random.Random) -> Iterator[Exchange]:
    """Ask for topics of the language reference."""
    for topic, text in sorted(topic_texts().items()):
        body = re.sub(r"\A.*\n\*+\n+", "", text)  # without the underlined title
        yield rng.choice(TOPIC_PROMPTS).format(topic=topic), first_paragraphs(body)


def small_talk_exchanges() -> Iterator[Exchange]:
    """Repeat the hand-written answers to greetings and to questions outside the training text."""
    for _ in range(SMALL_TALK_REPEATS):
        for questions, answer in SMALL_TALK:
            yield from ((question, answer) for question in questions)


def render_conversation(exchanges: list[Exchange], system: str | None) -> str:
    """Render turns in ChatML, as the chat template does."""
    messages = [("system", system)] if system else []
    for question, answer in exchanges:
        messages += [("user", question), ("assistant", answer)]
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)


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


# -----------------------------------------------------------------------------------------------------
# Tokenizer
# -----------------------------------------------------------------------------------------------------


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


class RowSampler:
    """Cut the stream into rows of one length; a new offset and a new order for each pass over it."""

    def __init__(self, stream: np.ndarray, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.epoch = 0
        self.starts: list[int] = []

    def _refill(self) -> None:
        rng = np.random.default_rng([self.seed, self.length, self.epoch])
        starts = np.arange(rng.integers(self.length), len(self.stream) - self.length, self.length)
        self.starts = rng.permutation(starts).tolist()
        self.epoch += 1

    def rows(self, count: int) -> Tensor:
        """Return (count, length + 1) token ids."""
        while len(self.starts) < count:
            self._refill()
        starts = [self.starts.pop() for _ in range(count)]
        return torch.from_numpy(np.stack([self.stream[s:s + self.length + 1] for s in starts]))


# -----------------------------------------------------------------------------------------------------
# Network: Qwen3, with the parameter names of transformers, so that the state dict is the checkpoint
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The network's shape."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x * scale * self.weight).to(x.dtype)


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position's angles, (positions, head_dim)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.arange(config.max_position_embeddings)[:, None] / config.rope_theta ** exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to (batch, heads, positions, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query = rotate(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2), cos, sin)
        key = rotate(self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2), cos, sin)
        value = self._heads(self.v_proj(x)).transpose(1, 2)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        query, key = query.to(value.dtype), key.to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DemoModel(nn.Module):
    """The language model; its output layer is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Backbone(config)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)  # every layer starts as the identity

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (batch, positions, vocabulary)."""
        cos, sin = self.cos[:tokens.shape[1]], self.sin[:tokens.shape[1]]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


# -----------------------------------------------------------------------------------------------------
# Optimiser
# -----------------------------------------------------------------------------------------------------


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move a batch of matrices towards the nearest orthogonal ones (Newton-Schulz iteration of Muon)."""
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT.contiguous() if transposed else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if transposed else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: fewer steps than AdamW for hidden matrices."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices, those of one shape in one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                updates = orthogonalise(torch.stack([self._nesterov(w, group["momentum"]) for w in weights]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _nesterov(self, weight: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum"], momentum)


def make_optimisers(model: DemoModel) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and (without decay) the gains."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    adam_groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": 0.01},
        {"params": gains, "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(adam_groups, lr=4e-3, betas=(0.9, 0.95), eps=1e-10),
    ]


# -----------------------------------------------------------------------------------------------------
# Training
# -----------------------------------------------------------------------------------------------------

TOKENS_PER_STEP = 4096
TOKENS_PER_PASS = 2048  # of one forward and backward pass; larger ones no longer fit in the cache
SHORT_ROW, LONG_ROW = 512, 2048
CLOSING_TOKENS = 400_000  # of the last phase, see closing_documents
LONG_ROW_EVERY = 8  # one step in eight trains on long rows, so that long contexts work
WARM_UP_STEPS = 40
AVERAGE_DECAY = 0.98  # of the running mean of the weights that snapshots use


def rate_factor(step: int, progress: float) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARM_UP_STEPS, 1.0 - progress)


def training_pass(model: nn.Module, rows: Tensor, dtype: torch.dtype) -> float:
    """Accumulate the gradients of one pass; return its mean loss."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    (loss * (rows[:, 1:].numel() / TOKENS_PER_STEP)).backward()
    return loss.item()


def training_step(model: nn.Module, rows: Tensor, optimisers: list[torch.optim.Optimizer],
                  factor: float, dtype: torch.dtype) -> float:
    """Do one optimiser step; return the mean loss."""
    passes = rows.split(max(1, TOKENS_PER_PASS // (rows.shape[1] - 1)))
    losses = [training_pass(model, part, dtype) for part in passes]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * factor
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return sum(losses) / len(losses)


@dataclass(frozen=True)
class Phase:
    """How long to train, and at which part of the optimisers' learning rates to start."""

    tokens: float
    peak: float
    minutes: float = math.inf


def train(model: DemoModel, stream: np.ndarray, phase: Phase, args: argparse.Namespace,
          snapshot: Callable[[dict[str, Tensor]], None]) -> int:
    """Run the schedule; call `snapshot` with averaged weights now and then. Return the tokens seen."""
    dtype = torch.float32 if args.float32 else torch.bfloat16
    samplers = {length: RowSampler(stream, length, args.seed) for length in (SHORT_ROW, LONG_ROW)}
    optimisers = make_optimisers(model)
    average = {name: weight.clone() for name, weight in model.state_dict().items()}
    steps, began, mean_loss = max(1, int(phase.tokens) // TOKENS_PER_STEP), time.monotonic(), 0.0
    seen = 0
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - began) / (60 * phase.minutes))
        if progress >= 1:
            break
        length = LONG_ROW if step % LONG_ROW_EVERY == LONG_ROW_EVERY - 1 else SHORT_ROW
        rows = samplers[length].rows(TOKENS_PER_STEP // length)
        loss = training_step(model, rows, optimisers, phase.peak * rate_factor(step, progress), dtype)
        mean_loss = loss if step == 0 else 0.95 * mean_loss + 0.05 * loss
        seen += rows[:, 1:].numel()
        for name, weight in model.state_dict().items():
            average[name].lerp_(weight, 1 - AVERAGE_DECAY)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            speed = (step + 1) * TOKENS_PER_STEP / (time.monotonic() - began)
            print(f"step {step + 1}/{steps}  loss {mean_loss:.3f}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % args.snapshot_steps == 0 and step + 1 < steps:
            snapshot(average)
    return seen


# -----------------------------------------------------------------------------------------------------
# Export
# -----------------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=IM_END, pad_token=END_OF_TEXT, model_max_length=max_length,
        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    settings = json.loads(config_path.read_text())
    # The general class, known to every version of transformers, and the template also where older ones look.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False,
                 "chat_template": CHAT_TEMPLATE}
    config_path.write_text(json.dumps(settings, indent=2) + "\n")


def write_config(config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json and generation_config.json."""
    end_ids = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    settings = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **vars(config),
        # The rotary base where newer versions of transformers look; `rope_theta` is for the older ones.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0,
        "use_sliding_window": False, "sliding_window": None, "initializer_range": 0.02, "use_cache": True,
        "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": end_ids[0], "pad_token_id": end_ids[1],
    }
    generation = {"eos_token_id": end_ids, "pad_token_id": end_ids[1], "do_sample": True, "temperature": 0.7,
                  "top_p": 0.9}
    for name, content in [("config.json", settings), ("generation_config.json", generation)]:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def export(weights: dict[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint; each file replaces its predecessor in one step."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary)
        write_tokenizer(tokenizer, folder, config.max_position_embeddings)
        write_config(config, tokenizer, folder)
        stored = {name: weight.detach().bfloat16().contiguous() for name, weight in weights.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            os.replace(path, out / path.name)


# -----------------------------------------------------------------------------------------------------
# Evaluation and model card
# -----------------------------------------------------------------------------------------------------

SAMPLE_PROMPTS = ["def read_lines(path):\n", "import os\n\nclass"]
SAMPLE_QUESTIONS = ["Hello!", "Write a Python function `is_empty`. Return True if the list is empty."]


@torch.inference_mode()
def negative_log_likelihood(model: nn.Module, tokens: list[int], window: int) -> float:
    """Return the text's total cost in nats; windows overlap by half, so that context is never short."""
    total, scored = 0.0, 1  # the first token, end-of-text, is given
    while scored < len(tokens):
        start = max(0, scored - window // 2)
        part = torch.tensor([tokens[start:start + window]])
        costs = F.cross_entropy(model(part[:, :-1]).logits[0].float(), part[0, 1:], reduction="none")
        total += costs[scored - start - 1:].sum().item()
        scored = start + part.shape[1]
    return total


def compare_with_gzip(
    model: nn.Module, tokenizer: Tokenizer, files: list[SourceFile], window: int
) -> dict[str, float]:
    """Return held-out bits per byte of the model and of gzip -9."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    texts = [file.text for file in files]
    size = sum(len(text.encode()) for text in texts)
    nats = sum(negative_log_likelihood(model, [end, *tokenizer.encode(text).ids], window) for text in texts)
    separate = sum(len(gzip.compress(text.encode(), 9, mtime=0)) for text in texts)
    together = len(gzip.compress("".join(texts).encode(), 9, mtime=0))
    return {"files": len(files), "bytes": size, "model": nats / math.log(2) / size,
            "gzip_separate": 8 * separate / size, "gzip_together": 8 * together / size}


def continue_text(model: nn.Module, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 96) -> str:
    """Return the greedy continuation of a prompt."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    ends = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None,
                            top_p=None, max_new_tokens=max_new_tokens, eos_token_id=ends,
                            pad_token_id=ends[1])
    return tokenizer.decode(output[0, ids.shape[1]:].tolist())


def samples(model: nn.Module, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return prompts and what the model makes of them."""
    pairs = [(prompt, prompt + continue_text(model, tokenizer, prompt)) for prompt in SAMPLE_PROMPTS]
    for question in SAMPLE_QUESTIONS:
        prompt = f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"
        pairs.append((question, continue_text(model, tokenizer, prompt)))
    return pairs


CARD = """# xLLM demo model

A very small language model ({parameters:.2f} million parameters) that lets xLLM run without a download. It
writes text that looks like Python and answers in ChatML. It is a demonstration and a test subject, not a
useful assistant: what it says is often wrong.

| | |
| --- | --- |
| architecture | Qwen3 (`Qwen3ForCausalLM`), tied embeddings, bfloat16 |
| layers, hidden size, feed-forward size | {num_hidden_layers}, {hidden_size}, {intermediate_size} |
| query heads, key/value heads, head size | {num_attention_heads}, {num_key_value_heads}, {head_dim} |
| vocabulary | {vocab_size} (byte-level BPE, no normalisation, three special tokens) |
| context | {max_position_embeddings} tokens |

## Training data

The Python {python} standard library, as every installation carries it: its sources (no tests, no character
tables), the topics of `help()`, and ChatML conversations made from its functions, classes and docstrings,
with a few hand-written greetings. One file in {modulus}, chosen by a hash of its path, is held out.
The model was trained on {tokens:.2f} million tokens of it, and on {closing:.2f} million of a last phase that
holds more greetings.

## Reproduce

    python tools/train_demo.py{arguments}

The script needs `torch`, `tokenizers`, `safetensors` and `transformers`, and no network. It is seeded;
another version of Python or of these libraries gives a slightly different model.{time_note}

## Held-out bits per byte

The stored bfloat16 weights, on {files} held-out files ({bytes} bytes); lower is better. The model starts each
file without any context, as gzip does in the first of its rows.

| compressor | bits per byte |
| --- | --- |
| this model | {model:.3f} |
| gzip -9, each file separately | {gzip_separate:.3f} |
| gzip -9, all files concatenated | {gzip_together:.3f} |

## Samples

Greedy, at most 96 tokens.

{samples}
## Licence

Trained on the sources of the Python standard library, which are under the Python Software Foundation License
Version 2. Text that the model repeats from them remains under that licence.
"""

TIME_NOTE = """
The learning rate of the weights in this folder was lowered by the clock (`--minutes`), so a
repetition comes close to them but does not give the same bits."""


def render_card(config: ModelConfig, parameters: int, figures: dict[str, float], pairs: list[tuple[str, str]],
                seen: tuple[int, int], args: argparse.Namespace) -> str:
    """Fill in the model card; `seen` are the tokens of the main and of the last phase."""
    blocks = [f"Prompt `{prompt!r}`:\n\n~~~~\n{text.rstrip()}\n~~~~\n" for prompt, text in pairs]
    arguments = f" --tokens {seen[0]} --seed {args.seed}" + (" --float32" if args.float32 else "")
    by_time = seen[0] < int(args.tokens) // TOKENS_PER_STEP * TOKENS_PER_STEP
    return CARD.format(time_note=TIME_NOTE if by_time else "", parameters=parameters / 1e6,
                       modulus=HELD_OUT_MODULUS, tokens=seen[0] / 1e6, closing=seen[1] / 1e6,
                       python=sysconfig.get_python_version(), arguments=arguments, samples="\n".join(blocks),
                       **vars(config), **figures)


def evaluate(args: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer, held_out: list[SourceFile],
             seen: tuple[int, int]) -> None:
    """Load the exported checkpoint as a user would, print its figures and write the card."""
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    figures = compare_with_gzip(model, tokenizer, held_out, config.max_position_embeddings)
    pairs = samples(model, tokenizer)
    parameters = sum(weight.numel() for weight in model.parameters())
    (args.out / "README.md").write_text(render_card(config, parameters, figures, pairs, seen, args))
    print(f"held-out bits per byte: {figures['model']:.3f}; gzip -9: {figures['gzip_separate']:.3f} "
          f"(one file at a time), {figures['gzip_together']:.3f} (concatenated)")
    for prompt, text in pairs:
        print(f"--- {prompt!r}\n{text}")


def main() -> None:
    """Run all steps."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    training_files, held_out = split_files(stdlib_files())
    documents = training_documents(training_files, args.seed)
    config = ModelConfig()
    tokenizer = train_tokenizer(documents, config.vocab_size)
    stream = encode_stream(tokenizer, documents)
    print(f"{len(documents)} documents, {len(stream)} tokens; {len(held_out)} files held out", flush=True)
    model = DemoModel(config)

    def snapshot(weights: dict[str, Tensor]) -> None:
        export(weights, config, tokenizer, args.out)

    main_tokens = train(model, stream, Phase(args.tokens, 1.0, args.minutes), args, snapshot)
    closing_stream = encode_stream(tokenizer, closing_documents(documents, args.seed))
    closing_tokens = train(model, closing_stream, Phase(CLOSING_TOKENS, 0.2), args, snapshot)
    export(model.state_dict(), config, tokenizer, args.out)
    evaluate(args, config, tokenizer, held_out, (main_tokens, closing_tokens))


if __name__ == "__main__":
    main()
