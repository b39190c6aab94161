"""The messages between the two processes come back as they were sent."""

from __future__ import annotations

import copy
import dataclasses
import math

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm.client.command_codec import COMMANDS, REPORTS, config_from_json, config_to_json
from xllm.client.reports import Fatal, Heartbeat, Ready, StartPhase
from xllm.config import EngineConfig
from xllm.engine.commands import (
    Abort,
    Control,
    Controlled,
    Depart,
    EngineState,
    Expect,
    Expected,
    Outputs,
    Refused,
    Shutdown,
    Submit,
    Unexpect,
)
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.kv_layout import FieldLayout, KVLayout, LayerRun
from xllm.kv_offer import KVOffer, RankWindow
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams, TokenLogprobs
from xllm.stats import EngineStats
from xllm.token_ids import token_array
from xllm.worker.messages import Placement

LOGPROBS = st.builds(TokenLogprobs, st.integers(0, 2**31), st.floats(-1e4, 0), st.integers(1, 10**6),
                     st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
                     st.lists(st.floats(-100, 0), max_size=3).map(tuple))


@st.composite
def deltas(draw: st.DrawFn) -> OutputDelta:
    delta = OutputDelta(draw(st.text()), draw(st.lists(st.integers(0, 2**31), max_size=5)), draw(st.integers(0, 10**6)))
    delta.finish_reason = draw(st.none() | st.sampled_from(FinishReason))
    if delta.finish_reason is not None:
        delta.stop_reason = draw(st.none() | st.integers(0, 10**6) | st.text())
        delta.error = draw(st.none() | st.text())
    delta.logprobs = draw(st.none() | st.lists(LOGPROBS, max_size=3))
    delta.prompt_logprobs = draw(st.none() | st.lists(st.none() | LOGPROBS, max_size=3))
    delta.num_preemptions = draw(st.integers(0, 9))
    tiers = st.sampled_from(["l1", "l2", "l3", "l4", "l5"])
    delta.cached_by_tier = draw(st.none() | st.dictionaries(tiers, st.integers(0, 10**6)))
    delta.embedding = draw(st.none() | st.lists(st.floats(allow_nan=False, width=32), max_size=3))
    return delta


FULL = OutputDelta("a", [1], 2, FinishReason.STOP, "s", [TokenLogprobs(1, -1.0, 1)], [None], 3, "e", {"l1": 4}, [0.5])


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(deltas(), max_size=4))
def test_deltas(sent: list[OutputDelta]) -> None:
    received = REPORTS.decode(REPORTS.encode(Outputs(sent)))
    assert received == Outputs(sent)


def test_every_field_of_a_delta_is_carried() -> None:
    received = REPORTS.decode(REPORTS.encode(Outputs([FULL])))
    assert isinstance(received, Outputs)
    assert received.deltas == [FULL]
    plain = OutputDelta("", [])
    assert not [field.name for field in dataclasses.fields(plain)
                if getattr(plain, field.name) == getattr(received.deltas[0], field.name)]


@pytest.mark.parametrize("sampling", [
    SamplingParams(),
    SamplingParams(temperature=0.25, top_p=0.5, top_k=7, seed=2**63, stop=["a", "ü"], stop_token_ids=[1, 2],
                   bad_words=["x"], bad_words_token_ids=[[1, 2], [3]], logit_bias={5: -1.5}, allowed_token_ids=[4],
                   logprobs=3, prompt_logprobs=0, max_tokens=None, min_tokens=3, ignore_eos=True),
], ids=["defaults", "everything"])
def test_requests(sampling: SamplingParams) -> None:
    request = Request(request_id="r", prompt_token_ids=token_array([1, 2, 3]), sampling=sampling,
                      eos_token_ids=(7,), arrival_s=1.5, priority=-3, offline=True, deadline_s=math.pi, cache_salt="s",
                      session_id="c", generated_token_ids=(4, 5, 2**31 - 1))
    received = COMMANDS.decode(COMMANDS.encode(Submit([request])))
    assert received == Submit([request])


def test_what_requests_share_is_one_object_again_and_written_once() -> None:
    """A thousand sequences with large parameters and one prompt weigh hardly more than one."""
    params = SamplingParams(stop=["x" * 4000], allowed_token_ids=range(3000), logit_bias=dict.fromkeys(range(500), 1.0))
    prompt = token_array(range(500))
    sent = [Request(request_id=str(i), prompt_token_ids=prompt, sampling=params.varied(seed=i)) for i in range(1000)]
    frame = COMMANDS.encode(Submit(sent))
    assert len(frame) < len(COMMANDS.encode(Submit(sent[:1]))) + 1000 * 400
    received = COMMANDS.decode(frame)
    assert received == Submit(sent)
    assert isinstance(received, Submit)
    first, *others = received.requests
    for other in others:
        assert other.prompt_token_ids is first.prompt_token_ids
        assert other.sampling.shares_collections(first.sampling)


def test_a_set_of_requests_that_refers_to_nothing_is_refused() -> None:
    frame = COMMANDS.encode(Submit([Request(request_id="r", prompt_token_ids=[1])] * 2))
    prompts, none = b"\x91\xc4\x04\x01\x00\x00\x00", b"\x90"
    assert prompts in frame
    with pytest.raises(msgspec.DecodeError, match="no set of requests"):
        COMMANDS.decode(frame.replace(prompts, none))


def test_config_and_stats() -> None:
    config = EngineConfig.from_flat(model="m", max_num_seqs=3, speculative_method="ngram", strict_ops=True)
    assert config_from_json(config_to_json(config)) == config
    beat = Heartbeat(0.5, EngineStats(num_running=3, requests_finished_total={"stop": 2}))
    assert REPORTS.decode(REPORTS.encode(beat)) == beat


FACTS = EngineFacts(config=EngineConfig(), model_path="/m", vocab_size=9, hidden_size=4, eos_token_ids=(1, 2),
                    num_blocks=3, adapters=("x",),
                    placement=Placement(device="cuda", num_threads=2, kv_bytes=2**40))
FIELD = FieldLayout(offset=0, head_stride=4, position_stride=8, number_stride=4, width=1, item_bytes=4, num_heads=2,
                    first_head=2, total_heads=4)
LAYOUT = KVLayout(format="fp32.1", block_size=16, rank=1, num_ranks=2,
                  runs=(LayerRun(num_layers=3, layer_bytes=128, fields=(FIELD,)),))
OFFER = KVOffer(number=2**62, key=bytes(range(16)), first_block=3, slots=(2**31 - 1, 0), lease_s=0.5,
                windows=(RankWindow(addresses=("shm://a", "tcp://b"), block_bytes=2**40, layout=LAYOUT),))
WANTED = Request(request_id="r", prompt_token_ids=token_array([1, 2, 3]), generated_token_ids=(4,), landing=5,
                 offer=OFFER, sampling=SamplingParams(seed=7, stop=["x"]))
COMMAND_KINDS = [Abort(["a", "b"]), Control(3, "load_adapter", "abort", 2, "name", "folder"), Shutdown(),
                 Submit([WANTED]), Expect(4, WANTED, 0.5), Unexpect(2**62), Depart("a", OFFER)]
REPORT_KINDS = [
    Refused("a", "no", "prompt"), Controlled(3, EngineState("keep", 1, 2, ("x",)), 5, "no", "level", True),
    Outputs([FULL], [("a", 1.5)], ["a"], ["a"]), StartPhase("weights", 0.5), Ready(FACTS), Fatal("why", True),
    Heartbeat(None, EngineStats(), StepReport(recent=[(1.0, 0.5, 8, 2)])),
    Expected(4, OFFER, 2**62), Expected(5, reason="no"),
]


@pytest.mark.parametrize("message", [*COMMAND_KINDS, *REPORT_KINDS], ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_itself(message: object) -> None:
    codec, other = (COMMANDS, REPORTS) if message in COMMAND_KINDS else (REPORTS, COMMANDS)
    received = codec.decode(codec.encode(message))
    assert type(received) is type(message) and received == message
    with pytest.raises(msgspec.DecodeError):
        other.decode(codec.encode(message))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([*COMMAND_KINDS, *REPORT_KINDS]), st.data())
def test_a_damaged_message_is_another_one_or_refused(message: object, data: st.DataObject) -> None:
    """Nothing but a DecodeError comes of it, and what is read can be written."""
    codec = COMMANDS if message in COMMAND_KINDS else REPORTS
    frame = bytearray(codec.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)) | st.just(len(frame)))
    try:
        received = codec.decode(bytes(frame[:cut]))
    except msgspec.DecodeError:
        return
    codec.encode(received)


@pytest.mark.parametrize("offer", [{"windows": ()}, {"number": -1}, {"first_block": -1}, {"slots": (-1,)},
                                   {"key": b""}], ids=str)
def test_an_offer_that_no_receiver_makes_is_refused(offer: dict[str, object]) -> None:
    forged = copy.copy(OFFER)
    for name, value in offer.items():
        object.__setattr__(forged, name, value)
    with pytest.raises(msgspec.DecodeError, match="offer"):
        COMMANDS.decode(COMMANDS.encode(Depart("a", forged)))
    with pytest.raises(msgspec.DecodeError, match="offer"):
        REPORTS.decode(REPORTS.encode(Expected(1, forged)))


@pytest.mark.parametrize("frame", [b"", b"\x00", b"\x80\x04\x95junk", b"\x40junk", b"\x42"])
def test_anything_else_is_refused(frame: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
        REPORTS.decode(frame)
