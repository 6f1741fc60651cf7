"""Whether a chain that gives no token is slow, held up or dead: questions by the clock, and a judgement of the answers.

Broken streams are not its affair: they count at once, without any judgement. It judges hops that are silent though
their streams are open, links that carry nothing though both ends are well, and hops that compute for ever. While no
token comes it has every hop asked how far it is, at each half of a deadline; whoever is asked answers at once,
whatever it computes, so that work that takes long is told apart from silence.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from mycel.protocols.hop import MAX_STEP_TOKENS
from mycel.protocols.messages import HopTiming, Progress
from mycel.swarm.view import short_id

LEAST_DEADLINE_S = 2.0
# A deadline is this many times the moving average of the time between two tokens.
DEADLINE_TURNS = 5.0
_NEWEST_WEIGHT = 0.2
# A question travels there and back; a link whose round trip is measured to be long gets more time.
PATIENT_ROUND_TRIPS = 4.0
# Who looks at the clock so much later than it meant to was itself asleep, and can blame nobody.
LATE_S = 0.5
LEAST_STUCK_S = 10.0
STUCK_STEPS = 5.0
# A chunk of hidden states on a slow uplink: 16 KiB a token at 330 kB/s. As long, its link is not held up.
LINK_S_PER_TOKEN = 0.05


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask every hop how far it is."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Replace this hop."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Relay:
    """Lay the link into hop `receiver` (its place in the chain) anew, under a fresh number; nobody is to blame."""

    receiver: int
    reason: str


Verdict = Ask | Lost | Relay


@dataclass(slots=True)
class _Hop:
    """What is known of one hop. `owed_since_s`: when the oldest question was asked that it has not answered.

    `before`: how far it was certainly before the step that it may be in; `high`: the furthest that it ever said;
    `busy_from_s`: when it was first heard to be in the step of its last answer.
    """

    peer: str
    step_s: float
    owed_since_s: float | None = None
    answered_s: float = -inf
    answer: Progress = field(default_factory=lambda: Progress(0, 0))
    before: int = 0
    high: int = 0
    busy_from_s: float = inf

    @property
    def busy(self) -> bool:
        return self.answer.busy_us > 0


@dataclass(slots=True)
class Liveness:
    """The judgement over one chain. Told of everything that is heard, it says at `wake_at_s` or sooner what to do."""

    wake_at_s: float = inf
    progress_at_s: float = -inf
    _hops: list[_Hop] = field(default_factory=list)
    _quiet_since_s: float = 0.0
    _token_at_s: float | None = None
    _gap_s: float = 0.0
    _longest_step_s: float = 0.0
    _judged: bool = True
    # The link that was found held up by the last answers: (receiver, how far that was), since when.
    _held_up: tuple[str, int] | None = None
    _held_up_since_s: float = 0.0
    _relaid: set[str] = field(default_factory=set)

    @property
    def deadline_s(self) -> float:
        """Silence beyond this is a reason to act."""
        return max(LEAST_DEADLINE_S, DEADLINE_TURNS * self._gap_s)

    @property
    def furthest(self) -> int:
        """The furthest position that any hop of the chain said it had got to."""
        return max((hop.high for hop in self._hops), default=0)

    def begin(self, now: float, chain: Sequence[tuple[str, float]], opened: Collection[str]) -> None:
        """The chain is set up or changed: its peers in order, each with the seconds that one token should take it.

        `opened` are those of them that are new to it.
        """
        known = {hop.peer: hop for hop in self._hops if hop.peer not in opened}
        self._hops = [known.get(peer) or _Hop(peer, step_s) for peer, step_s in chain]
        self._relaid &= known.keys() & {peer for peer, _ in chain}
        self.restart(now)

    def restart(self, now: float) -> None:
        """Count silence from now on: it was ours."""
        self._quiet_since_s, self._token_at_s = now, None
        self._await_quiet(now)

    def token(self, now: float, position: int, timings: Sequence[HopTiming]) -> None:
        """The token at `position` was heard: it went through all hops."""
        if self._token_at_s is not None:
            gap_s = now - self._token_at_s
            self._gap_s += (gap_s - self._gap_s) * (_NEWEST_WEIGHT if self._gap_s else 1.0)
        spent_s = [(timing.queue_us + timing.compute_us) / 1e6 for timing in timings]
        self._longest_step_s = max([self._longest_step_s, *spent_s])
        for hop in self._hops:
            hop.before = max(hop.before, position)
        self._quiet_since_s = self._token_at_s = self.progress_at_s = now
        self._await_quiet(now)

    def _await_quiet(self, now: float) -> None:
        self.wake_at_s = now + self.deadline_s / 2
        self._judged, self._held_up = True, None
        for hop in self._hops:
            hop.owed_since_s = None

    def answered(self, now: float, peer: str, answer: Progress) -> None:
        """A hop said how far it is."""
        for hop in self._hops:
            if hop.peer != peer:
                continue
            if answer.received > hop.answer.received:
                hop.before = max(hop.before, hop.answer.received)
            if not hop.busy or answer.received != hop.answer.received:
                hop.busy_from_s = now
            if answer.received > hop.high:
                hop.high, self.progress_at_s = answer.received, now
            hop.answer, hop.answered_s, hop.owed_since_s = answer, now, None

    def is_due(self, now: float) -> bool:
        """Whether there is anything to decide."""
        return now >= self.wake_at_s or self._is_answered

    @property
    def _is_answered(self) -> bool:
        """Whether all have answered the last question, and nobody has looked at the answers yet."""
        return not self._judged and all(hop.owed_since_s is None for hop in self._hops)

    def decide(self, now: float, rtts: Mapping[str, float]) -> tuple[Verdict, ...]:
        """What is to be done now; `rtts` are the measured round trips to peers, in seconds."""
        if now > self.wake_at_s + LATE_S:
            self.restart(now)
            self.progress_at_s = now
            return ()
        verdicts: list[Verdict] = []
        if self._is_answered:
            self._judged = True
            verdicts += self._stuck() or self._links(now)
        if now >= self.wake_at_s:
            verdicts += self._silent(now, rtts)
            verdicts.append(Ask())
            for hop in self._hops:
                hop.owed_since_s = now if hop.owed_since_s is None else hop.owed_since_s
            self._judged, self.wake_at_s = False, now + self.deadline_s / 2
        return tuple(verdicts)

    # ---- judgements ---------------------------------------------------------------------------------------------

    def _silent(self, now: float, rtts: Mapping[str, float]) -> list[Verdict]:
        """Who owes an answer for too long. If all of several do, the silence is more likely ours: heartbeats tell."""

        def patience_s(hop: _Hop) -> float:
            return max(self.deadline_s / 2, PATIENT_ROUND_TRIPS * rtts.get(hop.peer, 0.0)) * 0.999

        silent = [h for h in self._hops if h.owed_since_s is not None and now - h.owed_since_s >= patience_s(h)]
        first_s = min((hop.owed_since_s for hop in silent if hop.owed_since_s is not None), default=inf)
        if len(self._hops) > 1 and not any(hop.answered_s >= first_s for hop in self._hops):
            return []
        return [Lost(h.peer, f"silent for {now - max(self._quiet_since_s, h.answered_s):.1f} s") for h in silent]

    def _stuck(self) -> list[Verdict]:
        """Who computes a step for far longer than any step took so far or should take."""
        found: list[Verdict] = []
        for hop in self._hops:
            n_tokens = min(max(hop.answer.received - hop.before, 1), MAX_STEP_TOKENS)
            bound_s = max(LEAST_STUCK_S, STUCK_STEPS * self._longest_step_s, STUCK_STEPS * n_tokens * hop.step_s)
            if not hop.busy:
                continue
            busy_s = max(hop.answer.busy_us / 1e6, hop.answered_s - hop.busy_from_s)  # not only by its own clock
            if busy_s > bound_s:
                found.append(Lost(hop.peer, f"stuck in one step for {busy_s:.0f} s"))
        return found

    def _links(self, now: float) -> list[Verdict]:
        """The link that two questions in a row found held up at the same place: laid anew once, then its end goes."""
        receiver = self._receiver_held_up()
        if receiver is None:
            self._held_up = None
            return []
        sender, hop = self._hops[receiver - 1], self._hops[receiver]
        found = (hop.peer, hop.answer.received)
        if found != self._held_up:
            self._held_up, self._held_up_since_s = found, now
            return []
        ahead = min(max(self._supply(receiver) - hop.answer.received, 1), MAX_STEP_TOKENS)
        if now - self._held_up_since_s < ahead * LINK_S_PER_TOKEN:
            return []
        self._held_up = None
        where = f"nothing arrives from {short_id(sender.peer)} beyond position {hop.answer.received}"
        if hop.peer in self._relaid:
            return [Lost(hop.peer, f"{where}, also over a new link")]
        self._relaid.add(hop.peer)
        return [Relay(receiver, f"{where} at {short_id(hop.peer)}")]

    def _receiver_held_up(self) -> int | None:
        """The place of the hop that lacks what its neighbour has put out, though nobody behind it is at work.

        Looked for from the end of the chain: whoever waits for the next hop takes nothing in meanwhile, so that only
        the last held-up link says anything. The way back to the first hop comes last of all, since that hop takes
        tokens only once it has worked through its prompt.
        """
        if len(self._hops) < 2:
            return None
        for receiver in range(len(self._hops) - 1, 0, -1):
            if self._hops[receiver].busy:
                return None
            if self._supply(receiver) > self._hops[receiver].answer.received:
                return receiver
        if self._hops[0].busy:
            return None
        return 0 if self._supply(0) > self._hops[0].answer.received else None

    def _supply(self, receiver: int) -> int:
        """How far the receiver could be: what its link was given, or what the hop before must have put out."""
        sender = self._hops[receiver - 1]
        if sender.busy:
            return sender.answer.given
        sampled = 1 if receiver == 0 else 0  # the last hop's output is the token after its input
        return max(sender.answer.given, sender.answer.received + sampled)
