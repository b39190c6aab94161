"""DeepSeek's latent attention and experts in a whole engine, and what its family reads or refuses. Logits:
`test_parity.py`."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.backend import Backend
from backends.opset import EXPERT_OPS, LATENT_OPS
from backends.reference import REFERENCE
from tests.models.checkpoints import BY_ID, PROMPT, VOCAB_SIZE, Truth, save_checkpoint, transformers_greedy
from tests.models.harness import PagedRunner
from tests.models.test_parity import relative_error
from tests.ops.test_linear import stored_weight
from xllm import LLM, SamplingParams
from xllm.config import EngineConfig
from xllm.errors import ConfigError, ModelError
from xllm.models.deepseek import DeepseekConfig
from xllm.models.kv_spec import KVSpec
from xllm.models.loader import load_model
from xllm.models.mixture import Mixture
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

GROUPS = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 8,
      "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(BY_ID["deepseek-v3-moe-yarn-bf16-sharded"], tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without experts. Where numbers are rounded a token may get other ones, and an error says nothing of the rest."""
    return save_checkpoint(BY_ID["deepseek-v3-yarn-bf16"], tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def plain_truth(plain: Path) -> Truth:
    return transformers_greedy(plain)


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


@pytest.mark.parametrize(("quantization", "most"), [("int8", 1e-4), ("fp8", 1e-4), ("w8a8", 0.15)])
def test_quantised(plain: Path, tmp_path: Path, backend: Backend, quantization: str, most: float) -> None:
    """As if the checkpoint had the rounded weights; what makes keys and values of latents is not rounded."""
    rounded = load_file(plain / "model.safetensors")
    for name, weight in rounded.items():
        if weight.ndim == 2 and not name.endswith(("embed_tokens.weight", "kv_b_proj.weight")):
            rounded[name] = stored_weight(weight.float(), "fp8" if quantization == "fp8" else "int8").float()
    save_file(rounded, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    found, truth_TV = (PagedRunner(load_model(each, backend=backend, dtype=torch.float32, max_model_len=96,
                                              quantization=how), backend).step({"a": PROMPT})["a"]
                       for each, how in ((plain, quantization), (tmp_path, None)))
    assert float((found - truth_TV).norm() / truth_TV.norm()) < most


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
def test_quantised_latents(plain: Path, plain_truth: Truth, backend: Backend, kv_dtype: torch.dtype,
                           most: float) -> None:
    """A prompt in chunks over latents that were read back from codes; without them the error is nothing."""
    model = load_model(plain, backend=backend, dtype=torch.float32, max_model_len=128)
    runner = PagedRunner(model, backend, kv_dtype=kv_dtype)
    found = torch.cat([runner.step({"a": chunk})["a"] for chunk in (PROMPT[:20], PROMPT[20:])])
    error = (found - plain_truth.logits_TV[:37]).norm() / plain_truth.logits_TV[:37].norm()
    assert 1e-4 < float(error) < most


def read(folder: Path, values: dict[str, Any]) -> DeepseekConfig:
    (folder / "config.json").write_text(json.dumps(values))
    config = read_model_config(folder)
    assert isinstance(config, DeepseekConfig)
    return config


def test_a_released_config(tmp_path: Path, backend: Backend) -> None:
    """A token takes 576 numbers a layer, where 16 heads of keys and values would take 5,120."""
    config = read(tmp_path, V2_LITE)
    assert config.kv_specs == (KVSpec(num_heads=1, widths=(576,), rotated_width=64),) * 27
    assert block_bytes(backend, config.kv_specs, 16, torch.bfloat16) == 16 * 27 * 576 * 2
    assert (config.q_rank, config.max_model_len, config.ffn_size) == (None, 163840, 10944)
    assert config.mixture == Mixture(layers=(False,) + (True,) * 26, num_experts=64, expert_size=1408, shared_size=2816,
                                     num_chosen=6, scores_in_fp32=True)
    assert config.rope.attention_factor == 1.0
    assert config.score_scale == pytest.approx(192**-0.5 * 1.2608**2, rel=1e-4)


@pytest.mark.parametrize(("num_tokens", "num_positions", "num_shares", "expected"), [
    (2048, 4096, 1, 2 * 2048 * 16 * 512 * 2), (100, 4096, 2, 4096 * (576 + 8 * 256) * 2), (100, 131_072, 1, 2**29)])
def test_what_attention_takes(tmp_path: Path, backend: Backend, num_tokens: int, num_positions: int, num_shares: int,
                              expected: int) -> None:
    """Queries and sums of latents; keys and values of all heads; of as many heads as may be made at a time."""
    config = read(tmp_path, V2_LITE)
    assert config.attention_bytes(backend, num_tokens=num_tokens, num_positions=num_positions, longest=num_positions,
                                  num_shares=num_shares, itemsize=2) == expected


@pytest.mark.parametrize(("changes", "message"), [
    ({"first_k_dense_replace": True}, "first_k_dense_replace must be an integer"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer"),
    ({"num_key_value_heads": 8}, r"num_key_value_heads \(8\) is not num_attention_heads"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
    ({"sliding_window": 4096}, "sliding_window is not built for latent attention"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported; supported: softmax"),
    ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported; supported: greedy, group_limited_greedy"),
    ({"norm_topk_prob": True}, "norm_topk_prob is not built for DeepSeek V2"),
    ({"num_experts_per_tok": None}, "'num_experts_per_tok' is missing"),
    ({"num_experts_per_tok": 65}, r"num_experts_per_tok \(65\) is more than there are experts \(64\)"),
    ({"num_experts": 32}, r"n_routed_experts and num_experts differ \(32 and 64\)"),
    ({"moe_layer_freq": 0}, "moe_layer_freq must be an integer"),
    ({"n_shared_experts": -1}, "n_shared_experts must be an integer"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor must be a number in"),
    ({**GROUPS, "n_group": None}, "'n_group' is missing"),
    ({**GROUPS, "n_group": 7}, r"n_group \(7\) cannot share 64 experts evenly"),
    ({**GROUPS, "topk_group": 9}, r"topk_group \(9\) of n_group \(8\)"),
    ({**GROUPS, "topk_group": 1, "num_experts_per_tok": 9}, r"topk_group \(1\) of n_group \(8\) groups of 8 experts "
                                                            r"leaves no 9 to choose"),
    ({**V3, "scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; supported: sigmoid"),
    ({**V3, "topk_method": "greedy"}, "topk_method 'greedy' is not supported; supported: noaux_tc"),
    ({**V3, "n_group": 64}, r"n_group \(64\) cannot share 64 experts evenly, at least 2 to each"),
], ids=str)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, {**V2_LITE, **changes})


@pytest.mark.parametrize(("changes", "expected"), [
    ({"moe_layer_freq": 2, "num_hidden_layers": 6}, {"layers": (False, False, True, False, True, False)}),
    ({"n_shared_experts": None, "num_hidden_layers": 1, "first_k_dense_replace": 0}, {"layers": (True,),
                                                                                      "shared_size": 0}),
    (GROUPS, {"num_groups": 8, "num_kept_groups": 3, "summed_per_group": 1, "scale": 16.0, "sigmoid": False}),
    ({**GROUPS, "topk_method": "greedy"}, {"num_groups": 1, "num_kept_groups": 1, "scale": 16.0}),
    (V3, {"num_groups": 8, "num_kept_groups": 4, "summed_per_group": 2, "scale": 2.5, "sigmoid": True,
          "is_corrected": True, "renormalise": True}),
], ids=str)
def test_how_experts_are_chosen(tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    mixture = read(tmp_path, {**V2_LITE, **changes}).mixture
    assert {name: getattr(mixture, name) for name in expected} == expected


def test_the_correction_is_never_rounded(folder: Path, backend: Backend) -> None:
    """In a bf16 model too it is what the checkpoint has, to the bit."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored_E = load_file(folder / index["weight_map"][name])[name]
    assert stored_E.dtype == torch.float32 and not torch.equal(stored_E, stored_E.bfloat16().float())
    model: Any = load_model(folder, backend=backend, dtype=torch.bfloat16, max_model_len=64)
    assert torch.equal(model._layers[1]._mlp._bias_E, stored_E)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_correction_that_is_not_finite(folder: Path, tmp_path: Path, backend: Backend, value: float) -> None:
    """It steers the choice alone: answers would be wrong, and no logit would show it."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    for file in folder.iterdir():
        shutil.copy(file, tmp_path)
    file = tmp_path / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = load_file(file)
    weights[name][2] = value
    save_file(weights, file)
    with pytest.raises(ModelError, match=f"tensor '{name}' holds numbers that are not finite"):
        load_model(tmp_path, backend=backend, dtype=torch.float32)


def test_scores_are_computed_in_fp32(folder: Path, backend: Backend) -> None:
    """In a bf16 model too, as transformers does: a choice turns on less than bf16 can tell apart."""
    name = "model.layers.1.mlp.gate.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    router_ED = load_file(folder / index["weight_map"][name])[name]
    model: Any = load_model(folder, backend=backend, dtype=torch.bfloat16, max_model_len=64)
    experts, found = model._layers[1]._mlp, []

    def route(logits_TE: Tensor, *rest: Any, inner: Any = experts._route) -> Any:
        found.append(logits_TE)
        return inner(logits_TE, *rest)

    experts._route = route
    x_TD = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    experts(x_TD)
    expected_TE = x_TD.double() @ router_ED.double().T
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected_TE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_ranks", [3, 5])
def test_heads_that_ranks_cannot_share(tmp_path: Path, num_ranks: int) -> None:
    config = read(tmp_path, V2_LITE)
    config.check_shared(2)
    with pytest.raises(ConfigError, match=r"does not divide the number of query heads \(16\)"):
        config.check_shared(num_ranks)


def test_layers_that_predict_further_tokens_are_left_out(folder: Path, backend: Backend, tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    """As V3's checkpoints have them behind the last layer; a tensor of any other layer is refused."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
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
    """A strict one, such as all but the CPU are."""
    assert read(tmp_path, V2_LITE).special_ops == LATENT_OPS | EXPERT_OPS
    config = read(tmp_path, {**V2_LITE, "first_k_dense_replace": 27})
    assert config.special_ops == LATENT_OPS
    ops = replace(REFERENCE, name="card")
    device: Any = SimpleNamespace(name="card", ops=ops, strict_ops=True, computes_on_host=False)
    for strict in (None, True, False):
        settings = EngineConfig.from_flat(model="m", strict_ops=strict)
        with pytest.raises(ConfigError, match="DeepseekV2ForCausalLM is not built for card yet, which lacks "
                                              "latent_attention and latent_rope_write"):
            _check_special_ops(device, config, settings)
    device.strict_ops = False
    _check_special_ops(device, config, EngineConfig.from_flat(model="m"))
    with pytest.raises(ConfigError, match=r"slow reference: .*latent_rope_write, latent_attention"):
        _check_ops(device, True, config.special_ops)


@pytest.mark.parametrize("settings", [
    {"graph_max_prefill_tokens": 17}, {"speculative_method": "ngram", "num_speculative_tokens": 16}], ids=str)
def test_checked_graphs_of_long_chunks_are_refused(folder: Path, settings: dict[str, Any]) -> None:
    expected = f"{[*settings][-1]} with graph_mode checked: graphs of DeepseekV3ForCausalLM with more than 16 tokens"
    with pytest.raises(ConfigError, match=expected):
        LLM(str(folder), skip_tokenizer_init=True, graph_mode="checked", num_kv_blocks=64, max_model_len=64, **settings)


def test_a_quantised_model_stays_close(plain: Path, plain_truth: Truth, backend: Backend) -> None:
    model = load_model(plain, backend=backend, dtype=torch.float32, quantization="int8", max_model_len=128)
    found = PagedRunner(model, backend).step({"a": PROMPT})["a"]
    assert 1e-4 < relative_error(found, plain_truth.logits_TV[:37]) < 0.1
