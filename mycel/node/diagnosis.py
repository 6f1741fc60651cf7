"""What findings mean: each judged ok, doubtful or wrong, in one line, with what to do about it; and what caused it all.

Knows no sockets and no files; doctor.py looks, this file judges.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from statistics import median
from typing import Literal

from mycel.node.endpoints import Endpoint, parse_endpoint, plain_host, scope_of
from mycel.swarm.placement import show_bytes
from mycel.swarm.view import View, short_id, show_ranges

Mark = Literal["ok", "warn", "fail", "skip"]

CLOCK_WARN_S = 5.0
CLOCK_FAIL_S = 20.0
SLOW_S = 0.5
FEW_DISK_BYTES, NO_DISK_BYTES = 2 * 2**30, 100 * 2**20
FEW_MEMORY_BYTES = 2**30
# What may cause what: of several failures the first in this order is the most probable cause of the others.
_CAUSES = (
    "software",
    "data",
    "disk",
    "network",
    "clock",
    "invite",
    "peer",
    "swarm",
    "port",
    "announce",
    "reach",
    "directory",
    "round trip",
    "memory",
    "neighbours",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `name` says what was looked at, `found` what was seen, `advice` what to do, "" if nothing."""

    name: str
    mark: Mark
    found: str
    advice: str = ""


# ---- the machine


def judge_software(installed: Mapping[str, str | None], pinned: Mapping[str, str]) -> Check:
    """`installed`: versions by name, None for what is not there; `pinned`: those that have to be exactly so."""
    missing = [name for name, version in installed.items() if version is None]
    wrong = [f"{name}=={version}" for name, version in pinned.items() if installed.get(name) not in (None, version)]
    shown = ", ".join(f"{name} {version}" for name, version in installed.items() if version is not None)
    if missing:
        return Check(
            "software", "fail", f"{', '.join(missing)} not installed", "Install Mycel again: pip install mycel"
        )
    if wrong:
        return Check("software", "fail", f"{shown}, but {', '.join(wrong)} is needed", f"pip install {' '.join(wrong)}")
    return Check("software", "ok", shown)


def judge_disk(free_bytes: int, place: str) -> Check:
    found = f"{show_bytes(free_bytes)} free for downloads in {place}"
    if free_bytes < NO_DISK_BYTES:
        return Check("disk", "fail", found, "Free some space, or choose another disk with --data-dir.")
    if free_bytes < FEW_DISK_BYTES:
        return Check("disk", "warn", found, "That may not hold a node's share of a model: see --data-dir.")
    return Check("disk", "ok", found)


def judge_memory(free_bytes: int, total_bytes: int) -> Check:
    found = f"{show_bytes(free_bytes)} of {show_bytes(total_bytes)} of memory free"
    if free_bytes < FEW_MEMORY_BYTES:
        return Check(
            "memory", "warn", found, "End other programs: a node holds its blocks and their KV cache in memory."
        )
    return Check("memory", "ok", found)


def judge_network(hosts: Sequence[str], listen: Sequence[Endpoint]) -> Check:
    """`hosts`: the IP addresses of this machine's interfaces."""
    outside = [host for host in hosts if scope_of(host) in ("private", "public")]
    if not outside:
        advice = "Connect this machine to a network; on loopback only its own processes reach it."
        if listens_on_loopback(listen):
            return Check("network", "ok", "loopback only, as asked for")
        return Check("network", "fail", "this machine has no network but loopback", advice)
    ip6 = "" if any(":" in host for host in outside) else "; no IPv6"
    public = [host for host in outside if scope_of(host) == "public"]
    if listens_on_loopback(listen):
        return Check("network", "ok", "listening on loopback as asked for: only this machine can dial the node")
    if public:
        return Check("network", "ok", f"public address {listed(public)}{ip6}")
    return Check("network", "ok", f"private address {listed(outside)}: the internet is behind a router{ip6}")


def listens_on_loopback(listen: Sequence[Endpoint]) -> bool:
    return bool(listen) and all(scope_of(endpoint.host) == "loopback" for endpoint in listen)


def judge_port(endpoint: Endpoint, failure: str, holder: str, *, running: bool) -> Check:
    """`failure`: why it cannot be listened on ("in use", "not permitted", "no such address", another text, or "")."""
    port = endpoint.port
    if not failure:
        return Check(
            "port", "ok", f"port {port} can be listened on" if port else "any free port, another at each start"
        )
    if failure == "in use" and running:
        return Check("port", "ok", f"port {port} is in use by {holder or 'a process'}: the node that runs already")
    advice = {
        "in use": f"End it, or give this node another port: --port {port % 65535 + 1}",
        "not permitted": "Ports below 1024 are for the administrator: choose a higher one with --port.",
        "no such address": "Listen on /ip4/0.0.0.0/tcp/<port> (all networks), or on an address that this machine has.",
    }.get(failure, "Choose another with --listen or --port.")
    what = {
        "in use": f"port {port} is in use by {holder or 'another process'}",
        "not permitted": f"port {port} may not be listened on by this user",
        "no such address": f"this machine has no address {endpoint.host}",
    }.get(failure, f"cannot listen on {endpoint.shown}: {failure}")
    return Check("port", "fail", what, advice)


def judge_neighbours(failures: Mapping[str, str]) -> Check:
    """`failures`: for each interface's address why multicast does not work there, or ""."""
    working = [host for host, failure in failures.items() if not failure]
    if working:
        return Check("neighbours", "ok", f"multicast DNS works on {listed(working)}: finds nodes of the same network")
    why = next(iter(failures.values()), "no network for it")
    advice = "Nodes of this network will not find each other by themselves: use invites, as between networks."
    return Check("neighbours", "warn", f"multicast DNS does not work here: {why}", advice)


# ---- the invite's peers


@dataclass(frozen=True, slots=True)
class Dial:
    """What came of dialling one address of a peer.

    `outcome`: "found", "odd" (not TCP), "nameless", "hidden" (a name that is not in DNS), "refused", "silent",
    "unreachable", "mute" (accepts and says nothing), "another" (peer) or "stranger" (no peer at all); `detail` is what
    the system said.
    """

    peer: str
    address: str
    outcome: str
    detail: str = ""


def judge_dials(dials: Sequence[Dial]) -> list[Check]:
    """One line for each address; what fails beside one that answers is doubtful and no more."""
    checks = [judge_dial(dial) for dial in dials]
    found = {dial.peer for dial in dials if dial.outcome == "found"}
    return [replace(check, mark="warn") if check.mark == "fail" and found else check for check in checks]


def judge_dial(dial: Dial) -> Check:
    """

    >>> judge_dial(Dial("12D3KooWabcde", "/ip4/203.0.113.7/tcp/4001", "refused")).found
    '12D..abcde at 203.0.113.7:4001: nothing listens there (connection refused)'
    """
    endpoint = parse_endpoint(dial.address)
    if endpoint is None or dial.outcome == "odd":
        return Check("peer", "warn", f"{short_id(dial.peer)}: {dial.address} is not an address to dial over TCP")
    where = f"{short_id(dial.peer)} at {endpoint.shown}"
    if dial.outcome == "found":
        return Check("peer", "ok", f"{where} answers and proved its id")
    what, advice = {
        "nameless": (
            f"the name {endpoint.host} cannot be resolved ({dial.detail})",
            "Check the name, and whether this machine's DNS works at all.",
        ),
        "hidden": (
            f"the name {endpoint.host} is known to this machine, but not to DNS",
            "Nodes ask DNS alone: register the name there, or use the address itself (/ip4/...).",
        ),
        "refused": (
            "nothing listens there (connection refused)",
            "The machine is up, but its node has ended or has another port: start it again, or get a new invite.",
        ),
        "silent": (
            f"no answer ({dial.detail})",
            f"The machine is off, or a firewall or router drops what comes: open TCP port {endpoint.port} there.",
        ),
        "unreachable": (
            f"no way there ({dial.detail})",
            "Check this machine's own network" + (", and whether it has IPv6." if endpoint.kind == "ip6" else "."),
        ),
        "mute": (
            "accepts connections but stays silent",
            "The node there is stopped or overloaded, or a proxy stands before it: restart it.",
        ),
        "another": (
            "another peer answers there",
            "The node there has a new key, or the address is someone else's by now: get a new invite.",
        ),
        "stranger": (
            "another program answers there, no Mycel node",
            "The node has another port by now, or a proxy stands before it: get a new invite.",
        ),
    }.get(dial.outcome, (dial.detail or dial.outcome, "Get a new invite."))
    return Check("peer", "fail", f"{where}: {what}", _scoped_advice(endpoint, dial.outcome) or advice)


def _scoped_advice(endpoint: Endpoint, outcome: str) -> str:
    """What explains a failure by the kind of the address alone."""
    if endpoint.is_name or outcome not in ("refused", "silent", "unreachable"):
        return ""
    scope = scope_of(endpoint.host)
    if scope == "loopback":
        return "That is an address of this machine itself. If the node is on another one: start it there with --port."
    if scope != "public" and outcome != "refused":
        return (
            f"{endpoint.host} is a private address. If you are not in its network: the node has to be started with "
            "--announce and its public address."
        )
    return ""


def judge_round_trips(rtts_s: Mapping[str, float]) -> Check:
    if not rtts_s:
        return Check("round trip", "skip", "none was measured in time")
    shown = ", ".join(f"{rtt_s * 1e3:.1f} ms to {short_id(peer)}" for peer, rtt_s in sorted(rtts_s.items())[:3])
    if min(rtts_s.values()) > SLOW_S:
        return Check("round trip", "warn", shown, "Such a link makes every token slow: is something else using it?")
    return Check("round trip", "ok", shown)


def judge_clock(skews_s: Mapping[str, float]) -> Check:
    """`skews_s`: how far each peer's clock is ahead of ours."""
    if not skews_s:
        return Check("clock", "skip", "no peer told its time")
    skew_s = median(skews_s.values())
    off_s = abs(skew_s)
    if off_s <= CLOCK_WARN_S:
        return Check("clock", "ok", f"{off_s:.1f} s from {counted(len(skews_s), 'peer')}")
    side = "behind" if skew_s > 0 else "ahead of"
    found = f"this machine's clock is {off_s:.0f} s {side} {counted(len(skews_s), 'peer')}"
    advice = "Set the clock (Linux: timedatectl set-ntp true): what nodes say of themselves ends by the clock."
    if len(skews_s) == 1:
        advice += f" If ours is right, that of {short_id(next(iter(skews_s)))} is wrong."
    return Check("clock", "fail" if off_s > CLOCK_FAIL_S else "warn", found, advice)


# ---- the swarm


def judge_directory(view: View, me: str | None) -> Check:
    """`me`: the id of the node that runs here, None if none does."""
    if not view.peers:
        advice = "Its nodes have ended, or cannot tell the directory: start one with `mycel join`, or ask its owner."
        return Check("directory", "fail", "nobody serves this swarm now", advice)
    found = f"{counted(len(view.peers), 'node')} for {counted(view.n_blocks, 'block')}"
    missing = view.missing()
    if missing:
        found += f"; nobody serves blocks {show_ranges(missing)}"
        return Check(
            "directory",
            "warn",
            found,
            "The model answers nobody until somebody does: run `mycel join` on one more machine.",
        )
    if me is not None and me not in view.peers:
        return Check("directory", "warn", f"{found}; the node that runs here is not among them", "Is it still loading?")
    return Check("directory", "ok", f"{found}, all served")


# ---- all together


def skipped(name: str, why: str) -> Check:
    return Check(name, "skip", f"not looked at: {why}")


def swarm_is_reached(checks: Sequence[Check]) -> bool:
    """False if the invite is good and nobody of the swarm can be spoken with."""
    return all(check.mark != "fail" for check in checks if check.name == "swarm")


def cause(checks: Sequence[Check]) -> Check | None:
    """The finding that most probably explains the others, or None if nothing is wrong."""
    for mark in ("fail", "warn"):
        marked = [check for check in checks if check.mark == mark]
        if marked:
            return min(marked, key=lambda check: _CAUSES.index(check.name) if check.name in _CAUSES else len(_CAUSES))
    return None


def conclusion(checks: Sequence[Check]) -> str:
    """One sentence that names the most probable cause."""
    first = cause(checks)
    if first is not None:
        said = "Most probable cause" if first.mark == "fail" else "Nothing has failed. To look at"
        return f"{said}: {first.found}."
    marks = {check.name: check.mark for check in checks}
    if marks.get("swarm") != "ok":
        return "This machine is ready; no swarm was asked."
    if marks.get("reach") == "ok":
        return "All is well: the swarm answers, and this machine can be reached."
    return "The swarm answers; whether this machine can be reached could not be tried."


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def listed(hosts: Sequence[str]) -> str:
    """Some of many, IPv4 first: that is what people know their machines by."""
    ordered = sorted(hosts, key=lambda host: ip_address(plain_host(host)).version)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
