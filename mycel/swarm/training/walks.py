"""One microbatch's walk as its trainer sees it: who computes what, how far it is, whom to replace, when it is done.

Peers compute and pass on by themselves; the trainer only hears of it. It begins a walk, and begins it again with a
higher turn when somebody on the way failed, fell silent or went. Who has done its part then answers from what it keeps,
so that only what was lost is computed again.

A walk is done when for each stage a live peer has counted its gradient. It stays known until its step is over: if such
a peer dies before, the walk is due again. The trainer of a number follows from who trains (`RunPlan.owner`), so the
numbers of a trainer that died become due elsewhere.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.messages import PeerAddress
from mycel.protocols.training import Passed, Way, WorkFailed
from mycel.swarm.training.members import HEARTBEAT_S, Members
from mycel.swarm.training.numbers import members as numbers_of
from mycel.swarm.training.plan import RunPlan, Work
from mycel.swarm.training.wiring import Wiring
from mycel.swarm.view import short_id

__all__ = ["Finished", "Replaced", "Seen", "Send", "Wait", "Walk", "drivers", "due", "look", "nobody", "owned"]

# A peer's report of a gradient comes before the status that shows it, by so much at most.
STATUS_LAG_S = 3.0 * HEARTBEAT_S
# Whoever tries says that it cannot: perhaps nobody can, as when a run has diverged. Then it is tried ever more seldom.
PATIENT_FAILURES = 6
LONGEST_REST_S = 60.0


# ---- what the members' table says about one step ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the table. `counted[stage]`: who is there, and which numbers of the step each has counted.

    `ready[stage]` are those that are at this step already; the others come to it. `decided`: somebody has made it.
    """

    counted: tuple[Mapping[str, int], ...]
    ready: tuple[frozenset[str], ...]
    queue_s: Mapping[str, float]
    addresses: Mapping[str, tuple[str, ...]]
    decided: bool = False

    def missing(self, everything: int) -> int:
        """The numbers that some stage lacks."""
        lacking = 0
        for stage in self.counted:
            have = 0
            for bits in stage.values():
                have |= bits
            lacking |= everything & ~have
        return lacking

    def changed(self, before: Seen) -> int:
        """The numbers that somebody has counted, or uncounted, since then."""
        news = 0
        for now, then in zip(self.counted, before.counted, strict=True):
            for peer in now.keys() | then.keys():
                news |= now.get(peer, 0) ^ then.get(peer, 0)
        return news


def nobody(n_stages: int) -> Seen:
    """Before the first look."""
    return Seen(({},) * n_stages, (frozenset(),) * n_stages, {}, {})


def look(members: Members, version: int, n_stages: int) -> Seen:
    """The table as step `version` sees it: who computes, or finishes this step and leaves."""
    counted: list[dict[str, int]] = [{} for _ in range(n_stages)]
    ready: list[set[str]] = [set() for _ in range(n_stages)]
    queue_s, addresses, decided = {}, {}, False
    for member in members:
        # Whoever has made it, be it one that computes nothing more and is about to leave.
        decided |= member.version > version and member.status.state != "joining"
        if member.status.state not in ("training", "leaving") or not 0 <= member.stage < n_stages:
            continue
        # One step behind: it makes that step now, and holds what comes for this one, unless it leaves then.
        if member.version == version or (member.version == version - 1 and member.status.state == "training"):
            counted[member.stage][member.peer] = member.counted if member.version == version else 0
            queue_s[member.peer], addresses[member.peer] = member.status.queue_s, member.status.addresses
        if member.version == version:
            ready[member.stage].add(member.peer)
    return Seen(tuple(counted), tuple(frozenset(peers) for peers in ready), queue_s, addresses, decided)


def drivers(members: Members) -> tuple[str, ...]:
    """Who drives the microbatches of this step, in order of peer id.

    A newcomer begins with the next step: it cannot know what is on its way. Who leaves finishes its own.
    """
    trainers = [member for member in members if member.status.trains and member.status.state != "joining"]
    steady = tuple(member.peer for member in trainers if member.status.state in ("training", "leaving"))
    return steady or tuple(member.peer for member in trainers)


def owned(plan: RunPlan, version: int, trainers: Collection[str], me: str) -> int:
    """The numbers of the step that `me` drives, as a set."""
    if me not in trainers:
        return 0
    numbers = range(plan.n_microbatches)
    return sum(1 << number for number in numbers if plan.owner(plan.work(version, number), trainers) == me)


def due(mine: int, seen: Seen, walks: Mapping[int, Walk], flying: Collection[int], now: float) -> tuple[int, ...]:
    """Those of the numbers `mine` that must be begun now, or begun again, in rising order.

    That is what some stage lacks, as far as statuses say, and is not on its way (`flying`) or done by one of `walks`; a
    walk that was done is due again when a peer that had counted it is gone.
    """
    if seen.decided:
        return ()
    lacking = [number for number in numbers_of(seen.missing(mine)) if number not in flying]
    return tuple(number for number in lacking if number not in walks or not walks[number].is_whole(seen, now))


# ---- what a walk decides ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replaced:
    """`by` takes the place of `peer`."""

    stage: int
    peer: str
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Send:
    """Send a Forward with this turn and these ways to the first of them."""

    turn: int
    ways: tuple[Way, ...]
    replaced: tuple[Replaced, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until something is heard, or until then."""

    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Every stage has counted it."""

    reason: str


Decision = Send | Wait | Finished


@dataclass(eq=False, slots=True)
class Walk:
    """One microbatch. Told of everything that is heard about it, it says in `decide` what to do.

    Facts outlive turns: `_inputs`, `_done` are the peers of each stage that have the microbatch's input, and that have
    done its backward; `_said` when a peer said so, `_shown` whose status did. The rest is about the present turn.
    """

    work: Work
    n_stages: int
    turn: int = 0
    finished: bool = False
    # How often one who was asked could not do it, by its own word.
    failures: int = 0
    began_s: float = 0.0
    peers: list[str] = field(init=False)
    _inputs: list[set[str]] = field(init=False)
    _done: list[set[str]] = field(init=False)
    _said: list[dict[str, float]] = field(init=False)
    _shown: list[set[str]] = field(init=False)
    _asked: list[set[str]] = field(init=False)
    _soured: list[set[str]] = field(init=False)
    # Of this turn: which stages were said to have something, the highest one heard of, when anything was heard last.
    _promised: set[int] = field(default_factory=set, init=False)
    _excused: set[str] = field(default_factory=set, init=False)
    _highest: int = -1
    _moved_s: float = inf
    _deadline_s: float = inf
    _last_heard: tuple[int, bool] | None = field(default=None, init=False)
    # Seconds that each stage took forward.
    _forward_s: dict[int, float] = field(default_factory=dict, init=False)
    # What makes another turn necessary: stages whose peers fail us and why, or something else.
    _troubles: dict[int, str] = field(default_factory=dict, init=False)
    _replaced: list[Replaced] = field(default_factory=list, init=False)
    _anew: str = ""

    def __post_init__(self) -> None:
        self.peers = [""] * self.n_stages  # "": nobody is there for that stage yet
        self._inputs = [set() for _ in range(self.n_stages)]
        self._done = [set() for _ in range(self.n_stages)]
        self._said = [{} for _ in range(self.n_stages)]
        self._shown = [set() for _ in range(self.n_stages)]
        self._asked = [set() for _ in range(self.n_stages)]
        self._soured = [set() for _ in range(self.n_stages)]

    # ---- hearing

    def passed(self, peer: str, message: Passed, now: float, wiring: Wiring) -> bool:
        """A peer has done its part in one direction; whether it is still the one who is to do it.

        Raises RemoteProtocolError for a stage that there is not.
        """
        if not self._was_asked(peer, message):
            return True
        stage = message.stage
        self._inputs[stage].add(peer)
        if message.backward:
            self._done[stage].add(peer)
            self._said[stage][peer] = now
        if message.turn != self.turn or self.peers[stage] != peer:
            return self.peers[stage] == peer
        took_s, here = now - self._moved_s, (stage, message.backward)
        # Else it tells how long it took together with another, or how long who has done it before takes to say so.
        if self._before(*here) == self._last_heard and stage not in self._promised:
            if not message.backward:
                self._forward_s[stage] = took_s
            elif stage in self._forward_s or stage == self.n_stages - 1:
                wiring.passed(stage, peer, self.work.count, self._forward_s.get(stage, 0.0) + took_s)
        self._last_heard = here
        self._highest = max(self._highest, stage)
        self._moved_s, self._deadline_s = now, 0.0
        return True

    def _before(self, stage: int, backward: bool) -> tuple[int, bool] | None:
        """What is reported last before this, if nothing is lost; None: the walk began."""
        if backward and stage < self.n_stages - 1:
            return stage + 1, True
        return (stage - 1, False) if stage else None

    def failed(self, peer: str, message: WorkFailed, now: float, wiring: Wiring) -> None:
        """The walk has ended at a peer, by its own fault or a neighbour's.

        Raises RemoteProtocolError for a stage that there is not, or who is no neighbour to blame.
        """
        stage = message.stage
        if not self._was_asked(peer, message) or message.turn != self.turn or self.peers[stage] != peer:
            return  # an echo
        around = {self.peers[s]: s for s in (stage - 1, stage + 1) if 0 <= s < self.n_stages}
        if message.peer == peer:
            if stage in self._promised and peer not in self._excused:
                # We said that it has what it lacks: its first chance is still to come.
                self._excused.add(peer)
                self._forget(stage, peer)
                self._anew = f"{short_id(peer)} has lost it: {message.reason}"
            else:
                self.failures += 1
                self._blame(stage, message.reason, now, wiring)
        elif message.peer in around:
            reason = f"{message.reason} (says {short_id(peer)})"
            wiring.blamed_another(stage, peer, now)
            self._blame(around[message.peer], reason, now, wiring)
        else:
            raise RemoteProtocolError("blames a peer that is no neighbour of its own", peer)

    def unreachable(self, stage: int, peer: str, reason: str, now: float, wiring: Wiring) -> None:
        """We could not send to it ourselves."""
        if self.peers[stage] == peer:
            self._blame(stage, reason, now, wiring)

    def _was_asked(self, peer: str, message: Passed | WorkFailed) -> bool:
        """Whether this walk ever led to it. Else it may answer a trainer of our name that lived before: an echo."""
        if message.stage >= self.n_stages:
            raise RemoteProtocolError(f"reports on stage {message.stage} of {self.n_stages}", peer)
        return peer in self._asked[message.stage] and 0 < message.turn <= self.turn

    def _blame(self, stage: int, reason: str, now: float, wiring: Wiring) -> None:
        wiring.failed(stage, self.peers[stage], now)
        self._troubles.setdefault(stage, reason)

    def _forget(self, stage: int, peer: str) -> None:
        self._inputs[stage].discard(peer)
        self._done[stage].discard(peer)
        self._said[stage].pop(peer, None)
        self._shown[stage].discard(peer)

    # ---- deciding

    def is_whole(self, seen: Seen, now: float) -> bool:
        """Whether for each stage a live peer has counted it: its status says so, or itself a moment ago."""
        return all(self._is_counted(stage, seen, now) for stage in range(self.n_stages))

    def _is_counted(self, stage: int, seen: Seen, now: float) -> bool:
        bit = 1 << self.work.number
        there = seen.counted[stage]
        if any(bits & bit for bits in there.values()):
            return True
        return any(peer in there and now - at_s < STATUS_LAG_S for peer, at_s in self._said[stage].items())

    def decide(self, now: float, seen: Seen, wiring: Wiring) -> Decision:
        """What is to be done now. Whoever `wiring` does not list is not there, or cannot be talked to."""
        self._learn(seen)
        if seen.decided or self.is_whole(seen, now):
            self.finished = True
            return Finished("the step is made" if seen.decided else f"counted by every stage in turn {self.turn}")
        if self.finished:
            self._reopen(now, seen, wiring)
        self._find_trouble(now, seen, wiring)
        if "" in self.peers or self._troubles or self._anew:
            return self._begin(now, seen, wiring)
        stage = self._position()
        return Wait(self._deadline_s, f"stage {stage}, {short_id(self.peers[stage])}, is at work")

    def _reopen(self, now: float, seen: Seen, wiring: Wiring) -> None:
        """It was done, and is not any more: who had counted it is gone, or had not counted it."""
        self.finished, self._anew = False, "a peer that had counted it is gone"
        for stage, peer in enumerate(self.peers):
            if peer in self._said[stage] and not self._is_counted(stage, seen, now):
                self._done[stage].discard(peer)
                self._blame(stage, "said that it had counted it, and shows it to nobody", now, wiring)

    @property
    def rest_s(self) -> float:
        """How long to rest after the last failure."""
        times = self.failures - PATIENT_FAILURES
        return min(2.0 ** min(times, 16), LONGEST_REST_S) if times >= 0 else 0.0

    def pause(self) -> None:
        """Another trainer drives it from now on; if it comes back to us, it begins another turn."""
        self._anew = "driven by another meanwhile"

    def _learn(self, seen: Seen) -> None:
        """Facts about peers that are gone are none; whoever counts a number has done it."""
        bit = 1 << self.work.number
        for stage, there in enumerate(seen.counted):
            for peer in (self._inputs[stage] | self._done[stage]) - there.keys():
                self._forget(stage, peer)
            for peer, bits in there.items():
                if bits & bit:
                    self._done[stage].add(peer)
                    self._inputs[stage].add(peer)
                    self._shown[stage].add(peer)
                    self._said[stage].pop(peer, None)  # from now on its status tells
                elif peer in self._shown[stage]:  # it has taken it back, for another who counted it, too
                    self._shown[stage].discard(peer)
                    self._done[stage].discard(peer)

    def _find_trouble(self, now: float, seen: Seen, wiring: Wiring) -> None:
        """Who on the way is gone, or has let its deadline pass."""
        for stage, peer in enumerate(self.peers):
            if peer and not wiring.serves(stage, peer):
                self._troubles.setdefault(stage, "is gone")
        if "" in self.peers or self._troubles or self._anew:
            return
        stage = self._position()
        peer = self.peers[stage]
        if peer not in seen.ready[stage] and not seen.ready[stage]:
            self._moved_s, self._deadline_s = now, 0.0  # its stage still makes the step before
        patience_s = wiring.deadline_s(stage, peer, self.work.count, seen.queue_s.get(peer, 0.0))
        self._deadline_s = max(self._deadline_s, self._moved_s + patience_s)
        if now >= self._deadline_s:
            waited_s = now - self._moved_s
            self._troubles[stage] = f"no word for {waited_s:.1f} s"
            wiring.timed_out(stage, peer, self.work.count, waited_s, now)

    def _position(self) -> int:
        """The stage that is at work on it, or on its way to it.

        It walks forward until all that is ahead is done, then back from there.
        """
        done = [peer in self._done[stage] for stage, peer in enumerate(self.peers)]
        turning = self.n_stages
        while turning and done[turning - 1]:
            turning -= 1
        if self._highest < min(turning, self.n_stages - 1):
            return self._highest + 1
        return max((stage for stage in range(turning) if not done[stage]), default=0)

    def _begin(self, now: float, seen: Seen, wiring: Wiring) -> Decision:
        """A new turn: the same peers but for those in trouble, and whoever has done it already."""
        for stage, old in enumerate(self.peers):
            trouble = self._troubles.get(stage, "")
            if trouble:
                self._soured[stage].add(old)
            # In order of id, so that all who redo a stage for a neighbour go to the same one.
            able = sorted(self._done[stage] - self._soured[stage])
            able = [peer for peer in able if wiring.is_free(stage, peer, now)]
            if old and not trouble and (old in able or not able):
                continue
            chosen = able[0] if able else self._choose(stage, now, wiring)
            if isinstance(chosen, Wait):
                return chosen
            self.peers[stage] = chosen
            self._troubles.pop(stage, None)
            self._anew = self._anew or trouble
            if old and chosen != old:
                self._replaced.append(Replaced(stage, old, chosen, trouble or "another has done it"))
        return self._send(now, seen, self._anew if self.turn else "begins")

    def _choose(self, stage: int, now: float, wiring: Wiring) -> str | Wait:
        choice = wiring.choose(stage, self.work.count, now, self._soured[stage])
        if choice is None:
            return Wait(inf, f"nobody serves stage {stage}")
        if choice.not_before_s > now:
            return Wait(choice.not_before_s, f"stage {stage}: {choice.reason}")
        return choice.peer

    def _send(self, now: float, seen: Seen, reason: str) -> Send:
        self.turn += 1
        if self.turn == 1:
            self.began_s = now
        for stage, peer in enumerate(self.peers):
            self._asked[stage].add(peer)
        ways = tuple(
            Way(PeerAddress(peer, seen.addresses.get(peer, ())), peer in self._inputs[stage], peer in self._done[stage])
            for stage, peer in enumerate(self.peers)
        )
        replaced, self._replaced, self._anew = tuple(self._replaced), [], ""
        self._highest, self._moved_s, self._deadline_s = -1, now, 0.0
        self._promised = {stage for stage, way in enumerate(ways) if way.has_input}
        self._last_heard = None
        self._forward_s.clear()
        return Send(self.turn, ways, replaced, reason)
