"""Whether this machine can be reached, judged from what peers say that dialled it.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mycel.node.diagnosis import Check, Mark, counted, listed
from mycel.node.endpoints import Endpoint, parse_endpoint, plain_host, scope_of
from mycel.node.reach_rules import NOT_TRIED
from mycel.protocols.messages import Dialled


@dataclass(frozen=True, slots=True)
class Reach:
    """What is known of being dialled.

    `told`: the addresses that others are told; `tried`: those and some guesses; `answers` by peer. `wanted`: the user
    means a node to be reached here; `fixed_port`: it has the same port at each start.
    """

    told: Collection[str]
    tried: Sequence[str]
    answers: Mapping[str, Dialled]
    wanted: bool
    fixed_port: bool


def judge_reach(reach: Reach) -> list[Check]:
    """Where we are seen to come from, and what came of the addresses that somebody dialled."""
    if not reach.answers:
        return [Check("reach", "skip", "no peer could say whether it reaches us (are they of an older version?)")]
    ends = [parse_endpoint(answer.observed) for answer in reach.answers.values()]
    hosts = list(dict.fromkeys(plain_host(end.host) for end in ends if end is not None and not end.is_name))
    if not hosts:
        return [Check("reach", "skip", "no peer could see where we come from")]
    seen = Check("seen as", "ok", f"{listed(hosts)} by {counted(len(reach.answers), 'peer')}{_how_far(hosts)}")
    if reach.told and all(map(_is_loopback, reach.told)) and not all(scope_of(host) == "loopback" for host in hosts):
        advice = "Listen on every network: --port 4001, or --listen /ip4/0.0.0.0/tcp/4001"
        return [seen, Check("reach", "fail", "listening on loopback alone: only this machine gets through", advice)]
    outcomes = {address: _outcome(address, reach.answers.values()) for address in reach.tried}
    told = {address: outcome for address, outcome in outcomes.items() if address in reach.told and outcome is not None}
    guessed = {
        address: outcome
        for address, outcome in outcomes.items()
        if outcome is not None and address not in reach.told and not _is_loopback(address)
    }
    if told and (any(outcome == "" for outcome in told.values()) or "" not in guessed.values()):
        return [seen, *_judge_told(reach, told)]
    if guessed and not _is_told_farther(reach, hosts):
        return [seen, _judge_guessed(reach, guessed)]
    return [seen, _judge_untried(reach, hosts)]


def _judge_told(reach: Reach, outcomes: Mapping[str, str]) -> list[Check]:
    """Beside an address that works, one that does not is doubtful and no more."""
    is_reached = "" in outcomes.values()
    mark: Mark = "warn" if is_reached or not reach.wanted else "fail"
    checks = []
    for address, outcome in outcomes.items():
        endpoint = _endpoint(address)
        if outcome == "":
            checks.append(Check("reach", "ok", f"reachable at {endpoint.shown}"))
        else:
            found = f"not reachable at {endpoint.shown}: {outcome}"
            checks.append(Check("reach", mark, found, _advice(endpoint, outcome)))
    return checks


def _judge_guessed(reach: Reach, outcomes: Mapping[str, str]) -> Check:
    """Nobody gets through to what others are told, or nobody could try; our port where we are seen is what is left."""
    works = next((address for address, outcome in outcomes.items() if outcome == ""), None)
    if works is not None:
        endpoint = _endpoint(works)
        port = "" if reach.fixed_port else f"--port {endpoint.port} "
        found = f"reachable at {endpoint.shown}, but others are not told that address"
        return Check("reach", "warn", found, f"Start the node with {port}--announce {endpoint.multiaddr}")
    address, outcome = next(iter(outcomes.items()))
    endpoint = _endpoint(address)
    if "another peer" in outcome or "no peer" in outcome:
        mark: Mark = "fail" if reach.wanted else "warn"
        return Check("reach", mark, f"not reachable at {endpoint.shown}: {outcome}", _advice(endpoint, outcome))
    number = endpoint.port if reach.fixed_port else 4001
    announce = f"--announce /{endpoint.kind}/{endpoint.host}/tcp/{number}"
    choose = "" if reach.fixed_port else f"--port {number} "
    found = f"only a client: nobody gets through to {endpoint.shown} ({outcome})"
    advice = (
        f"It can use the swarm, but not serve it. To serve: open TCP port {number} in its firewall, forward it "
        f"in the router, and start the node with {choose}{announce}"
    )
    return Check("reach", "fail" if reach.wanted else "warn", found, advice)


def _advice(endpoint: Endpoint, outcome: str) -> str:
    if "another peer" in outcome or "no peer" in outcome:
        return f"Port {endpoint.port} is forwarded to another machine or program: forward it to this node."
    return f"Open TCP port {endpoint.port} in this machine's firewall, and behind a router forward it to this machine."


def _judge_untried(reach: Reach, hosts: Sequence[str]) -> Check:
    """Nobody dialled: each answer says why."""
    if all(scope_of(host) == "loopback" for host in hosts):
        return Check("reach", "skip", "only peers on this machine were asked, and those cannot tell")
    told = [end for end in map(parse_endpoint, reach.told) if end is not None]
    if _is_told_farther(reach, hosts):
        shown = ", ".join(end.shown for end in told)
        return Check("reach", "skip", f"nobody outside this network was asked, so {shown} could not be tried")
    if told and all(plain_host(end.host) not in hosts for end in told):
        advice = "Announce the address that others see, with the port that is forwarded: --announce /ip4/.../tcp/..."
        return Check("reach", "warn", f"others are told {told[0].shown}, but see this machine as {hosts[0]}", advice)
    reasons = [result.failure for answer in reach.answers.values() for result in answer.results]
    why = reasons[0].removeprefix(NOT_TRIED) if reasons else "there is no address to try"
    return Check("reach", "skip", f"nobody tried: {why}")


def _outcome(address: str, answers: Collection[Dialled]) -> str | None:
    """ "" if somebody found us there, else why not, or None if nobody tried."""
    results = [result.failure for answer in answers for result in answer.results if result.address == address]
    tried = [failure for failure in results if not failure.startswith(NOT_TRIED)]
    return None if not tried else "" if "" in tried else tried[0]


def _endpoint(address: str) -> Endpoint:
    endpoint = parse_endpoint(address)
    assert endpoint is not None, "we asked for endpoints alone"
    return endpoint


def _is_told_farther(reach: Reach, hosts: Sequence[str]) -> bool:
    """Whether others are told an address of a wider network than that in which peers see us."""
    told = [end.host for end in map(parse_endpoint, reach.told) if end is not None and not end.is_name]
    return any(scope_of(host) == "public" for host in told) and all(scope_of(host) != "public" for host in hosts)


def _is_loopback(address: str) -> bool:
    endpoint = parse_endpoint(address)
    return endpoint is not None and not endpoint.is_name and scope_of(endpoint.host) == "loopback"


def _how_far(hosts: Sequence[str]) -> str:
    scopes = {scope_of(host) for host in hosts}
    if scopes == {"loopback"}:
        return " on this machine, which says nothing of other machines"
    return "" if "public" in scopes else " in this network, which says nothing of the internet"
