"""A simulation that hangs is ended and says where: in virtual time a hang would otherwise be an endless busy loop.

Three kinds: tasks wait for something that never comes (the scenario's own time limit sees to that), tasks go round in
circles without waiting, so that time never moves, and a task waits shielded, so that no cancellation reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

MAX_STEPS_AT_ONE_MOMENT = 300_000
_PATIENCE_S = 60.0  # for bounded clean-up after the limit


class StandstillGuard(trio.abc.Instrument):
    """Watches one run. `finding` says what was wrong, or is empty."""

    def __init__(self, limit_s: float) -> None:
        self.scope: trio.CancelScope | None = None
        self.finding = ""
        self._limit_s = limit_s
        self._moment_s, self._n_steps = -1.0, 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Cancel `scope` when the steps at one moment are too many."""
        moment_s = trio.current_time()
        if moment_s != self._moment_s:
            self._moment_s, self._n_steps = moment_s, 0
        self._n_steps += 1
        if self._n_steps > MAX_STEPS_AT_ONE_MOMENT and self.scope is not None and not self.finding:
            self.finding = (
                f"{self._n_steps} steps and time stands still at {moment_s:.3f} s, the last in {_place(task)}"
            )
            self.scope.cancel()

    async def break_shields(self) -> None:
        """A system task: some time after the limit, take the shields of whatever still waits behind one."""
        await trio.sleep_until(self._limit_s + _PATIENCE_S)
        shielded = []
        for task in _descendants(trio.lowlevel.current_root_task()):
            status = task._cancel_status
            while status is not None:
                if status._scope.shield:
                    shielded.append(_place(task))
                    status._scope.shield = False
                status = status.parent
        self.finding = f"still waiting behind a shield after {self._limit_s:.0f} s: {', '.join(sorted(set(shielded)))}"


def _place(task: trio.lowlevel.Task) -> str:
    """Where a waiting task stands: its innermost frames outside of trio."""
    names: list[str] = []
    awaited: object = task.coro
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        if "/trio/" not in frame.f_code.co_filename:
            names.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None)
    return " > ".join(names[-4:]) or task.name


def _descendants(task: trio.lowlevel.Task | None) -> Iterator[trio.lowlevel.Task]:
    for nursery in task.child_nurseries if task is not None else ():
        for child in nursery.child_tasks:
            yield child
            yield from _descendants(child)
