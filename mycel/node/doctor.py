"""`mycel doctor`: why a node cannot be reached or finds no peers. `examine` walks from this machine to the swarm.

Each step looks, has diagnosis.py judge, and is bounded; what needs a step that failed is skipped and says why. The
doctor is a stranger in the swarm: a key of its own for the time being, no entry in anybody's routing table.

Ring: shell.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from mycel.node import diagnosis, machine
from mycel.node.diagnosis import Check, Dial
from mycel.node.endpoints import Endpoint, parse_endpoint, plain_host, tcp_multiaddr
from mycel.node.events import no_events
from mycel.node.files import fetch_manifest
from mycel.node.libp2p_transport import Libp2pTransport, open_transport
from mycel.node.network import Network, open_network
from mycel.node.peer_dial import dial_address
from mycel.node.reach import ask_to_dial
from mycel.node.reach_verdict import Reach, judge_reach
from mycel.protocols.errors import ConfigError, MycelError, PeerError
from mycel.protocols.messages import Dialled
from mycel.security.identity import Identity
from mycel.swarm.invite import Invite, parse_invite
from mycel.swarm.manifest import Manifest
from mycel.swarm.view import View, short_id

__all__ = ["Question", "examine"]

DIAL_S = 5.0
SWARM_S = 15.0
DIRECTORY_S = 10.0
RTT_S = 2.0
CLOCK_S = 5.0
REACH_S = 15.0
_MAX_ASKED = 3
_MAX_TRIED = 8

Tell = Callable[[Check], None]
Wait = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about: `listen` and `announce` as a node would get them, `invite` as it was given.

    `running`: a node of this data directory runs. `wanted`: the user said where the node shall be reached. `no_invite`
    is why there is no invite, if there is none. `interfaces` as for multicast DNS (discovery.py).
    """

    data_dir: Path
    listen: tuple[str, ...]
    announce: tuple[str, ...] = ()
    invite: str | None = None
    no_invite: str = "no invite was given"
    running: bool = False
    wanted: bool = False
    interfaces: Sequence[str] | None = None


@dataclass(slots=True)
class _Findings:
    """What later steps need of earlier ones, and everything that was told."""

    question: Question
    tell: Tell
    wait: Wait
    clock: Callable[[], float]
    checks: list[Check] = field(default_factory=list)
    me: str | None = None  # the id of the node whose data directory this is
    listen: list[Endpoint] = field(default_factory=list)
    answering: list[str] = field(default_factory=list)
    seen_as: list[str] = field(default_factory=list)  # multiaddrs that peers see us come from
    manifest: Manifest | None = None
    view: View | None = None

    def add(self, *checks: Check) -> None:
        for check in checks:
            self.checks.append(check)
            self.tell(check)

    def failed(self, name: str) -> bool:
        return any(check.name == name and check.mark == "fail" for check in self.checks)


async def examine(question: Question, tell: Tell, wait: Wait, *, clock: Callable[[], float] = time.time) -> list[Check]:
    """Look at everything; each finding is told as soon as it is there, and `wait(what, at_most_s)` before each wait."""
    findings = _Findings(question, tell, wait, clock)
    await _this_machine(findings)
    invite = _invite(findings)
    if invite is None:
        findings.add(*(diagnosis.skipped(name, "without an invite") for name in ("swarm", "reach")))
        return findings.checks
    for listen in (_can_listen(findings), []):
        try:
            async with (
                open_transport(Identity.generate(), listen=listen, event=no_events) as listener,
                open_network(Identity.generate(), (), no_events) as network,
            ):
                await _the_swarm(findings, invite, listener, network)
                await _being_reached(findings, listener, network)
            break
        except ConfigError as error:
            if not listen:
                raise
            findings.add(Check("port", "fail", str(error), "Choose another with --listen or --port."))
    return findings.checks


# ---- this machine


async def _this_machine(findings: _Findings) -> None:
    question = findings.question
    findings.add(machine.look_at_software())
    data, identity = machine.look_at_data(question.data_dir)
    findings.me = identity.peer_id if identity else None
    findings.add(data)
    if question.running:
        findings.add(Check("node", "ok", "a node of this data directory is running"))
    findings.add(machine.look_at_disk(question.data_dir), machine.look_at_memory())
    for text in question.listen:
        endpoint = parse_endpoint(text)
        if endpoint is None or endpoint.is_name or endpoint.peer is not None:
            advice = "It looks like /ip4/0.0.0.0/tcp/4001"
            findings.add(Check("port", "fail", f"{text!r} is not an address to listen on", advice))
        else:
            findings.listen.append(endpoint)
            findings.add(machine.look_at_port(endpoint, running=question.running))
    findings.add(diagnosis.judge_network(machine.interface_hosts(), findings.listen))
    if question.interfaces is None and diagnosis.listens_on_loopback(findings.listen):
        findings.add(Check("neighbours", "skip", "not looked at: listening on loopback, so nobody is looked for"))
        return
    findings.wait("listening for multicast", 4.0)
    findings.add(await machine.look_at_neighbours(question.interfaces))


def _invite(findings: _Findings) -> Invite | None:
    text, now = findings.question.invite, findings.clock()
    if text is None:
        advice = "Name a swarm to ask it: mycel doctor mycel1:... (as `mycel start` printed it)."
        findings.add(Check("invite", "warn", findings.question.no_invite, advice))
        return None
    try:
        invite = parse_invite(text, now)
    except ConfigError as error:
        reason, _, advice = str(error).partition(": ")
        advice = advice[:1].upper() + advice[1:] + "." if advice else "Ask for a new one."
        today = time.strftime("%Y-%m-%d %H:%M", time.gmtime(now))
        if "expired" in reason or "future" in reason:
            advice += f" It is {today} UTC by this machine's clock."
        findings.add(Check("invite", "fail", reason, advice))
        return None
    days = (invite.expires_at - now) / 86400
    left = f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours"
    findings.add(Check("invite", "ok", f"to {invite.name}, signed by {short_id(invite.issuer)}, good for {left} more"))
    return invite


def _can_listen(findings: _Findings) -> list[str]:
    """Where the doctor listens in place of a node; nowhere if the node itself does."""
    if findings.question.running or findings.failed("port"):
        return []
    return [endpoint.multiaddr for endpoint in findings.listen]


# ---- the swarm


async def _the_swarm(findings: _Findings, invite: Invite, listener: Libp2pTransport, network: Network) -> None:
    await _dial_peers(findings, invite, listener)
    if not findings.answering:
        why = "no peer of the invite answers"
        findings.add(Check("swarm", "fail", why, "See above what became of each of its addresses."))
        findings.add(*(diagnosis.skipped(name, why) for name in ("clock", "directory")))
        return
    await _join(findings, invite, network)
    await _ask_time(findings, network)
    await _read_directory(findings, invite, network)


async def _dial_peers(findings: _Findings, invite: Invite, listener: Libp2pTransport) -> None:
    """Each address of each peer of the invite, all at once."""
    dials: list[Dial] = []
    targets = [(peer.peer, address) for peer in invite.bootstrap for address in dict.fromkeys(peer.addresses)]
    if findings.me is not None and not findings.question.running and any(peer == findings.me for peer, _ in targets):
        targets = [target for target in targets if target[0] != findings.me]
        findings.add(Check("peer", "skip", "one peer of the invite is this machine's own node, which is not running"))
    findings.wait(f"dialling the invite's addresses ({len(targets)})", 4 * DIAL_S)

    async def dial(peer: str, address: str) -> None:
        dials.append(await dial_address(listener, peer, address, DIAL_S))

    async with trio.open_nursery() as nursery:
        for target in targets:
            nursery.start_soon(dial, *target)
    dials.sort(key=lambda dial: targets.index((dial.peer, dial.address)))
    findings.answering = list(dict.fromkeys(dial.peer for dial in dials if dial.outcome == "found"))
    findings.add(*diagnosis.judge_dials(dials))


async def _join(findings: _Findings, invite: Invite, network: Network) -> None:
    """The manifest, as a joiner gets it, and how far away the peers are."""
    findings.wait("asking for the swarm's manifest", SWARM_S + RTT_S)
    advice = "The peers answer but do not give what the swarm is: is it the right invite, and does its model still run?"
    try:
        with trio.fail_after(SWARM_S):
            await network.join([peer for peer in invite.bootstrap if peer.peer in findings.answering])
            findings.manifest = await fetch_manifest(network.transport, findings.answering, invite.swarm)
    except trio.TooSlowError:
        findings.add(Check("swarm", "fail", f"no manifest within {SWARM_S:.0f} s", advice))
        return
    except MycelError as error:
        findings.add(Check("swarm", "fail", str(error), advice))
        return
    manifest = findings.manifest
    found = f"{manifest.name}, {manifest.n_blocks} blocks, swarm {invite.swarm.hex()[:8]}"
    findings.add(Check("swarm", "ok", found))
    transport = network.transport
    rtts: dict[str, float] = {}
    with trio.move_on_after(RTT_S):
        while not rtts:
            rtts = {peer: rtt for peer in findings.answering if (rtt := transport.rtt_s(peer)) is not None}
            await trio.sleep(0.02)
    findings.add(diagnosis.judge_round_trips(rtts))


async def _ask_time(findings: _Findings, network: Network) -> None:
    findings.wait("comparing clocks", CLOCK_S)
    answers = await _ask(network, findings.answering, (), CLOCK_S)
    findings.seen_as = list(dict.fromkeys(answer.observed for answer, _ in answers.values() if answer.observed))
    findings.add(diagnosis.judge_clock({peer: skew_s for peer, (_, skew_s) in answers.items()}))


async def _read_directory(findings: _Findings, invite: Invite, network: Network) -> None:
    if findings.manifest is None:
        findings.add(diagnosis.skipped("directory", "the swarm gave no manifest"))
        return
    findings.wait("reading the directory", DIRECTORY_S)
    try:
        with trio.fail_after(DIRECTORY_S):
            located = await network.directory.find(invite.swarm)
    except (trio.TooSlowError, PeerError) as error:
        why = str(error) or f"no answer within {DIRECTORY_S:.0f} s"
        findings.add(Check("directory", "fail", f"the directory cannot be read: {why}", "Try again in a minute."))
        return
    view = View(findings.manifest.n_blocks)
    for one in located:
        view = view.apply(one)
    findings.view = view
    findings.add(diagnosis.judge_directory(view, findings.me if findings.question.running else None))


# ---- being reached


async def _being_reached(findings: _Findings, listener: Libp2pTransport, network: Network) -> None:
    """Have peers dial where a node would be, or where the node is that runs."""
    question, view = findings.question, findings.view
    if not findings.answering:
        findings.add(diagnosis.skipped("reach", "no peer of the invite answers"))
        return
    if not question.running and findings.failed("port"):
        findings.add(diagnosis.skipped("reach", "the port cannot be listened on"))
        return
    expected, own = listener.peer_id, list(listener.addresses)
    if question.running:
        here = view.peers.get(findings.me or "") if view else None
        if here is None:
            findings.add(diagnosis.skipped("reach", "the directory does not say where the running node listens"))
            return
        expected, own = here.peer, list(here.addresses)
    for peer in view.serving() if view else ():
        network.transport.learn(peer.peer, peer.addresses)
    others = dict.fromkeys(
        [*findings.answering, *(peer.peer for peer in view.serving())] if view else findings.answering
    )
    askable = [peer for peer in others if peer != expected][:_MAX_ASKED]
    if not askable:
        why = "nobody else is in the swarm to dial this node; run `mycel doctor` on another machine"
        findings.add(diagnosis.skipped("reach", why))
        return
    findings.wait(f"being dialled by {diagnosis.counted(len(askable), 'peer')}", DIAL_S + REACH_S)
    told, names = await _resolved(question.announce or own)
    asked = {f"{address}/p2p/{expected}": address for address in _candidates(told, own, findings.seen_as)}
    answers = await _ask(network, askable, asked, REACH_S)
    judged = {peer: _renamed(answer, asked) for peer, (answer, _) in answers.items()}
    fixed = question.running or all(endpoint.port for endpoint in findings.listen)
    reach = Reach(told, list(asked.values()), judged, wanted=question.running or question.wanted, fixed_port=fixed)
    findings.add(*names, *judge_reach(reach))


async def _resolved(addresses: Sequence[str]) -> tuple[list[str], list[Check]]:
    """The addresses with their names looked up, since nobody dials a name for a stranger, and findings about those."""
    plain, checks = [], []
    deadline = trio.current_time() + DIAL_S
    for endpoint in filter(None, map(parse_endpoint, addresses)):
        if not endpoint.is_name:
            plain.append(endpoint.multiaddr)
            continue
        try:
            with trio.fail_at(deadline):
                found = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError, trio.TooSlowError):
            advice = "Register the name first, or announce the address itself."
            checks.append(Check("announce", "fail", f"the name {endpoint.host} cannot be resolved", advice))
            continue
        hosts = list(dict.fromkeys(plain_host(str(where[0])) for *_, where in found))
        plain += [tcp_multiaddr(host, endpoint.port) for host in hosts]
        checks.append(Check("announce", "ok", f"{endpoint.host} leads to {', '.join(hosts[:3])}"))
    return plain, checks


def _candidates(told: Sequence[str], own: Sequence[str], seen_as: Sequence[str]) -> list[str]:
    """What to have dialled: what others are told, and our ports on each host that we are seen as.

    Nobody dials another host than the one we come from, so what is there goes first.
    """
    seen = [endpoint for endpoint in map(parse_endpoint, seen_as) if endpoint is not None and not endpoint.is_name]
    ports = dict.fromkeys(endpoint.port for endpoint in map(parse_endpoint, own) if endpoint is not None)
    guesses = [tcp_multiaddr(each.host, port) for each in seen for port in ports]
    hosts = {each.host for each in seen}
    there = [text for text in told if (endpoint := parse_endpoint(text)) is not None and endpoint.host in hosts]
    return list(dict.fromkeys([*there, *guesses, *told]))[:_MAX_TRIED]


def _renamed(answer: Dialled, asked: Mapping[str, str]) -> Dialled:
    """The answer in terms of the addresses without the peer id."""
    results = tuple(type(result)(asked[result.address], result.failure) for result in answer.results)
    return Dialled(results, answer.observed, answer.unix_time_s)


async def _ask(
    network: Network, peers: Sequence[str], addresses: Collection[str], within_s: float
) -> dict[str, tuple[Dialled, float]]:
    """What some peers answer, side by side; those that fail are left out."""
    answers: dict[str, tuple[Dialled, float]] = {}

    async def ask(peer: str) -> None:
        try:
            answers[peer] = await ask_to_dial(network.transport, peer, list(addresses))
        except PeerError:
            return  # an older peer, or one that is gone: others answer

    with trio.move_on_after(within_s):
        async with trio.open_nursery() as nursery:
            for peer in peers[:_MAX_ASKED]:
                nursery.start_soon(ask, peer)
    return dict(sorted(answers.items()))
