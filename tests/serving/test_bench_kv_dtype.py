"""`xllm bench kv-dtype` on a little text, and that it chooses the texts that the bundled model has not seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from serving.commands.bench import kv_dtype_bench
from serving.commands.cli import main
from tools.train_demo import corpus

ROOT = Path(__file__).resolve().parents[2]


def test_formats_are_ordered_by_what_they_cost(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert main(["bench", "kv-dtype", "--windows", "4", "--prefix", "256", "--continuation", "256",
                 "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    more = result["perplexity_more_pct"]
    assert more["fp32"] == 0
    assert 0 < abs(more["bf16"]) < 0.1
    assert 0 < abs(more["int8"]) < 0.5
    assert abs(more["fp8"]) < 3
    assert 0.5 < result["bits_per_byte"]["fp32"] < 2.5
    sizes = result["payload_bytes"]
    assert sizes["fp32"] > sizes["bf16"] > sizes["int8"] > sizes["fp8"]


def test_every_token_behind_the_prefix_is_scored_once() -> None:
    text = "import os\n\n\ndef f(é):\n    return é\n" * 40
    tokenizer = Tokenizer.from_file(str(ROOT / "xllm" / "bundled" / "tokenizer.json"))
    found = list(kv_dtype_bench.windows(ROOT / "xllm" / "bundled", iter([text]), 16, 32))
    whole = found[0].token_ids + [token for window in found[1:] for token in window.token_ids[16:]]
    assert whole == tokenizer.encode(text).ids
    assert sum(window.num_bytes for window in found) == len(text.encode()) - len(tokenizer.decode(whole[:16]).encode())
    assert [len(window.token_ids) for window in found[:-1]] == [48] * (len(found) - 1)


def test_the_same_files_as_the_training_script() -> None:
    _, held_out = corpus.split_files(corpus.stdlib_files())
    assert [file.text for file in held_out] == list(kv_dtype_bench.held_out_texts())


@pytest.mark.parametrize(("args", "code", "says"), [
    (("--prefix", "100"), 1, "prefix must be a multiple of 16"),
    (("--continuation", "0"), 1, "continuation"),
    (("/no/such/model",), 1, "/no/such/model"),
])
def test_wrong_input(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, says: str) -> None:
    assert main(["bench", "kv-dtype", *args]) == code
    assert says in capsys.readouterr().err
