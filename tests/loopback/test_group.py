"""Rounds of real processes over real libp2p: equal states, also of one that is killed in a round and started again."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from mycel.node.compute import DeviceCompute
from mycel.node.events import EventWriter
from mycel.node.file_transfer import DiskThreads
from mycel.node.libp2p_transport import open_transport
from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.group import Contribution, Group, GroupPlace, GroupPorts, NeedState, Standing
from mycel.node.rounds.round_streams import RoundDoor
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import load_or_create
from tests.sim.group_rig import N_ELEMENTS, RUN, ToyReducer, digest_of, group_terms, mean_of, vector_of

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

N_PEERS = 4
WITHIN_S = 60.0
TERMS = group_terms(min_members=N_PEERS, patience_s=30.0)


@dataclass
class Peer:
    """A process that takes part. `rounds`: what it said of each round it applied, by number."""

    name: str
    process: Any
    pipe: Connection
    folder: Path
    rounds: dict[int, tuple[bytes, tuple[str, ...]]] = field(default_factory=dict)
    address: PeerAddress | None = None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()
        self.process.close()

    def log(self) -> str:
        return (self.folder / "log").read_text()


@dataclass
class Processes:
    root: Path
    peers: dict[str, Peer] = field(default_factory=dict)

    def start(self, name: str) -> Peer:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        founder = load_or_create(self.root / "a.key").peer_id
        process = context.Process(target=_serve, args=(theirs, name, folder, founder), daemon=True)
        process.start()
        theirs.close()
        peer = self.peers[name] = Peer(name, process, ours, folder)
        assert ours.poll(WITHIN_S), peer.log()
        peer.address = ours.recv()
        for other in self.peers.values():
            if other is not peer and other.process.is_alive():
                peer.pipe.send(other.address)
        return peer

    def go(self, until: int, *names: str) -> None:
        """Let all contribute up to this round, and wait until these have applied it."""
        living = [peer for peer in self.peers.values() if peer.process.is_alive()]
        for peer in living:
            peer.pipe.send(until)
        waiting = {name for name in names or self.peers if until not in self.peers[name].rounds}
        while waiting:
            ready = wait([self.peers[name].pipe for name in waiting], timeout=WITHIN_S)
            assert ready, f"{sorted(waiting)} did not reach round {until}: " + "\n".join(
                f"--- {name}\n{self.peers[name].log()[-3000:]}" for name in sorted(waiting)
            )
            for peer in living:
                if peer.pipe in ready:
                    number, digest, contributors = peer.pipe.recv()
                    peer.rounds[number] = digest, contributors
            waiting = {name for name in waiting if until not in self.peers[name].rounds}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.peers.values():
            peer.end()


def test_four_processes_make_rounds_and_one_is_killed(forking: None, tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        for name in "abcd":
            processes.start(name)
        # The founder admits the others in rounds without contributions; from some round on all four are members.
        processes.go(8)
        founder = processes.peers["a"]
        # A round does not wait for long for the last of four.
        assert [1 for number in range(1, 9) if len(founder.rounds[number][1]) >= N_PEERS - 1]
        processes.peers["c"].kill()
        processes.go(10, "a", "b", "d")
        assert founder.rounds[10][1] == ("a", "b", "d")
        kept = dict(processes.peers["c"].rounds)
        again, number = processes.start("c"), 10
        while "c" not in founder.rounds[number][1]:
            number += 1
            assert number < 20, founder.rounds
            processes.go(number)
        assert set(again.rounds) | set(kept) == set(range(1, number + 1)), "it made up for what it had missed"
        # What anybody had after a round is what the others had, and what the rule gives.
        total = np.zeros(N_ELEMENTS, np.float32)
        for over in range(1, number + 1):
            said = {peer.rounds[over] for peer in processes.peers.values() if over in peer.rounds}
            said |= {kept[over]} if over in kept else set()
            assert len(said) == 1, f"round {over}: {said}"
            [(digest, contributors)] = said
            if contributors:
                total = total + mean_of([vector_of(name, over) for name in contributors])
            assert digest == digest_of(total)
        assert not any("peer.named" in peer.log() for peer in processes.peers.values())


# ---- in the child --------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, name: str, folder: Path, founder: str) -> None:
    with (folder / "log").open("a", buffering=1) as log:
        try:
            trio.run(_run, pipe, name, folder, founder, EventWriter(log, as_json=True))
        except BaseException:  # noqa: BLE001 - the root of a process: whoever started it reads the log
            traceback.print_exc(file=log)
            sys.exit(1)


async def _run(pipe: Connection, name: str, folder: Path, founder: str, event: EventWriter) -> None:
    identity = load_or_create(folder.parent / f"{name}.key")
    async with open_transport(identity, listen=("/ip4/127.0.0.1/tcp/0",), event=event) as transport:
        exchange = BlobExchange(transport, event=event)
        ports = GroupPorts(RoundDoor(transport), exchange, identity, DeviceCompute(), DiskThreads(), event)
        after, total = _kept(folder)
        place = GroupPlace(RUN, "average", TERMS, founder)
        group = Group(place, ports, ToyReducer(), folder / "rounds", Standing(digest_of(total), after))
        async with trio.open_nursery() as nursery:
            await nursery.start(exchange.run)
            await nursery.start(group.run)
            pipe.send(PeerAddress(identity.peer_id, transport.addresses))
            program = _Program(pipe, name, folder, group, total)
            nursery.start_soon(program.obey)
            nursery.start_soon(program.contribute)
            await program.apply()


@dataclass
class _Program:
    pipe: Connection
    name: str
    folder: Path
    group: Group
    total: np.ndarray
    until: int = 0

    async def obey(self) -> None:
        while True:
            try:
                word = await trio.to_thread.run_sync(self.pipe.recv, abandon_on_cancel=True)
            except (EOFError, OSError):
                return  # whoever started us has gone, and kills us
            if isinstance(word, PeerAddress):
                self.group.meet(word)
            else:
                self.until = word
                self.group.bell.ring()

    async def contribute(self) -> None:
        while True:
            seen, number = self.group.bell.count, self.group.round
            if number <= self.until and self.group.is_member and len(self.group.members) == N_PEERS:
                bodies = np.split(vector_of(self.name, number), self.group.n_shards)
                await self.group.contribute(Contribution(tuple(body.tobytes() for body in bodies)), number)
            await self.group.bell.after(seen)

    async def apply(self) -> None:
        while True:
            done = await self.group.committed()
            assert not isinstance(done, NeedState), done
            if done.results:
                self.total = self.total + np.frombuffer(b"".join(done.results), np.float32)
            _keep(self.folder, done.round, self.total)
            digest = digest_of(self.total)
            self.pipe.send(
                (done.round, digest, tuple(sorted(map(_name_of(self.folder), done.certificate.outcome.contributors))))
            )
            self.group.applied(digest)


def _name_of(folder: Path):
    keys = {load_or_create(path).peer_id: path.stem for path in folder.parent.glob("*.key")}
    return keys.__getitem__


def _keep(folder: Path, number: int, total: np.ndarray) -> None:
    fresh = folder / "state.new"
    fresh.write_bytes(number.to_bytes(8, "little") + total.tobytes())
    fresh.replace(folder / "state")


def _kept(folder: Path) -> tuple[int, np.ndarray]:
    with contextlib.suppress(FileNotFoundError):
        data = (folder / "state").read_bytes()
        return int.from_bytes(data[:8], "little"), np.frombuffer(data[8:], np.float32)
    return 0, np.zeros(N_ELEMENTS, np.float32)
