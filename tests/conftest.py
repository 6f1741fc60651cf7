"""What holds for every test: one torch thread, nothing beyond loopback, no process left behind, repeatable examples."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator

# Before anything imports torch: tests run two at a time on two cores, and spinning threads would starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# transformers asks its hub about missing files unless it is told that there is none.
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import pytest
from hypothesis import HealthCheck, Phase, settings

# A shared machine stalls for seconds, so no example has a deadline; a test that hangs meets faulthandler_timeout.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", _PATIENT, print_blob=True)
settings.register_profile("ci", _PATIENT, derandomize=True, database=None, print_blob=True)
settings.register_profile("fuzz", _PATIENT, max_examples=2_000, phases=(Phase.explicit, Phase.generate, Phase.shrink))
settings.load_profile("ci" if os.environ.get("CI") else "dev")

_MDNS_GROUPS = {"224.0.0.251", "ff02::fb"}
_attempts_outside: list[str] = []


def _stays_here(host: object) -> bool:
    """Whether a host names this machine, or the multicast group that mDNS speaks to."""
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    text = (host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)).partition("%")[0]
    if text in _MDNS_GROUPS:
        return True
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _guard_network(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: the interpreter calls it before every connect, datagram and name lookup, whoever makes it."""
    if event in ("socket.connect", "socket.sendto"):
        sock, address = arguments
        if not isinstance(sock, socket.socket) or not isinstance(address, tuple):
            return
        # Connecting a datagram socket sends nothing: it is how a program asks for its own address.
        harmless = event == "socket.connect" and sock.type == socket.SOCK_DGRAM
        host = address[0]
    elif event == "socket.getaddrinfo":
        host, harmless = arguments[0], _is_address(arguments[0])
    else:
        return
    if not harmless and not _stays_here(host):
        _attempts_outside.append(f"{event} {host!r}")
        raise AssertionError(f"a test reached beyond loopback: {event} {host!r}")


def _is_address(host: object) -> bool:
    """Whether a host is an address already, so that looking it up asks nobody."""
    try:
        ipaddress.ip_address(host.decode("ascii") if isinstance(host, bytes) else str(host))
    except ValueError:
        return False
    return True


sys.addaudithook(_guard_network)


@pytest.fixture(autouse=True)
def _nothing_beyond_loopback() -> Iterator[None]:
    """Fail the test that reached out, also where the code under test swallowed the guard's error."""
    _attempts_outside.clear()
    yield
    assert not _attempts_outside, f"reached beyond loopback: {_attempts_outside}"


@pytest.fixture(autouse=True)
def _no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the loopback test that leaves a child running."""
    if request.node.get_closest_marker("loopback") is None:
        yield
        return
    myself = psutil.Process()
    before = set(myself.children(recursive=True))
    yield
    left: list[str] = []
    for child in set(myself.children(recursive=True)) - before:
        # It may end at any moment, and a process that ended but was not waited for runs no more.
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                left.append(f"{child.pid} {child.name()}")
                child.kill()
    assert not left, f"left running: {left}"


@pytest.fixture(scope="session")
def fuzz_seconds() -> float:
    """How long one fuzz target may search; a plain run of pytest only looks in."""
    return float(os.environ.get("FUZZ_SECONDS", "2"))
