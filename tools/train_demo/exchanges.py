"""Questions and answers made from the corpus: its functions, classes, docstrings and help topics."""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
from collections.abc import Iterator

from tools.train_demo.chat import Exchange
from tools.train_demo.corpus import SourceFile, topic_texts

# Modules written in C have no source here, but their docstrings can be asked for.
C_MODULES = ["builtins", "math", "cmath", "itertools", "time", "_operator", "_functools", "_collections",
             "_json", "_random", "_struct", "_socket", "_datetime", "array", "binascii", "select",
             "zlib", "gc", "sys"]
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
MAX_CODE_CHARACTERS = 1500
MAX_DOC_CHARACTERS = 700


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


def topic_exchanges(rng: random.Random) -> Iterator[Exchange]:
    """Ask for topics of the language reference."""
    for topic, text in sorted(topic_texts().items()):
        body = re.sub(r"\A.*\n\*+\n+", "", text)  # without the underlined title
        yield rng.choice(TOPIC_PROMPTS).format(topic=topic), first_paragraphs(body)
