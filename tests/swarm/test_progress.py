"""How far a run is, from statuses over time."""

from __future__ import annotations

import math

import pytest

from mycel.protocols.training import Reduced, StageStatus
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.progress import (
    Progress,
    ProgressTracker,
    StageProgress,
    grad_norm,
    mean_loss,
    progress_line,
    show_duration,
    stage_rows,
)

RUN = bytes(32)
# 16 target tokens a step.
PLAN = RunPlan(RUN, ((0, 1), (1, 2)), n_steps=600, n_microbatches=2, n_sequences=2, n_tokens=4)


class Peers:
    """The table of a run of two stages, told what each peer says; `look` is a second later each time."""

    def __init__(self) -> None:
        self.members = Members("a", RUN)
        self.tracker = ProgressTracker(PLAN)
        self.now = 100.0
        self._seq = 0

    def say(self, peer: str, stage: int, version: int, state: str = "training", **more: object) -> None:
        self._seq += 1
        self.members.hear(peer, StageStatus(RUN, self._seq, stage, state, version, **more), self.now)  # type: ignore[arg-type]

    def all_say(self, version: int, loss: float = 32.0, **more: object) -> None:
        last = (Reduced(version - 1, bytes(32), 9.0, loss),) if version else ()
        first = (Reduced(version - 1, bytes(32), 16.0),) if version else ()
        for peer, stage in (("a", 0), ("b", 0), ("c", 1), ("d", 1)):
            self.say(peer, stage, version, reduced=last if stage else first, **more)

    def look(self, after_s: float = 1.0) -> Progress:
        self.now += after_s
        return self.tracker.observe(self.members, self.now)


def test_before_the_first_step_there_is_no_rate_and_no_loss() -> None:
    peers = Peers()
    peers.all_say(0)
    progress = peers.look()
    assert (progress.step, progress.tokens, progress.loss, progress.tokens_per_s, progress.eta_s) == (
        0,
        0,
        None,
        None,
        None,
    )
    assert not progress.is_done
    assert progress_line(progress) == "step 0/600  0 tokens  peers 2+2"
    empty = Peers().look()
    assert empty.stages == (StageProgress(), StageProgress())


def test_loss_and_norm_are_of_the_last_step_that_is_done() -> None:
    peers = Peers()
    peers.all_say(3, loss=40.0)
    assert peers.look().loss == 2.5
    assert mean_loss(peers.members, PLAN, 2) == 2.5
    assert mean_loss(peers.members, PLAN, 1) is None, "nobody says it any more"
    assert grad_norm(peers.members, PLAN, 2) == 5.0
    assert grad_norm(peers.members, PLAN, 3) is None
    peers.members.lose("a")
    peers.members.lose("b")
    assert grad_norm(peers.members, PLAN, 2) is None, "a stage's part is missing"


def test_a_loss_of_zero_is_a_loss() -> None:
    peers = Peers()
    peers.all_say(1, loss=16.0)
    peers.look()
    peers.all_say(2, loss=0.0)
    assert peers.look().loss == 0.0


def test_a_loss_that_was_missed_stays_the_one_before() -> None:
    peers = Peers()
    peers.all_say(1, loss=16.0)
    peers.look()
    for peer, stage in (("a", 0), ("b", 0), ("c", 1), ("d", 1)):
        peers.say(peer, stage, 2)
    progress = peers.look()
    assert (progress.step, progress.loss) == (2, 1.0)


def test_the_numbers_of_a_step_are_those_of_the_smallest_id() -> None:
    peers = Peers()
    peers.say("d", 1, 1, reduced=(Reduced(0, bytes(32), 1.0, 160.0),))
    peers.say("c", 1, 1, reduced=(Reduced(0, bytes(32), 1.0, 32.0),))
    assert mean_loss(peers.members, PLAN, 0) == 2.0


def test_rates_are_of_the_last_steps_alone() -> None:
    peers = Peers()
    peers.all_say(0)
    peers.look(after_s=1000.0)
    for version in range(1, 5):
        peers.all_say(version)
        progress = peers.look(after_s=8.0)
    assert progress.tokens_per_s == 2.0
    assert progress.seconds == 8.0
    assert progress.commits == 4
    assert progress.eta_s == (600 - 4) * 8.0
    for version in range(5, 26):
        peers.all_say(version)
        progress = peers.look(after_s=4.0)
    assert progress.tokens_per_s == 4.0, "the slow beginning is forgotten"
    assert peers.look(after_s=50.0).tokens_per_s == 4.0, "of steps, not of waiting"


def test_who_goes_back_to_a_checkpoint_begins_anew() -> None:
    peers = Peers()
    for version in range(10):
        peers.all_say(version)
        peers.look(after_s=1.0)
    peers.all_say(4)
    progress = peers.look()
    assert (progress.step, progress.tokens_per_s, progress.seconds) == (4, None, None)
    for version in (5, 6):
        peers.all_say(version)
        progress = peers.look(after_s=2.0)
    assert progress.tokens_per_s == 8.0


def test_the_furthest_counts_and_who_joins_does_not() -> None:
    peers = Peers()
    peers.all_say(7)
    peers.say("a", 0, 8)
    peers.say("z", 0, 599, "joining")
    progress = peers.look()
    assert progress.step == 8
    assert progress.stages[0] == StageProgress(training=2, joining=1, version=7)


def test_bytes_are_summed_over_peers_also_of_those_who_have_gone_or_begin_again() -> None:
    peers = Peers()
    peers.all_say(1, sent_bytes=1000)
    assert peers.look().sent_bytes == 4000
    peers.all_say(2, sent_bytes=1500)
    peers.look()
    peers.members.lose("d")
    peers.all_say(3, sent_bytes=2000)
    progress = peers.look()
    assert progress.sent_bytes == 8000
    assert progress.step_bytes == 2000.0
    peers.say("d", 1, 3, sent_bytes=300)
    progress = peers.look()
    assert progress.sent_bytes == 8300, "a process that was started again counts from 0"
    peers.say("e", 1, 3, sent_bytes=5000)
    peers.all_say(4, sent_bytes=2000)
    assert peers.look().step_bytes == pytest.approx((2000 + 2000 + 2000) / 3), "what e had sent before is no rate"


def test_who_was_lost_and_who_joined() -> None:
    peers = Peers()
    peers.all_say(0)
    peers.look()
    assert peers.tracker.take_changes().joined == (), "the beginning is no change"
    peers.all_say(1)
    peers.look()
    peers.members.lose("b")
    peers.say("c", 1, 1, "leaving")
    peers.look()
    assert peers.tracker.take_changes().lost == ("b",)
    peers.members.lose("c")
    peers.say("e", 0, 1, "joining")
    peers.look()
    peers.say("e", 0, 1, "observing")
    peers.look()
    changes = peers.tracker.take_changes()
    assert (changes.joined, changes.lost) == ((), ()), "who said that it leaves is not lost, who observes is not there"
    peers.say("e", 0, 2)
    peers.look()
    peers.look()
    assert peers.tracker.take_changes().joined == ("e",)
    assert peers.tracker.take_changes().joined == ()


def test_a_stage_in_words_and_numbers() -> None:
    peers = Peers()
    peers.say("a", 0, 5, queue_s=0.1, sequences_per_s=10.0)
    peers.say("b", 0, 4, "leaving", queue_s=0.3, sequences_per_s=5.5)
    peers.say("c", 0, 4, "observing", queue_s=9.0, sequences_per_s=99.0)
    progress = peers.look()
    assert progress.stages[0].peers == 2
    assert stage_rows(progress) == [
        ("stage", "peers", "state", "queue", "rate", "version"),
        ("0", "2", "1 training, 1 observing, 1 leaving", "200 ms", "15.5 sequences/s", "4"),
        ("1", "0", "nobody", "0 ms", "0.0 sequences/s", "0"),
    ]


def test_the_line_of_the_documentation() -> None:
    stages = (StageProgress(training=2),) * 3
    progress = Progress(120, 600, 983_040, 4.8123, 9310.2, 372.0, 0.9, stages, 10**9, 1.9e6, 120)
    assert progress_line(progress) == (
        "step 120/600  983,040 tokens  loss 4.812  9,310 tokens/s  ETA 6m 12s  peers 2+2+2  1.9 MB/step"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.2, "0s"),
        (48.4, "48s"),
        (59.9, "1m 00s"),
        (372, "6m 12s"),
        (11_100, "3h 05m"),
        (187_200, "2d 04h"),
        (-1, "0s"),
        (math.inf, "11574d 01h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown


def test_the_counters_of_peers_that_come_and_go_take_bounded_memory() -> None:
    peers = Peers()
    for index in range(6000):
        peers.say(f"peer {index}", 0, 1, sent_bytes=1)
        if index % 1000 == 999:
            peers.look()
            for member in tuple(peers.members):
                peers.members.lose(member.peer)
    assert len(peers.tracker._said_bytes) == 4096
    assert peers.look().sent_bytes == 6000
