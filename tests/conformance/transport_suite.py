"""The conformance suite of the `Transport` and `Stream` ports: one list of checks for every adapter.

How an adapter plugs in: give a `Rig` (see `transport_rig`), made fresh for each check by an async context manager that
ends everything the check started, and run every check with it on a clock of the adapter's choosing:

    @pytest.mark.parametrize("check", [*CHECKS, *DEATH_CHECKS], ids=check_name)
    def test_my_transport(check: Check) -> None:
        async def main() -> None:
            async with my_rig(scale=FAST) as rig:
                await check(rig)
        trio.run(main)

and the same, marked slow, for `SLOW_CHECKS` (and all the others again) with `scale=FULL`.
`Rig.start_victim` must give a peer that `serve_suite` was called for; a real adapter runs it in a process of its own.
The checks know no clock: every wait is for an event and bounded, so a hang is a failure.

What the suite asks beyond the port's docstrings, so that all adapters agree:
- a frame has at least one byte: `send` of nothing raises LocalProtocolError;
- after an own `aclose` or `reset`, `send` raises a MycelError, and a `receive` that is blocked does not stay blocked;
- a transport that shuts down cancels its handlers, and its peers hear PeerUnreachable: only `aclose`, or a handler that
  returns, is an end;
- a connection serves both peers: who was dialled can open a stream back.

Left to each adapter's own tests, because only its wire can say them: a frame header over the limit gives
RemoteProtocolError; garbage from a peer that is no Mycel node.
"""

from __future__ import annotations

from tests.conformance import peer_checks, stream_checks
from tests.conformance.transport_rig import (
    CHECKS,
    DEATH_CHECKS,
    FAST,
    FULL,
    SLOW_CHECKS,
    Check,
    Rig,
    Scale,
    Victim,
    check_name,
    serve_suite,
)

__all__ = [
    "CHECKS",
    "DEATH_CHECKS",
    "FAST",
    "FULL",
    "SLOW_CHECKS",
    "Check",
    "Rig",
    "Scale",
    "Victim",
    "check_name",
    "serve_suite",
]

_REGISTERED_BY_IMPORT = (peer_checks, stream_checks)
