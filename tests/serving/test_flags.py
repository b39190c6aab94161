"""The command line: generated flags, both spellings, aliases, and errors that name the nearest flag."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from serving.cli import build_parser, engine_config, main
from serving.config import ServerConfig
from serving.flags import apply_speculative_config, tree_from
from tests.serving.server_process import ROOT
from xllm.config import EngineConfig
from xllm.errors import ConfigError


def parse(*args: str) -> tuple[EngineConfig, ServerConfig]:
    namespace = build_parser().parse_args(["serve", *args])
    apply_speculative_config(namespace)
    return engine_config(namespace), tree_from(namespace, ServerConfig)


def test_nothing_given_is_the_default() -> None:
    assert parse() == (EngineConfig(), ServerConfig())


@pytest.mark.parametrize("args", [
    ("--max-num-seqs", "7"), ("--max_num_seqs", "7"), ("--max-num-seqs=7",), ("--max_seqs_per_batch=7",),
])
def test_spellings_and_aliases(args: tuple[str, ...]) -> None:
    assert parse(*args)[0].scheduler.max_num_seqs == 7


@pytest.mark.parametrize(("args", "value"), [
    (("--enable-prefix-caching",), True), (("--no-enable-prefix-caching",), False),
    (("--enable_prefix_caching=false",), False), (("--enable-prefix-caching=TRUE",), True),
    (("--enable-prefix-caching", "false"), False), (("--enable_prefix_cache=0",), False),
    (("--no_enable_prefix_caching",), False),
])
def test_booleans(args: tuple[str, ...], value: bool) -> None:
    config, _ = parse(*args, "some-model")
    assert config.cache.enable_prefix_caching is value
    assert config.model.model == "some-model"


def test_model_by_position_or_flag() -> None:
    assert parse("some/model")[0].model.model == parse("--model", "some/model")[0].model.model == "some/model"
    with pytest.raises(SystemExit):
        parse("one", "--model", "two")


def test_server_settings() -> None:
    _, server = parse("--host", "::1", "--port", "1", "--api-key", "a", "--api-key", "b", "--served-model-name", "m",
                      "--max-body-bytes", "1m", "--drain-timeout", "2.5")
    assert server.http.host == "::1"
    assert server.http.api_key == ("a", "b")
    assert server.http.served_model_name == ("m",)
    assert server.limits.max_body_bytes == 2**20
    assert server.http.drain_timeout == 2.5


def test_speculative_config_is_vllms_json() -> None:
    text = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 5}'
    config, _ = parse("--speculative-config", text)
    assert config.speculative.speculative_method == "ngram"
    assert config.speculative.num_speculative_tokens == 3
    assert config.speculative.prompt_lookup_max == 5


@pytest.mark.parametrize("text", ["{", "[]", '{"metod": "ngram"}', '{"method": 3}', '{"num_speculative_tokens": true}'])
def test_wrong_speculative_config(text: str) -> None:
    with pytest.raises(ConfigError, match="speculative_config"):
        parse("--speculative-config", text)


@pytest.mark.parametrize(("args", "says"), [
    (("serve", "--max-num-seq", "3"), "did you mean '--max-num-seqs'"),
    (("serve", "--prot", "3"), "did you mean '--port'"),
    (("generate", "--promt", "x"), "did you mean '--prompt'"),
    (("--verson",), "--verson"),
    (("serve", "--port", "many"), "many"),
    (("serve", "--dtype", "float8"), "float8"),
    (("serve", "--enable-prefix-caching=maybe"), "true or false"),
    (("serv",), "serv"),
    ((), "COMMAND"),
])
def test_wrong_usage_exits_with_two(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], says: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("args", [("--port", "70000"), ("--api-key", ""), ("--drain-timeout", "nan"),
                                  ("--max-body-bytes", "0"), ("--served-model-name", "")])
def test_wrong_values_exit_with_one(capsys: pytest.CaptureFixture[str], args: tuple[str, ...]) -> None:
    assert main(["serve", *args]) == 1
    assert args[0][2:].replace("-", "_") in capsys.readouterr().err


def test_unknown_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nothing"]) == 2
    assert "throughput" in capsys.readouterr().err


def test_help_is_quick_and_brings_nothing_heavy() -> None:
    code = ("import sys; from serving.cli import main\n"
            "try: main(['serve', '--help'])\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'pydantic', 'zmq'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    started_s = time.process_time()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.process_time() - started_s < 0.5
    assert "--max-num-seqs" in result.stdout


def test_settings_page_is_up_to_date() -> None:
    result = subprocess.run([sys.executable, "tools/gen_settings.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0, "run tools/gen_settings.py"
