"""The bundled demo checkpoint: it loads with transformers, round-trips text, and has learnt some Python."""

from __future__ import annotations

import ast
import itertools
import json
import sysconfig
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tools.train_demo.chat import SPECIAL_TOKENS  # noqa: E402  (it needs what is looked for above)
from tools.train_demo.corpus import SourceFile, is_held_out  # noqa: E402
from tools.train_demo.evaluation import compare_with_gzip  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "xllm" / "bundled"
HELD_OUT = ["stat.py", "idlelib/textview.py"]
ODD_TEXTS = [
    "def f(x):\n    return x\n",
    "\tindented\twith\ttabs\r\n\r\n        and CRLF \r alone",
    "emoji 🦙👩‍👩‍👧 and 漢字, naïve ﬁ, e\u0301 decomposed",
    "\x00\x01\x7f\u200b\ufeff\ufffd\U0010ffff",
    "   leading and trailing   ",
    "\n\n\n \n\t\n",
    "''\"\"``<>|<im_end|> ____init____ 1234567890",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer as transformers loads it."""
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    """The stored weights, computed in float32 and, as the model is so small, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    auto = transformers.AutoModelForCausalLM
    yield auto.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()
    torch.set_num_threads(threads)


def complete(model, tokenizer, prompt: str, max_new_tokens: int = 64) -> tuple[str, bool]:
    """Return the greedy continuation, and whether the model ended it by itself."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None,
                            top_p=None, max_new_tokens=max_new_tokens)[0, ids.shape[1]:].tolist()
    ended = output[-1] in model.generation_config.eos_token_id
    return tokenizer.decode(output, skip_special_tokens=True), ended


def test_folder_is_small_and_complete():
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "generation_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 12_000_000


def test_configuration():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["tie_word_embeddings"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_special_tokens(tokenizer, model):
    ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    assert ids == [0, 1, 2]
    assert model.generation_config.eos_token_id == [ids[2], ids[0]]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("x").input_ids == tokenizer("x", add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_indentation_is_one_token(tokenizer):
    for width in (2, 4, 8, 12, 16):
        assert len(tokenizer(" " * width).input_ids) == 1
    prompt, rest = "def f(x):\n", "    return x\n"  # the prompt's end does not change how it is split
    assert tokenizer(prompt + rest).input_ids == tokenizer(prompt).input_ids + tokenizer(rest).input_ids


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    expected = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
                "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    prompted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompted == expected + "<|im_start|>assistant\n"


def test_beats_gzip_on_held_out_files(model, tokenizer):
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [SourceFile(path, (library / path).read_text(encoding="utf-8")) for path in HELD_OUT]
    assert all(is_held_out(path) for path in HELD_OUT)
    figures = compare_with_gzip(model, tokenizer.backend_tokenizer, files, 1024)
    assert figures["model"] < 0.85 * figures["gzip_separate"]


def test_chat_turn_ends(model, tokenizer):
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer, ended = complete(model, tokenizer, prompt, 48)
    assert ended and "demo model" in answer


def test_writes_python(model, tokenizer):
    prompts = ["def is_empty(self):\n    return ", "def get_name(self):\n    return "]
    functions = [first_function(prompt + complete(model, tokenizer, prompt, 16)[0]) for prompt in prompts]
    assert any(parses(function) for function in functions)


def first_function(text: str) -> str:
    """Return the text's complete lines up to the next statement at the left margin."""
    first, *rest = text.splitlines()[:-1]
    body = itertools.takewhile(lambda line: not line or line[0].isspace(), rest)
    return "\n".join([first, *body])


def parses(code: str) -> bool:
    """Is this the source of a function?"""
    try:
        return isinstance(ast.parse(code).body[0], ast.FunctionDef)
    except SyntaxError:
        return False
