"""The process of one baseline. `python -m benchmarks.gpu.baseline_worker generate|batching DEVICE PROFILE LIMIT_S
FOLDER` prints one line of JSON: tokens_per_s, and how they came about; or why it did not run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.baselines import PREFIX
from benchmarks.gpu.profile import PROFILES, Profile
from benchmarks.gpu.roofline import Workload, make_workload
from benchmarks.gpu.shapes import SHAPES
from xllm.models.dummy_weights import dummy_weight

# Tried in this order.
BATCHING_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cuda": [{"max_requests_per_batch": 256, "use_cuda_graph": True}, {"max_requests_per_batch": 256}, {}],
    "cpu": [{"num_blocks": 64, "max_batch_tokens": 64}],
}


def load(profile: Profile, kind: str, folder: Path, attention: str) -> Any:
    """The engine's own dummy weights, by name, in transformers' model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device, dtype = torch.device(kind), torch.bfloat16 if kind == "cuda" else torch.float32
    path = SHAPES[profile.baseline_model].write(folder / f"baseline-{attention}")
    config = AutoConfig.from_pretrained(path)
    with torch.device(device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        for name, weight in model.named_parameters():
            weight.copy_(dummy_weight(name, tuple(weight.shape), dtype=dtype, device=device))
    return model.eval()


def generate(profile: Profile, kind: str, limit_s: float, folder: Path) -> dict[str, Any]:
    """One sequence; a step's time is that of the tokens after the first, from runs of two lengths."""
    from transformers import GenerationConfig

    model, context = load(profile, kind, folder, "sdpa"), profile.contexts[0]
    prompt = torch.randint(SHAPES[profile.baseline_model].vocab, (1, context), device=kind)

    def seconds(count: int) -> float:
        options: dict[str, Any] = {"cache_implementation": "static", "max_cache_len": context + profile.generate_tokens}
        if kind == "cuda":
            from transformers import CompileConfig

            options["compile_config"] = CompileConfig(mode="reduce-overhead")
        config = GenerationConfig(do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
                                  eos_token_id=None, **options)  # fmt: skip
        began = time.perf_counter()
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        assert out.shape[1] == context + count
        return time.perf_counter() - began

    began, most = time.perf_counter(), profile.generate_tokens
    seconds(most)  # compiles
    compile_s = time.perf_counter() - began
    long_s, short_s = min(seconds(most) for _ in range(3)), min(seconds(1) for _ in range(3))
    step_s = (long_s - short_s) / (most - 1)
    return {"tokens_per_s": 1 / step_s, "us": step_s * 1e6, "compile_s": compile_s,
            "cfg": {"B": 1, "context": context, "cache": "static", "compiled": kind == "cuda"}}  # fmt: skip


def batching(profile: Profile, kind: str, limit_s: float, folder: Path) -> dict[str, Any]:
    """The offline workload, ended at the time limit: the rate of what came until then."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    until = time.perf_counter() + limit_s
    model, vocab = load(profile, kind, folder, "sdpa"), SHAPES[profile.baseline_model].vocab
    work = make_workload(*profile.workload, vocab=min(10_001, vocab))
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(work.outputs))
    failed: list[str] = []
    for options in BATCHING_OPTIONS[kind]:
        manager = model.init_continuous_batching(config, ContinuousBatchingConfig(**options))
        manager.start()
        try:
            _collect(manager, Workload([work.prompts[0]], [2]), 60.0)  # starts its threads, captures its first graphs
            answer = _collect(manager, work, until - time.perf_counter())
            attention = model.config._attn_implementation
            return answer | {"cfg": options | {"attention": attention}, "failed": failed}
        except Exception as error:  # other settings may do
            failed.append(f"{options}: {type(error).__name__}: {error}"[:500])
        finally:
            manager.stop(block=True, timeout=5)
    raise RuntimeError("; ".join(failed))


def _collect(manager: Any, work: Workload, limit_s: float) -> dict[str, Any]:
    began, tokens, open_ids = time.perf_counter(), 0, set()
    for prompt, count in zip(work.prompts, work.outputs):
        open_ids.add(manager.add_request(prompt, max_new_tokens=count))
    while open_ids and time.perf_counter() - began < limit_s:
        if not manager.is_running():
            raise RuntimeError("its thread ended")
        result = manager.get_result(timeout=0.5)
        if result is not None and result.request_id in open_ids and result.is_finished():
            if result.error is not None:
                raise RuntimeError(result.error)
            open_ids.discard(result.request_id)
            tokens += len(result.generated_tokens)
    seconds = time.perf_counter() - began
    return {"tokens_per_s": tokens / seconds, "us": seconds * 1e6, "tokens": tokens, "unfinished": len(open_ids)}


def main(name: str, kind: str, profile_name: str, limit_s: str, folder: str) -> None:
    try:
        answer = {"generate": generate, "batching": batching}[name](PROFILES[profile_name], kind, float(limit_s),
                                                                    Path(folder))  # fmt: skip
    except Exception as error:  # whatever a library in its own process does wrong is its row
        answer = {"why": f"{type(error).__name__}: {error}"[:2000]}
    print(PREFIX + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
