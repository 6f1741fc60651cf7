"""The conformance suite of the `Compute` port.

How a processor plugs in: give a `Rig` and run every check of `CHECKS` with it, each on a fresh one.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Protocol

import pytest
import trio

from mycel.protocols.ports import Compute


class Blocking(Protocol):
    """A job that occupies the processor until it is released."""

    cost_s: float

    def __call__(self) -> str:
        """The job itself; returns "released"."""
        ...

    async def started(self) -> None:
        """Wait until the processor has begun with it."""
        ...

    async def release(self) -> None:
        """Let it end; when this returns, nothing holds it any more."""
        ...


class Rig(Protocol):
    @property
    def compute(self) -> Compute: ...

    def blocking(self) -> Blocking: ...


Check = Callable[[Rig], Awaitable[None]]


async def _settle() -> None:
    """Let every task that can run now do so; what is asserted after it must not depend on any wait."""
    for _ in range(20):
        await trio.lowlevel.checkpoint()


async def values_and_times_come_back(rig: Rig) -> None:
    done = await rig.compute.run(lambda: 6 * 7, cost_s=0.01)
    assert done.value == 42
    assert done.queue_s >= 0
    assert done.compute_s > 0


async def an_exception_is_the_callers(rig: Rig) -> None:
    def fail() -> None:
        raise KeyError("on purpose")

    for _ in range(3):
        with pytest.raises(KeyError, match="on purpose"):
            await rig.compute.run(fail)
        assert (await rig.compute.run(lambda: "still well")).value == "still well"


async def jobs_run_one_at_a_time_in_order_of_arrival(rig: Rig) -> None:
    order: list[int] = []
    running = 0

    def job(index: int) -> None:
        nonlocal running
        running += 1
        assert running == 1
        order.append(index)
        sum(range(5000))  # long enough for a second thread to show itself
        running -= 1

    async def call(index: int) -> None:
        await rig.compute.run(lambda: job(index), cost_s=0.001)

    first = rig.blocking()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.compute.run(first, cost_s=first.cost_s))
        await first.started()
        for index in range(50):
            nursery.start_soon(call, index)
            await _settle()
        assert order == []
        await first.release()
    assert order == list(range(50))


async def the_event_loop_goes_on(rig: Rig) -> None:
    blocking = rig.blocking()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.compute.run(blocking, cost_s=blocking.cost_s))
        await blocking.started()
        await _settle()  # would hang, were the job on the event loop
        await blocking.release()


async def waiting_is_told_from_running(rig: Rig) -> None:
    times: list[float] = []

    async def wait_in_line() -> None:
        times.append((await rig.compute.run(lambda: None, cost_s=0.001)).queue_s)

    blocking = rig.blocking()
    async with trio.open_nursery() as nursery:

        async def occupy() -> None:
            times.append((await rig.compute.run(blocking, cost_s=blocking.cost_s)).compute_s)

        nursery.start_soon(occupy)
        await blocking.started()
        nursery.start_soon(wait_in_line)
        await _settle()
        await blocking.release()
    compute_s, queue_s = times
    assert 0 < queue_s <= compute_s, "it came after the first had started, and waited for its end"


async def a_caller_cancelled_in_the_line_leaves_at_once(rig: Rig) -> None:
    ran: list[str] = []
    left = trio.Event()

    async def call() -> None:
        try:
            await rig.compute.run(lambda: ran.append("cancelled"), cost_s=0.001)
        finally:
            left.set()

    blocking = rig.blocking()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.compute.run(blocking, cost_s=blocking.cost_s))
        await blocking.started()
        async with trio.open_nursery() as impatient:
            impatient.start_soon(call)
            await _settle()
            impatient.cancel_scope.cancel()
        assert left.is_set()
        nursery.start_soon(lambda: rig.compute.run(lambda: ran.append("patient"), cost_s=0.001))
        await _settle()
        assert ran == []
        await blocking.release()
    assert ran == ["patient"]


async def a_caller_cancelled_too_late_waits_for_the_end(rig: Rig) -> None:
    left: list[str] = []

    async def call() -> None:
        done = await rig.compute.run(blocking, cost_s=blocking.cost_s)
        left.append(done.value)

    blocking = rig.blocking()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await blocking.started()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await _settle()
            assert left == []
            await blocking.release()
    assert left == ["released"], "the job ended, so its caller must hear of it"
    assert (await rig.compute.run(lambda: "next")).value == "next"


async def a_storm_of_cancellations_keeps_the_books(rig: Rig) -> None:
    """Who heard "done" was run, who was run heard "done", each once and in order."""
    rng = random.Random(5)
    ran: list[int] = []
    heard: list[int] = []

    async def call(index: int, patience_s: float) -> None:
        with trio.move_on_after(patience_s):
            await rig.compute.run(lambda: ran.append(index), cost_s=0.001)
            heard.append(index)

    for first in range(0, 300, 50):
        async with trio.open_nursery() as nursery:
            for index in range(first, first + 50):
                nursery.start_soon(call, index, rng.choice((10.0, rng.uniform(0, 0.03))))
    assert sorted(heard) == sorted(ran)
    assert len(set(ran)) == len(ran) > 100
    assert (await rig.compute.run(lambda: "well")).value == "well"


CHECKS: tuple[Check, ...] = (
    values_and_times_come_back,
    an_exception_is_the_callers,
    jobs_run_one_at_a_time_in_order_of_arrival,
    the_event_loop_goes_on,
    waiting_is_told_from_running,
    a_caller_cancelled_in_the_line_leaves_at_once,
    a_caller_cancelled_too_late_waits_for_the_end,
    a_storm_of_cancellations_keeps_the_books,
)
