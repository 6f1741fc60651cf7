"""A microbatch's walk as its trainer decides it: positions, deadlines, replacements, and which numbers are due."""

from collections.abc import Iterable
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.training import Passed, StageStatus, WorkFailed
from mycel.swarm.training import numbers
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.walks import STATUS_LAG_S, Finished, Seen, Send, Wait, Walk, drivers, due, look, nobody, owned
from mycel.swarm.training.wiring import Wiring

RUN = bytes(32)
PLAN = RunPlan(RUN, ((0, 1), (1, 2), (2, 3)), n_steps=5, n_microbatches=8, n_sequences=2, n_tokens=4)


class Scene:
    """Peers a0, b0 (stage 0), a1, ... with what they say, one walk, and a clock."""

    def __init__(self, per_stage: int = 2, n_stages: int = 3) -> None:
        self.now = 0.0
        self.n_stages = n_stages
        self.there = [{f"{letter}{stage}" for letter in "abcd"[:per_stage]} for stage in range(n_stages)]
        self.counted: dict[str, set[int]] = {}
        self.ready: set[str] = set.union(*self.there)
        self.decided = False
        self.wiring = Wiring(n_stages, Random(0))
        self.walk = Walk(PLAN.work(0, 3), n_stages)

    def seen(self) -> Seen:
        counted = tuple({peer: numbers.of(self.counted.get(peer, ())) for peer in stage} for stage in self.there)
        ready = tuple(frozenset(stage & self.ready) for stage in self.there)
        return Seen(
            counted, ready, {}, {peer: (f"/at/{peer}",) for stage in self.there for peer in stage}, self.decided
        )

    def decide(self, after_s: float = 0.0):
        self.now += after_s
        for stage, there in enumerate(self.there):
            self.wiring.set_peers(stage, dict.fromkeys(there, 10.0), self.now)
        return self.walk.decide(self.now, self.seen(), self.wiring)

    def begin(self) -> Send:
        decision = self.decide()
        assert isinstance(decision, Send)
        return decision

    def passed(
        self, stage: int, *, backward: bool = False, peer: str = "", turn: int = 0, after_s: float = 0.1
    ) -> bool:
        self.now += after_s
        message = Passed(self.walk.work.id, turn or self.walk.turn, stage, backward)
        return self.walk.passed(peer or self.walk.peers[stage], message, self.now, self.wiring)

    def failed(self, stage: int, blamed: str = "", *, turn: int = 0, peer: str = "") -> None:
        peer = peer or self.walk.peers[stage]
        message = WorkFailed(self.walk.work.id, turn or self.walk.turn, stage, blamed or peer, "broken")
        self.walk.failed(peer, message, self.now, self.wiring)

    def count(self, stage: int) -> None:
        """The peer of this walk has it in its ledger, and its status says so."""
        self.counted.setdefault(self.walk.peers[stage], set()).add(3)

    def walk_through(self) -> None:
        self.begin()
        for stage in range(self.n_stages - 1):
            self.passed(stage)
        for stage in reversed(range(self.n_stages)):
            self.passed(stage, backward=True)
            self.count(stage)


def flags(send: Send) -> list[tuple[bool, bool]]:
    return [(way.has_input, way.has_gradient) for way in send.ways]


# ---- a walk that goes well


def test_it_begins_with_one_peer_of_each_stage_and_where_it_is():
    scene = Scene()
    send = scene.begin()
    assert send.turn == 1
    assert [way.peer.peer[1:] for way in send.ways] == ["0", "1", "2"]
    assert [way.peer.addresses for way in send.ways] == [(f"/at/{peer}",) for peer in scene.walk.peers]
    assert flags(send) == [(False, False)] * 3
    assert send.reason == "begins"


def test_it_waits_for_each_stage_in_turn_and_is_done_at_the_end():
    scene = Scene()
    scene.begin()
    heard = [(0, False), (1, False), (2, True), (1, True), (0, True)]
    waited_for = []
    for stage, backward in heard:
        decision = scene.decide()
        assert isinstance(decision, Wait)
        assert decision.until_s == pytest.approx(scene.now + 2.0)
        waited_for.append(decision.reason[:7])
        scene.passed(stage, backward=backward)
    assert waited_for == ["stage 0", "stage 1", "stage 2", "stage 1", "stage 0"]
    assert isinstance(scene.decide(), Finished)
    assert scene.walk.finished


def test_what_is_measured_is_the_time_of_each_peer_in_both_directions():
    scene = Scene(per_stage=1)
    scene.begin()
    scene.passed(0, after_s=0.1)
    scene.passed(1, after_s=0.2)
    scene.passed(2, backward=True, after_s=0.4)
    scene.passed(1, backward=True, after_s=0.8)
    scene.passed(0, backward=True, after_s=1.6)
    assert [scene.wiring.expected_s(s, f"a{s}") for s in range(3)] == pytest.approx([1.7 / 2, 1.0 / 2, 0.4 / 2])


def test_a_report_that_was_lost_spoils_no_measure():
    scene = Scene(per_stage=1)
    scene.begin()
    scene.passed(1, after_s=0.3)  # that of stage 0 is lost
    scene.passed(2, backward=True, after_s=0.4)
    scene.passed(0, backward=True, after_s=9.0)  # that of stage 1 is lost
    assert [scene.wiring.expected_s(s, f"a{s}") for s in range(3)] == pytest.approx([0.1, 0.1, 0.4 / 2])
    decision = scene.decide()
    assert isinstance(decision, Wait)
    assert decision.reason.startswith("stage 1")


def test_reports_that_come_twice_change_nothing():
    scene = Scene(per_stage=1)
    scene.begin()
    for _ in range(2):
        scene.passed(0)
    scene.passed(1)
    for _ in range(2):
        scene.passed(2, backward=True, after_s=0.2)
    assert scene.wiring.expected_s(2, "a2") == pytest.approx(0.1)
    decision = scene.decide()
    assert isinstance(decision, Wait)
    assert decision.reason.startswith("stage 1")


def test_a_single_stage_is_a_pipeline_too():
    scene = Scene(n_stages=1)
    scene.begin()
    scene.passed(0, backward=True)
    assert isinstance(scene.decide(), Finished)


def test_counted_by_all_as_statuses_say_is_done_whoever_did_it():
    scene = Scene()
    scene.counted = {"a0": {3}, "b1": {3}, "a2": {3}}
    assert isinstance(scene.decide(), Finished)


# ---- trouble


def test_a_deadline_replaces_the_one_who_is_at_work():
    scene = Scene()
    scene.begin()
    scene.passed(0)
    silent = scene.walk.peers[1]
    assert isinstance(scene.decide(1.9), Wait)
    send = scene.decide(0.2)
    assert isinstance(send, Send)
    assert (send.turn, flags(send)) == (2, [(True, False), (False, False), (False, False)])
    (one,) = send.replaced
    assert (one.stage, one.peer, one.reason) == (1, silent, "no word for 2.1 s")
    assert one.by == scene.walk.peers[1] != silent
    assert scene.wiring.expected_s(1, silent) == pytest.approx(2.1 / 2)


def test_deadlines_grow_with_the_queue_and_stop_while_a_stage_makes_the_step_before():
    scene = Scene(per_stage=1)
    scene.ready -= {"a1"}
    scene.begin()
    scene.passed(0)
    for _ in range(20):
        assert isinstance(scene.decide(1.5), Wait)
    scene.ready |= {"a1"}
    assert isinstance(scene.decide(1.5), Wait)
    assert isinstance(scene.decide(1.5), Send)


def test_a_lone_peer_is_asked_again_when_its_ban_is_over():
    scene = Scene(per_stage=1)
    scene.begin()
    scene.failed(0)
    decision = scene.decide()
    assert isinstance(decision, Wait)
    assert decision.until_s == 1.0
    assert "banned" in decision.reason
    send = scene.decide(1.0)
    assert isinstance(send, Send)
    assert send.turn == 2
    assert send.replaced == ()


def test_whoever_is_gone_is_replaced_at_once_also_before_its_turn():
    scene = Scene()
    scene.begin()
    gone = scene.walk.peers[2]
    scene.there[2].remove(gone)
    send = scene.decide()
    assert isinstance(send, Send)
    assert [(one.stage, one.peer, one.reason) for one in send.replaced] == [(2, gone, "is gone")]


def test_backward_is_redone_elsewhere_from_what_others_keep():
    scene = Scene()
    scene.begin()
    scene.passed(0)
    scene.passed(1)
    scene.passed(2, backward=True)
    gone = scene.walk.peers[1]
    scene.there[1].remove(gone)
    send = scene.decide()
    assert isinstance(send, Send)
    assert flags(send) == [(True, False), (False, False), (True, True)]
    scene.passed(0)
    scene.passed(1)
    scene.passed(2, backward=True)
    decision = scene.decide()
    assert isinstance(decision, Wait)
    assert decision.reason.startswith("stage 1")
    scene.passed(1, backward=True)
    scene.passed(0, backward=True)
    assert isinstance(scene.decide(), Finished)


def test_a_counted_gradient_that_dies_with_its_peer_is_due_again():
    scene = Scene()
    scene.walk_through()
    assert isinstance(scene.decide(), Finished)
    scene.there[2].remove(scene.walk.peers[2])
    assert due(0b1000, scene.seen(), {3: scene.walk}, (), scene.now) == (3,)
    send = scene.decide()
    assert isinstance(send, Send)
    assert flags(send) == [(True, True), (True, True), (False, False)]
    assert scene.passed(0, backward=True)
    decision = scene.decide()
    assert isinstance(decision, Wait)
    assert decision.reason.startswith("stage 1"), "it still walks on to the last stage"
    scene.passed(1, backward=True)
    scene.passed(2, backward=True)
    assert isinstance(scene.decide(), Finished)


def test_whoever_has_counted_it_is_chosen_by_a_trainer_that_takes_over():
    scene = Scene()
    scene.counted = {"b1": {3, 4}, "b2": {3}}
    send = scene.begin()
    assert scene.walk.peers[1:] == ["b1", "b2"]
    assert flags(send)[1:] == [(True, True), (True, True)]


def test_a_late_report_of_a_replaced_peer_counts_and_it_is_taken_back():
    scene = Scene()
    scene.begin()
    scene.passed(0)
    slow = scene.walk.peers[1]
    assert isinstance(scene.decide(3.0), Send)
    assert scene.passed(1, backward=True, peer=slow, turn=1) is False
    scene.passed(0)
    assert isinstance(scene.decide(), Wait)
    scene.failed(1)
    send = scene.decide()
    assert isinstance(send, Send)
    assert scene.walk.peers[1] == slow, "nobody else is free"
    assert flags(send)[1] == (True, True)


def test_who_lacks_what_it_was_said_to_have_gets_it_without_blame():
    scene = Scene(per_stage=1)
    scene.walk_through()
    scene.decide()
    scene.counted["a2"].clear()
    send = scene.decide()
    assert isinstance(send, Send)
    assert flags(send) == [(True, True), (True, True), (True, False)]
    scene.counted["a1"].clear()
    scene.failed(1)
    send = scene.decide()
    assert isinstance(send, Send), "no ban: it has been restarted"
    assert flags(send) == [(True, True), (False, False), (True, False)]
    scene.failed(1)
    assert isinstance(scene.decide(), Wait), "the second time it is to blame"


def test_who_says_that_it_counted_and_never_shows_it_is_replaced():
    scene = Scene()
    scene.walk_through()
    liar = scene.walk.peers[1]
    scene.counted[liar].clear()
    assert isinstance(scene.decide(), Finished), "its status may be on its way"
    scene.now += STATUS_LAG_S
    assert due(0b1000, scene.seen(), {3: scene.walk}, (), scene.now) == (3,)
    send = scene.decide()
    assert isinstance(send, Send)
    assert [one.peer for one in send.replaced] == [liar]


def test_what_was_taken_back_is_walked_again_at_once_and_without_blame():
    scene = Scene()
    scene.walk_through()
    assert isinstance(scene.decide(), Finished)
    scene.counted[scene.walk.peers[1]].clear()  # for one who counted it, too, and is gone in the next moment
    send = scene.decide()
    assert isinstance(send, Send)
    assert not send.replaced
    assert [way.has_gradient for way in send.ways] == [True, False, True]


@pytest.mark.parametrize(("by", "blamed"), [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_a_neighbour_may_be_blamed(by, blamed):
    scene = Scene()
    scene.begin()
    bad = scene.walk.peers[blamed]
    scene.failed(by, bad)
    send = scene.decide()
    assert isinstance(send, Send)
    assert [(one.stage, one.peer) for one in send.replaced] == [(blamed, bad)]
    assert "broken (says " in send.replaced[0].reason
    assert not scene.wiring.is_free(blamed, bad, scene.now)


def test_nobody_else_may_be_blamed():
    scene = Scene()
    scene.begin()
    with pytest.raises(RemoteProtocolError, match="no neighbour"):
        scene.failed(0, scene.walk.peers[2])
    with pytest.raises(RemoteProtocolError, match="no neighbour"):
        scene.failed(0, "somebody")
    assert isinstance(scene.decide(), Wait)


def test_echoes_change_nothing():
    scene = Scene()
    scene.begin()
    assert isinstance(scene.decide(3.0), Send)
    idle = ({"a1", "b1"} - {scene.walk.peers[1]}).pop()
    scene.passed(1, backward=True, peer=idle)  # it was never asked
    scene.passed(0, backward=True, turn=3)  # a turn to come: of a trainer that lived before
    scene.failed(0, turn=1)  # a turn that was given up
    scene.failed(0, turn=9)
    decision = scene.decide()
    assert isinstance(decision, Wait)
    assert decision.reason.startswith("stage 0")


def test_a_stage_that_there_is_not_is_a_broken_rule():
    scene = Scene()
    scene.begin()
    with pytest.raises(RemoteProtocolError, match="stage 7 of 3"):
        scene.passed(7, peer="a0")


def test_a_stage_without_peers_is_waited_for():
    scene = Scene()
    scene.there[1].clear()
    assert scene.decide() == Wait(inf, "nobody serves stage 1")
    scene.there[1].add("c1")
    send = scene.decide()
    assert isinstance(send, Send)
    assert scene.walk.peers[1] == "c1"


def test_a_step_that_somebody_has_made_is_over():
    scene = Scene()
    scene.begin()
    scene.decided = True
    assert scene.decide() == Finished("the step is made")
    assert due(0b11111111, scene.seen(), {}, (), 0.0) == ()


def test_a_walk_that_comes_back_to_its_trainer_begins_another_turn():
    scene = Scene()
    scene.begin()
    scene.walk.pause()
    send = scene.decide(100.0)
    assert isinstance(send, Send)
    assert (send.turn, send.replaced) == (2, ())


REPORTS = st.lists(
    st.tuples(
        st.sampled_from(["passed", "failed", "gone", "back", "count", "wait"]),
        st.integers(0, 2),
        st.booleans(),
        st.sampled_from("ab"),
        st.integers(1, 4),
        st.floats(0.0, 6.0),
    ),
    max_size=40,
)


def happen(scene: Scene, kind: str, stage: int, peer: str, turn: int, *, backward: bool) -> None:
    if kind == "passed":
        scene.passed(stage, backward=backward, peer=peer, turn=turn, after_s=0.0)
    elif kind == "failed" and scene.walk.peers[stage] == peer:
        scene.failed(stage, peer=peer, turn=turn)
    elif kind == "gone" and len(scene.there[stage]) > 1:
        scene.there[stage].discard(peer)
        scene.counted.pop(peer, None)
    elif kind == "back":
        scene.there[stage].add(peer)
    elif kind == "count" and peer in scene.there[stage]:
        scene.counted.setdefault(peer, set()).add(3)


@given(REPORTS)
def test_whatever_is_heard_it_ends_when_all_go_on_honestly(reports: Iterable[tuple[str, int, bool, str, int, float]]):
    scene = Scene()
    for kind, stage, backward, letter, turn, after_s in reports:
        happen(scene, kind, stage, f"{letter}{stage}", turn, backward=backward)
        last = scene.decide(after_s)
        if isinstance(last, Send):
            assert all(peer in scene.there[at] for at, peer in enumerate(scene.walk.peers))
            assert all(way.has_input or not way.has_gradient for way in last.ways)
    for _ in range(6):
        decision = scene.decide(61.0)  # whoever is at work is asked again, or stands in for who was banned
        if isinstance(decision, Finished):
            return
        if isinstance(decision, Wait):
            continue
        for stage in range(3):
            assert scene.passed(stage, backward=True, after_s=0.0)
            scene.count(stage)
        assert isinstance(scene.decide(), Finished)
        return
    pytest.fail("it never began again")


# ---- the table, and what is due


def members_of(*statuses: tuple[str, int, int, Iterable[int], str, bool]) -> Members:
    members = Members("a0", RUN)
    for seq, (peer, stage, version, counted, state, trains) in enumerate(statuses):
        status = StageStatus(
            RUN, seq, stage, state, version, counted=numbers.to_bytes(numbers.of(counted)), trains=trains, queue_s=seq
        )
        members.hear(peer, status, 0.0)
    return members


def test_the_table_as_a_step_sees_it():
    members = members_of(
        ("a0", 0, 4, [1, 2], "training", True),
        ("b0", 0, 3, [5], "training", False),
        ("c0", 0, 2, [5], "training", False),
        ("d0", 0, 4, [6], "observing", False),
        ("a1", 1, 4, [2], "leaving", False),
        ("b1", 1, 3, [5], "leaving", False),
    )
    seen = look(members, 4, 2)
    assert seen.counted == ({"a0": 0b110, "b0": 0}, {"a1": 0b100})
    assert seen.ready == (frozenset({"a0"}), frozenset({"a1"}))
    assert seen.queue_s["a1"] == 4.0
    assert not seen.decided
    assert seen.missing(0b1111) == 0b1011
    assert look(members, 3, 2).decided
    assert seen.changed(nobody(2)) == 0b110


def test_newcomers_drive_from_the_next_step_on_and_leavers_to_the_end_of_theirs():
    members = members_of(
        ("a0", 0, 0, [], "training", True),
        ("b0", 0, 0, [], "observing", True),
        ("c0", 0, 0, [], "leaving", True),
        ("d0", 0, 0, [], "training", False),
    )
    assert drivers(members) == ("a0", "c0")
    only = members_of(("b0", 0, 0, [], "observing", True), ("d0", 0, 0, [], "joining", True))
    assert drivers(only) == ("b0",)


def test_every_number_has_one_trainer_and_only_the_share_of_a_dead_one_moves():
    trainers = ("a0", "b1", "c2")
    plan = RunPlan(RUN, ((0, 1),), n_steps=5, n_microbatches=90, n_sequences=2, n_tokens=4)
    shares = {peer: owned(plan, 1, trainers, peer) for peer in trainers}
    assert sum(share.bit_count() for share in shares.values()) == 90
    assert shares["a0"] | shares["b1"] | shares["c2"] == plan.everything
    after = {peer: owned(plan, 1, ("a0", "c2"), peer) for peer in ("a0", "c2")}
    assert all(after[peer] & shares[peer] == shares[peer] for peer in after)
    assert after["a0"] | after["c2"] == plan.everything
    assert owned(plan, 1, ("b1",), "a0") == 0


def test_due_is_what_some_stage_lacks_and_is_not_on_its_way():
    scene = Scene()
    scene.counted = {"a0": {0, 1, 2}, "b1": {0, 1}, "a2": {0, 1, 2}, "b2": {5}}
    assert due(0b100111, scene.seen(), {}, (), 0.0) == (2, 5)
    assert due(0b100111, scene.seen(), {}, (5,), 0.0) == (2,)
    assert due(0b11, scene.seen(), {}, (), 0.0) == ()
