"""Folders that were published to do harm: each is refused in words that name the file, soon, and in little memory.

Every case runs in a forked process, with the memory that it takes and the time measured from outside.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm.errors import XllmError

BUNDLED = Path(__file__).parents[2] / "xllm" / "bundled"
EVERY_WAY = os.environ.get("HOSTILE_ALL") == "1"
MAX_SECONDS, MAX_GROWTH_MB = 20.0, 512
SHORT = 4000  # characters of a message that a terminal shows
Write = Callable[[Path], object]


def sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(2**40)


def endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def circle(file: Path) -> None:
    file.symlink_to(file.name)


def deep(file: Path) -> None:
    file.write_text('{"a":' * 10**5)


def not_text(file: Path) -> None:
    file.write_bytes(b'{"a": "\xff"}')


def members(**changes: Any) -> Write:
    def write(file: Path) -> None:
        file.write_text(json.dumps({**json.loads((BUNDLED / file.name).read_text()), **changes}))
    return write


def text(content: str) -> Write:
    return lambda file: file.write_text(content)


def folder_with(root: Path, **files: Write) -> Path:
    """The bundled model, linked, with some files of it written otherwise. `__` in a name stands for a dot."""
    for file in BUNDLED.iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja"):
            (root / file.name).symlink_to(file)
    for name, write in files.items():
        file = root / name.replace("__", ".")
        file.unlink(missing_ok=True)
        write(file)
    return root


def load(folder: Path, answer: Any) -> None:
    """In the forked process: what `LLM` says of the folder, and by how much its memory grew meanwhile."""
    from xllm import LLM, SamplingParams

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        llm = LLM(str(folder), max_model_len=256, num_kv_blocks=64)
        llm.generate("def f(", SamplingParams(max_tokens=4, min_tokens=2), use_tqdm=False)
        said = "fine"
    except XllmError as error:
        said = str(error)
    except BaseException as error:
        said = f"TRACEBACK {type(error).__name__}: {error}"
    answer.send((said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024))


def judged(folder: Path) -> str:
    """What was said. Fails if it took long, needed much, or was no error of ours."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=load, args=(folder, theirs))
    began_s = time.monotonic()
    process.start()
    theirs.close()
    try:
        assert ours.poll(MAX_SECONDS), "it hangs"
        said, growth_mb = ours.recv()
    finally:
        process.kill()
        process.join()
    assert time.monotonic() - began_s < MAX_SECONDS
    assert growth_mb < MAX_GROWTH_MB
    assert not said.startswith("TRACEBACK") and len(said) < SHORT, said[:SHORT]
    return said


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
WRONG_SIZES = (10**9, 10**12, 10**400, -1, 0, 2.5, float("inf"), float("nan"), "8", [8], {})


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_cannot_be(tmp_path: Path, name: str) -> None:
    from xllm.errors import ModelError
    from xllm.models.model_registry import read_model_config

    for value in WRONG_SIZES:
        (tmp_path / "config.json").write_text(json.dumps({**json.loads((BUNDLED / "config.json").read_text()),
                                                          name: value}))
        if value == 10**9 and name not in ("num_hidden_layers", "num_key_value_heads", "head_dim"):
            read_model_config(tmp_path)  # its tensors will not fit
            continue
        with pytest.raises(ModelError, match=name):
            read_model_config(tmp_path)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_any_memory(tmp_path: Path, name: str) -> None:
    """Nothing is allocated for what a config says and its tensors do not bear out."""
    said = judged(folder_with(tmp_path, config__json=members(**{name: 10**9})))
    assert said == "fine" if name == "max_position_embeddings" else ("config" in said or "shape" in said), said


BROKEN: dict[str, tuple[dict[str, Write], str]] = {
    "text-of-10-MB": ({"config__json": members(hidden_size="A" * 10**7)}, "hidden_size must be"),
    "architecture-of-10-MB": ({"config__json": members(architectures=["A" * 10**7])}, "not supported"),
    "twice": ({"config__json": text('{"hidden_size": 1, "hidden_size": 2}')}, "'hidden_size' is there twice"),
    "rope-beyond-floats": ({"config__json": members(rope_parameters={
        "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 10**400})}, "positive integer up to"),
    "many-lists": ({"config__json": text("[" + "[]," * (12 * 2**20) + "[]]")}, "larger than"),
    "many-modules": ({"modules__json": text(json.dumps([{}] * 10**5))}, "modules.json must hold"),
    "outside": ({"modules__json": text(json.dumps([
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": ".."}]))}, r"path '\.\.'"),
    "many-shards": ({"model__safetensors": lambda file: None, "model__safetensors__index__json": text(json.dumps(
        {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(10**5)}}))}, "names 100000 files"),
    "added-tokens": ({"tokenizer_config__json": members(added_tokens_decoder={"x": 1})}, "tokenizer_config.json"),
    "added-list": ({"tokenizer_config__json": members(added_tokens_decoder=[1])}, "tokenizer_config.json"),
    "special": ({"tokenizer_config__json": members(additional_special_tokens=5)}, "tokenizer_config.json"),
    "flag-of-a-token": ({"tokenizer_config__json": members(added_tokens_decoder={
        "9": {"content": "no such token", "lstrip": "x"}})}, "tokenizer_config.json"),
}
WAYS: dict[str, Write] = {"sparse": sparse, "endless": endless, "fifo": os.mkfifo, "circle": circle, "deep": deep,
                          "folder": os.mkdir, "not-text": not_text}
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "modules.json", "tokenizer.json",
         "special_tokens_map.json", "chat_template.jinja", "model.safetensors")


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_wrong(tmp_path: Path, case: str) -> None:
    files, message = BROKEN[case]
    assert re.search(message, judged(folder_with(tmp_path, **files)))


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_no_files(tmp_path: Path, file: str) -> None:
    """A terabyte of nothing, a device without an end, a pipe that nobody writes to, a link to itself, a folder."""
    ways = list(WAYS) if EVERY_WAY else [list(WAYS)[FILES.index(file) % len(WAYS)], "fifo"]
    for way in dict.fromkeys(ways):
        if (file, way) == ("chat_template.jinja", "deep"):
            continue  # it is a text like any other
        write = WAYS[way]
        (tmp_path / way).mkdir()
        said = judged(folder_with(tmp_path / way, **{file.replace(".", "__"): write}))
        assert file.partition(".")[0] in said and said != "fine", (way, said)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [10**12, -1, -10**12, 4096, [2, 10**30]], ids=str)
def test_ends_outside_the_vocabulary(tmp_path: Path, file: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Tiny models are published with the ids of large ones: they never end a text, and harm nobody."""
    from xllm.models.model_registry import read_model_config

    folder = folder_with(tmp_path, **{file.replace(".", "__"): members(eos_token_id=value)})
    assert set(read_model_config(folder).eos_token_ids) <= {0, 2}
    assert "outside the vocabulary" in caplog.text
    assert judged(folder) == "fine"
