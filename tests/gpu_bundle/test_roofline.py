"""Floors against a table that was worked out apart: one H200, milliseconds."""

from __future__ import annotations

import pytest

from benchmarks.gpu.roofline import (
    H200,
    KV8,
    SIXTEEN_BITS,
    W8_KV8,
    Ceilings,
    Work,
    decode_parts,
    decode_s,
    make_workload,
    prefill_s,
    workload_s,
)
from benchmarks.gpu.shapes import SHAPES

BATCHES = (1, 8, 32, 64, 128, 256)
DECODE_1K = {
    "llama-3.1-8b": (3.52, 3.74, 4.49, 5.49, 7.50, 12.9), "qwen3-0.6b": (0.30, 0.50, 1.15, 2.03, 3.79, 7.40),
    "qwen3-1.7b": (0.83, 1.02, 1.68, 2.55, 4.31, 8.13), "qwen3-4b": (1.91, 2.15, 3.00, 4.12, 6.38, 11.6),
    "qwen3-8b": (3.56, 3.80, 4.65, 5.77, 8.03, 13.9), "qwen3-14b": (6.55, 6.82, 7.76, 9.01, 11.5, 19.1),
    "qwen3-32b": (14.9, 15.4, 16.9, 18.9, 22.9, 36.7),
}  # fmt: skip
DECODE_4K = {"qwen3-0.6b": (0.39, 1.15, 3.78, 7.28, 14.3, 28.4), "qwen3-8b": (3.66, 4.64, 8.02, 12.5, 21.5)}
PREFILL = {"qwen3-0.6b": {512: 0.6, 2048: 2.9, 8192: 18.8}, "qwen3-8b": {512: 9.1, 2048: 37.6, 8192: 169.2},
           "llama-3.1-8b": {512: 9.1, 2048: 37.6, 8192: 167.0}}  # fmt: skip
KV_BYTES = {"llama-3.1-8b": 131_072, "qwen3-0.6b": 114_688, "qwen3-8b": 147_456, "qwen3-14b": 163_840,
            "qwen3-32b": 262_144}  # fmt: skip


@pytest.mark.parametrize(("table", "context"), [(DECODE_1K, 1024), (DECODE_4K, 4096)], ids=["1k", "4k"])
def test_decode(table: dict[str, tuple[float, ...]], context: int) -> None:
    for name, expected in table.items():
        for batch, ms in zip(BATCHES, expected):
            assert decode_s(SHAPES[name], batch, context) * 1e3 == pytest.approx(ms, rel=0.01, abs=0.006), (name, batch)


@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name: str) -> None:
    for tokens, ms in PREFILL[name].items():
        assert prefill_s(SHAPES[name], tokens) * 1e3 == pytest.approx(ms, rel=0.01, abs=0.06)


@pytest.mark.parametrize("name", KV_BYTES)
def test_kv_bytes(name: str) -> None:
    assert SHAPES[name].kv_bytes == KV_BYTES[name]


def test_the_workload_is_the_one_that_others_measure() -> None:
    work = make_workload()
    assert len(work.prompts) == 256
    assert (sum(map(len, work.prompts)), work.num_output_tokens) == (142_827, 133_966)


@pytest.mark.parametrize(("name", "rate"), [("qwen3-0.6b", 36_300), ("qwen3-8b", 13_000), ("qwen3-14b", 8_300)])
def test_the_workloads_floor(name: str, rate: float) -> None:
    work = make_workload()
    assert work.num_output_tokens / workload_s(SHAPES[name], work) == pytest.approx(rate, rel=0.03)


def test_the_parts_of_a_decode_step() -> None:
    """The tiny shape by hand: 2 layers, 64 hidden, 4 and 2 heads of 16, ffn 128, vocabulary 512."""
    params = 2 * 64 * (2 * 64 + 2 * 32 + 3 * 128) + 512 * 64
    products, attention, logits = decode_parts(SHAPES["tiny"], [10, 20, 30])
    assert (products.bytes, products.flops) == (2 * params, 2 * 3 * params)
    assert (attention.bytes, attention.flops) == (63 * 2 * 2 * 16 * 2 * 2, 4 * 60 * 4 * 16 * 2)
    assert (logits.bytes, logits.flops) == (2 * 3 * 512, 0)


def test_the_larger_of_bytes_and_operations_counts() -> None:
    ceilings = Ceilings(10.0, 100.0)
    assert Work(20.0, 100.0).seconds(ceilings) == 2.0
    assert Work(20.0, 900.0).seconds(ceilings) == 9.0
    assert decode_s(SHAPES["qwen3-8b"], 1, 1024, Ceilings(H200.bandwidth / 2, H200.rate)) == pytest.approx(
        2 * decode_s(SHAPES["qwen3-8b"], 1, 1024), rel=1e-3)  # fmt: skip


def test_numbers_of_one_byte() -> None:
    """As above, with a byte a weight, and 16 codes and a scale a key."""
    parts, params = decode_parts(SHAPES["tiny"], [10, 20, 30], W8_KV8), 2 * 64 * (2 * 64 + 2 * 32 + 3 * 128) + 512 * 64
    assert (parts[0].bytes, parts[0].flops) == (params, 2 * 3 * params)
    assert parts[1].bytes == 63 * 2 * 2 * 2 * (16 + 1)
    many = decode_parts(SHAPES["tiny"], [10] * 65, W8_KV8)
    assert many[0].flops == 65 * params and decode_parts(SHAPES["tiny"], [10] * 65)[0].flops == 2 * 65 * params


@pytest.mark.parametrize(("batch", "ms"), [(1, 1.78), (64, 2.90), (256, 7.0)])
def test_the_second_stage(batch: int, ms: float) -> None:
    assert decode_s(SHAPES["qwen3-8b"], batch, 1024, stored=W8_KV8) * 1e3 == pytest.approx(ms, rel=0.01)


def test_the_fewer_bytes_the_sooner() -> None:
    both, kv, none = (decode_s(SHAPES["qwen3-8b"], 64, 4096, stored=stored) for stored in (W8_KV8, KV8, SIXTEEN_BITS))
    assert both < kv < none == decode_s(SHAPES["qwen3-8b"], 64, 4096)
