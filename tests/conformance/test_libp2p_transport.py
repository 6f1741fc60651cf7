"""The conformance suite of the transport port, run by the real adapter: real sockets, time and processes."""

from __future__ import annotations

import pytest
import trio
from _pytest.mark.structures import ParameterSet

from tests.conformance.libp2p_rig import libp2p_rig
from tests.conformance.transport_suite import CHECKS, DEATH_CHECKS, FAST, FULL, SLOW_CHECKS, Check, Scale, check_name

pytestmark = pytest.mark.loopback


def _run(check: Check, scale: Scale) -> None:
    async def main() -> None:
        async with libp2p_rig(scale) as rig:
            await check(rig)

    trio.run(main)


@pytest.mark.parametrize("check", CHECKS, ids=check_name)
def test_checks(check: Check) -> None:
    _run(check, FAST)


# A silence is as long in real time as it is: one of the checks that wait for it is enough for the fast part.
WAIT_FOR_SILENCE = {"opening_to_a_stopped_stranger_times_out", "a_write_to_a_stopped_peer_can_be_cancelled_and_reset"}


def _death_checks() -> list[ParameterSet]:
    marks = {check: [pytest.mark.slow] * (check_name(check) in WAIT_FOR_SILENCE) for check in DEATH_CHECKS}
    return [pytest.param(check, id=check_name(check), marks=slow) for check, slow in marks.items()]


@pytest.mark.parametrize("check", _death_checks())
def test_death_checks(check: Check) -> None:
    _run(check, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("check", [*CHECKS, *SLOW_CHECKS], ids=check_name)
def test_checks_at_full_scale(check: Check) -> None:
    _run(check, FULL)
