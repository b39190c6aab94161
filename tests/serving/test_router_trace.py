"""A trace on modelled instances: what the model computes, by hand, and what the router's policies make of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from serving.commands.bench.http_load import ChatAnswer
from serving.commands.bench.modelled_engine import STEP_TOKENS, EngineSpeed, ModelledEngine, TracedRequest
from serving.commands.bench.router_processes import check_blocks, measured_prices, prices_of, prompt_of, summary
from serving.commands.bench.router_trace import marks_of, read_requests, scaled
from serving.commands.cli import main
from xllm.cost.cost_file import CostOrigin, profile_to_json
from xllm.cost.cost_model import StepPrices
from xllm.cost.observations import MeasuredStep, Profile, decode_work, prefill_work
from xllm.errors import ConfigError, XllmError
from xllm.routing.policies import POLICIES
from xllm.routing.prompt_marks import prompt_marks

SPEED = EngineSpeed(step_s=0.01, token_s=0.001, sequence_s=0.002)


class Heard:
    """An engine, and what it has said."""

    def __init__(self, num_blocks: int) -> None:
        self.said: list[tuple[str, str, float]] = []
        self.cached: set[bytes] = set()
        self.engine = ModelledEngine(num_blocks, SPEED, self._note("begun"), self._note("left"), self._change)

    def _note(self, what: str) -> Any:
        return lambda request_id: self.said.append((what, request_id, pytest.approx(self.engine.now_s)))

    def _change(self, stored: bytes, removed: bytes) -> None:
        new, gone = ({joined[start : start + 1] for start in range(len(joined))} for joined in (stored, removed))
        assert not new & self.cached and gone <= self.cached | new
        self.cached = (self.cached | new) - gone


def request(name: str, blocks: bytes, extra: int = 0, output: int = 3, at_s: float = 0.0) -> TracedRequest:
    return TracedRequest(request_id=name, at_s=at_s, num_tokens=100 * len(blocks) + extra, num_output_tokens=output,
                         block_size=100, blocks=[blocks[place : place + 1] for place in range(len(blocks))])


def test_the_model_computes_what_is_not_cached_and_then_decodes() -> None:
    heard = Heard(10)
    engine = heard.engine
    engine.advance(1.0)
    engine.submit(request("1", b"ab", 50, at_s=1.0))
    engine.advance(1.1)
    assert (engine.num_waiting, engine.num_running, engine.num_free_blocks) == (0, 1, 7), "a step that began ends"
    assert heard.said == [("begun", "1", 1.26)] and heard.cached == {b"a", b"b"}
    engine.submit(request("2", b"abc", output=1, at_s=1.1))
    engine.advance(1.3)
    assert heard.said[1:] == [("begun", "2", 1.26 + 0.01 + 0.1 + 0.002), ("left", "2", 1.372)]
    engine.advance(9.0)
    assert heard.said[3:] == [("left", "1", 1.372 + 0.012)] and engine.now_s == 9.0
    assert (engine.totals.num_prompt_tokens, engine.totals.num_cached, engine.totals.num_computed) == (550, 200, 350)
    assert engine.totals.ttft_s == pytest.approx([0.26, 0.272]) and engine.num_free_blocks == 10
    assert [timing[2:] for timing in engine.timings] == [(250, 1), (101, 2), (1, 1)]


def test_a_long_prompt_takes_several_steps_and_the_next_waits_for_memory() -> None:
    heard = Heard(30)
    heard.engine.submit(request("1", bytes(range(25)), output=5))
    heard.engine.submit(request("2", b"xyzuvw"))
    heard.engine.advance(1.0)
    assert heard.engine.num_waiting == 2 and len(heard.cached) == STEP_TOKENS // 100
    heard.engine.advance(99.0)
    assert [said[:2] for said in heard.said] == [("begun", "1"), ("left", "1"), ("begun", "2"), ("left", "2")]
    assert heard.cached == {bytes([n]) for n in range(24)} | {b"x", b"y", b"z", b"u", b"v", b"w"}, "the last goes first"


def conversations(path: Path) -> Path:
    """Of people with three turns each, who all begin alike; one block is 512 tokens."""
    rng, lines, serial = random.Random(0), [], 100
    for person in range(21):
        ids = [0, 1]
        for turn in range(3):
            ids = [*ids, *range(serial, serial + 4)]
            serial += 4
            lines.append({"timestamp": 1000 * person + 40_000 * turn + rng.randrange(900),
                          "input_length": 512 * len(ids) - rng.randrange(100), "output_length": rng.randrange(1, 50),
                          "hash_ids": ids})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_policies_on_conversations(tmp_path: Path) -> None:
    trace, file = conversations(tmp_path / "trace.jsonl"), tmp_path / "result.json"
    results = []
    for _ in range(2):
        assert main(["bench", "router", "--trace", str(trace), "--instances", "4", "--cache-tokens", "100k",
                     "--json", str(file)]) == 0
        results.append(json.loads(file.read_text(encoding="utf-8")))
    assert results[0] == results[1], "time is simulated"
    result = results[0]
    assert list(result["policies"]) == list(POLICIES) and result["requests"] == 63
    rates = {name: one["hit_rate_pct"] for name, one in result["policies"].items()}
    assert rates["cache_aware"] > 50 > 45 > rates["round_robin"] > 0
    assert result["hit_rate_ratio"] == round(rates["cache_aware"] / rates["round_robin"], 2)
    assert result["imbalance"] == result["policies"]["cache_aware"]["imbalance"] < 1.6
    assert all(1 <= one["imbalance"] <= 4 and 0 < one["ttft_p50_s"] <= one["ttft_p99_s"]
               and sum(one["reasons"].values()) == 63 for one in result["policies"].values())


def test_a_trace_is_scaled_and_its_blocks_become_tokens(tmp_path: Path) -> None:
    requests = scaled(read_requests(conversations(tmp_path / "trace.jsonl")), 6, 4)
    by_id = {one.request_id: one for one in requests}
    first, second = by_id["1"], by_id["2"]  # two turns, of 6 and 10 blocks of 512 tokens
    assert (first.block_size, first.num_tokens // 128, second.num_tokens // 128) == (128, 5, 9)
    assert second.at_s - first.at_s == pytest.approx(40 / 6, abs=0.2) and 1 <= first.num_output_tokens <= 8
    prompts = [prompt_of(one, 4096) for one in (first, second, by_id["4"])]
    assert [len(prompt) for prompt in prompts] == [one.num_tokens for one in (first, second, by_id["4"])]
    assert prompts[0] == prompt_of(first, 4096) and all(3 < min(prompt) <= max(prompt) < 4096 for prompt in prompts)
    marks = [prompt_marks(prompt, 16).digests for prompt in prompts]
    assert marks[0][:40] == marks[1][:40] and marks[0][40] != marks[1][40], "five whole blocks in common"
    assert marks[0][:16] == marks[2][:16] and marks[0][16] != marks[2][16], "two, that everybody begins with"
    with pytest.raises(ConfigError, match="--shrink must divide"):
        scaled(requests, 1, 3)
    with pytest.raises(ConfigError, match="whole blocks of 16 tokens; it leaves 8"):
        check_blocks(scaled(requests, 1, 16))


def test_prices_of_steps(tmp_path: Path) -> None:
    prices = prices_of(SPEED)
    assert prices.predict(prefill_work(250)) == pytest.approx(0.01 + 0.25)
    assert prices.predict(decode_work([9, 9])) == pytest.approx(0.01 + 0.004)
    measured = [MeasuredStep(work, StepPrices(0.01, 1e-3, 1e-3, 1e-6, 1e-6).predict(work))
                for work in (*(prefill_work(number, 200) for number in (100, 200, 300, 400, 500, 600)),
                             *(decode_work([100] * number) for number in (1, 2, 4, 8)),
                             *(decode_work([800] * number) for number in (1, 2, 4, 8)))]
    origin = CostOrigin(version="1", model="m", config="c", quantization=None, device="cpu", device_name="d",
                        dtype="float32", kv_dtype="float32", num_threads=1, tensor_parallel_size=1)
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(profile_to_json(origin, Profile(steps=measured))), encoding="utf-8")
    scaled_prices = measured_prices(file, 5, 4)
    assert scaled_prices.predict(prefill_work(200)) == pytest.approx(  # of 800 tokens, five times as fast
        0.01 + (800 * 1e-3 + 1e-6 * 800 * 800 / 2) / 5, rel=1e-2)
    assert scaled_prices.predict(decode_work([25])) == pytest.approx(  # one of fewer steps, over 100 tokens
        0.01 + 1e-3 + 1e-3 * 4 / 5 + 2e-6 * 100, rel=1e-2)
    file.write_text(json.dumps(profile_to_json(origin, Profile(steps=measured[:3]))), encoding="utf-8")
    with pytest.raises(ConfigError, match="fewer than 8 steps"):
        measured_prices(file, 5, 4)


def test_what_instances_and_clients_say_is_summed_up() -> None:
    requests = [request("1", b"ab"), request("2", b"ab", output=5), request("3", b"abc")]
    answers = [ChatAnswer(200, 3, 0.1, 3), ChatAnswer(200, 4, 0.3, 3), "the server answered 503"]
    said = {"preemptions_total": 0, "busy_s": 1.0}
    found = summary(requests, answers, [{**said, "prompt_tokens_total": 300, "cached_prompt_tokens_total": 100},
                                        {**said, "prompt_tokens_total": 100, "cached_prompt_tokens_total": 0}], 2.0)
    assert (found["hit_rate_pct"], found["imbalance"], found["computed_by_instance"]) == (25.0, 1.333, [200, 100])
    assert (found["failed"], found["errors"], found["busy_pct"]) == (2, ["the server answered 503"], 50.0)
    with pytest.raises(XllmError, match="no request was answered: the server answered 503"):
        summary(requests[2:], answers[2:], [], 2.0)


def test_sessions_of_agents_are_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    agent = {"id": "x", "block_size": 64, "requests": [
        {"t": 1.5, "in": 200, "out": 5, "hash_ids": [1, 2, 3, 4]},
        {"t": 0.5, "requests": [{"t": 0.25, "in": 128, "out": 0, "hash_ids": [1, 9]}]}]}
    trace.write_text(json.dumps(agent) + "\n" + json.dumps(agent) + "\n", encoding="utf-8")
    found = read_requests(trace)
    assert [(one.at_s, one.num_tokens, one.num_output_tokens, len(one.blocks), one.session) for one in found] == [
        (0.75, 128, 1, 2, "1"), (0.75, 128, 1, 2, "2"), (1.5, 200, 5, 3, "1"), (1.5, 200, 5, 3, "2")]
    assert found[0].blocks[0] == found[2].blocks[0] != found[1].blocks[0], "ids are a session's own"
    assert len({one.request_id for one in found}) == 4
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no requests"):
        read_requests(tmp_path / "empty.jsonl")


def test_long_prompts_are_marked_as_a_front_would(tmp_path: Path) -> None:
    marks = marks_of(TracedRequest(request_id="1", at_s=0, num_tokens=20_000, num_output_tokens=1, block_size=512,
                                   blocks=[bytes([n]) for n in range(39)]))
    assert marks.num_tokens == [*range(512, 8193, 512), *range(9216, 20_000, 1024)]
    assert marks.digests == [bytes([end // 512 - 1]) for end in marks.num_tokens]
