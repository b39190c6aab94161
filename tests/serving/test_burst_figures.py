"""What the benchmark of running decodes beside a burst makes of the times of tokens, and what devices take."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.burst_figures import chosen, compared, figures, gaps_s, quantile, tpot_s
from benchmarks.burst_load import Arrivals, BurstRun
from benchmarks.disaggregation_tpot import DEVICE, NULL_LOAD
from benchmarks.priced_device import TOKEN_BYTES, read_device
from xllm.errors import ConfigError

LOAD = dataclasses.replace(NULL_LOAD, num_decodes=2, num_prompts=2, prompt_tokens=100, answer_tokens=2)


def every(step_s: float, begin_s: float, end_s: float) -> list[float]:
    return [begin_s + step_s * i for i in range(round((end_s - begin_s) / step_s))]


def test_a_window_has_the_gaps_that_reach_into_it() -> None:
    arrivals = Arrivals([0.0, 1.0, 3.0, 3.0, 7.0, 8.0])
    assert gaps_s(arrivals, 2.0, 5.0) == [2.0, 0.0, 4.0]
    assert gaps_s(arrivals, 1.0, 3.0) == [2.0], "what ends or begins at an edge is outside"
    assert tpot_s(arrivals, 2.0, 5.0) == 2.0


def test_quantiles_are_samples() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile([float(i) for i in range(1, 33)], 0.99) == 32.0
    assert quantile([float(i) for i in range(1, 201)], 0.99) == 198.0
    assert quantile([4.0, 2.0], 0.5) == 2.0


def test_the_figures_of_a_run() -> None:
    """Steps of 0.1 s; from 10 to 12 s, while the burst's prompts are computed, of 0.5 s for one decode of two."""
    slow = [*every(0.1, 0.0, 10.0), *every(0.5, 10.0, 12.0), *every(0.1, 12.0, 14.0)]
    run = BurstRun(8.0, 10.0, 13.0, [Arrivals(every(0.1, 0.0, 14.0)), Arrivals(slow)],
                   [Arrivals([11.0, 11.2]), Arrivals([12.0, 12.4])])
    found = figures(run, LOAD)
    assert (found["tpot_p50_ms"], found["tpot_p99_ms"], found["calm_tpot_p99_ms"]) == (100.0, 500.0, 100.0)
    assert (found["gap_p99_ms"], found["gap_max_ms"]) == (500.0, 500.0)
    assert (found["burst_filled_s"], found["run_s"], found["ttft_p50_s"]) == (2.0, 5.0, 1.0)
    assert found["burst_own_tpot_p99_ms"] == 400.0
    assert found["tokens_per_s"] == pytest.approx((200 + 4 + 50 + 20 + 4 + 10) / 5, abs=1)


def test_the_chunk_that_a_split_is_compared_with() -> None:
    rows = [{"chunk_tokens": size, "tpot_p99_ms": tpot, "gap_p99_ms": tpot, "tokens_per_s": rate, "ttft_p50_s": 2.0}
            for size, tpot, rate in ((64, 20.0, 949), (128, 40.0, 950), (256, 30.0, 960), (512, 90.0, 1000))]
    found = chosen(rows)
    assert found is not None and found["chunk_tokens"] == 256
    split = {"tpot_p99_ms": 15.0, "gap_p99_ms": 18.0, "tokens_per_s": 990, "ttft_p50_s": 1.0}
    assert compared(split, rows) == {
        "chunk_tokens": 256, "tpot_p99_over_mixed": 0.5, "gap_p99_over_mixed": 0.6, "ttft_p50_over_mixed": 0.5,
        "throughput_over_mixed": 1.031, "tpot_p99_over_least": 0.75,
        "at_its_throughput": {"chunk_tokens": 64, "tpot_p99_over_mixed": 0.75}}
    assert compared({**split, "tokens_per_s": 1100}, rows)["at_its_throughput"] is None


def test_the_device_is_what_its_arithmetic_says() -> None:
    device = read_device(DEVICE)
    embedding, num_weights, flops, bytes_per_s = 152064 * 5120, 14.77e9, 0.75 * 312e12, 0.75 * 2.039e12
    read = 4 * 40 * 128 * 48 / flops
    expected = ((num_weights - embedding) * 2 / bytes_per_s, 2 * (num_weights - 2 * embedding) / flops,
                2 * embedding / flops, read, 2 * 2 * 8 * 128 * 48 / bytes_per_s - read)
    assert device.prices == pytest.approx(expected, rel=1e-3)
    assert device.kv_token_bytes == 2 * 2 * 8 * 128 * 48
    assert device.link_bytes_per_s / TOKEN_BYTES == pytest.approx(0.75 * 25e9 / device.kv_token_bytes, rel=1e-3)
    assert device.host_bytes_per_s / TOKEN_BYTES == pytest.approx(0.75 * 32e9 / device.kv_token_bytes, rel=1e-3)


@pytest.mark.parametrize("wrong", ["{", "[]", "{}", '{"what": "", "kv_token_bytes": 1, "model": {}}'])
def test_what_is_no_device_is_named(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "device.json").write_text(wrong)
    with pytest.raises(ConfigError, match=r"device\.json does not say"):
        read_device(tmp_path / "device.json")


def test_a_device_has_prices_of_steps(tmp_path: Path) -> None:
    data = json.loads(DEVICE.read_text())
    data["model"]["steps"] = None
    (tmp_path / "device.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="steps and kv_token_bytes"):
        read_device(tmp_path / "device.json")
