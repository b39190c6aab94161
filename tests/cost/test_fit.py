"""The cost model fitted to a profile: exact on a machine that keeps to its prices, close on one that does not."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from tests.cost.machine import PRICES, steps
from xllm.cost.cost_model import CostModel, FitError, MovePrices, StepPrices
from xllm.cost.fit import fit
from xllm.cost.observations import MeasuredMove, MeasuredStep, Profile, StepWork, decode_work, prefill_work


def moves(kind: str, start: float, rate: float, num: int = 20) -> list[MeasuredMove]:
    return [MeasuredMove(kind, size, start + size / rate) for size in np.linspace(1e4, 1e7, num)]


MODEL = fit(Profile(list(steps(200)), [*moves("load", 1e-4, 1e9), *moves("save", 2e-4, 5e8),
                                       *moves("transfer", 1e-3, 1e8)]))


def test_a_machine_is_found_exactly() -> None:
    assert MODEL.steps == pytest.approx(PRICES, rel=1e-3)
    assert MODEL.steps_error.p90 < 1e-5 and MODEL.steps_error.num == 200
    assert MODEL.moves["load"] == pytest.approx(MovePrices(1e-4, 1e-9), rel=1e-4)
    assert MODEL.transfer_s(5e6) == pytest.approx(1e-3 + 0.05, rel=1e-4)
    assert MODEL.load_s(5e6) == pytest.approx(1e-4 + 5e-3, rel=1e-4)
    assert MODEL.swap_s(5e6) == pytest.approx(3e-4 + 15e-3, rel=1e-4)
    assert MODEL.moves_error["save"].p90 < 1e-5


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_noise_and_outliers_are_borne(outliers: float) -> None:
    model = fit(Profile(list(steps(400, noise=0.1, outliers=outliers))))
    assert model.steps == pytest.approx(PRICES, rel=0.15)
    assert 0.03 < model.steps_error.median < 0.08, "the noise is uniform up to 0.1"
    assert (model.steps_error.p90 > 0.5) == bool(outliers), "who was not predicted is told"


def test_every_kind_is_predicted_of_sizes_that_were_not_seen() -> None:
    """Fitted to noisy observations of some sizes, compared with what others take: between them and beyond."""
    dice = random.Random(3)
    seen = [MeasuredMove(kind, size, (start + size / rate) * dice.uniform(0.95, 1.05))
            for kind, start, rate in (("load", 1e-4, 1e9), ("save", 2e-4, 5e8), ("transfer", 1e-3, 1e8))
            for size in (1e4, 1e5, 1e6, 1e7) for _ in range(10)]
    model = fit(Profile(list(steps(400, noise=0.05)), seen))
    for size in (3e4, 5e5, 4e6, 3e7):
        assert model.load_s(size) == pytest.approx(1e-4 + size / 1e9, rel=0.05)
        assert model.swap_s(size) == pytest.approx(3e-4 + size / 1e9 + size / 5e8, rel=0.05)
        assert model.transfer_s(size) == pytest.approx(1e-3 + size / 1e8, rel=0.05)
    for num, cached in ((50, 0), (1200, 0), (3000, 2000), (6000, 1000)):
        assert model.prefill_s(num, cached) == pytest.approx(PRICES.predict(prefill_work(num, cached)), rel=0.08)
    for contexts in ([50], [1000] * 12, [4000] * 100):
        found = model.decode_s(contexts, num_drafts=2)
        assert found == pytest.approx(PRICES.predict(decode_work(contexts, 2)), rel=0.08)


def test_a_prompt_in_chunks_reads_as_much_and_takes_more_steps() -> None:
    whole, chunks = MODEL.prefill_s(4096, 1024), MODEL.prefill_s(4096, 1024, max_chunk=512)
    assert chunks == pytest.approx(whole + 5 * PRICES.step, rel=1e-3)
    by_hand = sum(PRICES.predict(prefill_work(done + 512, done)) for done in range(1024, 4096, 512))
    assert chunks == pytest.approx(by_hand, rel=1e-3)
    assert MODEL.decode_s([100, 200]) == pytest.approx(PRICES.predict(decode_work([100, 200])), rel=1e-3)


def test_more_work_never_takes_less() -> None:
    """Whatever was measured: even steps whose times mean nothing."""
    dice = random.Random(7)
    for _ in range(40):
        works = [StepWork(*(dice.choice([0, 1, 30, 4000]) for _ in StepWork._fields)) for _ in range(30)]
        prices = fit(Profile([MeasuredStep(work, dice.uniform(1e-4, 1.0)) for work in works])).steps
        assert prices is not None and min(prices) >= 0.0 and prices.predict(works[0]) >= 0.0
        for place in range(len(works[0])):
            more = [*works[0]]
            more[place] += dice.randint(1, 1000)
            assert prices.predict(StepWork(*more)) >= prices.predict(works[0])


def test_what_was_not_observed_is_not_predicted() -> None:
    model = fit(Profile(list(steps(7)), moves("load", 0.0, 1e9, 1)))
    with pytest.raises(LookupError, match="steps"):
        model.prefill_s(10)
    with pytest.raises(LookupError, match="load"):
        model.load_s(10)
    assert model == fit(Profile()) == CostModel()


def test_it_goes_through_json() -> None:
    for model in (MODEL, CostModel(), CostModel(steps=StepPrices(1, 2), steps_error=FitError(0.1, 0.2, 3))):
        assert CostModel.from_json(json.loads(json.dumps(model.to_json(), allow_nan=False))) == model


@pytest.mark.parametrize(("path", "value", "said"), [
    (("version",), 2, "version"), (("steps", "token"), -1.0, r"steps\.token"),
    (("steps", "token"), "1", r"steps\.token"),
    (("steps", "token"), float("nan"), r"steps\.token"), (("steps",), {"step": 1.0}, "steps must have"),
    (("moves",), [], "moves"), (("moves", "load", "error", "num"), True, r"moves\.load\.error\.num"),
    (("more",), 1, "model must have"), (("moves", "load"), None, r"moves\.load"),
])
def test_what_is_wrong_in_json_is_named(path: tuple[str, ...], value: object, said: str) -> None:
    data = json.loads(json.dumps(MODEL.to_json()))
    place = data
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=said):
        CostModel.from_json(data)
