"""Who is there: what a table of statuses takes in, and what it forgets."""

from __future__ import annotations

import msgspec
import pytest

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.training import StageStatus
from mycel.swarm.training import members as module
from mycel.swarm.training.members import MAX_MEMBERS, SILENT_S, Members, check_status
from mycel.swarm.training.plan import RunPlan

RUN = bytes(range(32))
PLAN = RunPlan(RUN, ((0, 1), (1, 2)), 10, 4, 2, 3)


def said(seq: int, stage: int = 0, state: str = "training", **more) -> StageStatus:
    return StageStatus(RUN, seq, stage, state, **{"version": 3, **more})


def test_the_newest_status_counts_and_what_was_overtaken_does_not():
    table = Members("me", RUN)
    assert table.hear("a", said(2), 0.0)
    assert not table.hear("a", said(2, 1), 0.1)
    assert not table.hear("a", said(1, 1), 0.2)
    assert table.hear("a", said(3, 1), 0.3)
    member = table.get("a")
    assert member is not None
    assert (member.stage, member.version, member.heard_s) == (1, 3, 0.3)


def test_another_run_is_ignored():
    table = Members("me", RUN)
    assert not table.hear("a", msgspec.structs.replace(said(1), run=bytes(32)), 0.0)
    assert table.get("a") is None


def test_who_is_lost_does_not_come_back_by_what_it_said_before():
    table = Members("me", RUN)
    table.hear("a", said(5), 0.0)
    assert table.lose("a")
    assert not table.lose("a")
    assert not table.hear("a", said(5), 1.0)
    assert table.hear("a", said(6), 1.0)


def test_who_is_silent_is_dropped_and_oneself_never_is():
    table = Members("me", RUN)
    table.hear("me", said(1), 0.0)
    table.hear("a", said(1), 0.0)
    table.hear("b", said(1), 1.0)
    assert table.expire(SILENT_S) == ()
    assert table.expire(SILENT_S + 0.5) == ("a",)
    assert [member.peer for member in table] == ["b", "me"]
    assert table.expire(100.0) == ("b",)
    assert [member.peer for member in table] == ["me"]


def test_a_peer_that_is_gone_for_long_may_begin_to_count_anew():
    """Its clock was set back while it was down."""
    table = Members("me", RUN)
    table.hear("a", said(500), 0.0)
    table.lose("a")
    table.expire(59.0)
    assert not table.hear("a", said(1), 59.0)
    table.expire(61.0)
    assert table.hear("a", said(1), 61.0)


def test_the_table_and_its_memory_of_the_gone_are_bounded():
    table = Members("me", RUN)
    for index in range(MAX_MEMBERS):
        assert table.hear(f"p{index}", said(1), 0.0)
    assert not table.hear("one too many", said(1), 0.0)
    assert table.hear("me", said(1), 0.0), "there is always room for oneself"
    for index in range(3 * MAX_MEMBERS):
        table.lose(f"p{index}")
        table.hear(f"p{index + MAX_MEMBERS}", said(1), 0.0)
    assert len(table._seen) <= 2 * module.MAX_MEMBERS


def test_of_stage_and_trainers_are_in_order_of_peer_id():
    table = Members("me", RUN)
    table.hear("c", said(1, trains=True), 0.0)
    table.hear("a", said(1, state="leaving", trains=True), 0.0)
    table.hear("b", said(1, state="observing", trains=True), 0.0)
    table.hear("d", said(1, stage=1, state="joining"), 0.0)
    assert [m.peer for m in table.of_stage(0)] == ["a", "c"]
    assert [m.peer for m in table.of_stage(0, "observing")] == ["b"]
    assert table.trainers() == ("b", "c")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": bytes(32)}, "another run"),
        ({"stage": 2}, "at stage 2 of 2"),
        ({"moving_to": 5}, "at stage 5 of 2"),
        ({"version": 11}, "has made 11 of 10 steps"),
        ({"counted": b"\x10"}, "numbers that no step has"),
        ({"params": b"short"}, "a digest of 5 bytes"),
    ],
)
def test_a_status_that_fits_into_no_table_of_the_run_is_refused(change: dict, reason: str):
    assert check_status(said(1, counted=b"\x0f"), PLAN, "a")
    with pytest.raises(RemoteProtocolError, match=reason):
        check_status(msgspec.structs.replace(said(1), **change), PLAN, "a")
