"""A generation goes on when a process is killed, stopped, cut off or leaves: the same tokens, the right one named."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import trio

from mycel.node.client import Model, connect
from mycel.protocols.errors import RouteUnavailable
from mycel.swarm.generation import NewToken, Request, SessionEvent
from mycel.swarm.session import InferenceSession
from mycel.swarm.trace import RouteTrace
from mycel.swarm.view import short_id
from tests.conformance.transport_rig import eventually
from tests.loopback.generating import LONG_PROMPT, PROMPT, Run, bounded, generate, in_thread, reference, with_model
from tests.loopback.links import Link, link_to, rerouted_transports
from tests.loopback.node_process import NodeProcess, Nodes

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

SPANS = [(0, 1), (1, 3), (3, 4)]
# The nodes run ahead of the client, above all on a busy machine: a generation that is to lose a hop on its way is long,
# and is left some tokens after the loss was mended.
MANY = 3000
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def nodes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Three hops, and for each enough holders to lose one in every test that follows."""
    with Nodes(tmp_path_factory.mktemp("nodes"), llama) as started:
        started.start(*SPANS * 4, (1, 3), (1, 3))
        yield started


def hop_of(nodes: Nodes, trace: RouteTrace, index: int) -> NodeProcess:
    return nodes.named(trace.hops[index].peer.peer)


def generate_losing(nodes: Nodes, lose: Mapping[int, Callable[[RouteTrace], NodeProcess]]) -> tuple[Run, list[str]]:
    """A generation in which `lose[n]` ends a node once n tokens are there, and who these were."""
    victims: list[str] = []

    def act(trace: RouteTrace, lose_one: Callable[[RouteTrace], NodeProcess]) -> None:
        victims.append(lose_one(trace).peer)

    at = {n: partial(act, lose_one=lose_one) for n, lose_one in lose.items()}
    run = with_model(nodes.invite, lambda model: generate(model, PROMPT, MANY, at, n_losses=len(at)))
    return run, victims


def killing(nodes: Nodes, index: int) -> Callable[[RouteTrace], NodeProcess]:
    def kill(trace: RouteTrace) -> NodeProcess:
        node = hop_of(nodes, trace, index)
        node.kill()
        return node

    return kill


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_killed_hop_is_replaced(nodes: Nodes, llama: Path, index: int, record_testsuite_property: Record) -> None:
    run, killed = generate_losing(nodes, {20: killing(nodes, index)})
    assert run.tokens == reference(llama, PROMPT, len(run.tokens))
    assert run.lost == killed
    # Whoever hears of it first says it: the client's own connection, or the hop before, which tried to attach again.
    reason = run.trace.replaced[0].reason
    assert "connection was lost" in reason or "cannot be dialled" in reason
    assert len(PROMPT) + 20 <= run.trace.replaced[0].position < len(PROMPT) + len(run.tokens)
    assert run.spans == SPANS
    assert not set(killed) & set(run.peers)
    record_testsuite_property(f"pause_ms_killed_hop_{index}", round(run.longest_gap_s * 1e3))


def test_every_hop_is_killed_in_turn(nodes: Nodes, llama: Path) -> None:
    run, killed = generate_losing(nodes, {1: killing(nodes, 0), 12: killing(nodes, 2), 24: killing(nodes, 1)})
    assert run.tokens == reference(llama, PROMPT, len(run.tokens))
    assert run.lost == killed
    assert run.spans == SPANS


def test_a_stopped_hop_is_replaced(nodes: Nodes, llama: Path, record_testsuite_property: Record) -> None:
    """SIGSTOP: its sockets stay open and nothing answers any more, heartbeats included. Continued, it tidies up."""

    def freeze(trace: RouteTrace) -> NodeProcess:
        node = hop_of(nodes, trace, 1)
        node.freeze()
        return node

    run, frozen = generate_losing(nodes, {20: freeze})
    assert run.tokens == reference(llama, PROMPT, len(run.tokens))
    assert run.lost == frozen
    node = nodes.named(frozen[0])
    node.thaw()
    bounded(partial(eventually, lambda: len(node.events("session.closed")) == len(node.events("session.opened"))))
    assert run.trace.replaced[0].reason.startswith("silent for ")
    record_testsuite_property("pause_ms_stopped_hop", round(run.longest_gap_s * 1e3))


def test_a_hop_that_leaves_hands_over(nodes: Nodes, llama: Path, record_testsuite_property: Record) -> None:
    def leave(trace: RouteTrace) -> NodeProcess:
        node = hop_of(nodes, trace, 2)
        node.ask_to_leave()
        return node

    run, left = generate_losing(nodes, {20: leave})
    assert run.tokens == reference(llama, PROMPT, len(run.tokens))
    assert (run.lost, run.moved) == ([], left)
    record_testsuite_property("pause_ms_hop_that_leaves", round(run.longest_gap_s * 1e3))


def test_a_hop_is_killed_during_the_prefill(nodes: Nodes, llama: Path) -> None:
    killed: list[str] = []
    n_before: list[int] = []

    async def run(model: Model) -> list[int]:
        tokens: list[int] = []
        send, receive = trio.open_memory_channel[SessionEvent](0)
        request = Request(LONG_PROMPT, 10)
        session = InferenceSession(model.network.transport, model.watch, model.watch.swarm, request, send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            async for event in receive:
                if isinstance(event, NewToken):
                    tokens.append(event.token)
                elif not killed:
                    victim = nodes.named(event.hops[1].peer.peer)
                    killed.append(victim.peer)
                    n_before.append(len(tokens))
                    victim.kill()
                else:
                    assert [peer for peer, _ in event.lost] == killed
        return tokens

    assert with_model(nodes.invite, run) == reference(llama, LONG_PROMPT, 10)
    assert n_before == [0]


Pair = tuple[str, str]


def test_a_cut_link_between_client_and_hop(nodes: Nodes, llama: Path, record_testsuite_property: Record) -> None:
    """A black hole: the peer is well, and its neighbours reach it, but not the client any more."""
    cut: list[str] = []

    async def main() -> Run:
        async with AsyncExitStack() as stack:
            links = {node.peer: await stack.enter_async_context(link_to(node.address)) for node in nodes.living}
            stack.enter_context(rerouted_transports({nodes.named(peer).address: links[peer].address for peer in links}))

            def act(trace: RouteTrace) -> None:
                cut.append(trace.hops[1].peer.peer)
                links[cut[0]].cut()

            async with connect(nodes.invite) as model:
                run = await generate(model, PROMPT, MANY, {20: act}, n_losses=1)
            assert all(links[peer].n_connections for peer in run.peers + cut)
            return run

    run = bounded(main)
    assert run.tokens == reference(llama, PROMPT, len(run.tokens))
    assert run.lost == cut
    assert "silent for" in run.trace.replaced[0].reason
    assert nodes.named(cut[0]).alive
    record_testsuite_property("pause_ms_link_to_client_cut", round(run.longest_gap_s * 1e3))


def test_a_cut_link_between_two_hops(llama: Path, tmp_path: Path, record_testsuite_property: Record) -> None:
    """The client reaches both ends, and either may be held to be the one that failed; never anybody else."""

    async def main(nodes: Nodes) -> tuple[Run, set[str]]:
        seconds = await in_thread(nodes.start, (2, 4), (2, 4))
        links: dict[Pair, Link] = {}
        async with AsyncExitStack() as stack:
            for _ in range(2):
                mine = [await stack.enter_async_context(link_to(second.address)) for second in seconds]
                reroute = {second.address: link.address for second, link in zip(seconds, mine, strict=True)}
                [first] = await in_thread(nodes.start, (0, 2), reroute=reroute)
                links |= {(first.peer, second.peer): link for second, link in zip(seconds, mine, strict=True)}
            cut: set[str] = set()

            def act(trace: RouteTrace) -> None:
                first, second = (hop.peer.peer for hop in trace.hops)
                assert links[first, second].n_connections == 1
                links[first, second].cut()
                cut.update((first, second))

            async with connect(nodes.invite) as model:
                return await generate(model, PROMPT, MANY, {20: act}, n_losses=1), cut

    with Nodes(tmp_path, llama) as nodes:
        run, cut = bounded(partial(main, nodes))
    assert run.tokens == reference(llama, PROMPT, len(run.tokens))
    assert run.lost
    assert set(run.lost) <= cut
    # The client finds it by asking both how far they are, or hears it from them: whatever comes first.
    reason = run.trace.replaced[0].reason
    assert reason.startswith("failed its neighbour: ") or reason.endswith("also over a new link")
    record_testsuite_property("pause_ms_link_between_hops_cut", round(run.longest_gap_s * 1e3))


def test_without_another_holder_it_says_which_blocks(llama: Path, tmp_path: Path) -> None:
    with Nodes(tmp_path, llama) as nodes:
        _, second = nodes.start((0, 2), (2, 4))

        def kill(_: RouteTrace) -> None:
            second.kill()

        began = time.monotonic()
        with pytest.raises(RouteUnavailable) as caught:
            with_model(nodes.invite, lambda model: generate(model, PROMPT, MANY, {10: kill}, patience_s=1.5))
        assert time.monotonic() - began >= 1.5
        assert caught.value.missing == ((2, 4),)
        assert "blocks 2:4" in str(caught.value)
        assert short_id(second.peer) in str(caught.value)
        assert "the connection was lost" in str(caught.value)


def test_a_late_holder_takes_over(llama: Path, tmp_path: Path) -> None:
    """Nobody else serves the blocks when they are lost; whoever comes within the patience is used."""
    with Nodes(tmp_path, llama) as nodes, ThreadPoolExecutor(1) as thread:
        _, second = nodes.start((0, 2), (2, 4))
        late: list[Future[list[NodeProcess]]] = []

        def kill(_: RouteTrace) -> None:
            second.kill()
            late.append(thread.submit(nodes.start, (2, 4)))

        run = with_model(nodes.invite, lambda model: generate(model, PROMPT, MANY, {10: kill}, n_losses=1))
        assert run.tokens == reference(llama, PROMPT, len(run.tokens))
        assert run.lost == [second.peer]
        assert run.peers[1] == late[0].result()[0].peer
