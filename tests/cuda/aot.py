"""`python -m tests.cuda.aot`: every kernel with every entry of the config table, compiled without a device.

The operators themselves are called, with tensors on the CPU, so that what is compiled is what would be launched. Each
(operator, architecture) has a process of its own, which a failed assertion in the compiler would end. Of every kernel:
registers without spills, no local memory, shared memory within the device's; of those that promise it, more than one
buffer for keys and values, copies of 16 bytes into them (of 4 for scales), and Hopper's warp-group instructions; of
those that may start early, that they touch no memory before they have waited. What the table has no number for today
(`ALTERNATIVES`) is compiled as well, so that a measurement on a device can choose it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUANTISED = {"int8": (torch.int8, 4), "fp8": (torch.float8_e4m3fn, 1)}  # dtypes of caches, and the bytes of a scale
# Compute capability, multiprocessors, bytes of shared memory a program may have. Ampere's are those of its smaller
# devices (8.6, 8.9), so that every table entry runs on all of them.
DEVICES = {"sm80": (80, 108, 101_376), "sm90": (90, 132, 232_448)}
ALTERNATIVES: dict[str, list[dict[str, int]]] = {"sm80": [{}], "sm90": [{}, {"PDL": 1}]}
MEMORY = re.compile(r"\b(?:ld|st|atom|red)\.(?!param|shared)|cp\.async|\bcp\.reduce")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
SECONDS = 600


def norm_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.norm import add_rms_norm, rms_norm

    for D, dtype in ((1024, BF16), (2048, BF16), (4096, BF16), (5120, FP32), (8192, BF16)):
        x, weight = torch.empty(4, D, dtype=dtype), torch.empty(D, dtype=dtype)
        yield f"D{D} {dtype}", lambda x=x, weight=weight: (rms_norm(x, weight, 1e-6), add_rms_norm(x, x, weight, 1e-6))


def silu_mul_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.activation import silu_mul

    for dtype in (BF16, FP32):
        yield str(dtype), lambda dtype=dtype: silu_mul(torch.empty(4, 2 * 14336, dtype=dtype))


def qkv_rope_write_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.rotary import qkv_rope_write

    for H, dtype, normed in ((64, BF16, False), (128, BF16, False), (128, BF16, True), (128, FP32, True),
                             (256, BF16, False)):  # fmt: skip
        places = torch.zeros(16, dtype=torch.int32)
        norms = dict.fromkeys(("q_norm_H", "k_norm_H"), torch.empty(H, dtype=dtype) if normed else None)
        for format, (codes, scale_bytes) in {"": (dtype, 0), **QUANTISED}.items():
            cache = torch.empty(4, 8, 128, H + scale_bytes, dtype=codes)
            yield f"H{H} {dtype}{' normed' * normed}{f' {format} KV' if format else ''}", partial(
                qkv_rope_write, torch.empty(16, 48 * H, dtype=dtype), places, torch.empty(64, H), cache, cache, places,
                num_heads=32, num_kv_heads=8, head_dim=H, **norms)  # fmt: skip


def attention_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops import attention as ops

    heads = {64: (32, 8), 128: (32, 8), 256: (8, 4)}
    shapes = [(H, BF16, 128, heads[H]) for H in heads] + [(64, FP32, 128, (32, 8)), (128, FP32, 128, (32, 8)),
              (256, FP32, 128, (8, 4)), (128, FP16, 128, (32, 8)), (128, BF16, 16, (16, 8)), (128, BF16, 128, (7, 1)),
              (80, BF16, 128, (32, 32))]  # fmt: skip
    modes = [(False, None), (True, None), (False, 4096)]
    for H, dtype, P, (N, K) in shapes:
        for contiguous, window in modes if (H, dtype, P, N) == (128, BF16, 128, 32) else modes[:1]:
            name = f"H{H} {dtype} P{P} N{N} K{K}{' base' * contiguous}{' window' * bool(window)}"
            q, cache = torch.empty(64, N, H, dtype=dtype), torch.empty(3, K, P, H, dtype=dtype)
            yield name, partial(_attend, ops, q, cache, contiguous, window)
    for H, dtype, P, (N, K), format in _quantised_shapes():
        codes, scale_bytes = QUANTISED[format]
        q, cache = torch.empty(64, N, H, dtype=dtype), torch.empty(3, K, P, H + scale_bytes, dtype=codes)
        for contiguous, window in modes if (H, dtype, P, N, format) == (128, BF16, 128, 32, "int8") else modes[:1]:
            name = f"H{H} {dtype} P{P} N{N} K{K}{' base' * contiguous}{' window' * bool(window)} {format} KV"
            yield name, partial(_attend, ops, q, cache, contiguous, window)


def _quantised_shapes() -> Iterator[tuple[int, torch.dtype, int, tuple[int, int], str]]:
    for format in QUANTISED:
        for H in (64, 128, 256):
            yield H, BF16, 128, (8, 4) if H == 256 else (32, 8), format
        yield 128, BF16, 16, (16, 8), format
    yield from ((128, FP16, 128, (32, 8), "fp8"), (128, FP32, 128, (32, 8), "int8"), (128, BF16, 128, (7, 1), "fp8"),
                (80, BF16, 128, (32, 32), "int8"))  # fmt: skip


def _attend(ops: Any, q: torch.Tensor, cache: torch.Tensor, contiguous: bool, window: int | None) -> None:
    ids = torch.zeros(64, dtype=torch.int32)
    batch = ops.Batch(query_start_S1=torch.zeros(65, dtype=torch.int32), seq_lens_S=ids,
                      block_table_SM=torch.zeros(64, 0 if contiguous else 48, dtype=torch.int32), num_tokens=64,
                      kv_base_S=ids if contiguous else None, max_query_len=64)  # fmt: skip
    plan = ops.plan(batch, ops.Shape.of(q, cache), q, window)
    ops.attention(q, cache, cache, batch, plan, scale=0.1)


def latent_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """DeepSeek's widths: V2-Lite's heads, V2's and V3's, and a rank's; a token, its drafts, and a chunk."""
    for N, dtype, P, contiguous in ((16, BF16, 128, False), (16, BF16, 128, True), (32, BF16, 128, False),
                                    (128, BF16, 128, False), (16, FP16, 128, False), (16, FP32, 128, False),
                                    (16, BF16, 16, False)):  # fmt: skip
        for query_len in (1, 4, 64) if (dtype, P, contiguous) == (BF16, 128, False) else (1, 64):
            name = f"N{N} Q{query_len} {dtype} P{P}{' base' * contiguous}"
            forms = {"": (dtype, 0), **(QUANTISED if N != 32 and query_len != 4 else {})}
            for format, (codes, scale_bytes) in forms.items():
                cache = torch.empty(3, 1, P, 576 + scale_bytes, dtype=codes)
                yield f"{name}{f' {format} KV' if format else ''}", partial(
                    _attend_latents, cache, N, dtype, query_len, contiguous)  # fmt: skip


def _attend_latents(cache: torch.Tensor, N: int, dtype: torch.dtype, query_len: int, contiguous: bool) -> None:
    from cuda_ops.attention import Batch
    from cuda_ops.latent import latent_attention

    ids = torch.zeros(8, dtype=torch.int32)
    batch = Batch(query_start_S1=torch.zeros(9, dtype=torch.int32), seq_lens_S=ids, num_tokens=8 * query_len,
                  block_table_SM=torch.zeros(8, 0 if contiguous else 48, dtype=torch.int32),
                  kv_base_S=ids if contiguous else None, max_query_len=query_len)  # fmt: skip
    q, up = torch.empty(8 * query_len, N, 192, dtype=dtype), torch.empty(N, 256, 512, dtype=dtype)
    latent_attention(q, up, cache, batch, scale=0.1)


def latent_rope_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.latent_rope import latent_rope_write

    places = torch.zeros(16, dtype=torch.int32)
    for dtype, interleaved in ((BF16, True), (BF16, False), (FP32, True)):
        latent, q = torch.empty(16, 576, dtype=dtype), torch.empty(16, 128, 192, dtype=dtype)
        for format, (codes, scale_bytes) in {"": (dtype, 0), **QUANTISED}.items():
            cache = torch.empty(4, 1, 128, 576 + scale_bytes, dtype=codes)
            yield f"{dtype}{' pairs' * interleaved}{f' {format} KV' if format else ''}", partial(
                latent_rope_write, latent, q, places, torch.empty(64, 64), cache, places,
                norm_weight_L=torch.empty(512, dtype=dtype), eps=1e-6, interleaved=interleaved)  # fmt: skip


def sampling_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.sampling import argmax, sample

    logits, column = torch.empty(4, 151_936), torch.zeros(4)
    yield "V151936", lambda: (argmax(logits),
                              sample(logits, column, torch.zeros(4, dtype=torch.int32), column, column, column))


def logits_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.logits import apply_token_bitmask, penalise

    logits, rows, starts = torch.empty(4, 151_936), torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    factors = torch.ones(4), *(torch.zeros(4, dtype=torch.float64) for _ in range(2))
    yield "V151936", lambda: (penalise(logits, rows, torch.zeros(99, dtype=torch.int32), starts, starts, *factors),
                              apply_token_bitmask(logits, torch.zeros(4, 4748, dtype=torch.int32), rows))


def kv_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.kv import copy_blocks, export_blocks, import_blocks, stored_bytes

    ids = torch.zeros(4, dtype=torch.int64)
    for dtype in (BF16, FP32):
        cache = torch.zeros(4, 8, 128, 128, dtype=dtype)
        yield f"copy {dtype}", lambda cache=cache: copy_blocks(cache, ids, ids)
        for format in ("int8", "fp8"):
            store = torch.zeros(4, stored_bytes((cache, cache), format=format), dtype=torch.uint8)
            yield f"{format} {dtype}", lambda c=cache, s=store, f=format: (
                export_blocks((c, c), ids, s, ids, format=f), import_blocks((c, c), ids, s, ids, format=f))  # fmt: skip
    codes = torch.zeros(4, 8, 128, 129, dtype=torch.float8_e4m3fn)
    yield "copy fp8 KV", lambda: copy_blocks(codes, ids, ids)


def linear_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.linear import linear_bytes, linear_w8a8, quantise_rows, rescale

    for codes in (torch.int8, torch.float8_e4m3fn):
        weight = torch.zeros(4096, 4096, dtype=torch.int8).view(codes)
        for rows, dtype in ((16, BF16), (64, BF16), (64, FP16), (64, FP32)):
            x, scale, bias = torch.empty(rows, 4096, dtype=dtype), torch.empty(4096), torch.empty(4096, dtype=dtype)
            yield f"{codes} T{rows} {dtype}", partial(linear_bytes, x, weight, scale, bias)
    yield str(BF16), lambda: quantise_rows(torch.empty(4, 4096, dtype=BF16))
    weight, scale = torch.zeros(4096, 4096, dtype=torch.int8), torch.empty(4096)
    for rows, dtype in ((16, BF16), (64, BF16), (64, FP32)):
        x, bias = torch.empty(rows, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
        yield f"w8a8 T{rows} {dtype}", partial(linear_w8a8, x, weight, scale, bias)
        yield f"sums {dtype}", partial(rescale, torch.zeros(rows, 4096, dtype=torch.int32), scale, scale, bias, dtype)


def feed_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.feed import feed_tokens

    ids = torch.zeros(64, dtype=torch.int32)
    yield "T64", lambda: feed_tokens(ids, ids, torch.zeros(64, dtype=torch.int64))


def lora_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.lora import lora_add, pack_lora

    slots = torch.zeros(4, dtype=torch.int32)
    for rank, parts, dtype in ((16, (4096, 1024, 1024), BF16), (64, (12288, 12288), BF16), (8, (4096,), FP32)):
        a = torch.empty(2, len(parts) * rank, 4096, dtype=dtype)
        packed = pack_lora(a, torch.empty(2, sum(parts), rank, dtype=dtype), parts)
        x, y = torch.empty(4, 4096, dtype=dtype), torch.empty(4, sum(parts), dtype=dtype)
        yield f"R{rank} {len(parts)} parts {dtype}", partial(lora_add, y, x, packed, slots)


OPERATORS = {
    "norm": norm_cases, "silu_mul": silu_mul_cases, "qkv_rope_write": qkv_rope_write_cases,
    "attention": attention_cases, "latent": latent_cases, "latent_rope": latent_rope_cases, "sampling": sampling_cases,
    "logits": logits_cases, "kv": kv_cases, "linear": linear_cases, "feed": feed_cases, "lora": lora_cases,
}  # fmt: skip


class Device:
    """A driver of nothing, from which the compiler learns what to compile for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Of one kernel: registers, and bytes of stack and local memory."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = RESOURCES.search(text)
    assert found, text
    return dict(zip(("registers", "stack", "static", "local"), map(int, found.groups())))


def num_buffers(ttgir: str) -> int:
    """The fewest buffers of what a pipelined loop loads; 0 without one. A buffer is the outer axis of an allocation."""
    shapes = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<([\dx]+)x[a-z]", ttgir)
    counts = [int(shape.split("x")[0]) for shape in shapes if shape.count("x") == 2]
    return min(counts, default=0)


def examine(kernel: Any, name: str, case: str, arch: str) -> dict[str, Any]:
    """One line of the report; `faults` is empty if all is as promised."""
    used = resources(kernel.asm["cubin"])
    shared, buffers = kernel.metadata.shared, num_buffers(kernel.asm["ttgir"])
    half, of_latents = "float32" not in case, name in ("latent_decode_kernel", "latent_prefill_kernel")
    walks = of_latents or name in ("decode_kernel", "prefill_kernel")
    in_table = "P16" not in case and "H80" not in case  # entries of "any", or blocks that are smaller than tiles
    faults = [f"{key} {used[key]} B" for key in ("stack", "local") if used[key]]
    if shared > DEVICES[arch][2]:
        faults.append(f"shared {shared} B of {DEVICES[arch][2]}")
    if walks and half and in_table and buffers < 2:
        faults.append(f"{buffers} buffers for keys and values")
    copies = set(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x(\w+)", kernel.asm["ptx"]))
    expected = {"10", "4"} if "KV" in case else {"10"}  # scales by words
    if of_latents and "KV" in case:
        copies -= {"8"}  # the rotated part has few bytes for so many threads
    if walks and half and in_table and copies != expected:
        faults.append(f"copies of {sorted(copies)} bytes (hexadecimal) instead of {sorted(expected)}")
    wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
    of_64_rows = name == "prefill_kernel" or (name == "latent_prefill_kernel" and "KV" not in case)
    if of_64_rows and arch == "sm90" and half and in_table and not wgmma:
        faults.append("no wgmma")
    waits, touches = kernel.asm["ptx"].find("griddepcontrol.wait"), MEMORY.search(kernel.asm["ptx"])
    if "PDL" in case and not (touches and 0 <= waits < touches.start()):
        faults.append("touches memory before it has waited")
    return {"kernel": name, "case": case, "arch": arch, "registers": used["registers"], "shared": shared,
            "buffers": buffers, "wgmma": wgmma, "faults": faults}  # fmt: skip


def compile_all(operator: str, arch: str) -> None:
    """In a child: a line of JSON for every kernel."""
    import triton

    from cuda_ops.launch import ahead_of_time, overridden

    capability, num_sms, _ = DEVICES[arch]
    triton.runtime.driver.set_active(Device(capability))
    with tempfile.TemporaryDirectory() as cache_dir:
        triton.knobs.cache.dir = cache_dir
        seen, entries = set(), set()
        for numbers in ALTERNATIVES[arch]:
            for case, call in OPERATORS[operator]():
                if numbers and "KV" in case:
                    continue  # they begin as those of plain numbers do
                with ahead_of_time(arch, num_sms) as compilation, overridden(**numbers):
                    call()
                for name, kernel in compilation.compiled:
                    if kernel.hash not in seen:
                        seen.add(kernel.hash)
                        print(json.dumps(examine(kernel, name, " ".join([case, *numbers]), arch)), flush=True)
                entries |= compilation.entries
    print(json.dumps({"entries": sorted(entries)}), flush=True)


def in_child(operator: str, arch: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.cuda.aot", "--child", operator, arch]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
        lines, error = done.stdout, done.stderr[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        lines, error = (expired.stdout or b"").decode(), f"more than {SECONDS} s"
    rows = [json.loads(line) for line in lines.splitlines()]
    if error or len(rows) < 2:
        rows.append({"kernel": operator, "case": "", "arch": arch, "faults": [error or "no kernel"]})
    return rows


def table_entries() -> set[tuple[str, str, str]]:
    table = json.loads((ROOT / "cuda_ops" / "configs.json").read_text())
    return {(op, arch, bucket) for op, archs in table.items() for arch, buckets in archs.items() for bucket in buckets}


def describe(row: dict[str, Any]) -> str:
    facts = "  ".join(f"{key} {value}" for key, value in row.items() if key != "faults")
    return facts + ("  FAILED: " + "; ".join(row["faults"]) if row["faults"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(OPERATORS)}; all without any")
    parser.add_argument("--arch", choices=DEVICES, help="only this one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write what was found there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        compile_all(*options.child)
        return 0
    tasks = [(operator, arch) for operator in options.operators or OPERATORS
             for arch in ([options.arch] if options.arch else DEVICES)]  # fmt: skip
    found, used = [], set()
    with ThreadPoolExecutor(options.workers) as pool:
        for rows in pool.map(lambda task: in_child(*task), tasks):
            used |= {tuple(entry) for row in rows for entry in row.get("entries", ())}
            for row in (row for row in rows if "entries" not in row):
                found.append(row)
                print(describe(row), flush=True)
    if not options.operators and not options.arch:
        found += [{"kernel": op, "case": bucket, "arch": arch, "faults": ["no case has this entry of the table"]}
                  for op, arch, bucket in sorted(table_entries() - used)]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    failed = sum(bool(row["faults"]) for row in found)
    print(f"{len(found) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
