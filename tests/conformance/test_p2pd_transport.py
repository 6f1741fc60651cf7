"""The conformance suite of the transport port, run by the second engine, alone and mixed with the first."""

from __future__ import annotations

import pytest
import trio

from tests.conformance.p2pd_rig import LIBP2P, P2PD, engine_rig, needs_engine
from tests.conformance.transport_suite import CHECKS, DEATH_CHECKS, FAST, FULL, SLOW_CHECKS, Check, Scale, check_name

pytestmark = [pytest.mark.loopback, needs_engine]


def _run(check: Check, engines: tuple[str, ...], scale: Scale = FAST) -> None:
    async def main() -> None:
        async with engine_rig(engines, scale) as rig:
            await check(rig)

    trio.run(main)


# The fast part of the suite; the slow part has all of it.
QUICK_LOOK = {
    "an_unknown_protocol_is_refused",
    "a_connection_serves_both_peers",
    "frames_of_all_sizes_echo",
    "an_end_comes_after_all_frames",
}
# What depends on how the two engines end, hold back and miss each other. A stranger whose process is stopped is not
# among it: its daemon accepts for it, and the first engine asks a stranger for no more than that.
MIXED = {
    "a_connection_serves_both_peers",
    "a_transport_that_shuts_down_does_not_end_its_streams",
    "frames_keep_their_order_and_borders",
    "an_end_comes_after_all_frames",
    "a_reset_is_not_an_end",
    "a_blocked_send_wakes_on_reset",
    "one_side_ends_while_the_other_sends",
    "cancelled_sends_corrupt_nothing",
    "a_reader_that_pauses_holds_its_sender_back",
    "many_streams_are_open_at_once",
    "a_killed_peer_is_noticed_within_a_second",
}
LONG = {"the_largest_frame_passes", "a_reader_that_pauses_for_long_loses_nothing", "an_idle_connection_stays"}
ALL = [*CHECKS, *DEATH_CHECKS, *(check for check in SLOW_CHECKS if check_name(check) in LONG)]


def _named(names: set[str]) -> list[Check]:
    found = [check for check in ALL if check_name(check) in names]
    assert len(found) == len(names), "a check was renamed"
    return found


@pytest.mark.parametrize("check", _named(QUICK_LOOK), ids=check_name)
def test_a_quick_look(check: Check) -> None:
    _run(check, (P2PD,))


@pytest.mark.slow
@pytest.mark.parametrize("check", ALL, ids=check_name)
def test_checks(check: Check) -> None:
    _run(check, (P2PD,), FULL if check_name(check) in LONG else FAST)


@pytest.mark.slow
@pytest.mark.parametrize("engines", [(LIBP2P, P2PD), (P2PD, LIBP2P)], ids="-".join)
@pytest.mark.parametrize("check", _named(MIXED), ids=check_name)
def test_peers_of_both_engines(check: Check, engines: tuple[str, ...]) -> None:
    _run(check, engines)
