"""How far a run is, as one peer sees it from what all say: step, loss, rate, what is left, who is there.

It watches `Members` over time and decides nothing. What a peer says of itself (rates, bytes) is shown as it says it.

Ring: pure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from mycel.protocols.training import Reduced
from mycel.swarm.placement import show_bytes
from mycel.swarm.training.members import MAX_MEMBERS, Member, Members
from mycel.swarm.training.plan import RunPlan

__all__ = [
    "Changes",
    "Progress",
    "ProgressTracker",
    "StageProgress",
    "grad_norm",
    "mean_loss",
    "progress_line",
    "show_duration",
    "stage_rows",
]

# Rates are those of so many last steps.
_WINDOW_STEPS = 20
# Whose sent bytes are remembered: those who are there, and some that have gone and may come back.
_MAX_SENDERS = 4 * MAX_MEMBERS
_MAX_CHANGES = 1024


@dataclass(frozen=True, slots=True)
class StageProgress:
    """One stage: its peers by state, how long new work waits there (mean), what they compute together.

    `version` is that of the slowest who trains, or else of the furthest who is there.
    """

    training: int = 0
    observing: int = 0
    joining: int = 0
    leaving: int = 0
    queue_s: float = 0.0
    sequences_per_s: float = 0.0
    version: int = 0

    @property
    def peers(self) -> int:
        """Who computes."""
        return self.training + self.leaving

    @property
    def state(self) -> str:
        """ "training", "2 training, 1 joining", or "nobody"."""
        named = [(n, name) for name in ("training", "observing", "joining", "leaving") if (n := getattr(self, name))]
        if not named:
            return "nobody"
        return named[0][1] if len(named) == 1 else ", ".join(f"{n} {name}" for n, name in named)


@dataclass(frozen=True, slots=True)
class Progress:
    """A run at one moment. `tokens` and `loss` (per target token) are of the last step that is done.

    `tokens_per_s` and `step_bytes` (sent by all peers) are means over the last steps, None before there are two;
    `seconds` is what the last step took, `commits` how many steps have been watched, `sent_bytes` all ever sent.
    """

    step: int
    n_steps: int
    tokens: int
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    seconds: float | None
    stages: tuple[StageProgress, ...]
    sent_bytes: int
    step_bytes: float | None
    commits: int

    @property
    def is_done(self) -> bool:
        return self.step >= self.n_steps


@dataclass(frozen=True, slots=True)
class Changes:
    """Who began to train, and who fell silent without having said that it leaves."""

    joined: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Mark:
    step: int
    at_s: float
    sent_bytes: int


@dataclass(eq=False, slots=True)
class ProgressTracker:
    """Shown the table after every step, and as often as one likes between."""

    plan: RunPlan
    _step: int | None = None
    _commits: int = 0
    _seconds: float | None = None
    _loss: float | None = None
    _marks: deque[_Mark] = field(default_factory=lambda: deque(maxlen=_WINDOW_STEPS + 1))
    _states: dict[str, str] = field(default_factory=dict)
    _joined: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_CHANGES))
    _lost: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_CHANGES))
    # Of each peer the counter that it said last. `_before` is what it had sent before we first heard of it.
    _said_bytes: dict[str, int] = field(default_factory=dict)
    _sent_bytes: int = 0
    _before_bytes: int = 0

    def begin(self, step: int) -> None:
        """The run is known to have made `step` steps when the watch begins; nothing, if it has begun."""
        if self._step is None:
            self._step = step

    def observe(self, members: Members, now: float) -> Progress:
        """The run at `now`."""
        everyone = tuple(members)
        self._count_bytes(everyone)
        self._note_changes(everyone)
        self._note_step(max((m.version for m in everyone if m.status.state != "joining"), default=0), now)
        assert self._step is not None
        loss = mean_loss(members, self.plan, self._step - 1)
        self._loss = self._loss if loss is None else loss
        tokens_per_s, step_bytes = self._rates()
        left = max(0, self.plan.n_steps - self._step) * self.plan.step_tokens
        return Progress(
            step=self._step,
            n_steps=self.plan.n_steps,
            tokens=self._step * self.plan.step_tokens,
            loss=self._loss,
            tokens_per_s=tokens_per_s,
            eta_s=left / tokens_per_s if tokens_per_s else None,
            seconds=self._seconds,
            stages=tuple(_stage(everyone, stage) for stage in range(self.plan.n_stages)),
            sent_bytes=self._sent_bytes + self._before_bytes,
            step_bytes=step_bytes,
            commits=self._commits,
        )

    def take_changes(self) -> Changes:
        """Who came and went since this was last asked, once the first step was seen."""
        changes = Changes(tuple(self._joined), tuple(self._lost))
        self._joined.clear()
        self._lost.clear()
        return changes

    def _note_step(self, step: int, now: float) -> None:
        if self._step is None or step < self._step:  # the beginning, or everybody went back to a checkpoint
            self._marks.clear()
            self._seconds = None
        elif step > self._step:
            before = self._marks[-1] if self._marks else None
            self._seconds = (now - before.at_s) / (step - before.step) if before else None
            self._commits += step - self._step
            self._marks.append(_Mark(step, now, self._sent_bytes))
        self._step = step

    def _rates(self) -> tuple[float | None, float | None]:
        """Tokens per second and bytes per step over the window."""
        if len(self._marks) < 2:
            return None, None
        first, last = self._marks[0], self._marks[-1]
        steps, seconds = last.step - first.step, last.at_s - first.at_s
        rate = steps * self.plan.step_tokens / seconds if seconds > 0 else None
        return rate, (last.sent_bytes - first.sent_bytes) / steps

    def _count_bytes(self, everyone: Iterable[Member]) -> None:
        for member in everyone:
            said, before = member.status.sent_bytes, self._said_bytes.pop(member.peer, None)
            if before is None:
                self._before_bytes += said
            else:  # a process that was started again counts from 0
                self._sent_bytes += said - before if said >= before else said
            self._said_bytes[member.peer] = said
        while len(self._said_bytes) > _MAX_SENDERS:
            del self._said_bytes[next(iter(self._said_bytes))]

    def _note_changes(self, everyone: Iterable[Member]) -> None:
        states: dict[str, str] = {member.peer: member.status.state for member in everyone}
        if self._commits:
            self._lost += [p for p, s in self._states.items() if p not in states and s == "training"]
            self._joined += [p for p, s in states.items() if s == "training" and self._states.get(p) != "training"]
        self._states = states


def _stage(everyone: Iterable[Member], stage: int) -> StageProgress:
    here = [member for member in everyone if member.stage == stage]
    states: list[str] = [member.status.state for member in here]
    computing = [member for member in here if member.status.state in ("training", "leaving")]
    return StageProgress(
        training=states.count("training"),
        observing=states.count("observing"),
        joining=states.count("joining"),
        leaving=states.count("leaving"),
        queue_s=sum(member.status.queue_s for member in computing) / max(1, len(computing)),
        sequences_per_s=sum(member.status.sequences_per_s for member in computing),
        version=min((m.version for m in computing), default=max((m.version for m in here), default=0)),
    )


def _reduced(members: Members, stage: int, version: int) -> Reduced | None:
    """Of the member with the smallest id that has it: the one whose numbers the step goes by."""
    for member in members:
        if member.stage == stage:
            for reduced in member.status.reduced:
                if reduced.version == version:
                    return reduced
    return None


def mean_loss(members: Members, plan: RunPlan, version: int) -> float | None:
    """The loss per target token of step `version`, as the last stage says; None if nobody there does (any more)."""
    reduced = _reduced(members, plan.n_stages - 1, version)
    return None if reduced is None else reduced.loss / plan.step_tokens


def grad_norm(members: Members, plan: RunPlan, version: int) -> float | None:
    """The norm of the whole model's gradient at step `version`, None if a stage's part is not known (any more)."""
    parts = [part for stage in range(plan.n_stages) if (part := _reduced(members, stage, version)) is not None]
    return math.sqrt(sum(part.sum_sq for part in parts)) if len(parts) == plan.n_stages else None


def progress_line(progress: Progress) -> str:
    """step 120/600  983,040 tokens  loss 4.812  9,310 tokens/s  ETA 6m 12s  peers 2+2+2  1.9 MB/step"""
    parts = [f"step {progress.step}/{progress.n_steps}", f"{progress.tokens:,} tokens"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_s is not None:
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.eta_s is not None and not progress.is_done:
        parts.append(f"ETA {show_duration(progress.eta_s)}")
    parts.append("peers " + "+".join(str(stage.peers) for stage in progress.stages))
    if progress.step_bytes is not None:
        parts.append(f"{show_bytes(round(progress.step_bytes))}/step")
    return "  ".join(parts)


def stage_rows(progress: Progress) -> list[tuple[str, ...]]:
    """A table of the stages, its head first."""
    rows: list[tuple[str, ...]] = [("stage", "peers", "state", "queue", "rate", "version")]
    for number, stage in enumerate(progress.stages):
        queue, rate = f"{stage.queue_s * 1e3:.0f} ms", f"{stage.sequences_per_s:.1f} sequences/s"
        rows.append((str(number), str(stage.peers), stage.state, queue, rate, str(stage.version)))
    return rows


def show_duration(seconds: float) -> str:
    """ "48s", "6m 12s", "3h 05m", "2d 04h"."""
    total = max(0, round(min(seconds, 1e9)))
    for unit, size, lesser, part in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if total >= size:
            return f"{total // size}{unit} {total % size // part:02}{lesser}"
    return f"{total}s"
