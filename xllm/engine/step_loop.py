"""`StepLoop`: schedules a step, submits it, and takes in the results of the oldest one."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from xllm import env
from xllm.cost.observations import work_of
from xllm.engine.step_log import StepTiming
from xllm.errors import IntegrityError
from xllm.kv import failpoints
from xllm.request import OutputDelta
from xllm.scheduler.scheduler import Scheduler
from xllm.step import ScheduleOutput, StepOutput

# For moves between the KV tiers, before the loop looks for new commands again. Chosen: a command waits that long at
# most.
MAX_IDLE_WAIT_S = 0.05


class Steps(Protocol):
    """Computes plans: `worker/link.py: WorkerLink`, or a simulation of one.

    Steps are computed one after the other in the order of `submit`; `result` returns them in that order. depth: how
    many steps may be in flight while the next one is scheduled.
    """

    depth: int

    def submit(self, plan: ScheduleOutput) -> None: ...

    def result(self) -> StepOutput:
        """Wait for the results of the oldest step. Raises what it failed with."""
        ...


class StepLoop:
    """With a depth of 1, step n + 1 is scheduled while n runs."""

    def __init__(self, scheduler: Scheduler, steps: Steps):
        self.scheduler = scheduler
        self.steps = steps
        self.num_steps = 0
        self.last_step_s = time.monotonic()
        self.step_time_s = 0.0
        self.finished: StepTiming | None = None  # until somebody takes it
        self._began_s = self.last_step_s  # when a step was last submitted to an idle device
        self.frozen = False  # requests stay as they are; only what is in flight is finished
        self._in_flight: deque[ScheduleOutput] = deque()
        self._check_integrity = env.check_integrity()

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return bool(self._in_flight) or (self.scheduler.has_ready if self.frozen else self.scheduler.has_requests)

    def step(self) -> list[OutputDelta]:
        """One turn: schedule, submit, take in. Returns the outputs that changed; none on the turn that only fills the
        pipeline."""
        if failpoints.armed is not None:
            failpoints.hit("engine.step")
        if self.frozen:
            return self._settle_oldest() if self._in_flight else self.scheduler.take_ready()
        plan = self.scheduler.schedule()
        if plan.num_rows:
            if not self._in_flight:
                self._began_s = time.monotonic()
            self.steps.submit(plan)
            self._in_flight.append(plan)
            if len(self._in_flight) <= self.steps.depth:
                return self.scheduler.take_ready()
        return self._settle_oldest() if self._in_flight else self._nothing_to_run()

    def _settle_oldest(self) -> list[OutputDelta]:
        oldest = self._in_flight.popleft()
        context_S = self.scheduler.rows.computed[oldest.rows_S]
        result = self.steps.result()
        outputs = self.scheduler.update(oldest, result)
        self._count_step()
        if failpoints.armed is not None:
            failpoints.hit("engine.settled")
        work = work_of(oldest.num_tokens_S, context_S, int(result.num_drafts_S.sum()))
        self.scheduler.cost.note_step(work, self.step_time_s)
        num_tokens = int(work.num_prefill_tokens + work.num_decode_rows)
        self.finished = self.last_step_s, self.step_time_s, num_tokens, oldest.num_rows
        return outputs

    def _nothing_to_run(self) -> list[OutputDelta]:
        ready = self.scheduler.take_ready()
        if not ready and self.scheduler.has_requests and not self.scheduler.promotions.wait(MAX_IDLE_WAIT_S):
            raise IntegrityError("requests are open but no step can be planned and none is in flight")
        return ready

    def _count_step(self) -> None:
        now = time.monotonic()
        # The device was idle before `_began_s`: that is no part of the step.
        self.step_time_s, self.last_step_s = now - max(self.last_step_s, self._began_s), now
        self.num_steps += 1
        if self._check_integrity:
            self.scheduler.check_integrity()
