"""The conformance suite of the transport port, run by the real adapter: real sockets, time and processes."""

from __future__ import annotations

import pytest
import trio

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


@pytest.mark.parametrize("check", DEATH_CHECKS, ids=check_name)
def test_death_checks(check: Check) -> None:
    _run(check, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("check", [*CHECKS, *SLOW_CHECKS], ids=check_name)
def test_checks_at_full_scale(check: Check) -> None:
    _run(check, FULL)
