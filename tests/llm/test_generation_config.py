"""generation_config.json: taken as defaults, over HTTP and in Python, or refused by the member's name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import transformers

from tests.runner.tiny_model import PROMPT, save_checkpoint
from tests.serving.server_process import ServerProcess
from xllm import LLM, AsyncLLM, SamplingParams
from xllm.errors import ConfigError
from xllm.generation_config import HARMLESS, HONOURED, REFUSED, read_sampling_defaults

IDS = PROMPT[:12]
# A value of each refused member that changes what transformers generates.
OTHER: dict[str, Any] = {
    "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "penalty_alpha": 0.6, "dola_layers": "low",
    "typical_p": 0.9, "top_h": 0.4, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 3, "bad_words_ids": [[5]], "force_words_ids": [[5]],
    "constraints": [1], "forced_bos_token_id": 0, "forced_eos_token_id": 0,
    "exponential_decay_length_penalty": [5, 1.1], "suppress_tokens": [5], "begin_suppress_tokens": [5],
    "sequence_bias": [[[5], 2.0]], "token_healing": True, "guidance_scale": 1.5, "watermarking_config": {"bias": 2.0},
    "num_return_sequences": 2, "min_length": 9, "min_new_tokens": 9, "max_time": 3.0, "stop_strings": ["x"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path)


def write(folder: Path, **content: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))


def engine(folder: Path, **settings: Any) -> LLM:
    return LLM(model=str(folder), skip_tokenizer_init=True, dtype="float32", num_threads=1, num_kv_blocks=32,
               max_model_len=64, **settings)


def by_default(folder: Path, **settings: Any) -> list[int]:
    with engine(folder, **settings) as llm:
        return list(llm.generate([{"prompt_token_ids": IDS}], use_tqdm=False)[0].outputs[0].token_ids)


def asked(folder: Path, **params: Any) -> list[int]:
    with engine(folder) as llm:
        sampling = SamplingParams(**params)
        return list(llm.generate([{"prompt_token_ids": IDS}], sampling, use_tqdm=False)[0].outputs[0].token_ids)


TAKEN = {"temperature": 0.01, "top_k": 1, "top_p": 1e-4, "min_p": 1.0, "repetition_penalty": 9.0, "max_new_tokens": 3,
         "do_sample": False}


@pytest.mark.parametrize("member", TAKEN)
def test_a_default_is_as_if_the_request_said_it(folder: Path, member: str) -> None:
    write(folder, **{member: TAKEN[member]})
    said = {"max_new_tokens": {"max_tokens": 3}, "do_sample": {"temperature": 0.0}}.get(member, {member: TAKEN[member]})
    assert by_default(folder) == asked(folder, **said) != by_default(folder, generation_config="vllm")


def test_end_tokens_end_an_answer(folder: Path) -> None:
    write(folder)
    token_ids = asked(folder, temperature=0.0, max_tokens=6)
    write(folder, eos_token_id=[token_ids[3], 2], do_sample=False)
    assert by_default(folder) == token_ids[:token_ids.index(token_ids[3]) + 1]


def test_a_request_comes_first(folder: Path) -> None:
    write(folder, do_sample=False, max_new_tokens=3)
    assert len(asked(folder, max_tokens=5, ignore_eos=True)) == 5


async def test_the_asynchronous_interface_takes_them_too(folder: Path) -> None:
    write(folder, do_sample=False, max_new_tokens=4)
    llm = AsyncLLM(model=str(folder), skip_tokenizer_init=True, dtype="float32", num_threads=1, max_model_len=64)
    try:
        outputs = [output async for output in llm.generate({"prompt_token_ids": IDS}, output_kind="final")]
    finally:
        llm.shutdown()
    assert list(outputs[-1].outputs[0].token_ids) == asked(folder, temperature=0.0, max_tokens=4)


def test_over_http(folder: Path, tmp_path: Path) -> None:
    write(folder, do_sample=False, max_new_tokens=4)
    body = {"prompt": IDS, "return_token_ids": True}
    with ServerProcess(tmp_path / "log.txt", str(folder), "--skip-tokenizer-init", "--max-model-len", "64") as server:
        answers = [server.http.post("/v1/completions", json=body | more) for more in ({}, {"max_tokens": 6})]
    assert all(isinstance(answer, httpx.Response) and answer.status_code == 200 for answer in answers), answers[0].text
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [4, 6]


@pytest.mark.parametrize("member", OTHER)
def test_what_is_not_built_is_refused_and_can_be_left_out(tmp_path: Path, member: str) -> None:
    write(tmp_path, **{member: OTHER[member]})
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {member} .*--generation-config vllm"):
        read_sampling_defaults("auto", tmp_path)
    assert read_sampling_defaults("vllm", tmp_path) == {}


@pytest.mark.parametrize("member", [name for name in REFUSED if REFUSED[name]])
def test_what_changes_nothing_passes(tmp_path: Path, member: str) -> None:
    write(tmp_path, **{member: REFUSED[member][0]})
    assert read_sampling_defaults("auto", tmp_path) == {}


def test_a_server_starts_without_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    write(folder, num_beams=4)
    with pytest.raises(AssertionError, match="num_beams 4 is not built; --generation-config vllm"):
        ServerProcess(tmp_path / "log.txt", str(folder), "--skip-tokenizer-init", "--max-model-len", "64")
    with ServerProcess(tmp_path / "log.txt", str(folder), "--skip-tokenizer-init", "--max-model-len", "64",
                       "--generation-config", "vllm") as server:
        assert server.http.get("/health").status_code == 200


def test_members_that_nobody_knows_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, chat_format="chatml", top_k=5)
    with caplog.at_level(logging.WARNING):
        assert read_sampling_defaults("auto", tmp_path) == {"top_k": 5}
    assert "mean nothing here: chat_format" in caplog.text


def test_every_member_of_transformers_is_known() -> None:
    members = set(transformers.GenerationConfig().__dict__)
    assert members and not members - {*HONOURED, *REFUSED, *HARMLESS} and set(OTHER) == set(REFUSED)
