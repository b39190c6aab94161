"""Block lifetime against the slow model: a hypothesis state machine, and every short history of a tiny pool."""

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.kv.driver import Driver

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
    def lease(self, choice):
        self.driver.lease(self.pick(choice))

    @rule()
    def end_leases(self):
        self.driver.end_leases()

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
    "lease-0": lambda d: 0 in d.tokens and d.lease(0),
    "end-leases": lambda d: d.end_leases(),
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
    assert hits or first.startswith(("settle", "end")), "no history ever hit the cache"
