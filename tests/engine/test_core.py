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
    ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
    ({"prompt_lookup_min": 9}, "prompt_lookup_min"),
])
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineCore(EngineConfig.from_flat(**{"max_model_len": 128, "num_kv_blocks": 64, **settings}))


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
