"""Weights between real processes: from several peers at once, past a liar, after SIGKILL with nothing sent twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from mycel.node.file_transfer import FileOptions
from mycel.node.files import serve_files
from mycel.node.libp2p_transport import open_transport
from mycel.node.model_store import ModelStore, build_manifest
from mycel.protocols.codec import file_codec
from mycel.protocols.ids import FILES
from mycel.protocols.messages import FileChunk, GetFile
from mycel.protocols.ports import Done, Handler, Stream, Transport
from mycel.security.identity import Identity
from mycel.swarm.manifest import Manifest, sign_manifest, swarm_id
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

T = TypeVar("T")
WANTED = ("block.0", "block.2")
LISTEN = ("/ip4/127.0.0.1/tcp/0",)

# argv: cache, swarm id, units, {peer: addresses}. Says every chunk when it is kept, and at the end what came of it.
FETCHER = """
import json, sys
from pathlib import Path
import trio
from mycel.node.file_transfer import FileOptions
from mycel.node.files import fetch_manifest, fetch_units
from mycel.node.libp2p_transport import open_transport
from mycel.node.model_store import ModelStore
from mycel.security.identity import Identity

def say(**facts):
    print(json.dumps(facts), flush=True)

async def main():
    cache, swarm, units, peers = sys.argv[1], bytes.fromhex(sys.argv[2]), sys.argv[3].split(), json.loads(sys.argv[4])
    async with open_transport(Identity.generate(), listen=()) as transport:
        for peer, addresses in peers.items():
            transport.learn(peer, addresses)
        options = FileOptions(
            event=lambda name, /, **facts: say(event=name, **facts),
            progress=lambda progress: say(kept=progress.unit, by=progress.peer),
        )
        manifest = await fetch_manifest(transport, list(peers), swarm)
        done = await fetch_units(transport, list(peers), ModelStore(Path(cache)), manifest, units, options)
        say(done=done.size_bytes, rate=done.bytes_per_s, sources=done.sources)

trio.run(main)
"""


@dataclass
class Gate:
    """A disk that reads so many pieces, and further ones when it is opened; `passed` once one of those was read."""

    pieces: int
    opened: trio.Event = field(default_factory=trio.Event)
    passed: trio.Event = field(default_factory=trio.Event)

    async def run(self, job: Callable[[], T], *, cost_s: float = 0.0) -> Done[T]:
        self.pieces -= 1
        if self.pieces < 0:
            await self.opened.wait()
            self.passed.set()
        return Done(job(), 0.0, 0.0)


def counting(store: ModelStore, manifest: Manifest, asked: Counter[str]) -> ModelStore:
    """The store, noting which unit each piece that is read belongs to."""
    units = {unit.sha256: unit.name for unit in manifest.units}
    read = store.read

    def note(swarm: bytes, digest: bytes, offset: int, size_bytes: int) -> bytes:
        asked[units.get(digest, "other")] += 1
        return read(swarm, digest, offset, size_bytes)

    store.read = note  # type: ignore[method-assign]
    return store


@dataclass
class Bed:
    """A model, and the command line of a process that fetches part of it."""

    manifest: Manifest
    store: ModelStore
    cache: Path

    def command(self, transports: list[Transport]) -> list[str]:
        peers = json.dumps({transport.peer_id: transport.addresses for transport in transports})
        swarm = swarm_id(self.manifest).hex()
        return [sys.executable, "-c", FETCHER, str(self.cache), swarm, " ".join(WANTED), peers]


def lying(bed: Bed, lied: trio.Event) -> Handler:
    """Serves everything, but weights wrong."""
    chunks = {unit.sha256 for unit in bed.manifest.units}

    async def handle(stream: Stream) -> None:
        while (frame := await stream.receive()) is not None:
            request = file_codec.decode_only(frame)
            assert isinstance(request, GetFile)
            data = bed.store.read(request.swarm, request.digest, request.offset, request.size_bytes)
            if request.digest in chunks:
                lied.set()
                data = data[:-1] + bytes([data[-1] ^ 1])
            await stream.send(*file_codec.encode(FileChunk(data)))

    return handle


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    model = make_tiny_model("llama", tmp_path / "model", n_blocks=4, intermediate_size=24_000)
    make_tiny_tokenizer(model)
    store = ModelStore(tmp_path / "owner")
    unsigned, index = build_manifest(model, store.cache_dir)
    manifest = sign_manifest(unsigned, Identity.generate())
    store.share(manifest, index)
    return Bed(manifest, store, tmp_path / "joiner")


async def say_lines(process: trio.Process, heard: list[dict[str, Any]], enough: Callable[[], bool]) -> None:
    """Hear what the process says until that is enough, or its end."""
    assert process.stdout is not None
    rest = b""
    async for data in process.stdout:
        *lines, rest = (rest + data).split(b"\n")
        heard += [json.loads(line) for line in lines]
        if enough():
            return


async def run_to_end(command: list[str]) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE))
        await say_lines(process, heard, lambda: False)
    return heard


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_fetcher_goes_on_from_many_peers_past_a_liar_with_nothing_sent_twice(bed: Bed) -> None:
    total = sum(bed.manifest.unit(unit).size_bytes for unit in WANTED)
    n_chunks = sum(bed.manifest.unit(unit).n_chunks for unit in WANTED)
    asked: Counter[str] = Counter()
    counting(bed.store, bed.manifest, asked)
    before = 5

    async def main() -> None:
        async with (
            open_transport(Identity.generate(), listen=LISTEN) as first,
            open_transport(Identity.generate(), listen=LISTEN) as second,
            open_transport(Identity.generate(), listen=LISTEN) as third,
            trio.open_nursery() as nursery,
        ):
            gate = Gate(1 + before)  # the list of chunks, and a few of them
            first.serve(*serve_files(bed.store, FileOptions(disk=gate)))
            heard: list[dict[str, Any]] = []
            process = await nursery.start(
                partial(trio.run_process, bed.command([first]), stdout=subprocess.PIPE, check=False)
            )
            with trio.fail_after(60):
                await say_lines(process, heard, lambda: len(heard) == before)
                os.kill(process.pid, signal.SIGKILL)
                await process.wait()
            assert [line["by"] for line in heard] == [first.peer_id] * before
            (part,) = bed.cache.rglob("*.part")
            assert part.stem == heard[-1]["kept"]
            assert not list(bed.cache.rglob("block.*.safetensors"))

            asked.clear()
            # All three have their turn, whoever is connected first: the liar, then the second peer, then the first.
            lied = trio.Event()
            slow = Gate(0, opened=lied)
            first.serve(*serve_files(bed.store, FileOptions(disk=Gate(2, opened=slow.passed))))
            second.serve(*serve_files(bed.store, FileOptions(disk=slow)))
            third.serve(FILES, lying(bed, lied))
            with trio.fail_after(60):
                heard = await run_to_end(bed.command([first, second, third]))
            *said, done = heard
            kept = Counter(line["kept"] for line in said if "kept" in line)
            assert done["done"] == total - before * 2**20
            assert sum(kept.values()) == n_chunks - before
            assert kept.keys() <= set(WANTED)
            assert asked.keys() - {"other"} <= set(WANTED)  # nothing of a unit that is not hosted
            # several peers gave chunks of one unit
            assert {first.peer_id, second.peer_id} in [set(peers) for peers in done["sources"].values()]
            failed = [line for line in said if line.get("event") == "fetch.failed"]
            assert {(line["peer"], line["kind"]) for line in failed} == {(third.peer_id, "VerificationError")}
            assert "sent wrong bytes as chunk" in failed[0]["reason"]
            assert not [line for line in said if line.get("by") == third.peer_id]
            nursery.cancel_scope.cancel()

    trio.run(main)
    store = ModelStore(bed.cache)
    assert store.missing_units(bed.manifest, [unit.name for unit in bed.manifest.units]) == (
        "embed",
        "block.1",
        "block.3",
        "head",
    )
    store.share(bed.manifest)
    for unit in WANTED:
        spec = bed.manifest.unit(unit)
        ours, theirs = (s.read(swarm_id(bed.manifest), spec.sha256, 0, spec.size_bytes) for s in (store, bed.store))
        assert ours == theirs
