"""The judgement of a silent chain: who is asked, given up, relinked or left alone, by the clock of the test."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.messages import HopTiming, Progress
from mycel.swarm.liveness import (
    LEAST_DEADLINE_S,
    LEAST_STUCK_S,
    Ask,
    Liveness,
    Lost,
    Relay,
    Verdict,
)


@dataclass
class Watched:
    """A chain under judgement; `says` is what each hop answers, None if it does not."""

    peers: tuple[str, ...]
    liveness: Liveness = field(default_factory=Liveness)
    says: dict[str, Progress | None] = field(default_factory=dict)
    now: float = 0.0
    rtts: dict[str, float] = field(default_factory=dict)
    found: list[tuple[float, Verdict]] = field(default_factory=list)
    n_asked: int = 0

    def __post_init__(self) -> None:
        self.begin()

    def begin(self, step_s: float = 0.01, opened: tuple[str, ...] | None = None) -> None:
        self.liveness.begin(self.now, [(peer, step_s) for peer in self.peers], opened or self.peers)

    def tokens(self, count: int, every_s: float = 0.1, compute_s: float = 0.01, first: int = 10) -> None:
        for number in range(count):
            self.now += every_s
            self.liveness.token(self.now, first + number, [HopTiming(0, int(compute_s * 1e6))] * len(self.peers))

    def all_say(self, received: int, given: int | None = None, busy_us: int = 0) -> None:
        for peer in self.peers:
            self.says[peer] = Progress(received, received if given is None else given, busy_us)

    def run(self, until_s: float, rtt_s: float = 0.01) -> list[Verdict]:
        """Look whenever it wants to, and let everybody answer; what it wanted done beyond questions."""
        found: list[Verdict] = []
        while self.liveness.wake_at_s <= until_s:
            self.now = max(self.now, self.liveness.wake_at_s)
            found += self._look()
            if self.n_asked:
                self.n_asked, self.now = 0, self.now + rtt_s
                for peer, said in self.says.items():
                    if said is not None:
                        self.liveness.answered(self.now, peer, said)
                found += self._look()
        self.now = until_s
        return found

    def _look(self) -> list[Verdict]:
        verdicts = self.liveness.decide(self.now, self.rtts)
        self.n_asked += Ask() in verdicts
        others = [one for one in verdicts if one != Ask()]
        self.found += [(self.now, one) for one in others]
        return others


THREE = ("a", "b", "c")


def test_while_tokens_come_nobody_is_asked():
    chain = Watched(THREE)
    for _ in range(50):
        chain.tokens(1)
        assert chain.liveness.decide(chain.now, {}) == ()
        assert chain.liveness.wake_at_s == pytest.approx(chain.now + LEAST_DEADLINE_S / 2)


def test_questions_come_at_half_of_the_deadline_and_a_silent_hop_is_lost_at_the_whole():
    chain = Watched(THREE)
    chain.tokens(10)
    quiet_s = chain.now
    chain.all_say(20)
    chain.says["b"] = None
    assert chain.run(quiet_s + 1.99) == []
    assert chain.run(quiet_s + 2.01) == [Lost("b", "silent for 2.0 s")]
    assert chain.found[0][0] == pytest.approx(quiet_s + 2.0)


def test_slow_tokens_have_a_later_deadline():
    chain = Watched(THREE)
    chain.tokens(30, every_s=2.0)
    assert chain.liveness.deadline_s == pytest.approx(10.0)
    quiet_s = chain.now
    chain.all_say(20)
    chain.says["b"] = None
    assert chain.run(quiet_s + 9.9) == []
    assert chain.run(quiet_s + 10.1) == [Lost("b", "silent for 10.0 s")]


def test_if_all_of_several_are_silent_nobody_is_blamed():
    chain = Watched(THREE)
    chain.tokens(10)
    assert chain.run(chain.now + 60.0) == []


def test_the_only_hop_is_judged_by_itself():
    chain = Watched(("a",))
    chain.tokens(10)
    assert chain.run(chain.now + 2.1) == [Lost("a", "silent for 2.0 s")]


def test_two_silent_ones_of_three_are_lost_together():
    chain = Watched(THREE)
    chain.tokens(10)
    chain.all_say(20)
    chain.says["a"] = chain.says["c"] = None
    assert {one.peer for one in chain.run(chain.now + 2.1)} == {"a", "c"}


def test_a_far_hop_has_the_time_of_its_round_trips():
    chain = Watched(THREE)
    chain.tokens(10)
    chain.rtts = {"b": 0.9}
    chain.all_say(20)
    chain.says["b"] = None
    assert chain.run(chain.now + 4.9) == []
    assert chain.run(chain.now + 0.2) == [Lost("b", "silent for 5.0 s")]


def test_who_was_asleep_itself_blames_nobody():
    chain = Watched(THREE)
    chain.tokens(10)
    chain.all_say(20)
    chain.says["b"] = None
    chain.run(chain.now + 1.5)  # asked, and b owes its answer
    chain.now += 8.0
    assert chain.liveness.decide(chain.now, {}) == ()
    assert chain.liveness.wake_at_s == pytest.approx(chain.now + 1.0)
    chain.all_say(20)
    assert chain.run(chain.now + 1.5) == []


def test_a_hop_that_answers_again_is_forgiven():
    chain = Watched(THREE)
    chain.tokens(10)
    chain.all_say(20)
    chain.says["b"] = None
    chain.run(chain.now + 1.9)
    chain.liveness.answered(chain.now, "b", Progress(20, 20, 1))
    chain.says["b"] = Progress(20, 20, 1)
    assert chain.run(chain.now + 9.0) == []


def test_a_long_prompt_is_left_alone_as_long_as_somebody_gets_on():
    chain = Watched(THREE)
    for second in range(1, 120):
        for place, peer in enumerate(THREE):
            at = max(0, second // 3 - place)
            chain.says[peer] = Progress(256 * at, 256 * max(at - 1, 0), 2_000_000)
        assert chain.run(float(second)) == []
    assert chain.liveness.progress_at_s > 110.0
    assert chain.liveness.furthest == 256 * 39


def test_a_chain_that_gets_no_further_has_made_no_progress():
    chain = Watched(THREE)
    chain.tokens(3)
    chain.all_say(13, busy_us=1)
    chain.run(chain.now + 30.0)
    assert chain.liveness.progress_at_s < 5.0


@pytest.mark.parametrize("receiver", [1, 2])
def test_a_link_that_carries_nothing_is_laid_anew_once_and_then_its_end_goes(receiver):
    """Two questions find it, so it takes two seconds and a bit; then two more."""
    chain = Watched(THREE)
    chain.tokens(10)
    quiet_s = chain.now
    for place, peer in enumerate(THREE):
        chain.says[peer] = Progress(20, 20) if place < receiver else Progress(19, 19)
    assert chain.run(quiet_s + 1.99) == []
    (relay,) = chain.run(quiet_s + 2.5)
    assert isinstance(relay, Relay)
    assert relay.receiver == receiver
    assert f"nothing arrives from {THREE[receiver - 1]} beyond position 19" in relay.reason
    (lost,) = chain.run(quiet_s + 4.5)
    assert isinstance(lost, Lost)
    assert lost.peer == THREE[receiver]
    assert "also over a new link" in lost.reason


def test_the_way_back_to_the_first_hop_is_a_link_like_any_other():
    chain = Watched(THREE)
    chain.tokens(10)
    chain.all_say(19)
    chain.says["c"] = Progress(19, 20)  # it has sampled token 19, and the first hop has not got it
    (relay,) = chain.run(chain.now + 2.5)
    assert isinstance(relay, Relay)
    assert relay.receiver == 0


def test_a_link_that_heals_is_no_link_that_fails_later():
    chain = Watched(THREE)
    chain.tokens(10)
    chain.says = {"a": Progress(20, 20), "b": Progress(19, 19), "c": Progress(19, 19)}
    chain.run(chain.now + 1.5)
    chain.says["b"] = Progress(20, 20)  # it was only slow; now the next one waits
    assert chain.run(chain.now + 1.0) == []


@pytest.mark.parametrize("busy", [0, 1, 2])
def test_who_waits_for_a_busy_hop_is_not_held_up(busy):
    """The windows are full up to the hop that computes: nothing moves before it, and no link is to blame."""
    chain = Watched(THREE)
    for place, peer in enumerate(THREE):
        received = 4096 - 1024 * place
        chain.says[peer] = Progress(received, received, 5_000_000 if place == busy else 0)
    chain.says.update({peer: Progress(1024, 1024) for peer in THREE[busy + 1 :]})
    if busy < 2:
        chain.says[THREE[busy]] = Progress(2048, 1024, 5_000_000)
    assert chain.run(9.0) == []


def test_many_tokens_on_the_way_over_a_slow_link_have_their_time():
    chain = Watched(THREE)
    chain.says = {"a": Progress(512, 256), "b": Progress(0, 0), "c": Progress(0, 0)}
    assert chain.run(12.0) == []
    assert isinstance(chain.run(15.0)[0], Relay)


def test_a_hop_that_computes_for_ever_is_stuck():
    chain = Watched(THREE)
    chain.tokens(10)
    quiet_s = chain.now
    for second in range(1, 12):
        chain.all_say(19)
        chain.says["b"] = Progress(20, 19, int(second * 1e6))
        chain.says["a"] = Progress(20, 20)
        found = chain.run(quiet_s + second + 0.5)
        if second <= LEAST_STUCK_S:
            assert found == []
    assert found == [Lost("b", "stuck in one step for 11 s")]


def test_steps_that_are_long_by_nature_are_not_stuck():
    slow = Watched(THREE)
    slow.tokens(5, every_s=20.0, compute_s=6.0)
    slow.all_say(20, busy_us=1)
    assert slow.run(slow.now + 29.0) == []
    slow.all_say(20, busy_us=31_000_000)
    assert {one.peer for one in slow.run(slow.now + 120.0)} == set(THREE)

    prompt = Watched(THREE)
    prompt.begin(step_s=0.1)  # a chunk of 256 tokens may take half a minute, and is given five times as long
    prompt.all_say(256, 0, busy_us=120_000_000)
    assert prompt.run(60.0) == []


def test_a_newcomer_in_the_place_of_a_peer_of_the_same_name_starts_afresh():
    chain = Watched(THREE)
    chain.tokens(10)
    chain.all_say(20)
    chain.says["b"] = None
    chain.run(chain.now + 2.1)
    chain.begin(opened=("b",))
    assert chain.run(chain.now + 1.9) == []


ANSWERS = st.builds(Progress, st.integers(0, 600), st.integers(0, 600), st.sampled_from([0, 0, 5, 10**7, 10**9]))


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(
            st.sampled_from(["token", "answer", "look", "sleep"]),
            st.integers(0, 4),
            ANSWERS,
            st.floats(0.0, 3.0),
        ),
        max_size=60,
    ),
)
def test_whatever_is_heard_verdicts_name_hops_of_the_chain_and_the_clock_goes_on(n_hops, heard):
    peers = tuple("abcd"[:n_hops])
    liveness, now = Liveness(), 0.0
    liveness.begin(now, [(peer, 0.01) for peer in peers], peers)
    for what, who, answer, took_s in heard:
        now += took_s
        if what == "token":
            liveness.token(now, answer.received, [HopTiming(1, 1)] * who)
        elif what == "answer":
            liveness.answered(now, "abcde"[who], answer)
        elif what == "look" or liveness.is_due(now):
            for verdict in liveness.decide(now, {"a": took_s}):
                assert isinstance(verdict, Ask) or (
                    verdict.peer in peers if isinstance(verdict, Lost) else 0 <= verdict.receiver < n_hops > 1
                )
            assert liveness.wake_at_s > now
