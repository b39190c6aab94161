"""The command line: generated flags, both spellings, aliases, and errors that name the nearest flag."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import cache

import pytest

from serving.commands.cli import build_parser, engine_config, main
from serving.commands.flags import apply_speculative_config, leaf_types, tree_from
from serving.config import ServerConfig
from tests.serving.server_process import ROOT
from xllm import LLM, __version__, env
from xllm.config import EngineConfig
from xllm.errors import ConfigError
from xllm.foreign.flag import ForeignFlag
from xllm.foreign.table import FOREIGN, SERVER
from xllm.setting_tree import all_options

the_parser = cache(build_parser)


def parse(*args: str) -> tuple[EngineConfig, ServerConfig]:
    namespace = the_parser().parse_args(["serve", *args])
    apply_speculative_config(namespace)
    return engine_config(namespace), tree_from(namespace, ServerConfig, SERVER)


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
    (("serv",), "did you mean 'serve'"),
    (("serve", "model", "--api-key", "a", "b"), "once for each"),
    (("serve", "--dtype", "bfloat61"), "did you mean 'bfloat16'"),
    (("serve", "--compilation-config.level", "3"), "--compilation-config one JSON object"),
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


@pytest.mark.parametrize("name", ["--no-insecur", "--insecur", "--trust-request-chat-templat", "--cors-origins",
                                  "--allowed-hosts", "--swap-spac"])
def test_no_mistake_leads_to_a_guard_or_to_what_has_no_effect(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        main(["serve", name, "x"])
    said = capsys.readouterr().err
    assert f"unknown flag {name}" in said and "did you mean" not in said


def test_alone_it_prints_its_help_and_its_version_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out
    assert main(["bench"]) == 0
    for flag in ("--version", "-V"):
        with pytest.raises(SystemExit) as stopped:
            main([flag])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.endswith(f"xllm {__version__}\n")


@pytest.mark.parametrize("package", ["xllm", "serving"])
def test_the_package_runs_as_the_command(package: str) -> None:
    done = subprocess.run([sys.executable, "-m", package, "-V"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"xllm {__version__}\n"


def test_a_mistyped_variable_of_the_environment_is_told(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = set(re.findall(r'[("](XLLM_[A-Z_]+)"', (ROOT / "xllm" / "env.py").read_text()))
    assert set(env.NAMES) == read
    monkeypatch.setenv("XLLM_APIKEY", "secret")
    monkeypatch.setenv("XLLM_ANOTHER_PROGRAMS", "1")
    assert env.mistyped_names() == ["XLLM_APIKEY"]
    main([])
    assert "XLLM_APIKEY is not read" in capsys.readouterr().err


# --- flags of other engines

OWN = {**all_options(EngineConfig), **all_options(ServerConfig)}
TYPES = leaf_types(EngineConfig) | leaf_types(ServerConfig)
NAMES = {*OWN, *(alias for _, leaf in OWN.values() for alias in leaf.metadata["aliases"]), "speculative_config"}
SAMPLES = {"hf_overrides": "{}", "rope_scaling": "{}", "speculative_config": "{}", "api_key": "k",
           "lora_modules": "a=b", "max_model_len": "64", "h11_max_header_count": "50", "devices": "npu:0",
           "allowed_origins": '["https://a.example"]', "instance_role": "MIX"}
NEEDED = dict.fromkeys(("etcd_namespace", "enable_service_routing", "instance_name", "instance_role"),
                       ("--etcd-addr=127.0.0.1:2379",))  # flags that go with another one only


def spell(entry: ForeignFlag, value: str | None = None) -> tuple[str, ...]:
    if entry.takes == "switch":
        return (entry.flag if value != "false" else "--no-" + entry.flag[2:],)
    return (f"{entry.flag}={'some' if value is None else value}",) if entry.takes == "value" else (entry.flag, "some")


def sample_of(entry: ForeignFlag) -> str:
    if entry.name in SAMPLES:
        return SAMPLES[entry.name]
    name = entry.ours or next(n for n, (_, leaf) in OWN.items() if entry.name in (n, *leaf.metadata["aliases"]))
    choices = OWN[name][1].metadata["choices"]
    return choices[0] if choices else "none" if name.endswith("parser") else "warning" if "level" in name else "1"


@pytest.mark.parametrize("entry", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_flag_does_what_its_verdict_says(entry: ForeignFlag, caplog: pytest.LogCaptureFixture) -> None:
    if entry.verdict == "accepted":
        assert (entry.ours in OWN) if entry.ours else (entry.name in NAMES)
        boolean = entry.takes == "switch" or (entry.name in OWN and TYPES[entry.name] in (bool, bool | None))
        parse(entry.flag if boolean else f"{entry.flag}={sample_of(entry)}", *NEEDED.get(entry.name, ()))
        assert not caplog.records
        return
    assert entry.name not in NAMES
    if entry.verdict == "ignored":
        assert parse(*spell(entry)) == (EngineConfig(), ServerConfig())
        assert [r.message for r in caplog.records] == [f"{entry.name} is ignored: {entry.note}"]
        if entry.only:
            with pytest.raises(ConfigError, match=re.escape(entry.note)):
                parse(*spell(entry, "false"))
        return
    with pytest.raises(ConfigError, match=re.escape(f"{entry.name} is not supported: {entry.note}")):
        parse(*spell(entry))
    for value in entry.unless:
        assert parse(*spell(entry, value)) == (EngineConfig(), ServerConfig())


def test_foreign_flags_set_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    config, server = parse("--enforce-eager", "-tp", "1", "--dtype", "half", "--kv-offloading-size", "4",
                           "--load-format", "safetensors", "--allowed-origins", '["https://a.example"]',
                           "--h11-max-header-count", "50")
    assert (config.device.graph_mode, config.model.dtype, config.model.load_format) == ("off", "float16", "auto")
    assert config.cache.host_cache_size == "4GiB"
    assert server.http.cors_origin == ("https://a.example",) and server.limits.max_headers == 50
    assert parse("--no-enforce-eager", "--devices=npu:0")[0].device.graph_mode == "auto"
    for two in (("--graph-mode", "off", "--enforce-eager"), ("--enforce-eager", "--enable-graph")):
        with pytest.raises(ConfigError, match="say the same thing"):
            parse(*two)
    with pytest.raises(ConfigError, match="'many' is not a value of max_headers"):
        parse("--h11-max-header-count", "many")
    with pytest.raises(ConfigError, match="cors_origin"):
        parse("--allowed-origins", '["*"]')
    assert main(["serve", "--trust-remote-code"]) == 1
    assert "never run" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "ranks"), [
    (("--devices=npu:0",), 1), (("--devices=npu:0,npu:1",), 2), (("--devices=npu:0,npu:1", "--dp-size=2"), 1),
    (("--devices=npu:0", "--nnodes=2", "--master-node-addr=10.0.0.1:19888"), 2),
    (("--devices=npu:0,npu:1", "--nnodes=2", "-tp", "4"), 4),
])
def test_devices_say_how_many_ranks_there_are(flags: tuple[str, ...], ranks: int) -> None:
    device = parse(*flags)[0].device
    assert (device.device, device.tensor_parallel_size) == ("npu", ranks)


@pytest.mark.parametrize(("flags", "reason"), [
    (("--devices=npu:0,npu:1,npu:2", "--dp-size=2"), "devices: 3 of all nodes cannot be divided among 2 engines"),
    (("--devices=npu:0,npu:1", "--tp-size=4"), "devices npu:0,npu:1 is 2 ranks, and tensor_parallel_size 4"),
    (("--devices=npu:1",), "device must be one of .*; got 'npu:1'"),
    (("--devices=npu:0,npu:2",), "device must be one of .*; got 'npu:0,npu:2'"),
    (("--devices=npu:0,cuda:1",), "device must be one of .*; got 'npu:0,cuda:1'"),
])
def test_devices_that_cannot_be(flags: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(*flags)


def test_python_hears_the_same() -> None:
    assert EngineConfig.from_flat(enforce_eager=True, trust_remote_code=False, dtype="half").device.graph_mode == "off"
    with pytest.raises(ConfigError, match="trust_remote_code is not supported"):
        LLM(trust_remote_code=True)
    with pytest.raises(ConfigError, match="unknown setting 'host'"):
        LLM(host="127.0.0.1")
    with pytest.raises(ConfigError, match="say the same thing"):
        LLM(max_num_seqs=2, max_seqs_per_batch=3)


def test_unknown_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nothing"]) == 2
    assert "throughput" in capsys.readouterr().err


def test_help_is_quick_and_brings_nothing_heavy() -> None:
    code = ("import sys; from serving.commands.cli import main\n"
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
