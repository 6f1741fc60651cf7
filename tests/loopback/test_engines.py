"""Nodes of both network engines serve in one chain, and stand in for each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from mycel.dht.directory import Directory, Located
from mycel.node.hivemind_engine.dht_client import open_dht_process
from mycel.node.hivemind_engine.record_store import open_hivemind_records
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from mycel.swarm.trace import RouteTrace
from tests.conformance.p2pd_rig import needs_engine
from tests.loopback.generating import LONG_PROMPT, PROMPT, Run, bounded, generate, in_thread, reference, with_model
from tests.loopback.node_process import Nodes

pytestmark = [pytest.mark.loopback, pytest.mark.slow, needs_engine]

SPANS = [(0, 1), (1, 3), (3, 4)]


@pytest.fixture(scope="module")
def nodes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A chain whose middle runs on the Go daemon, between two on py-libp2p."""
    with Nodes(tmp_path_factory.mktemp("engines"), llama) as started:
        for span, network in zip(SPANS, ("libp2p", "p2pd", "libp2p"), strict=True):
            started.start_one(blocks=span, network=network)
        yield started


@pytest.mark.parametrize(("prompt", "n_new"), [(PROMPT, 60), (LONG_PROMPT[:700], 10)])
def test_peers_of_both_kinds_serve_in_one_chain(nodes: Nodes, llama: Path, prompt: tuple[int, ...], n_new: int) -> None:
    run = with_model(nodes.invite, lambda model: generate(model, prompt, n_new))
    assert run.tokens == reference(llama, prompt, n_new)
    assert run.spans == SPANS
    assert run.peers == [node.peer for node in nodes.nodes]
    assert run.trace.replaced == []


def test_each_engine_takes_over_from_the_other(llama: Path, tmp_path: Path) -> None:
    """The middle hop is killed while two nodes hold its blocks, one of each engine; then the survivor's turn comes."""
    victims: list[str] = []
    with Nodes(tmp_path, llama) as nodes:

        def kill_the_middle(trace: RouteTrace) -> None:
            victim = nodes.named(trace.hops[1].peer.peer)
            victims.append(victim.peer)
            victim.kill()

        def lose_one() -> Run:
            lose = {20: kill_the_middle}
            return with_model(nodes.invite, lambda model: generate(model, PROMPT, 3000, lose, n_losses=1))

        def engine_of(peer: str) -> str:
            return nodes.named(peer).config.network

        nodes.start((0, 1), (3, 4), network="libp2p")
        nodes.start_one(blocks=(1, 3), network="p2pd")
        nodes.start_one(blocks=(1, 3), network="libp2p")
        for _ in range(2):
            run = lose_one()
            assert run.tokens == reference(llama, PROMPT, len(run.tokens))
            assert run.lost == victims[-1:]
            assert engine_of(run.peers[1]) != engine_of(victims[-1])
            nodes.start_one(blocks=(1, 3), network=engine_of(victims[-1]))


def test_a_node_announces_itself_in_an_existing_hivemind_dht(llama: Path, tmp_path: Path) -> None:
    """Somebody else's DHT, with its own identity and nothing of Mycel's network: the swarm is found there."""
    stranger = Identity.generate()
    own = PeerAddress(stranger.peer_id, ())

    async def main() -> tuple[Located, ...]:
        async with (
            open_dht_process() as client,
            open_hivemind_records(client, stranger, time.time, own) as records,
        ):
            directory = Directory(records, stranger, time.time)
            node = await in_thread(nodes.start_one, blocks=(0, 4), hivemind_dht=records.addresses)
            with trio.fail_after(60):
                while not (found := await directory.find(node.serving.invite.swarm)):  # noqa: ASYNC110 - it tells nobody
                    await trio.sleep(0.1)
            return found

    with Nodes(tmp_path, llama) as nodes:
        [located] = bounded(main)
        [node] = nodes.nodes
        announced = located.announcement
        assert (located.peer, announced.start, announced.end) == (node.peer, 0, 4)
        assert announced.addresses == node.serving.addresses
