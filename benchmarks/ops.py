"""Times of the CPU's operators against plain torch, as JSON. Usage: python -m benchmarks.ops [--threads N]

The rivals of a case take turns, so that a busy machine slows all of them alike; the best of the rounds
counts. Weights are cycled through more memory than the caches hold, as they are in a model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch.nn import functional as F

from backends import get_backend
from backends.cpu.cpu import TORCH_OPS
from backends.cpu.linear import has_onednn
from backends.cpu.linear import linear as onednn_linear
from backends.cpu.linear import pack_linear as onednn_pack
from backends.metadata import AttentionMetadata
from backends.opset import OpSet
from backends.reference import REFERENCE
from backends.reference.kv import cache_shape, gather_kv
from xllm import env

N, K, H, P, D, FFN, V = 8, 4, 64, 16, 512, 1536, 32000
CYCLED_BYTES = 48 << 20


def race(rivals: dict[str, Callable[[], Any]], rounds: int = 7, round_s: float = 0.02) -> dict[str, float]:
    """Best time in microseconds of each rival, and how many times faster than the first the others are."""
    best = {}
    for name, call in rivals.items():
        call()
        start = time.perf_counter()
        call()
        best[name] = time.perf_counter() - start
    repeats = {name: max(1, int(round_s / best[name])) for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats[name])
    first = next(iter(best))
    times = {f"{name}_us": round(seconds * 1e6, 1) for name, seconds in best.items()}
    return times | {f"{name}_ratio": round(best[first] / best[name], 2) for name in best if name != first}


def linear_case(ops: OpSet, rows: int, outputs: int, inputs: int) -> dict[str, float]:
    x = torch.randn(rows, inputs)
    weights = [torch.randn(outputs, inputs) for _ in range(max(1, min(10, CYCLED_BYTES // (outputs * inputs * 4))))]
    raw, packed = cycle(weights), cycle([ops.pack_linear(w) for w in weights])
    int8, w8a8 = (cycle([ops.pack_linear(w, quantization=name) for w in weights]) for name in ("int8", "w8a8"))
    rivals = {"torch": lambda: F.linear(x, next(raw)), "cpu": lambda: ops.linear(x, next(packed)),
              "int8": lambda: ops.linear(x, next(int8)), "w8a8": lambda: ops.linear(x, next(w8a8))}  # fmt: skip
    if has_onednn():
        onednn = cycle([onednn_pack(w) for w in weights])
        rivals["onednn"] = lambda: onednn_linear(x, next(onednn))
    return race(rivals)


def gather_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMetadata) -> None:
    starts = meta.query_start_S1.tolist()
    for s, length in enumerate(meta.seq_lens_S.tolist()):
        keys, values = gather_kv(k, v, meta.block_table_SM[s], length)
        query = q[starts[s] : starts[s + 1]].transpose(0, 1)
        mask = torch.ones(query.shape[1], length, dtype=torch.bool).tril(length - query.shape[1])
        F.scaled_dot_product_attention(query[None], keys[None], values[None], mask, enable_gqa=True)


def attention_case(ops: OpSet, num_seqs: int, seq_len: int, query_len: int) -> dict[str, float]:
    per_seq = -(-seq_len // P)
    shape = cache_shape(num_seqs * per_seq, P, K, H)
    table = torch.randperm(shape[0], dtype=torch.int32).view(num_seqs, per_seq)
    meta = AttentionMetadata(
        query_start_S1=torch.arange(num_seqs + 1, dtype=torch.int32) * query_len, max_query_len=query_len,
        seq_lens_S=torch.full((num_seqs,), seq_len, dtype=torch.int32), block_table_SM=table, max_seq_len=seq_len,
        slot_mapping_T=torch.zeros(num_seqs * query_len, dtype=torch.int32), num_tokens=num_seqs * query_len,
        block_size=P,
    )  # fmt: skip
    q, k, v = torch.randn(num_seqs * query_len, N, H), torch.randn(shape), torch.randn(shape)
    planned = replace(meta, plan=ops.plan(meta, num_heads=N, num_kv_heads=K, head_dim=H))
    return race({"gather_sdpa": lambda: gather_sdpa(q, k, v, meta),
                 "cpu": lambda: ops.attention(q, k, v, planned, scale=H**-0.5)})  # fmt: skip


def latent_case(ops: OpSet, num_seqs: int, seq_len: int, query_len: int) -> dict[str, float]:
    """At DeepSeek V2-Lite's widths. reference: keys and values of all latents; torch: the CPU's without kernels."""
    num_heads, width, rotated, key_dim, value_dim = 16, 512, 64, 128, 128
    per_seq, num_tokens = -(-seq_len // P), num_seqs * query_len
    cache = torch.randn(cache_shape(num_seqs * per_seq, P, 1, width + rotated))
    meta = AttentionMetadata(
        query_start_S1=torch.arange(num_seqs + 1, dtype=torch.int32) * query_len, max_query_len=query_len,
        seq_lens_S=torch.full((num_seqs,), seq_len, dtype=torch.int32), max_seq_len=seq_len, block_size=P,
        block_table_SM=torch.randperm(num_seqs * per_seq, dtype=torch.int32).view(num_seqs, per_seq),
        slot_mapping_T=torch.zeros(num_tokens, dtype=torch.int32), num_tokens=num_tokens,
    )  # fmt: skip
    q, up = torch.randn(num_tokens, num_heads, key_dim + rotated), torch.randn(num_heads, key_dim + value_dim, width)
    rivals = {"reference": REFERENCE, "torch": TORCH_OPS, "cpu": ops}
    return race({name: partial(each.latent_attention, q, up, cache, meta, scale=0.07) for name, each in rivals.items()})


def small_cases(ops: OpSet, rows: int) -> dict[str, dict[str, float]]:
    x, weight, gate_up = torch.randn(rows, D), torch.ones(D), torch.randn(rows, 2 * FFN)
    logits, ones = torch.randn(rows, V) * 3, torch.ones(rows)
    settings = (ones, torch.full((rows,), 50), ones * 0.9, ones * 0, ones * 0.5)
    calls: dict[str, Callable[[OpSet], Any]] = {
        "rms_norm": lambda o: o.rms_norm(x, weight, 1e-6),
        "silu_mul": lambda o: o.silu_mul(gate_up),
        "argmax": lambda o: o.argmax(logits),
        "sample": lambda o: o.sample(logits.clone(), *settings),
    }
    return {f"{name} T={rows}": race({"reference": partial(call, REFERENCE), "cpu": partial(call, ops)})
            for name, call in calls.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    torch.set_grad_enabled(False)
    ops, results = get_backend("cpu", cache_dir=env.cache_dir()).ops, {}
    for rows in (1, 8, 32, 512):
        for outputs, inputs in ((1024, 512), (3072, 512), (512, 1536), (32000, 512))[: 4 if rows < 512 else 3]:
            results[f"linear M={rows} {outputs}x{inputs}"] = linear_case(ops, rows, outputs, inputs)
    for num_seqs, seq_len, query_len in ((1, 128, 1), (1, 2048, 1), (8, 512, 1), (32, 512, 1), (32, 2048, 1),
                                         (1, 512, 512), (1, 2048, 2048), (1, 2048, 256)):  # fmt: skip
        name = f"attention S={num_seqs} context={seq_len} queries={query_len}"
        results[name] = attention_case(ops, num_seqs, seq_len, query_len)
    for num_seqs, seq_len, query_len in ((1, 512, 1), (1, 4096, 1), (8, 1024, 1), (32, 512, 1), (1, 512, 512),
                                         (1, 4096, 256), (1, 4096, 32)):  # fmt: skip
        name = f"latent_attention S={num_seqs} context={seq_len} queries={query_len}"
        results[name] = latent_case(ops, num_seqs, seq_len, query_len)
    for rows in (1, 32):
        results |= small_cases(ops, rows)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
