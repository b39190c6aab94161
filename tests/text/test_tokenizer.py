"""`load_tokenizer` gives what transformers gives, and names what is wrong with a checkpoint or a text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.text.tiny_tokenizers import CORPUS
from xllm.errors import ModelError, RequestError
from xllm.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [*dict.fromkeys(CORPUS), "", " ", "  two  blanks ", "\n\n\ttab", "<|im_start|>user\nhi<|im_end|>", "<s>x</s>",
         "a<|late|>  b", "a fox<|pad|><|extra|>fox", "unseen: Ω ᚠ 한국어 עברית \x00 \u200d", "x" * 400]


@pytest.fixture(scope="session")
def reference_of():
    """transformers' tokenizer of a folder, loaded once."""
    from transformers import AutoTokenizer

    loaded: dict[Path, object] = {}

    def get(folder: Path):
        if folder not in loaded:
            loaded[folder] = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return loaded[folder]

    return get


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_encode_and_decode_equal_transformers(folder, tokenizer, reference_of, text):
    reference = reference_of(folder)
    for special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == reference(text, add_special_tokens=special)["input_ids"]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


def test_special_tokens_equal_transformers(folder, tokenizer, reference_of):
    reference = reference_of(folder)
    assert tokenizer.eos_token_ids == (reference.eos_token_id,)
    assert tokenizer.special_token_ids == {i for i, t in reference.added_tokens_decoder.items() if t.special}
    assert tokenizer.special_token_ids >= set(reference.all_special_ids)
    assert tokenizer.vocab_size == len(reference)


CHATS = {
    "plain": ([{"role": "user", "content": "héllo <b>"}], {}),
    "no-prompt": ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
                  {"add_generation_prompt": False}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}),
    "tool-call": ([{"role": "assistant", "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": {"ä": "<&>"}}}]}], {}),
    "tools": ([{"role": "user", "content": "w"}], {"tools": [{"type": "function", "function": {"name": "fü"}}]}),
    "null": ([{"role": "user", "content": "w", "name": None}, {"role": "user", "content": "w", "name": "n"}], {}),
    "variable": ([{"role": "user", "content": "w"}], {"enable_thinking": False}),
    "reasoning": ([{"role": "assistant", "content": "w", "reasoning": "hm"}], {}),
    "many": ([{"role": "user", "content": str(n)} for n in range(50)], {}),
}


# What these templates drop, which transformers lets them: calls, tools, names and variables; more than 40 messages.
DROPPED = {*((kind, "many") for kind in ("byte_level", "byte_level_bos")),
           *(("bundled", case) for case in ("tool-call", "tools"))}


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos", "bundled"])
def test_chat_equals_transformers(folders, reference_of, kind, case):
    messages, options = CHATS[case]
    tokenizer, reference = load_tokenizer(folders[kind]), reference_of(folders[kind])
    options = {"add_generation_prompt": True, **options}
    if (kind, case) in DROPPED:
        with pytest.raises(RequestError, match=r"messages\.\d+\.|tools|chat_template_kwargs\."):
            tokenizer.render_chat(messages, **options)
        return
    expected = reference.apply_chat_template(messages, tokenize=False, **options)
    assert tokenizer.render_chat(messages, **options) == expected
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
    assert tokenizer.encode_chat(messages, **options) == (expected, ids)


def test_template_file_wins_over_config(folders, tmp_path):
    _copy(folders["byte_level"], tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    assert load_tokenizer(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "x!"


def test_continue_final_message(folders, reference_of):
    tokenizer, reference = load_tokenizer(folders["byte_level"]), reference_of(folders["byte_level"])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer is"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = reference.apply_chat_template(messages, tokenize=False, **options)
    assert tokenizer.render_chat(messages, **options) == expected


@pytest.mark.parametrize(("messages", "word"), [
    ([], "non-empty"), ("hi", "list"), ([{"content": "x"}], "role"), (["x"], r"messages\[0\]"),
    ([{"role": "wizard", "content": "x"}], "unknown role wizard"), ([{"role": "user", "content": 7}], "refused"),
])
def test_wrong_messages_are_request_errors(folders, messages, word):
    with pytest.raises(RequestError, match=word) as caught:
        load_tokenizer(folders["byte_level"]).render_chat(messages)
    assert caught.value.field == "messages"


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% set n = namespace() %}{% set n._x = 1 %}",
    "{{ 1/0 }}", "{{ undefined.attribute }}",
])
def test_templates_cannot_reach_out(folders, template):
    with pytest.raises(RequestError, match="refused"):
        load_tokenizer(folders["byte_level"]).render_chat([{"role": "user", "content": "x"}], chat_template=template)


def test_missing_or_broken_template_is_model_error(folders):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(folders["metaspace"]).render_chat(messages)
    with pytest.raises(ModelError, match="does not compile"):
        load_tokenizer(folders["metaspace"]).render_chat(messages, chat_template="{% if %}")


def test_lone_surrogate_names_the_field(tokenizer):
    with pytest.raises(RequestError, match=r"prompt .* character 1") as caught:
        tokenizer.encode("a\ud800b")
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize("length", [40, 5000])
def test_patterns_that_give_up_on_a_text(tokenizer, part, length):
    """The library's own bound on backtracking ends in a panic, which is no Exception."""
    content = json.loads(tokenizer.backend.to_str())
    pattern = {"Regex": "(a+)+$"}
    content[part] = {"type": "Replace", "pattern": pattern, "content": "x"} if part == "normalizer" else {
        "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    hostile = Tokenizer(type(tokenizer.backend).from_str(json.dumps(content)), {}, {})
    for encode in (hostile.encode, hostile.encode_continuation, hostile.encode_with_spans):
        with pytest.raises(RequestError, match="prompt cannot be tokenised"):
            encode("a" * length + "!")
    assert hostile.encode("short")


def test_lone_surrogate_in_a_chat_names_messages(folders):
    with pytest.raises(RequestError) as caught:
        load_tokenizer(folders["byte_level"]).encode_chat([{"role": "user", "content": "\udfff"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
@pytest.mark.parametrize("text", ["naïve 😀 dog.", "机器 fox"])
def test_token_bytes_are_the_text(folders, kind, text):
    tokenizer = load_tokenizer(folders[kind])
    joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text, add_special_tokens=False))
    assert joined.decode().lstrip(" ") == text


def test_token_text(folders):
    tokenizer = load_tokenizer(folders["byte_level"])
    assert tokenizer.token_text(tokenizer.eos_token_ids[0]) == "<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_missing_and_corrupt_files_are_model_errors(folders, tmp_path):
    with pytest.raises(ModelError, match="not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    _copy(folders["byte_level"], tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    _copy(folders["byte_level"], tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_vocab_and_merges_are_converted_by_transformers(folders, tmp_path):
    state = json.loads((folders["byte_level"] / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]), encoding="utf-8")
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    text = "The quick brown fox"
    assert tokenizer.encode(text) == load_tokenizer(folders["byte_level"]).encode(text)
    assert len(tokenizer.eos_token_ids) == 1


def test_loading_does_not_import_transformers(folders):
    code = (f"import sys; from pathlib import Path; from xllm.text.tokenizer import load_tokenizer;"
            f"t = load_tokenizer(Path({str(folders['byte_level'])!r}));"
            "t.encode_chat([{'role': 'user', 'content': 'x'}]);"
            "assert not {'transformers', 'torch'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], check=True)


def _copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def test_long_texts_are_encoded_like_short_ones(tokenizer):
    """They take another way through the tokenizers library."""
    text = "\n".join(CORPUS) * (5000 // len("\n".join(CORPUS)) + 1)
    assert len(text) > 4096
    for special in (True, False):
        assert tokenizer.encode(text, special) == tokenizer.backend.encode(text, add_special_tokens=special).ids
    with pytest.raises(RequestError, match=f"lone surrogate at character {len(text)}") as caught:
        tokenizer.encode(text + "\ud800", field="messages")
    assert caught.value.field == "messages"


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos", "sentencepiece_like", "metaspace"])
@pytest.mark.parametrize("text", ["dog", " dog", "  dog", "o", "the lazy dog"])
def test_a_text_that_goes_on_another_is_its_tokens_bytes(folders, kind, text):
    """Nothing is put before it, so a banned word is banned with and without a blank."""
    tokenizer = load_tokenizer(folders[kind])
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_continuation(text))).decode() == text
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode_continuation("\ud800")
