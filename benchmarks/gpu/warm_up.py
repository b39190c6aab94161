"""One of the processes that compile kernels before they are measured: `python -m benchmarks.gpu.warm_up DEVICE PROFILE
INDEX COUNT`.

A kernel is compiled at its first call with new constants, which takes a second or more. So that no section does that
one by one, all that they will call is called once here, every COUNT-th thing by this process: engines of one layer, the
cases of `micro` with short sequences, and the very checks of `ops`. What breaks stops nothing; it is told at the end.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.bank import MicroCase
from benchmarks.gpu.device import Device
from benchmarks.gpu.driver import Driver
from benchmarks.gpu.engine import BYTE_FORMS
from benchmarks.gpu.micro_cases import all_cases
from benchmarks.gpu.op_cases import World
from benchmarks.gpu.ops import OPERATORS, REFUSALS
from benchmarks.gpu.profile import PROFILES, Profile
from benchmarks.gpu.shapes import SHAPES, ModelShape
from benchmarks.gpu.spot import SPOTS
from xllm.errors import ConfigError

CONTEXT = 128  # of the cases of `micro`: kernels do not depend on it
NUM_SEQS = (1, 100, 256)  # each of another bucket of the kernels that look sequences up
PROMPT, NUM_NEW = 24, 3
# The small models of `e2e` on a GPU.
SMALL = ModelShape(name="small", family="Qwen3", hidden=1024, layers=1, heads=8, kv_heads=2, ffn=1536, vocab=1031,
                   max_len=512)
Job = tuple[str, Callable[[], Any]]


def jobs(device: Device, profile: Profile, scratch: Path) -> Iterator[Job]:
    """What takes longest first. Inputs are random in the same order in each process: the jobs are the same ones."""
    for name, shape, settings in engines(profile):
        yield f"engine/{name}", partial(run_engine, device, profile, shape, scratch / name, settings)
    for case in all_cases(device, profile, once=True):
        if not case.absent:
            yield case.id, partial(call_once, case)
    for name, cases in OPERATORS.items():
        world = World(device, seed=len(name), cases=profile.cases, longest=profile.longest)
        for check in cases(world):
            yield f"{name}/{check.name}", check.run
    for name, spots in SPOTS.items():
        world = World(device, seed=len(name), cases=1, longest=profile.longest)
        for check in spots(world, SHAPES[profile.models[-1]]):
            yield f"spot/{name}/{check.name}", check.run


def call_once(case: MicroCase) -> None:
    case.calls(1)[0]()


def engines(profile: Profile) -> Iterator[tuple[str, ModelShape, dict[str, Any]]]:
    for name in profile.models:
        yield name, replace(SHAPES[name], layers=1), {}
    for form, (settings, _) in BYTE_FORMS.items():
        yield f"{profile.models[-1]}-{form}", replace(SHAPES[profile.models[-1]], layers=1), settings
    for name, choices in (("kv_cache_dtype", ("auto", "int8", "fp8")), ("quantization", ("int8", "fp8", "w8a8"))):
        for choice in choices:
            yield f"small-{name}-{choice}", SMALL, {name: choice, "dtype": "float32"}


def run_engine(device: Device, profile: Profile, shape: ModelShape, folder: Path, settings: dict[str, Any]) -> None:
    most = max(profile.batches)
    driver = Driver(shape.write(folder), device=device.kind, load_format="dummy", max_model_len=256, max_num_seqs=most,
                    num_kv_blocks=4 * most + 16, graph_mode="off", enable_prefix_caching=False, **settings)  # fmt: skip
    try:
        for count in (n for n in NUM_SEQS if n <= most):
            for i in range(count):
                driver.add([1 + i] * PROMPT, NUM_NEW, temperature=0.6 * (i % 2))
            driver.run()
    finally:
        driver.close()


def main(kind: str, profile_name: str, index: int, count: int) -> int:
    """How many jobs broke."""
    device, profile, broken = Device(kind), PROFILES[profile_name], 0
    profile = replace(profile, micro_contexts=(min(CONTEXT, *profile.micro_contexts),), prefills=profile.prefills[:1])
    with torch.inference_mode(), TemporaryDirectory(prefix="xllm-warm-") as scratch:
        for i, (name, job) in enumerate(jobs(device, profile, Path(scratch))):
            if i % count != index:
                continue
            try:
                job()
            except (ConfigError, *REFUSALS):
                pass  # what is refused is told where it is measured
            except Exception:
                broken += 1
                print(f"{name}: {traceback.format_exc()[-800:]}", file=sys.stderr, flush=True)
                if not device.is_usable():
                    break
        if device.is_usable():
            device.synchronize()
    return broken


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
