"""`Profile`: how much of everything is measured. `tiny` runs in a minute on two CPU cores; `quick` and `full` fit 560 s
on one H200, kernels compiled on the way."""

from __future__ import annotations

from dataclasses import dataclass

SECTIONS = ("smoke", "env", "ceilings", "ops", "e2e", "micro", "engine", "host", "baselines", "report")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Lengths in tokens, times in seconds. section_s: what a section is thought to take, for the deadline."""

    name: str
    section_s: dict[str, float]
    models: tuple[str, ...]
    row_s: float  # of sampling, for one row of `ceilings` and `micro`
    copy_bytes: int
    gemm: int
    cases: int  # random cases of each operator
    longest: int  # context of those
    e2e_families: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    micro_tokens: tuple[int, ...]
    micro_contexts: tuple[int, ...]
    decode_steps: int
    prefill_repeats: int
    workload: tuple[int, int, int]  # sequences, longest, shortest
    online_s: float
    online_shares: tuple[float, ...]
    host_steps: int
    baseline_model: str
    baseline_s: float  # at most, for each
    generate_tokens: int
    block_size: int | None = None
    warm_processes: int = 14


FULL = Profile(
    name="full",
    section_s={"smoke": 20, "env": 60, "ceilings": 15, "ops": 60, "e2e": 55, "micro": 75, "engine": 140, "host": 25,
               "baselines": 95},
    models=("qwen3-0.6b", "qwen3-8b"), row_s=0.1, copy_bytes=8 << 30, gemm=8192, cases=24, longest=32_768,
    e2e_families=("Llama", "Qwen2", "Qwen3Moe", "Qwen3"), batches=(1, 8, 64, 256), contexts=(1024, 4096),
    prefills=(512, 2048, 8192), micro_tokens=(1, 8, 64, 256, 2048), micro_contexts=(1024, 4096, 32_768),
    decode_steps=64, prefill_repeats=7, workload=(256, 1024, 100), online_s=15.0, online_shares=(0.5, 0.8, 0.95),
    host_steps=200, baseline_model="qwen3-0.6b", baseline_s=60.0, generate_tokens=128,
)  # fmt: skip

QUICK = Profile(
    name="quick",
    section_s={"smoke": 20, "env": 60, "ceilings": 10, "ops": 45, "e2e": 45, "micro": 50, "engine": 145, "host": 25,
               "baselines": 105},
    models=("qwen3-0.6b", "qwen3-8b"), row_s=0.04, copy_bytes=8 << 30, gemm=8192, cases=20, longest=32_768,
    e2e_families=("Llama", "Qwen3Moe", "Qwen3"), batches=(1, 8, 64, 256), contexts=(1024, 4096),
    prefills=(512, 2048, 8192), micro_tokens=(1, 64, 256), micro_contexts=(1024, 4096), decode_steps=32,
    prefill_repeats=5, workload=(256, 1024, 100), online_s=8.0, online_shares=(0.5, 0.8), host_steps=100,
    baseline_model="qwen3-0.6b", baseline_s=45.0, generate_tokens=64,
)  # fmt: skip

TINY = Profile(
    name="tiny",
    section_s=dict.fromkeys(SECTIONS, 2.0) | {"e2e": 10.0, "baselines": 10.0},
    models=("tiny",), row_s=0.004, copy_bytes=8 << 20, gemm=256, cases=10, longest=90,
    e2e_families=("Qwen3Moe", "Qwen3"), batches=(1, 4), contexts=(32,), prefills=(48,), micro_tokens=(1, 4),
    micro_contexts=(32,), decode_steps=6, prefill_repeats=2, workload=(6, 24, 8), online_s=0.5, online_shares=(0.5,),
    host_steps=12, baseline_model="tiny", baseline_s=90.0, generate_tokens=6, warm_processes=1,
)  # fmt: skip

PROFILES = {profile.name: profile for profile in (TINY, QUICK, FULL)}
