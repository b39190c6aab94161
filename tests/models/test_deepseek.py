"""DeepSeek's latent attention in a whole engine, and what its family reads or refuses. Logits: `test_parity.py`."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.backend import Backend
from backends.opset import LATENT_OPS
from backends.reference import REFERENCE
from tests.models.checkpoints import BY_ID, PROMPT, VOCAB_SIZE, Truth, save_checkpoint, transformers_greedy
from tests.models.harness import PagedRunner
from tests.models.test_parity import relative_error
from xllm import LLM, SamplingParams
from xllm.config import EngineConfig
from xllm.errors import ConfigError, ModelError
from xllm.models.deepseek import DeepseekConfig
from xllm.models.kv_spec import KVSpec
from xllm.models.loader import load_model
from xllm.models.model_registry import read_model_config
from xllm.runner.kv_cache import block_bytes
from xllm.worker.loading import _check_ops, _check_special_ops

NUM_TOKENS = 24
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(BY_ID["deepseek-v3-yarn-bf16"], tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    return transformers_greedy(folder)


SETTINGS: dict[str, dict[str, Any]] = {
    "batched-chunked-tiers": {"max_num_batched_tokens": 19, "num_kv_blocks": 24, "watermark": 0.0,
                              "host_cache_size": "1MiB"},
    "preempted": {"num_kv_blocks": 24, "watermark": 0.0, "enable_prefix_caching": False},
    "xtensor-tiers": {"kv_layout": "xtensor", "num_kv_blocks": 24, "watermark": 0.0, "host_cache_size": "1MiB"},
    "drafts-codec": {"speculative_method": "ngram", "num_speculative_tokens": 3, "worker": "codec"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_engine_runs_it(folder: Path, truth: Truth, name: str) -> None:
    """Prompts that begin alike and end within what transformers wrote. The second time their prefixes are cached: below
    the device where there are tiers, as others have been there since."""
    sequence = PROMPT + truth.tokens
    starts = (37, 41, 37, 50)
    settings = {"max_model_len": 96, "block_size": 4, "num_kv_blocks": 128, "max_num_seqs": 4, "num_threads": 1,
                "enable_chunked_prefill": True, **SETTINGS[name]}
    greedily = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(str(folder), skip_tokenizer_init=True, **settings) as llm:
        for turn in range(2):
            if turn:
                others = [{"prompt_token_ids": [(token + 7 * i) % VOCAB_SIZE for token in PROMPT]} for i in range(1, 5)]
                llm.generate(others, greedily, use_tqdm=False)
            prompts = [{"prompt_token_ids": sequence[:start]} for start in starts]
            outputs = llm.generate(prompts, greedily, use_tqdm=False)
            assert [list(output.outputs[0].token_ids) for output in outputs] == [
                sequence[start:start + NUM_TOKENS] for start in starts]
        stats = llm.stats()
    if name == "preempted":
        assert stats.preemptions_total > 0
    if "tiers" in name:
        assert stats.cached_tokens_by_tier_total["l3"] > 0


@pytest.mark.parametrize(("kv_dtype", "most"), [(torch.int8, 0.04), (torch.float8_e4m3fn, 0.15)], ids=str)
def test_quantised_latents(folder: Path, truth: Truth, backend: Backend, kv_dtype: torch.dtype, most: float) -> None:
    """A prompt in chunks over latents that were read back from codes; without them the error is nothing."""
    model = load_model(folder, backend=backend, dtype=torch.float32, max_model_len=128)
    runner = PagedRunner(model, backend, kv_dtype=kv_dtype)
    found = torch.cat([runner.step({"a": chunk})["a"] for chunk in (PROMPT[:20], PROMPT[20:])])
    error = (found - truth.logits_TV[:37]).norm() / truth.logits_TV[:37].norm()
    assert 1e-4 < float(error) < most


def read(folder: Path, values: dict[str, Any]) -> DeepseekConfig:
    (folder / "config.json").write_text(json.dumps(values))
    config = read_model_config(folder)
    assert isinstance(config, DeepseekConfig)
    return config


def test_a_released_config(tmp_path: Path, backend: Backend) -> None:
    """V2-Lite, all of whose layers are dense here. A token takes 576 numbers a layer, where 16 heads of keys and values
    would take 5,120."""
    config = read(tmp_path, {**V2_LITE, "first_k_dense_replace": 27})
    assert config.kv_specs == (KVSpec(num_heads=1, widths=(576,)),) * 27
    assert block_bytes(backend, config.kv_specs, 16, torch.bfloat16) == 16 * 27 * 576 * 2
    assert (config.q_rank, config.max_model_len, config.ffn_size) == (None, 163840, 10944)
    assert config.rope.attention_factor == 1.0
    assert config.score_scale == pytest.approx(192**-0.5 * 1.2608**2, rel=1e-4)


@pytest.mark.parametrize(("changes", "message"), [
    ({}, r"mixtures of experts are not built yet: of 27 layers only the first 1 have none \(first_k_dense_replace\)"),
    ({"first_k_dense_replace": True}, "first_k_dense_replace must be an integer"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer"),
    ({"first_k_dense_replace": 27, "num_key_value_heads": 8}, r"num_key_value_heads \(8\) is not num_attention_heads"),
    ({"first_k_dense_replace": 27, "qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
    ({"first_k_dense_replace": 27, "hidden_act": "gelu"}, "hidden_act 'gelu'"),
])
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, {**V2_LITE, **changes})


@pytest.mark.parametrize("num_ranks", [3, 5])
def test_heads_that_ranks_cannot_share(tmp_path: Path, num_ranks: int) -> None:
    config = read(tmp_path, {**V2_LITE, "first_k_dense_replace": 27})
    config.check_shared(2)
    with pytest.raises(ConfigError, match=r"does not divide the number of query heads \(16\)"):
        config.check_shared(num_ranks)


def test_layers_that_predict_further_tokens_are_left_out(folder: Path, backend: Backend, tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    """As V3's checkpoints have them behind the last layer; a tensor of any other layer is refused."""
    tensors = load_file(folder / "model.safetensors")
    raw = {**json.loads((folder / "config.json").read_text()), "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path, backend=backend, dtype=torch.float32)
    assert "multi-token prediction (1, from number 3 on) are not used" in caplog.text
    save_file({**tensors, "model.layers.4.eh_proj.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.4\.eh_proj\.weight"):
        load_model(tmp_path, backend=backend, dtype=torch.float32)


def test_a_device_without_its_operators_refuses_it(tmp_path: Path) -> None:
    """Ascend is strict, and has neither."""
    config = read(tmp_path, {**V2_LITE, "first_k_dense_replace": 27})
    assert config.special_ops == LATENT_OPS
    ops = replace(REFERENCE, name="npu")
    device: Any = SimpleNamespace(name="npu", ops=ops, strict_ops=True, computes_on_host=False)
    for strict in (None, True, False):
        settings = EngineConfig.from_flat(model="m", strict_ops=strict)
        with pytest.raises(ConfigError, match="DeepseekV2ForCausalLM is not built for npu yet, which lacks "
                                              "latent_attention and latent_rope_write"):
            _check_special_ops(device, config, settings)
    device.strict_ops = False
    _check_special_ops(device, config, EngineConfig.from_flat(model="m"))
    with pytest.raises(ConfigError, match=r"slow reference: .*latent_rope_write, latent_attention"):
        _check_ops(device, True, config.special_ops)


def test_graphs_on_a_cpu_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="graph_mode checked: graphs of DeepseekV3ForCausalLM are not built for cpu"):
        LLM(str(folder), skip_tokenizer_init=True, graph_mode="checked", num_kv_blocks=64, max_model_len=64)


def test_a_quantised_model_stays_close(folder: Path, truth: Truth, backend: Backend) -> None:
    model = load_model(folder, backend=backend, dtype=torch.float32, quantization="int8", max_model_len=128)
    found = PagedRunner(model, backend).step({"a": PROMPT})["a"]
    assert 1e-4 < relative_error(found, truth.logits_TV[:37]) < 0.1
