"""Start-up checks and the step loop of the real engine."""

import pytest

from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import ConfigError, DeviceError, RequestError
from xllm.request import FinishReason, Request, SamplingParams


def make_core(**settings) -> EngineCore:
    return EngineCore(EngineConfig.from_flat(max_model_len=128, num_kv_blocks=64, num_threads=1, **settings))


@pytest.fixture(scope="module")
def core():
    core = make_core()
    yield core
    core.shutdown()


def drain(core: EngineCore) -> dict[str, list]:
    outputs: dict[str, list] = {}
    while core.has_work():
        for delta in core.step():
            outputs.setdefault(delta.request_id, []).append(delta)
    return outputs


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_a_device_that_is_not_built_is_refused_by_name(device):
    with pytest.raises(DeviceError, match=device):
        make_core(device=device)


def test_strict_ops_refuses_the_reference_on_the_hot_path(monkeypatch):
    monkeypatch.setenv("XLLM_NO_COMPILED_KERNELS", "1")
    with pytest.raises(ConfigError, match="attention"):
        make_core(strict_ops=True)


def test_without_compiled_kernels_it_warns_and_gives_the_same_tokens(monkeypatch, caplog, core):
    greedy = SamplingParams(temperature=0, max_tokens=12)
    request = Request(request_id="a", prompt_token_ids=[5, 6, 7, 8], sampling=greedy)
    core.add(request)
    compiled = [t for d in drain(core)["a"] for t in d.token_ids]
    monkeypatch.setenv("XLLM_NO_COMPILED_KERNELS", "1")
    plain = make_core()
    assert "slow reference" in caplog.text
    plain.add(request)
    assert [t for d in drain(plain)["a"] for t in d.token_ids] == compiled
    plain.shutdown()


@pytest.mark.parametrize(("settings", "message"), [
    ({"max_model_len": 10**6}, "max_model_len"),
    ({"num_kv_blocks": 2}, "max_model_len"),
    ({"watermark": 0.9}, "watermark"),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 8}, "max_num_batched_tokens"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
    ({"prompt_lookup_min": 9}, "prompt_lookup_min"),
])
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineCore(EngineConfig.from_flat(**{"max_model_len": 128, "num_kv_blocks": 64, **settings}))


@pytest.mark.parametrize(("settings", "message"), [
    ({"host_cache_size": "many"}, "host_cache_size"),
    ({"host_cache_size": "-1GiB"}, "host_cache_size"),
    ({"host_cache_size": "16"}, "host_cache_size must hold at least one KV block"),
    ({"host_cache_size": "900TiB"}, "host_cache_size 900TiB is more than"),
    ({"host_cache_size": "1MiB", "host_blocks_factor": 2.0}, "host_cache_size and host_blocks_factor"),
    ({"host_blocks_factor": -1.0}, "host_blocks_factor"),
    ({"host_cache_size": "1MiB", "enable_prefix_caching": False}, "host_cache_size needs enable_prefix_caching"),
    ({"host_cache_size": "1MiB", "host_bytes_per_s": "fast"}, "host_bytes_per_s"),
    ({"host_cache_size": "1MiB", "disk_bytes_per_s": "fast"}, "disk_bytes_per_s"),
    ({"disk_cache_size": "1MiB", "disk_cache_dir": "/nowhere"}, "disk_cache_size needs host_cache_size"),
    ({"host_cache_size": "1MiB", "disk_cache_size": "1MiB"}, "disk_cache_dir"),
    ({"host_cache_size": "1MiB", "disk_cache_dir": "/nowhere"}, "disk_cache_size and disk_cache_dir go together"),
    ({"host_cache_size": "1MiB", "disk_cache_size": "lots", "disk_cache_dir": "/nowhere"}, "disk_cache_size"),
    ({"host_cache_size": "1MiB", "disk_cache_size": "1MiB", "disk_cache_dir": "/dev/null/kv"}, "disk_cache_dir"),
    ({"disk_cache_key_file": "/nowhere"}, "disk_cache_key_file needs disk_cache_size"),
    ({"preemption_mode": "swap"}, "preemption_mode swap needs host_cache_size"),
    ({"preemption_mode": "drop"}, "preemption_mode"),
    ({"eviction_policy": "newest"}, "eviction_policy"),
    ({"lru_k": 1}, "lru_k"),
    ({"eviction_history": -1.0}, "eviction_history"),
    ({"l1_share": 1.0}, "l1_share"),
    ({"kv_cache_dtype": "int4"}, "kv_cache_dtype"),
])
def test_tier_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_core(**settings)


def test_a_disk_too_small_for_a_block_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="KV disk capacity of 4096 bytes"):
        make_core(host_cache_size="1MiB", disk_cache_size="4KiB", disk_cache_dir=str(tmp_path))


def test_a_key_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"disk_cache_key_file .*none cannot be read"):
        make_core(host_cache_size="1MiB", disk_cache_size="4MiB", disk_cache_dir=str(tmp_path),
                  disk_cache_key_file=str(tmp_path / "none"))


def test_a_folder_has_one_engine_at_a_time(tmp_path):
    tiers = {"host_cache_size": "1MiB", "disk_cache_size": "4MiB", "disk_cache_dir": str(tmp_path)}
    first = make_core(**tiers)
    with pytest.raises(ConfigError, match="is in use by process"):
        make_core(**tiers)
    first.shutdown()
    make_core(**tiers).shutdown()


def test_unknown_settings_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="max_num_seqs"):
        EngineConfig.from_flat(max_num_sequence=3)


@pytest.mark.parametrize("ids", [[-1], [4096], [3, 10**9]])
def test_token_ids_outside_the_vocabulary_are_refused(core, ids):
    with pytest.raises(RequestError, match="token ids"):
        core.add(Request(request_id="x", prompt_token_ids=ids))


def test_a_logit_bias_outside_the_vocabulary_is_refused(core):
    with pytest.raises(RequestError, match="logit_bias"):
        core.add(Request(request_id="x", prompt_token_ids=[1], sampling=SamplingParams(logit_bias={4096: 1.0})))


def test_abort_ends_with_one_terminal_output_and_frees_everything(core):
    for name in ("kept", "gone"):
        core.add(Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=30, seed=1)))
    core.step()
    core.abort("gone")
    outputs = drain(core)
    assert [d.finish_reason for d in outputs["gone"] if d.finish_reason] == [FinishReason.ABORT]
    assert outputs["kept"][-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    stats = core.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks == stats.num_blocks
    core.scheduler.check_integrity()
