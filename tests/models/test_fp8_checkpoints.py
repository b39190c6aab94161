"""DeepSeek's and Qwen's fp8 checkpoints mean what the plain ones mean that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.backend import Backend
from backends.scaled_weight import ScaledWeight
from tests.models.checkpoints import BY_ID, PROMPT, save_checkpoint, transformers_greedy
from tests.models.fp8_checkpoints import to_fp8
from tests.models.harness import PagedRunner, greedy, weight_bytes
from tests.models.test_parity import relative_error
from xllm import LLM, SamplingParams
from xllm.errors import ModelError
from xllm.models.fp8_format import Fp8Format
from xllm.models.loader import load_model
from xllm.models.model_registry import read_model_config
from xllm.models.weights import WeightSource
from xllm.parallel.shard import Shard

CPU = torch.device("cpu")
REAL, ODD = (128, 128), (24, 40)  # the second one divides no width of the tiny models
WIDE = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 136}
LAYER = "model.layers.1."
UP, SCALE = f"{LAYER}mlp.up_proj.weight", f"{LAYER}mlp.up_proj.weight_scale_inv"
EXPERT = f"{LAYER}mlp.experts.3.up_proj.weight"
STACKED = f"{LAYER}mlp.experts.gate_up_proj"


def load(folder: Path, backend: Backend, **options: Any) -> Any:
    return load_model(folder, backend=backend, dtype=torch.float32, max_model_len=128, **options)


def logits_of(model: Any, backend: Backend) -> Tensor:
    return PagedRunner(model, backend).step({"a": PROMPT})["a"]


@pytest.mark.parametrize(("variant", "block"), [
    ("qwen3", REAL), ("qwen3-attention-bias", ODD), ("llama-mlp-bias", (5, 16)), ("qwen3-moe", REAL),
    ("qwen2-moe", ODD), ("qwen3-moe-stacked-tied", (24, 20)), ("deepseek-v3", ODD), ("deepseek-v2-lite", REAL)],
    ids=str)
def test_logits_equal_those_of_transformers(tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch,
                                            variant: str, block: tuple[int, int]) -> None:
    """Of the plain model; in chunks. Made plain while they are read, the matrices give the same bits."""
    known = BY_ID[variant]
    wide = {name: size for name, size in WIDE.items() if block == REAL and (name in known.changes or "moe" not in name)}
    folder = save_checkpoint(replace(known, changes={**known.changes, **wide}), tmp_path / "fp8")
    truth = transformers_greedy(to_fp8(folder, block, tmp_path / "plain"))
    model = load(folder, backend)
    tokens, logits_TV = greedy(PagedRunner(model, backend), "a", PROMPT, (5, 11), 8)
    assert tokens == truth.tokens[:8]
    assert relative_error(logits_TV, truth.logits_TV[:len(logits_TV)]) <= 1e-4
    kept_bytes = weight_bytes(model)
    monkeypatch.setattr(type(backend), "takes_scaled_weights", False)
    plain = load(folder, backend)
    assert kept_bytes < 0.75 * weight_bytes(plain)  # tables, norms and rotations are not fp8
    assert torch.equal(greedy(PagedRunner(plain, backend), "a", PROMPT, (5, 11), 8)[1], logits_TV)


@pytest.mark.parametrize("quantization", ["int8", "w8a8", "fp8"])
def test_it_can_be_quantised_otherwise(tmp_path: Path, backend: Backend, quantization: str) -> None:
    """As the plain model would be; but fp8 is what it is already."""
    folder = save_checkpoint(BY_ID["qwen3-moe"], tmp_path / "fp8")
    plain = to_fp8(folder, ODD, tmp_path / "plain")
    expected = load(folder, backend) if quantization == "fp8" else load(plain, backend, quantization=quantization)
    found = load(folder, backend, quantization=quantization)
    assert torch.equal(logits_of(found, backend), logits_of(expected, backend))


def test_a_device_without_fp8_quantises_it_otherwise(tmp_path: Path, backend: Backend,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(BY_ID["qwen3"], tmp_path / "fp8")
    plain = to_fp8(folder, ODD, tmp_path / "plain")
    monkeypatch.setattr(type(backend), "takes_scaled_weights", False)
    found, expected = (load(each, backend, quantization="fp8") for each in (folder, plain))
    assert torch.equal(logits_of(found, backend), logits_of(expected, backend))


def test_which_matrices_are_fp8_their_own_types_say(tmp_path: Path, backend: Backend) -> None:
    """q is and k is not; lm_head, the table and the router may be; and `dequantize` asks for plain ones."""
    folder = save_checkpoint(BY_ID["qwen3-moe"], tmp_path / "fp8")
    plain = to_fp8(folder, ODD, tmp_path / "plain", is_plain=lambda name: "k_proj" in name)
    change_form(folder, modules_to_not_convert=["lm_head", "model.layers.0.self_attn.k_proj"])
    found, expected = (logits_of(load(each, backend), backend) for each in (folder, plain))
    assert torch.equal(found, expected)
    change_form(folder, dequantize=True)
    assert weight_bytes(load(folder, backend)) == weight_bytes(load(plain, backend))


@pytest.mark.parametrize("variant", ["deepseek-v3", "qwen3-moe"])
@pytest.mark.parametrize("quantization", [None, "int8", "w8a8"])
def test_the_engine_runs_it(tmp_path: Path, variant: str, quantization: str | None) -> None:
    """The tokens are those of the plain checkpoint; what it says of its weights is less."""
    folder = save_checkpoint(BY_ID[variant], tmp_path / "fp8")
    plain = to_fp8(folder, ODD, tmp_path / "plain")
    greedily, said = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), []
    for each in (folder, plain):
        with LLM(str(each), skip_tokenizer_init=True, max_model_len=96, num_kv_blocks=32, num_threads=1,
                 quantization=quantization) as llm:
            (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], greedily, use_tqdm=False)
            said.append((list(answer.outputs[0].token_ids), llm.facts.placement.weights_bytes))
    assert said[0][0] == said[1][0]
    assert said[0][1] < 0.7 * said[1][1] if quantization is None else said[0][1] == said[1][1]


# --- how it is read


def open_weights(folder: Path, **options: Any) -> WeightSource:
    form = read_model_config(folder).fp8
    assert form is not None
    return WeightSource(folder, dtype=torch.float32, device=CPU, fp8=form, **options)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
def test_scales_of_other_types(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    """Qwen's are bfloat16; scale_fmt ue8m0 means powers of two."""
    folder = save_checkpoint(BY_ID["llama-tied"], tmp_path / "fp8")
    plain = to_fp8(folder, ODD, tmp_path / "plain", scale_dtype=scale_dtype)
    with open_weights(folder) as weights:
        assert torch.equal(weights.take(UP, (112, 64)), load_file(plain / "model.safetensors")[UP])


@pytest.mark.parametrize(("axis", "count"), [(0, 2), (1, 2), (0, 3), (1, 5), (0, 7), (1, 1), (1, 8)])
def test_shards_put_together_are_the_matrix(tmp_path: Path, axis: int, count: int) -> None:
    """Wherever the cuts are: scales follow, and no cut makes runs longer than a block."""
    folder = save_checkpoint(BY_ID["llama-tied"], tmp_path / "fp8")
    whole = load_file(to_fp8(folder, ODD, tmp_path / "plain") / "model.safetensors")[UP]
    parts = []
    for index in range(count):
        with open_weights(folder, keeps_fp8=True) as weights:
            part = weights.take_matrix(UP, (112, 64), Shard(axis, index, count))
        assert isinstance(part, ScaledWeight) and part.codes_YX.dtype is torch.float8_e4m3fn
        assert part.codes_YX.untyped_storage().nbytes() == part.codes_YX.numel() == part.shape[0] * part.shape[1]
        parts.append(part.dequantise(torch.float32))
    assert torch.equal(torch.cat(parts, axis), whole)


def change_form(folder: Path, **members: Any) -> None:
    """Of quantization_config."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {**config["quantization_config"], **members}}))


def scaled_by(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[SCALE][1, 1] = value
    return change


def no_number_in(name: str) -> Callable[[dict[str, Tensor]], None]:
    """The code of one weight is NaN, of another -NaN."""
    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(torch.uint8).view(-1)[[3, -2]] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    return change


FP8 = torch.float8_e4m3fn
NOT_POSITIVE = rf"model.safetensors: tensor '{SCALE}' holds scales that are not positive and finite"
WRONG: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "nan": ("qwen3", scaled_by(float("nan")), NOT_POSITIVE),
    "inf": ("qwen3", scaled_by(float("inf")), NOT_POSITIVE),
    "zero": ("qwen3", scaled_by(0.0), NOT_POSITIVE),
    "negative": ("qwen3", scaled_by(-1.0), NOT_POSITIVE),
    "nan-code": ("qwen3", no_number_in(UP), rf"tensor '{UP}' holds codes of fp8 that are not numbers"),
    "nan-code-of-an-expert": ("qwen3-moe", no_number_in(EXPERT),
                              rf"'{EXPERT}' holds codes of fp8 that are not numbers"),
    "missing": ("qwen3", lambda w: w.pop(SCALE), rf"tensor '{SCALE}' is missing in .*model.safetensors"),
    "transposed": ("qwen3", lambda w: w.update({SCALE: w[SCALE].T.contiguous()}),
                   rf"'{SCALE}' has shape \[2, 5\], blocks of 24 x 40 ask for \[5, 2\]"),
    "one-for-all": ("qwen3", lambda w: w.update({SCALE: torch.tensor(1.0)}), r"has shape \[\], blocks of 24 x 40 ask"),
    "integers": ("qwen3", lambda w: w.update({SCALE: torch.ones(5, 2, dtype=torch.int32)}),
                 rf"'{SCALE}' is of type I32; scales of fp8 are F32, F16, BF16, F8_E8M0"),
    "scale-alone": ("qwen3", lambda w: w.pop(UP), rf"tensor '{UP}' is missing"),
    "not-fp8": ("qwen3", lambda w: w.update({UP: w[UP].bfloat16()}),
                rf"'{UP}' is of type BF16, and has scales as if it were fp8"),
    "other-fp8": ("qwen3", lambda w: w.update({UP: w[UP].float().to(torch.float8_e5m2)}),
                  rf"'{UP}' is of type F8_E5M2; only F32, F16, BF16 and, with scales, matrices of F8_E4M3"),
    "norm": ("qwen3", lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(FP8)}),
             r"'model.norm.weight' is of type F8_E4M3"),
    "extra": ("qwen3", lambda w: w.update({"model.norm.weight_scale_inv": torch.ones(1)}),
              r"'model.norm.weight' is of type F32, and has scales"),
    "nobody's": ("qwen3", lambda w: w.update({f"{LAYER}mlp.weight_scale_inv": torch.ones(1)}),
                 rf"'{LAYER}mlp.weight_scale_inv' is not part of this architecture"),
    "static": ("qwen3", lambda w: w.update({f"{LAYER}mlp.up_proj.input_scale": torch.ones(1)}),
               rf"'{LAYER}mlp.up_proj.input_scale' is not part of this architecture"),
    "expert": ("qwen3-moe", lambda w: w.pop(f"{EXPERT}_scale_inv"), rf"'{EXPERT}_scale_inv' is missing"),
    "expert-too-many": ("qwen3-moe", lambda w: w.update({
        f"{LAYER}mlp.experts.10.up_proj.weight_scale_inv": torch.ones(1)}),
        rf"'{LAYER}mlp.experts.10.up_proj.weight_scale_inv' is not part of"),
    "one-plain-expert": ("qwen3-moe", lambda w: [
        w.update({name: w[name].float()}) or w.pop(f"{name}_scale_inv") for name in list(w)
        if name.startswith(f"{LAYER}mlp.experts.3.") and name.endswith(".weight")],
        rf"{LAYER}mlp.experts: expert 3 is plain, unlike those before it"),
    "stacked-missing": ("qwen3-moe-stacked-tied", lambda w: w.pop(f"{STACKED}_scale_inv"),
                        rf"'{STACKED}_scale_inv' is missing"),
    "stacked-number": ("qwen3-moe-stacked-tied", lambda w: w.update({
        f"{STACKED}_scale_inv": w[f"{STACKED}_scale_inv"][:9].contiguous()}),
        rf"'{STACKED}_scale_inv' has shape \[9, 4, 2\], blocks of 24 x 40 ask for \[10, 4, 2\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, backend: Backend, case: str) -> None:
    variant, change, message = WRONG[case]
    folder = save_checkpoint(BY_ID[variant], tmp_path / "fp8")
    to_fp8(folder, ODD, tmp_path / "plain")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(folder, backend)


def test_fp8_that_the_config_does_not_speak_of(tmp_path: Path, backend: Backend) -> None:
    folder = save_checkpoint(BY_ID["qwen3"], tmp_path / "fp8")
    plain = to_fp8(folder, ODD, tmp_path / "plain")
    (folder / "config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(ModelError, match=r"is of type F8_E4M3; .*: fp8 needs a quantization_config in config.json"):
        load(folder, backend)


# --- what config.json says of it

DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def read_form(folder: Path, form: object) -> Fp8Format | None:
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 2, "quantization_config": form}
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(folder).fp8


@pytest.mark.parametrize(("form", "expected"), [
    (DEEPSEEK, Fp8Format(128, 128)),
    ({**DEEPSEEK, "scale_fmt": "ue8m0"}, Fp8Format(128, 128)),  # DeepSeek-V3.1
    ({**DEEPSEEK, "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "lm_head"]}, Fp8Format(128, 128)),
    ({"quant_method": "fp8", "weight_block_size": [64, 256], "modules_to_not_convert": None, "dequantize": True},
     Fp8Format(64, 256, dequantise=True)),
    (None, None), ({}, None)], ids=str)
def test_forms_that_are_read(tmp_path: Path, form: object, expected: Fp8Format | None) -> None:
    assert read_form(tmp_path, form) == expected


@pytest.mark.parametrize(("change", "message"), [
    ({"activation_scheme": "static"}, "activation_scheme 'static' cannot be read; only 'dynamic'"),
    ({"fmt": "e5m2"}, "fmt 'e5m2' cannot be read; only 'e4m3' or 'float8_e4m3fn'"),
    ({"expert_dtype": "fp4"}, "expert_dtype 'fp4'"), ({"scale_fmt": "e5m3"}, "scale_fmt 'e5m3'"),
    ({"weight_block_size": None}, "weight_block_size None cannot be read; only the two sizes of a block"),
    ({"weight_block_size": [128]}, r"weight_block_size \[128\]"), ({"weight_block_size": [0, 1]}, "weight_block_size"),
    ({"weight_block_size": [True, 128]}, "weight_block_size"), ({"weight_block_size": [2**40, 1]}, "weight_block_size"),
    ({"weight_block_size": "128"}, "weight_block_size '128'"), ({"dequantize": 1}, "dequantize 1"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head' cannot be read; only a list of names"),
    ({"ignored_layers": [3]}, r"ignored_layers \[3\]"), ({"kv_cache_scheme": {}}, "kv_cache_scheme {} .* not known"),
    ({"x" * 10**6: "y" * 10**6}, "not known"),
    ({"quant_method": "mxfp4"}, r"is quantised \(quantization_config: mxfp4\)"),
    ({"quant_method": ["fp8"]}, r"is quantised \(quantization_config: \['fp8'\]\)")], ids=lambda v: str(v)[:60])
def test_forms_that_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: .*{message}") as refused:
        read_form(tmp_path, {**DEEPSEEK, **change})
    assert len(str(refused.value)) < 5000
