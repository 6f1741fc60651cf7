"""What a chaotic run has shown: from records of requests and faults to a verdict, and the verdict as a table.

It knows nothing of processes or clocks: all times are seconds since the load began, and the simulator's records give
the same verdict as those of real processes.

Ring: pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from mycel.swarm.chaos import KINDS, Kind
from mycel.swarm.trace import RouteTrace
from mycel.swarm.view import short_id

# A peer that was lost longer ago than this was not lost by that fault.
_MEMORY_S = 90.0


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was carried out."""

    at_s: float
    kind: Kind
    peer: str


@dataclass(frozen=True, slots=True)
class Gone:
    """A hop that another took the place of; `index` is that of the answer's next token, the first of the new chain.

    It was lost, or, if that was `planned`, it left and handed its work over.
    """

    index: int
    peer: str
    reason: str
    planned: bool = False


@dataclass(slots=True)
class Answer:
    """One request as its client saw it, beside what one process alone says to it."""

    client: int
    what: str
    expected: tuple[int, ...]
    began_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    gone: list[Gone] = field(default_factory=list)
    finish: str = ""
    error: str = ""

    def note(self, token: int, trace: RouteTrace, at_s: float) -> tuple[Gone, ...]:
        """Take in a token that came at `at_s`, and what had become of the route by then; the hops gone before it."""
        self.tokens.append(token)
        self.times_s.append(at_s)
        return self.note_route(trace, len(self.tokens) - 1)

    def note_route(self, trace: RouteTrace, index: int) -> tuple[Gone, ...]:
        """Take in the hops that are gone since the last time, before token number `index`."""
        n_moved = sum(gone.planned for gone in self.gone)
        lost = trace.replaced[len(self.gone) - n_moved :]
        moved = trace.moved[n_moved:]
        gone = [Gone(index, one.peer, one.reason) for one in lost]
        gone += [Gone(index, one.peer, one.reason, planned=True) for one in moved]
        self.gone += gone
        return tuple(gone)

    @property
    def difference(self) -> str:
        """Where its tokens are not the expected ones, or ""."""
        pairs = zip(self.tokens, self.expected, strict=False)
        index = next((i for i, (token, right) in enumerate(pairs) if token != right), None)
        if index is not None:
            return f"token {index + 1} of {self.what} is {self.tokens[index]}, not {self.expected[index]}"
        if len(self.tokens) > len(self.expected) or (self.finish and len(self.tokens) < len(self.expected)):
            return f"{self.what} has {len(self.tokens)} tokens, not {len(self.expected)}"
        return ""


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds without a token."""

    count: int
    p50_s: float
    p95_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Pauses | None:
        ordered = sorted(seconds)
        if not ordered:
            return None
        return cls(len(ordered), percentile(ordered, 0.5), percentile(ordered, 0.95), ordered[-1])

    def __str__(self) -> str:
        return f"p50 {self.p50_s:.2f} s, p95 {self.p95_s:.2f} s, max {self.max_s:.2f} s"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ok` if every request finished with the right tokens; else `reason` names the first thing that went wrong.

    broken: something did go wrong, while a run in which nothing finished yet is neither that nor ok.
    pauses: for each kind of fault, from the fault to the next token of each request that lost a hop by it (kill, stop),
    or the longest gap between two tokens of each request that was being handed over (leave).
    """

    ok: bool
    broken: bool
    reason: str
    done: int
    failed: int
    cut_short: int
    tokens: int
    tokens_compared: int
    tokens_different: int
    faults: dict[str, int]
    failovers: dict[str, int]
    unexplained: tuple[str, ...]
    handovers: int
    pauses: dict[str, Pauses | None]
    first_token: Pauses | None
    tokens_per_s: float
    seconds: float


def judge(
    answers: Sequence[Answer], faults: Sequence[Injected], seconds: float, crashes: Sequence[str] = ()
) -> Verdict:
    """The verdict on a run of `seconds`. `crashes`: what ended without being asked to, one sentence each."""
    failed = [answer for answer in answers if answer.error]
    done = [answer for answer in answers if answer.finish and not answer.error]
    wrong = [answer for answer in answers if answer.difference]
    failovers: dict[str, list[float]] = {kind: [] for kind in KINDS}
    n_handovers = 0
    handing_over: list[float] = []
    unexplained = []
    for answer in answers:
        for gone in answer.gone:
            fault = cause(gone, answer, faults)
            if fault is None:
                unexplained.append(f"{short_id(gone.peer)} in {answer.what}: {gone.reason}")
            elif gone.planned:
                n_handovers += 1
                handing_over += _gaps_s(answer, fault.at_s, gone.index)
            elif (pause := pause_s(gone, answer, fault)) is not None:
                failovers[fault.kind].append(pause)
    pauses: dict[str, Pauses | None] = {kind: Pauses.of(failovers[kind]) for kind in KINDS}
    # A planned exit that fell back to a failover is a pause after a leave, too.
    pauses["leave"] = Pauses.of([*failovers["leave"], *handing_over])
    n_tokens = sum(len(answer.tokens) for answer in answers)
    failure = _first_failure(wrong, failed, crashes)
    good = "every request finished with the right tokens" if done else "no request finished"
    return Verdict(
        ok=bool(done) and not failure,
        broken=bool(failure),
        reason=failure or good,
        done=len(done),
        failed=len(failed),
        cut_short=len(answers) - len(done) - len(failed),
        tokens=n_tokens,
        tokens_compared=n_tokens,
        tokens_different=sum(
            token != right for answer in wrong for token, right in zip(answer.tokens, answer.expected, strict=False)
        ),
        faults={kind: sum(fault.kind == kind for fault in faults) for kind in KINDS},
        failovers={kind: len(failovers[kind]) for kind in KINDS},
        unexplained=tuple(unexplained),
        handovers=n_handovers,
        pauses=pauses,
        first_token=Pauses.of(answer.times_s[0] - answer.began_s for answer in answers if answer.times_s),
        tokens_per_s=n_tokens / seconds if seconds > 0 else 0.0,
        seconds=seconds,
    )


def _first_failure(wrong: Sequence[Answer], failed: Sequence[Answer], crashes: Sequence[str]) -> str:
    if wrong:
        return wrong[0].difference
    if failed:
        return f"{failed[0].what} failed: {failed[0].error}"
    return crashes[0] if crashes else ""


def cause(gone: Gone, answer: Answer, faults: Sequence[Injected]) -> Injected | None:
    """The last fault that hit the peer before another was in its place."""
    mended_s = answer.times_s[gone.index] if gone.index < len(answer.times_s) else math.inf
    since_s = answer.began_s - _MEMORY_S
    causes = [fault for fault in faults if fault.peer == gone.peer and since_s < fault.at_s <= mended_s]
    return max(causes, key=lambda fault: fault.at_s, default=None)


def pause_s(gone: Gone, answer: Answer, fault: Injected) -> float | None:
    """From the fault, or the request if that came later, to the token that the mended chain gave; None without one."""
    if gone.index >= len(answer.times_s):
        return None
    return answer.times_s[gone.index] - max(fault.at_s, answer.began_s)


def _gaps_s(answer: Answer, since_s: float, index: int) -> list[float]:
    """The longest time between two tokens, from the first after `since_s` up to number `index`; [] without two."""
    times = answer.times_s[: index + 1]
    return sorted(b - a for a, b in pairwise(times) if b >= since_s)[-1:]


def percentile(ordered: Sequence[float], part: float) -> float:
    """The least value that `part` of all do not exceed (nearest rank).

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


# -------------------------------------------------------------------------------------------------------------- showing


def as_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict for programs."""
    return {key: _rounded(value) for key, value in asdict(verdict).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def verdict_rows(verdict: Verdict) -> list[tuple[str, str]]:
    """The verdict for people: a word and a sentence in each row."""
    v = verdict
    rows = [
        ("verdict", f"{'PASS' if v.ok else 'FAIL'}: {v.reason}"),
        ("requests", f"{v.done} done, {v.failed} failed" + (f", {v.cut_short} cut short" if v.cut_short else "")),
        ("tokens", f"{v.tokens_compared} compared with one process, {v.tokens_different or 'none'} different"),
        ("faults", ", ".join(f"{count} {_WORDS[kind][0]}" for kind, count in v.faults.items() if count) or "none"),
        ("failovers", _failovers(v)),
    ]
    if v.faults["leave"]:
        rows.append(("handovers", f"{v.handovers} planned"))
    rows += [("pause", f"{pauses} {_WORDS[kind][1]} ({pauses.count})") for kind, pauses in v.pauses.items() if pauses]
    if v.first_token:
        rows.append(("first token", str(v.first_token)))
    rows.append(("speed", f"{v.tokens_per_s:.1f} tokens/s over {v.seconds:.0f} s"))
    rows.append(("lost", f"{v.failed} request{'' if v.failed == 1 else 's'}" if v.failed else "no request"))
    return rows


_WORDS = {
    "kill": ("killed", "after a kill"),
    "stop": ("stopped", "after a stop"),
    "leave": ("left", "while a node left"),
}


def _failovers(verdict: Verdict) -> str:
    parts = [f"{count} {_WORDS[kind][1]}" for kind, count in verdict.failovers.items() if count]
    if verdict.unexplained:
        parts.append(f"{len(verdict.unexplained)} without a fault (first: {verdict.unexplained[0]})")
    return ", ".join(parts) or "none"
