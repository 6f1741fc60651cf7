"""Which peer of a stage gets a trainer's next microbatch: SWARM's stochastic wiring, with what its release leaves out.

An interleaved weighted round robin for each stage. Each peer has a sum of the seconds that all it was given should have
taken; the least sum is next, and grows by what one more should take. So a peer that is twice as fast comes twice as
often, and evenly in between. What a microbatch should take is measured: a moving average of the time from when a
peer could begin until it reported, its queue and the way there included, so that a peer that others fill gets less.

Timeouts count as their time (and ban from the second in a row on, as failures do); bans double up to a minute. Whoever
comes new or comes back begins at the least sum: it is tried next, and once, not until it has caught up with the others.

Source: Ryabinin et al., SWARM Parallelism (2023), 3.2, as interleaved weighted round robin (Katevenis et al., 1991).

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf
from statistics import median, median_low
from typing import TYPE_CHECKING

from mycel.swarm.view import short_id

if TYPE_CHECKING:
    from random import Random

__all__ = ["Choice", "Wiring"]

EMA_WEIGHT = 0.1
MOST_BLIND = 16
LEAST_BAN_S = 1.0
MOST_BAN_S = 60.0
# Of a peer that nobody can stand in for.
LONE_BAN_S = 4.0
LEAST_DEADLINE_S = 2.0
MOST_DEADLINE_S = 600.0
DEADLINE_TIMES = 5.0
MOST_DOUBLINGS = 4
MOST_PRAISE = 16.0
# What a peer says of its queue counts as so many passes of its own at most: it might say anything, and be waited for.
MOST_QUEUED = 64.0
MOST_BLAMES = 3
# What a sequence should take where nobody knows anything yet: of no matter, as it is the same for all.
UNKNOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A peer for one stage, and why it. `not_before_s`: when its ban ends; ask again then, nothing was charged."""

    peer: str
    reason: str
    not_before_s: float = 0.0


@dataclass(slots=True)
class _Average:
    """Moving, of seconds. Bias-corrected: over what was measured alone, not over a made-up beginning."""

    total_s: float = 0.0
    weight: float = 0.0

    def add(self, seconds: float) -> None:
        self.total_s += EMA_WEIGHT * (seconds - self.total_s)
        self.weight += EMA_WEIGHT * (1.0 - self.weight)

    @property
    def value(self) -> float:
        """0 if nothing was measured."""
        return self.total_s / self.weight if self.weight else 0.0


@dataclass(eq=False, slots=True)
class _Peer:
    """`owed_s` is the sum that is compared; `tie` decides between equals.

    `spent` averages over all that it was given, `answered` over what it answered. `n_blind` is how often it was chosen
    before anything was measured: each time counts twice as much as the one before, so that a slow newcomer is not
    flooded before it shows that it is slow.
    """

    name: str
    announced: float  # sequences a second, 0: not known
    owed_s: float
    tie: float
    present: bool = True
    spent: _Average = field(default_factory=_Average)
    answered: _Average = field(default_factory=_Average)
    n_blind: int = 0
    failures: int = 0
    timeouts: int = 0  # in a row
    timed_out_s: float = -inf
    banned_s: float = 0.0
    banned_until_s: float = 0.0
    was_out: bool = False
    # Neighbours that it blamed since it did anything itself, those at one moment counted once; and when it did last.
    blames: int = 0
    blamed_s: float = -inf

    @property
    def known_s(self) -> float:
        """Seconds a sequence, as measured or else announced; 0 if neither."""
        return self.spent.value or self.announced_s

    @property
    def answering_s(self) -> float:
        """The same of what it answered alone."""
        return self.answered.value or self.announced_s

    @property
    def announced_s(self) -> float:
        return 1.0 / self.announced if self.announced > 0.0 else 0.0

    @property
    def pardoned_s(self) -> float:
        """When it is tried again if there is nobody else."""
        return min(self.banned_until_s, self.banned_s + LONE_BAN_S)

    def ban(self, now: float) -> None:
        self.banned_s = now
        self.banned_until_s = now + min(MOST_BAN_S, LEAST_BAN_S * 2.0 ** min(self.failures, 16))
        self.failures += 1


@dataclass(eq=False, slots=True)
class Wiring:
    """One trainer's choices and measurements, for all stages. Seconds are per sequence, forward and backward."""

    n_stages: int
    rng: Random
    _stages: list[dict[str, _Peer]] = field(init=False)

    def __post_init__(self) -> None:
        self._stages = [{} for _ in range(self.n_stages)]

    def set_peers(self, stage: int, announced: Mapping[str, float], now: float) -> None:
        """Who serves the stage now, and the sequences a second that each says it computes (0: it does not say)."""
        peers = self._stages[stage]
        for name in sorted(announced.keys() - peers.keys()):
            peers[name] = _Peer(name, announced[name], self._least(stage), self.rng.random())
        for name, peer in list(peers.items()):
            if name in announced:
                peer.was_out |= not peer.present
                peer.present, peer.announced = True, announced[name]
            elif peer.banned_until_s > now:
                peer.present = False  # remembered: who comes and goes does not lose its ban that way
            else:
                del peers[name]

    def peers(self, stage: int) -> tuple[str, ...]:
        """Who serves the stage, banned or not, in order of id."""
        return tuple(sorted(peer.name for peer in self._stages[stage].values() if peer.present))

    def choose(self, stage: int, n_sequences: int, now: float, avoid: Collection[str] = ()) -> Choice | None:
        """The next peer; not one of `avoid` unless there is no other. None if nobody serves the stage."""
        present = [peer for peer in self._stages[stage].values() if peer.present]
        if not present:
            return None
        free = [peer for peer in present if peer.banned_until_s <= now]
        if not free:
            peer = min(present, key=lambda one: (one.pardoned_s, one.tie))
            if peer.pardoned_s > now:
                reason = f"all are banned, {short_id(peer.name)} for {peer.pardoned_s - now:.1f} s more"
                return Choice(peer.name, reason, peer.pardoned_s)
            free = [peer]
        wanted = [peer for peer in free if peer.name not in avoid]
        peer = self._next(stage, wanted or free, now)
        expected_s = self._expected(stage, peer)
        peer.owed_s += expected_s * n_sequences * 2.0**peer.n_blind
        peer.n_blind = 0 if peer.spent.weight else min(peer.n_blind + 1, MOST_BLIND)
        peer.tie = self.rng.random()
        if not wanted:
            return Choice(peer.name, f"{short_id(peer.name)} again: nobody else is free")
        return Choice(peer.name, f"{short_id(peer.name)} is next of {len(wanted)}: {expected_s:.3g} s a sequence")

    def serves(self, stage: int, peer: str) -> bool:
        """Whether it is there for this stage, banned or not."""
        one = self._stages[stage].get(peer)
        return one is not None and one.present

    def is_free(self, stage: int, peer: str, now: float) -> bool:
        """Whether it serves the stage and is not banned."""
        one = self._stages[stage].get(peer)
        return one is not None and one.present and one.banned_until_s <= now

    def passed(self, stage: int, peer: str, n_sequences: int, seconds: float) -> None:
        """It did its part of a microbatch, forward and backward, within `seconds` of its turn in all."""
        if (one := self._stages[stage].get(peer)) is not None:
            self._measure(stage, one, seconds / n_sequences)
            one.answered.add(seconds / n_sequences)
            one.timeouts, one.failures, one.banned_until_s, one.blames = 0, one.failures // 2, 0.0, 0

    def timed_out(self, stage: int, peer: str, n_sequences: int, seconds: float, now: float) -> None:
        """It did not answer within `seconds`: that is what it takes, at least. Once may be chance, twice bans."""
        if (one := self._stages[stage].get(peer)) is not None:
            self._measure(stage, one, seconds / n_sequences)
            if now - seconds < one.timed_out_s:
                return  # it was waiting already when another came back without an answer: the same silence
            one.timeouts, one.timed_out_s = one.timeouts + 1, now
            if one.timeouts > 1:
                one.ban(now)

    def failed(self, stage: int, peer: str, now: float) -> None:
        """It could not be reached, broke the rules or said that it cannot."""
        one = self._stages[stage].get(peer)
        if one is not None and one.pardoned_s <= now:  # several at once are one failure
            one.ban(now)

    def blamed_another(self, stage: int, peer: str, now: float) -> None:
        """It says that it could not pass on to a neighbour. Who always says so, and does nothing, is banned, too."""
        one = self._stages[stage].get(peer)
        if one is None or now - one.blamed_s < LEAST_BAN_S:
            return
        one.blames, one.blamed_s = one.blames + 1, now
        if one.blames > MOST_BLAMES:
            self.failed(stage, peer, now)

    def expected_s(self, stage: int, peer: str) -> float:
        """What a sequence should take this peer."""
        one = self._stages[stage].get(peer)
        return UNKNOWN_S if one is None else self._expected(stage, one)

    def deadline_s(self, stage: int, peer: str, n_sequences: int, queue_s: float = 0.0) -> float:
        """How long to wait for one direction of a microbatch; `queue_s` is what the peer says of its queue.

        It doubles with each timeout in a row, up to sixteen times: its link may be slow, and who is asked again goes on
        where it was.
        """
        one = self._stages[stage].get(peer)
        if one is None:
            return LEAST_DEADLINE_S
        rest = [other for other in self._stages[stage].values() if other is not one]
        others = [other.answered.value for other in rest if other.answered.weight]
        # The lower middle: of two, one that boasts of being slow must not make the other's word count for nothing.
        others = others or [other.answering_s for other in rest if other.answering_s > 0.0]
        each_s = one.answering_s or (median_low(others) if others else UNKNOWN_S)
        if others:
            # Until it has answered, its word counts only as far as what others take makes it likely.
            usual_s = one.answered.value or median_low(others)
            each_s = min(each_s, MOST_PRAISE * usual_s)
            queue_s = min(queue_s, MOST_QUEUED * usual_s * n_sequences)
        patience_s = max(LEAST_DEADLINE_S, DEADLINE_TIMES * (each_s * n_sequences + queue_s))
        patience_s *= 2.0 ** min(one.timeouts, MOST_DOUBLINGS)
        return min(patience_s, MOST_DEADLINE_S)

    def _measure(self, stage: int, peer: _Peer, seconds: float) -> None:
        if peer.n_blind:  # the first time: from now on its sum is as everybody's
            peer.n_blind, peer.owed_s = 0, min(peer.owed_s, self._least(stage))
        peer.spent.add(seconds)

    def _next(self, stage: int, free: list[_Peer], now: float) -> _Peer:
        """The least sum; who was out meanwhile has saved nothing up."""
        steady = [peer.owed_s for peer in free if not peer.was_out]
        for peer in free:
            if peer.was_out and steady:
                peer.owed_s = max(peer.owed_s, min(steady))
            peer.was_out = False
        for peer in self._stages[stage].values():
            peer.was_out |= peer.banned_until_s > now
        return min(free, key=lambda peer: (peer.owed_s, peer.tie))

    def _least(self, stage: int) -> float:
        sums = [peer.owed_s for peer in self._stages[stage].values() if peer.present and not peer.was_out]
        return min(sums, default=0.0)

    def _expected(self, stage: int, peer: _Peer) -> float:
        if peer.spent.weight:
            return peer.spent.value
        others = [other.known_s for other in self._stages[stage].values() if other.known_s > 0.0 and other is not peer]
        middle_s = median(others) if others else UNKNOWN_S
        if not peer.announced:
            return middle_s
        # Nobody has seen it work yet: what it says of itself brings it that much at most.
        return max(peer.known_s, middle_s / MOST_PRAISE) if others else peer.known_s
