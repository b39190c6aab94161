"""Block lifetime against the slow model: a hypothesis state machine, and every short history of a tiny pool."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.kv.driver import LEASE_S, Driver

TOKENS = st.integers(0, 1)


class BlockLifetime(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.driver = Driver(num_blocks=10, block_size=2, num_rows=4)

    def pick(self, choice: int) -> int:
        rows = sorted(self.driver.tokens)
        return rows[choice % len(rows)]

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=9))
    def admit(self, tokens):
        self.driver.admit(tuple(tokens))

    @precondition(lambda self: self.driver.tokens)
    @rule(choice=st.integers(0, 3))
    def run(self, choice):
        self.driver.run(self.pick(choice))

    @precondition(lambda self: self.driver.tokens)
    @rule(choice=st.integers(0, 3), token=TOKENS)
    def extend(self, choice, token):
        self.driver.extend(self.pick(choice), token)

    @rule()
    def settle(self):
        self.driver.settle()

    @precondition(lambda self: self.driver.tokens)
    @rule(choice=st.integers(0, 3))
    def finish(self, choice):
        self.driver.finish(self.pick(choice))

    @precondition(lambda self: self.driver.tokens)
    @rule(choice=st.integers(0, 3))
    def pin(self, choice):
        self.driver.pin(self.pick(choice))

    @rule()
    def unpin(self):
        self.driver.unpin()

    @precondition(lambda self: self.driver.tokens)
    @rule(choice=st.integers(0, 3), for_s=st.sampled_from([0.5, LEASE_S, 3.0]))
    def lease(self, choice, for_s):
        self.driver.lease(self.pick(choice), for_s)

    @rule()
    def end_lease(self):
        self.driver.end_lease()

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.5]))
    def pass_time(self, seconds):
        self.driver.pass_time(seconds)

    @rule()
    def drop_cached(self):
        self.driver.drop_cached()

    def teardown(self):
        self.driver.finish_all()


TestBlockLifetime = BlockLifetime.TestCase
TestBlockLifetime.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, database=None,
                                      suppress_health_check=list(HealthCheck))

# Every history of these up to DEPTH operations, on a pool of three blocks of one token and two rows.
OPERATIONS = {
    "admit-a": lambda d: d.admit((0,)),
    "admit-ab": lambda d: d.admit((0, 1)),
    "run-0": lambda d: 0 in d.tokens and d.run(0),
    "run-1": lambda d: 1 in d.tokens and d.run(1),
    "extend-0": lambda d: 0 in d.tokens and d.extend(0, 1),
    "finish-0": lambda d: 0 in d.tokens and d.finish(0),
    "finish-1": lambda d: 1 in d.tokens and d.finish(1),
    "settle": lambda d: d.settle(),
    "pin-0": lambda d: 0 in d.tokens and d.pin(0),
    "unpin": lambda d: d.unpin(),
    "lease-0": lambda d: 0 in d.tokens and d.lease(0),
    "end-lease": lambda d: d.end_lease(),
    "pass-time": lambda d: d.pass_time(),
}
DEPTH = 4
LATE = ("admit-ab", "run-0", "finish-0", "settle")  # what the histories end with


@pytest.mark.parametrize("first", OPERATIONS)
def test_every_short_history(first):
    hits = 0
    for rest in itertools.product(OPERATIONS, repeat=DEPTH - 1):
        driver = Driver(num_blocks=3, block_size=1, num_rows=2)
        if not OPERATIONS[first](driver):
            return  # impossible at the start
        if all(OPERATIONS[name](driver) for name in rest):
            for name in LATE * 2:
                OPERATIONS[name](driver)
            hits += driver.num_hits
            driver.finish_all()
    assert hits or first.startswith(("settle", "end", "pass")), "no history ever hit the cache"


def compute(driver: Driver, tokens: tuple[int, ...]) -> np.ndarray:
    """Compute these tokens in row 0, which stays; returns its blocks, which are cached."""
    driver.admit(tokens)
    driver.run(0)
    driver.settle()
    return driver.kv.blocks_of(0)


def test_a_lease_that_has_expired_gives_its_blocks_back():
    driver = Driver(num_blocks=3, block_size=1, num_rows=2)
    compute(driver, (0, 1))
    driver.lease(0)
    driver.finish(0)
    assert driver.kv.num_free_blocks == 1 and driver.kv.num_pending_blocks == 2
    driver.pass_time(LEASE_S / 2)
    assert driver.kv.num_free_blocks == 1
    driver.pass_time(LEASE_S / 2)
    assert driver.kv.num_free_blocks == 3
    driver.admit((1, 0, 1))
    driver.end_lease()  # late: it must not end what is somebody else's by now
    driver.finish_all()


def test_a_lease_that_expires_while_a_copy_is_in_flight_does_not_give_its_blocks_to_others():
    driver = Driver(num_blocks=3, block_size=1, num_rows=2)
    blocks = compute(driver, (0, 1))
    driver.lease(0)
    driver.pin(0)
    driver.finish(0)
    driver.pass_time(10 * LEASE_S)
    assert driver.kv.num_free_blocks == 1 and driver.kv.pool.expire_leases(1e9) == 0
    driver.drop_cached()
    assert not driver.admit((1, 0, 1)), "the copy still reads them"
    driver.unpin()
    assert driver.admit((1, 0, 1)) and set(blocks.tolist()) < set(driver.kv.blocks_of(0).tolist())
    driver.finish_all()


def test_two_leases_of_one_block_end_one_by_one():
    driver = Driver(num_blocks=3, block_size=1, num_rows=2)
    compute(driver, (0, 1))
    driver.lease(0, 1.0)
    driver.lease(0, 3.0)
    driver.finish(0)
    driver.pass_time(2.0)
    assert driver.kv.num_free_blocks == 1, "the second one is alive"
    driver.end_lease()  # the first, which has expired
    assert driver.kv.num_free_blocks == 1
    driver.end_lease()
    assert driver.kv.num_free_blocks == 3
    driver.finish_all()
