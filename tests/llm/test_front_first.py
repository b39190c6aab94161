"""Tokenizer and chat template are read before the weights: a folder without any ends with what is wrong with them."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xllm import LLM, AsyncLLM
from xllm.errors import ModelError
from xllm.hub import resolve_model_path

ROOT = Path(__file__).parents[2]
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text('{"model": 1}'),
                  "tokenizer.json cannot be read as a tokenizer"),
    "template": (lambda folder: (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m }"),
                 "the chat template does not compile: "),
    "missing": (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer in "),
    "config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo model's, without weights."""
    shutil.copytree(resolve_model_path(None), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


@pytest.mark.parametrize("fault", FAULTS)
def test_in_python(folder: Path, fault: str) -> None:
    damage, said = FAULTS[fault]
    damage(folder)
    with pytest.raises(ModelError, match=said):
        LLM(str(folder), device="cpu")
    with pytest.raises(ModelError, match=said):
        AsyncLLM(model=str(folder), device="cpu")


def test_weights_come_next_and_a_tokenizer_that_nobody_wants_is_not_looked_at(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors"):
        LLM(str(folder), device="cpu")
    FAULTS["tokenizer"][0](folder)
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors"):
        LLM(str(folder), device="cpu", skip_tokenizer_init=True)


def test_the_tokenizer_of_another_folder(folder: Path) -> None:
    FAULTS["template"][0](folder)
    with pytest.raises(ModelError, match=f"{folder}: the chat template does not compile"):
        LLM(device="cpu", tokenizer=str(folder))


async def test_the_commands(folder: Path) -> None:
    """At once: a server whose engine is still importing torch is not waited for."""
    FAULTS["tokenizer"][0](folder)
    began_s = time.monotonic()
    running = [await asyncio.create_subprocess_exec(
        sys.executable, "-m", "serving.commands.cli", *command, cwd=ROOT, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
        for command in (("serve", str(folder), "--port", "0"), ("generate", str(folder), "--prompt", "x"),
                        ("chat", str(folder)))]
    for process in running:
        said, _ = await process.communicate()
        assert process.returncode == 1 and FAULTS["tokenizer"][1] in said.decode(), said
        assert b"weights" not in said and b"Traceback" not in said
    assert time.monotonic() - began_s < 30
