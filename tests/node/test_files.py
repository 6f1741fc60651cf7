"""Files between peers, in the simulated world: several sources at once, liars, deaths, silence, and resuming."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
import trio

from mycel.node.files import (
    FetchProgress,
    FileLimits,
    FileOptions,
    fetch_manifest,
    fetch_small_files,
    fetch_units,
    serve_files,
)
from mycel.node.model_store import ModelStore, build_manifest
from mycel.protocols.codec import file_codec
from mycel.protocols.errors import (
    ConfigError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
    VerificationError,
)
from mycel.protocols.ids import FILES
from mycel.protocols.messages import FileChunk, FileMessage, GetFile, GetManifest, ManifestBytes, NotHere
from mycel.protocols.ports import Handler, Stream
from mycel.security.identity import Identity
from mycel.swarm.manifest import (
    CHUNK_BYTES,
    Manifest,
    manifest_bytes,
    sign_manifest,
    split_chunk_list,
    swarm_id,
    unit_names,
)
from tests.sim.compute import SimCompute
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

N_BLOCKS = 4
UNITS = unit_names(N_BLOCKS)
LIMITS = FileLimits(window=4)
SLOW = LinkFaults(latency_s=0.02, bandwidth_bytes_per_s=1e6)
FOUNDER = Identity.from_seed(bytes(32))


@dataclass(frozen=True)
class Swarm:
    """A model that a founder has, and the store it serves it from."""

    directory: Path
    manifest: Manifest
    store: ModelStore
    tmp_path: Path

    @property
    def id(self) -> bytes:
        return swarm_id(self.manifest)

    def holder(self, name: str, units: Sequence[str]) -> ModelStore:
        """The store of a peer that has some units."""
        store = ModelStore(self.tmp_path / name)
        store.save_manifest(self.manifest)
        for file in self.manifest.files:
            store.save_file(self.manifest, file, self.store.read(self.id, file.sha256, 0, file.size_bytes))
        store.save_chunk_list(self.manifest, self.chunk_list)
        with store.downloading(self.manifest, units) as folder:
            for unit in units:
                part = folder.unit(self.manifest.unit(unit), self.hashes[unit])
                for index in sorted(part.missing):
                    assert part.keep(index, self.chunk(unit, index))
                part.finish()
        store.share(self.manifest)
        return store

    @property
    def chunk_list(self) -> bytes:
        return self.store.read(self.id, self.manifest.chunks, 0, self.manifest.chunk_list_bytes)

    @property
    def hashes(self) -> dict[str, bytes]:
        return split_chunk_list(self.manifest, self.chunk_list)

    def chunk(self, unit: str, index: int) -> bytes:
        extent = self.manifest.unit(unit).chunk(index)
        return self.blob(unit)[extent.start : extent.stop]

    def blob(self, unit: str) -> bytes:
        spec = self.manifest.unit(unit)
        return self.store.read(self.id, spec.sha256, 0, spec.size_bytes)

    def joiner(self) -> ModelStore:
        return ModelStore(self.tmp_path / "joiner")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of four chunks: hidden states wide enough for some megabytes."""
    wide = {"hidden_size": 256, "intermediate_size": 1024}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_tokenizer(make_tiny_model("qwen2", folder, n_blocks=N_BLOCKS, **wide))


@pytest.fixture
def swarm(directory: Path, tmp_path: Path) -> Swarm:
    store = ModelStore(tmp_path / "founder")
    unsigned, index = build_manifest(directory, store.cache_dir)
    manifest = sign_manifest(unsigned, FOUNDER)
    store.share(manifest, index)
    return Swarm(directory, manifest, store, tmp_path)


@dataclass
class Bed:
    """A world with a joiner and the sources it knows."""

    world: World
    joiner: SimTransport
    peers: dict[str, str] = field(default_factory=dict)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def options(
        self,
        name: str = "joiner",
        limits: FileLimits = LIMITS,
        progress: Callable[[FetchProgress], None] = lambda _: None,
    ) -> FileOptions:
        return FileOptions(
            SimCompute(self.world, name), limits, lambda event, /, **facts: self.events.append((event, facts)), progress
        )

    def source(self, name: str, served: ModelStore | Handler | None, limits: FileLimits = LIMITS) -> str:
        """A node that serves a store, or anything else; its peer id."""
        node = self.world.add_node(name)
        if isinstance(served, ModelStore):
            node.serve(*serve_files(served, self.options(name, limits)))
        elif served is not None:
            node.serve(FILES, served)
        self.joiner.learn(node.peer_id, node.addresses)
        self.peers[name] = node.peer_id
        self.world.link(name, "joiner", SLOW)
        return node.peer_id

    def names(self, sources: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
        back = {peer: name for name, peer in self.peers.items()}
        return {unit: {back[peer] for peer in peers} for unit, peers in sources.items()}


def simulate(scenario: Callable[[Bed], Awaitable[None]], seed: int = 1) -> World:
    async def main(world: World) -> None:
        await scenario(Bed(world, world.add_node("joiner")))

    return run_world(seed, main, options=WorldOptions(window_bytes=4 << 20))


def answering(answer: Callable[[FileMessage], FileMessage | None]) -> Handler:
    """A handler that answers by a function; None is silence."""

    async def handle(stream: Stream) -> None:
        while (frame := await stream.receive()) is not None:
            message = answer(file_codec.decode_only(frame))
            if message is not None:
                await stream.send(*file_codec.encode(message))

    return handle


def lying(store: ModelStore, about: Callable[[GetFile], bool] = lambda _: True) -> Handler:
    """Right sizes, wrong bytes."""

    def answer(request: FileMessage) -> FileMessage:
        assert isinstance(request, GetFile)
        data = store.read(request.swarm, request.digest, request.offset, request.size_bytes)
        return FileChunk(bytes([data[0] ^ about(request)]) + data[1:])

    return answering(answer)


def check_whole(store: ModelStore, swarm: Swarm, units: Sequence[str] = UNITS) -> None:
    """The units are here, right, and nothing half-written is beside them."""
    folder = store.directory(swarm.id)
    expected = safetensors.torch.load_file(swarm.directory / "model.safetensors")
    for unit in units:
        loaded = safetensors.torch.load_file(folder / f"{unit}.safetensors")
        assert loaded.keys() == {tensor.name for tensor in swarm.manifest.unit(unit).tensors}
        assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    assert not (folder / "partial").exists()
    assert not [path for path in folder.rglob("*") if path.suffix in {".part", ".tmp"}]


# ---- manifest and small files


def test_a_client_gets_manifest_and_tokenizer_and_no_weights(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("founder", swarm.store)]
        store = swarm.joiner()
        manifest = await fetch_manifest(bed.joiner, peers, swarm.id, bed.options())
        assert manifest == swarm.manifest
        folder = await fetch_small_files(bed.joiner, peers, store, manifest, bed.options())
        for file in manifest.files:
            assert (folder / file.name).read_bytes() == (swarm.directory / file.name).read_bytes()
        assert not list(folder.glob("*.safetensors"))
        frames = len([entry for entry in bed.world.log if entry[1] == "frame"])
        await fetch_small_files(bed.joiner, peers, store, manifest, bed.options())
        assert len([entry for entry in bed.world.log if entry[1] == "frame"]) == frames  # nothing was asked again

    simulate(scenario)


def test_manifests_that_are_not_this_swarms_are_refused(swarm: Swarm) -> None:
    other = manifest_bytes(sign_manifest(msgspec.structs.replace(swarm.manifest, name="other"), FOUNDER))

    async def scenario(bed: Bed) -> None:
        liar = bed.source("liar", answering(lambda _: ManifestBytes(other)))
        rude = bed.source("rude", answering(lambda _: FileChunk(b"")))
        stranger = bed.source("stranger", ModelStore(swarm.tmp_path / "empty"))
        deaf = bed.source("deaf", None)
        with pytest.raises(RouteUnavailable, match=r"no peer could send the manifest of the swarm: 4 asked; .*speak"):
            await fetch_manifest(bed.joiner, [liar, rude, stranger, deaf], swarm.id, bed.options())
        kinds = [facts["kind"] for _, facts in bed.events]
        assert kinds == ["VerificationError", "RemoteProtocolError", "FileNotHere", "PeerRefused"]
        founder = bed.source("founder", swarm.store)
        assert await fetch_manifest(bed.joiner, [liar, founder], swarm.id, bed.options()) == swarm.manifest
        with pytest.raises(RouteUnavailable, match="no peer is known"):
            await fetch_manifest(bed.joiner, [], swarm.id, bed.options())

    simulate(scenario)


def test_a_manifest_of_a_later_mycel_is_the_users_business(swarm: Swarm) -> None:
    later = manifest_bytes(sign_manifest(msgspec.structs.replace(swarm.manifest, version=9), FOUNDER))

    async def scenario(bed: Bed) -> None:
        founder = bed.source("founder", answering(lambda _: ManifestBytes(later)))
        with pytest.raises(ConfigError, match="version 9"):
            await fetch_manifest(bed.joiner, [founder], hashlib.sha256(later).digest(), bed.options())

    simulate(scenario)


def test_a_manifest_that_its_founder_did_not_sign_is_nobodys_swarm(swarm: Swarm) -> None:
    stolen = manifest_bytes(msgspec.structs.replace(swarm.manifest, founder=Identity.generate().peer_id))

    async def scenario(bed: Bed) -> None:
        thief = bed.source("thief", answering(lambda _: ManifestBytes(stolen)))
        with pytest.raises(ConfigError, match="not signed by the founder"):
            await fetch_manifest(bed.joiner, [thief], hashlib.sha256(stolen).digest(), bed.options())

    simulate(scenario)


def test_a_small_file_from_a_liar_comes_from_the_next(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("liar", lying(swarm.store)), bed.source("founder", swarm.store)]
        folder = await fetch_small_files(bed.joiner, peers, swarm.joiner(), swarm.manifest, bed.options())
        assert (folder / "tokenizer.json").read_bytes() == (swarm.directory / "tokenizer.json").read_bytes()
        assert [facts["kind"] for _, facts in bed.events] == ["VerificationError"]

    simulate(scenario)


def test_a_small_file_that_nobody_has_is_named(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("liar", lying(swarm.store))]
        store = swarm.joiner()
        with pytest.raises(RouteUnavailable, match=r"no peer could send config\.json: 1 asked"):
            await fetch_small_files(bed.joiner, peers, store, swarm.manifest, bed.options())
        assert store.missing_files(swarm.manifest) == swarm.manifest.files

    simulate(scenario)


# ---- units


def test_chunks_come_from_all_who_have_them_side_by_side(swarm: Swarm) -> None:
    def fetch(n_sources: int) -> float:
        store = ModelStore(swarm.tmp_path / f"joiner {n_sources}")
        took: list[float] = []

        async def scenario(bed: Bed) -> None:
            peers = [bed.source(f"source {number}", swarm.store) for number in range(n_sources)]
            shown: list[FetchProgress] = []
            options = bed.options(progress=shown.append)
            began = trio.current_time()
            fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, options)
            took.append(trio.current_time() - began)
            assert fetched.sources.keys() == set(UNITS)
            # one unit came from all of them at once
            assert set(peers) in [set(sources) for sources in fetched.sources.values()]
            assert not fetched.failures
            total = sum(unit.size_bytes for unit in swarm.manifest.units)
            assert fetched.size_bytes == total == sum(given.size_bytes for given in fetched.by_peer.values())
            assert fetched.seconds <= took[0]
            # the links carry 1 MB/s each
            assert 0.8e6 * n_sources < fetched.bytes_per_s < 1e6 * n_sources
            assert all(0.8e6 < given.size_bytes / given.seconds < 1e6 for given in fetched.by_peer.values())
            assert (shown[-1].done_bytes, shown[-1].total_bytes) == (total, total)
            again = await fetch_units(bed.joiner, [], store, swarm.manifest, UNITS, bed.options())
            assert (again.size_bytes, again.bytes_per_s) == (0, 0.0)

        simulate(scenario)
        check_whole(store, swarm)
        return took[0]

    assert fetch(3) < 0.4 * fetch(1)


def test_the_window_hides_the_round_trips(swarm: Swarm) -> None:
    def fetch(window: int) -> float:
        took: list[float] = []

        async def scenario(bed: Bed) -> None:
            peers = [bed.source("founder", swarm.store)]
            bed.world.link("founder", "joiner", LinkFaults(latency_s=0.3, bandwidth_bytes_per_s=100e6))
            store = ModelStore(swarm.tmp_path / f"joiner {window}")
            options = bed.options(limits=FileLimits(window=window))
            began = trio.current_time()
            await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, options)
            took.append(trio.current_time() - began)

        simulate(scenario)
        return took[0]

    assert fetch(8) < 0.5 * fetch(1)


def test_each_holder_is_asked_for_what_it_has(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        front = bed.source("front", swarm.holder("front", ("embed", "block.0", "block.1")))
        back = bed.source("back", swarm.holder("back", ("block.2", "block.3", "head")))
        holders = {unit: (front,) if unit in UNITS[:3] else (back,) for unit in UNITS}
        store = swarm.joiner()
        fetched = await fetch_units(bed.joiner, holders, store, swarm.manifest, UNITS, bed.options())
        expected = dict(zip(UNITS, [{"front"}] * 3 + [{"back"}] * 3, strict=True))
        assert bed.names(fetched.sources) == expected
        assert not fetched.failures
        check_whole(store, swarm)

    simulate(scenario)


def test_who_lacks_a_unit_is_asked_for_the_others(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [
            bed.source("front", swarm.holder("front", ("embed", "block.0", "block.1"))),
            bed.source("back", swarm.holder("back", ("block.2", "block.3", "head"))),
        ]
        store = swarm.joiner()
        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options())
        assert set.union(*bed.names(fetched.sources).values()) == {"front", "back"}
        assert all(isinstance(error, PeerRefused) for error in fetched.failures)
        assert len(fetched.failures) <= len(UNITS)  # said once for each unit, however many chunks it has
        check_whole(store, swarm)

    simulate(scenario)


def test_a_joiner_serves_what_it_has_fetched_and_nothing_else_is_there(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        founder = bed.source("founder", swarm.store)
        store = swarm.joiner()
        await fetch_small_files(bed.joiner, [founder], store, swarm.manifest, bed.options())
        fetched = await fetch_units(bed.joiner, [founder], store, swarm.manifest, ("block.1",), bed.options())
        assert fetched.size_bytes == swarm.manifest.unit("block.1").size_bytes
        weights = [path.name for path in store.directory(swarm.id).rglob("*.safetensors")]
        assert weights == ["block.1.safetensors"]
        store.share(swarm.manifest)
        bed.joiner.serve(*serve_files(store, bed.options()))
        third = bed.world.add_node("third")
        third.learn(bed.joiner.peer_id, bed.joiner.addresses)
        theirs = ModelStore(swarm.tmp_path / "third")
        options = bed.options("third")
        peers = [bed.joiner.peer_id]
        manifest = await fetch_manifest(third, peers, swarm.id, options)
        assert manifest.founder == FOUNDER.peer_id
        await fetch_small_files(third, peers, theirs, manifest, options)
        await fetch_units(third, peers, theirs, manifest, ("block.1",), options)
        check_whole(theirs, swarm, ("block.1",))

    simulate(scenario)


@pytest.mark.parametrize("seed", range(3))
def test_a_liar_is_named_at_its_first_wrong_chunk_and_the_unit_goes_on(swarm: Swarm, seed: int) -> None:
    spec = swarm.manifest.unit("block.2")

    def third_chunk(request: GetFile) -> bool:
        return request.digest == spec.sha256 and request.offset == 2 * CHUNK_BYTES

    async def scenario(bed: Bed) -> None:
        peers = [bed.source("liar", lying(swarm.store, third_chunk)), bed.source("founder", swarm.store)]
        # so that it is the liar whom the third chunk is asked of
        bed.world.link("founder", "joiner", LinkFaults(latency_s=0.5, bandwidth_bytes_per_s=1e6))
        store = swarm.joiner()
        options = bed.options(limits=FileLimits(window=8))
        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, ("block.2",), options)
        (error,) = fetched.failures
        assert isinstance(error, VerificationError)
        assert (error.peer, error.reason) == (peers[0], "sent wrong bytes as chunk 2 of block.2")
        ((event, facts),) = bed.events
        assert (event, facts["peer"], facts["kind"]) == ("fetch.failed", peers[0], "VerificationError")
        assert fetched.size_bytes == spec.size_bytes
        check_whole(store, swarm, ("block.2",))

    simulate(scenario, seed)


def test_of_a_liar_nothing_is_kept_and_nothing_more_asked(swarm: Swarm) -> None:
    asked: list[GetFile] = []

    def note(request: GetFile) -> bool:
        asked.append(request)
        return True

    async def scenario(bed: Bed) -> None:
        peers = [bed.source("liar", lying(swarm.store, note)), bed.source("founder", swarm.store)]
        store = swarm.joiner()
        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options())
        # the chunk list, then a few chunks that were asked before the first one came
        kinds = [type(error) for error in fetched.failures]
        assert kinds == ([VerificationError] if len(asked) > 1 else [])
        assert len(asked) <= 1 + LIMITS.window
        assert fetched.by_peer.keys() == {peers[1]}
        check_whole(store, swarm)

    for seed in range(3):
        asked.clear()
        shutil.rmtree(swarm.joiner().cache_dir, ignore_errors=True)
        simulate(scenario, seed)


def test_a_chunk_list_from_a_liar_comes_from_the_next(swarm: Swarm) -> None:
    def list_alone(request: GetFile) -> bool:
        return request.digest == swarm.manifest.chunks

    async def scenario(bed: Bed) -> None:
        liar = bed.source("liar", lying(swarm.store, list_alone))
        with pytest.raises(RouteUnavailable, match="no peer could send the list of chunks"):
            await fetch_units(bed.joiner, [liar], swarm.joiner(), swarm.manifest, ("head",), bed.options())
        founder = bed.source("founder", swarm.store)
        store = swarm.joiner()
        await fetch_units(bed.joiner, [liar, founder], store, swarm.manifest, ("head",), bed.options())
        assert {facts["kind"] for _, facts in bed.events} == {"VerificationError"}
        check_whole(store, swarm, ("head",))

    simulate(scenario)


def test_with_liars_alone_nothing_is_kept(swarm: Swarm) -> None:
    def weights(request: GetFile) -> bool:
        return request.digest != swarm.manifest.chunks

    async def scenario(bed: Bed) -> None:
        peers = [bed.source(name, lying(swarm.store, weights)) for name in ("one", "two")]
        store = swarm.joiner()
        with pytest.raises(RouteUnavailable, match="no peer could send") as caught:
            await fetch_units(bed.joiner, peers, store, swarm.manifest, ("block.2", "block.3"), bed.options())
        assert caught.value.missing == ((2, 3), (3, 4))
        assert not list(store.directory(swarm.id).glob("*.safetensors"))
        assert {facts["peer"] for _, facts in bed.events} == set(peers)
        assert not list(store.directory(swarm.id).rglob("*.part"))

    simulate(scenario)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda request: FileChunk(bytes(request.size_bytes - 1)), RemoteProtocolError),
        (lambda request: FileChunk(bytes(min(request.size_bytes + 1, CHUNK_BYTES))), RemoteProtocolError),
        (lambda _: GetManifest(bytes(32)), RemoteProtocolError),
        (lambda _: NotHere("sold out"), PeerRefused),
        (lambda _: None, PeerTimeout),
    ],
    ids=["short", "long", "nonsense", "absent", "silent"],
)
def test_a_source_that_does_not_deliver_is_left(
    swarm: Swarm, answer: Callable[[GetFile], FileMessage | None], kind: type[PeerError]
) -> None:
    async def scenario(bed: Bed) -> None:
        bad = bed.source("bad", answering(answer))
        store = swarm.joiner()
        store.save_manifest(swarm.manifest)
        store.save_chunk_list(swarm.manifest, swarm.chunk_list)
        with pytest.raises(RouteUnavailable, match=r"no peer could send embed"):
            await fetch_units(bed.joiner, [bad], store, swarm.manifest, ("embed",), bed.options())
        assert {facts["kind"] for _, facts in bed.events} <= {kind.__name__, "FileNotHere"}
        good = bed.source("good", swarm.store)
        fetched = await fetch_units(bed.joiner, [bad, good], store, swarm.manifest, UNITS, bed.options())
        assert set.union(*bed.names(fetched.sources).values()) == {"good"}
        assert all(isinstance(error, kind) and error.peer == bad for error in fetched.failures)
        check_whole(store, swarm)

    simulate(scenario)


def test_a_source_that_dies_in_the_middle_is_replaced_and_nothing_comes_twice(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("first", swarm.store), bed.source("second", swarm.store)]
        store = swarm.joiner()
        sent: dict[str, int] = dict.fromkeys(peers, 0)

        def watch(progress: FetchProgress) -> None:
            sent[progress.peer] += 1
            if sent[peers[0]] == 3 and not bed.world.node("first").crashed:
                bed.world.crash("first")

        options = bed.options(progress=watch)
        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, options)
        assert bed.world.node("first").crashed
        assert fetched.failures
        assert {error.peer for error in fetched.failures} == {peers[0]}
        assert all(isinstance(error, PeerUnreachable) for error in fetched.failures)
        # what the dead one had sent was used
        assert fetched.by_peer[peers[0]].size_bytes >= 2 * CHUNK_BYTES
        assert sum(sent.values()) == sum(unit.n_chunks for unit in swarm.manifest.units)
        check_whole(store, swarm)

    simulate(scenario)


def test_a_source_that_comes_back_goes_on(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peer = bed.source("only", swarm.store)
        store = swarm.joiner()
        crashed: list[bool] = []

        def watch(progress: FetchProgress) -> None:
            if progress.done_bytes > 3 * CHUNK_BYTES and not crashed:
                crashed.append(True)
                bed.world.crash("only")
                node = bed.world.restart("only")
                node.serve(*serve_files(swarm.store, bed.options("only")))

        options = bed.options(progress=watch)
        fetched = await fetch_units(bed.joiner, [peer], store, swarm.manifest, UNITS, options)
        assert crashed
        assert len(fetched.failures) >= 1
        check_whole(store, swarm)

    simulate(scenario)


def test_a_slow_source_does_not_keep_the_end_waiting(swarm: Swarm) -> None:
    """Its last chunks are asked of the idle one, too, and the first to come are taken."""

    async def scenario(bed: Bed) -> None:
        peers = [bed.source("slow", swarm.store), bed.source("quick", swarm.store)]
        bed.world.link("slow", "joiner", LinkFaults(latency_s=0.02, bandwidth_bytes_per_s=4e4))
        store = swarm.joiner()
        store.save_manifest(swarm.manifest)
        store.save_chunk_list(swarm.manifest, swarm.chunk_list)
        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options())
        assert fetched.seconds < 23  # 17 s for the quick one alone; one chunk takes the slow one 26 s
        assert not fetched.failures
        assert fetched.size_bytes == sum(unit.size_bytes for unit in swarm.manifest.units)
        check_whole(store, swarm)

    simulate(scenario)


def test_what_earlier_runs_left_is_kept_as_far_as_it_is_right(swarm: Swarm) -> None:
    spec = swarm.manifest.unit("block.0")

    async def scenario(bed: Bed) -> None:
        store = swarm.joiner()
        store.save_manifest(swarm.manifest)
        with store.downloading(swarm.manifest, ("block.0",)) as folder:
            part = folder.unit(spec, swarm.hashes["block.0"])
            assert part.keep(0, swarm.chunk("block.0", 0))
            assert part.keep(2, swarm.chunk("block.0", 2))
        (path,) = store.directory(swarm.id).rglob("*.part")
        data = bytearray(path.read_bytes())
        data[-CHUNK_BYTES // 2] ^= 1  # the disk is not what it was
        path.write_bytes(data)
        peer = bed.source("honest", swarm.store)
        shown: list[FetchProgress] = []
        options = bed.options(progress=shown.append)
        fetched = await fetch_units(bed.joiner, [peer], store, swarm.manifest, ("block.0",), options)
        assert fetched.size_bytes == spec.size_bytes - CHUNK_BYTES  # chunk 0 alone was right
        assert shown[-1].done_bytes == shown[-1].total_bytes == spec.size_bytes
        assert not fetched.failures
        check_whole(store, swarm, ("block.0",))

    simulate(scenario)


def test_a_unit_that_only_lacks_its_name_gets_it_without_a_peer(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        store = swarm.joiner()
        store.save_manifest(swarm.manifest)
        store.save_chunk_list(swarm.manifest, swarm.chunk_list)
        with store.downloading(swarm.manifest, ("block.0",)) as folder:
            part = folder.unit(swarm.manifest.unit("block.0"), swarm.hashes["block.0"])
            for index in sorted(part.missing):
                assert part.keep(index, swarm.chunk("block.0", index))
        fetched = await fetch_units(bed.joiner, [], store, swarm.manifest, ("block.0",), bed.options())
        assert fetched.size_bytes == 0
        check_whole(store, swarm, ("block.0",))

    simulate(scenario)


def spoiling() -> Handler:
    """Sends one wrong chunk of whatever it is asked for, and goes."""

    async def handle(stream: Stream) -> None:
        frame = await stream.receive()
        if frame is not None:
            await stream.send(*file_codec.encode(FileChunk(bytes(file_codec.decode_only(frame).size_bytes))))

    return handle


def test_who_spoils_the_beginning_and_goes_has_nobody_else_blamed_and_costs_one_chunk(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        honest = bed.source("honest", swarm.store)
        one, two = bed.source("one", spoiling()), bed.source("two", spoiling())
        store = swarm.joiner()
        store.save_manifest(swarm.manifest)
        store.save_chunk_list(swarm.manifest, swarm.chunk_list)
        fetched = await fetch_units(bed.joiner, [one, two, honest], store, swarm.manifest, UNITS, bed.options())
        assert sorted(error.peer for error in fetched.failures) == sorted([one, two])
        assert all(isinstance(error, VerificationError) for error in fetched.failures)
        assert fetched.by_peer.keys() == {honest}
        check_whole(store, swarm)

    for seed in range(2):
        shutil.rmtree(swarm.joiner().cache_dir, ignore_errors=True)
        simulate(scenario, seed)


def test_a_cancelled_download_goes_on_where_it_stopped(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("founder", swarm.store)]
        store = swarm.joiner()
        shown: list[FetchProgress] = []
        with trio.move_on_after(7) as scope:
            await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options(progress=shown.append))
        assert scope.cancelled_caught
        (part,) = store.directory(swarm.id).rglob("*.part")
        assert part.stat().st_size > CHUNK_BYTES
        lacking = [unit for unit in UNITS if unit in store.missing_units(swarm.manifest, UNITS)]
        assert 1 < len(lacking) < len(UNITS)
        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options())
        assert fetched.sources.keys() == set(lacking)
        total = sum(unit.size_bytes for unit in swarm.manifest.units)
        assert fetched.size_bytes == total - shown[-1].done_bytes  # no chunk that was here came again
        assert not bed.events
        check_whole(store, swarm)

    simulate(scenario)


def test_two_joiners_with_one_cache_do_not_harm_each_other(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        founder = bed.source("founder", swarm.store)
        other = bed.world.add_node("other")
        other.learn(founder, bed.world.node("founder").addresses)
        async with trio.open_nursery() as nursery:
            for node, name in ((bed.joiner, "joiner"), (other, "other")):
                nursery.start_soon(
                    fetch_units, node, [founder], swarm.joiner(), swarm.manifest, UNITS, bed.options(name)
                )
        check_whole(swarm.joiner(), swarm)

    simulate(scenario)


# ---- the model's repository


@dataclass
class Shelf:
    """A repository: gives a store's bytes after a while, `wrong` ones or none."""

    swarm: Swarm
    wrong: int = 0
    failure: PeerError | None = None
    asked: list[tuple[str, range]] = field(default_factory=list)
    name = "org/tiny@main"

    async def read(self, unit: str, extent: range) -> bytes:
        self.asked.append((unit, extent))
        await trio.sleep(0.1)
        if self.failure is not None:
            raise self.failure
        data = self.swarm.blob(unit)[extent.start : extent.stop]
        return bytes([data[0] ^ self.wrong]) + data[1:]


def test_what_no_peer_has_comes_from_the_repository_and_nothing_else_does(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        front = bed.source("front", swarm.holder("front", UNITS[:4]))
        shelf, store = Shelf(swarm), swarm.joiner()
        units = ("block.1", "block.2", "block.3")
        fetched = await fetch_units(bed.joiner, [front], store, swarm.manifest, units, bed.options(), repository=shelf)
        assert fetched.sources == {"block.1": (front,), "block.2": (front,), "block.3": (shelf.name,)}
        spec = swarm.manifest.unit("block.3")
        assert {unit for unit, _ in shelf.asked} == {"block.3"}
        assert (
            sum(len(extent) for _, extent in shelf.asked) == spec.size_bytes == fetched.by_peer[shelf.name].size_bytes
        )
        assert ("fetch.repository", {"repository": shelf.name, "what": "block.3"}) in bed.events
        check_whole(store, swarm, units)

    simulate(scenario)


def test_the_repository_goes_on_where_the_last_peer_died(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peer = bed.source("only", swarm.store)
        shelf, store = Shelf(swarm), swarm.joiner()

        def watch(progress: FetchProgress) -> None:
            if progress.done_bytes > 6 * CHUNK_BYTES and not bed.world.node("only").crashed:
                bed.world.crash("only")

        options = bed.options(progress=watch)
        fetched = await fetch_units(bed.joiner, [peer], store, swarm.manifest, UNITS, options, repository=shelf)
        assert fetched.by_peer.keys() == {peer, shelf.name}
        total = sum(unit.size_bytes for unit in swarm.manifest.units)
        assert fetched.size_bytes == total
        assert sum(len(extent) for _, extent in shelf.asked) == fetched.by_peer[shelf.name].size_bytes
        check_whole(store, swarm)

    simulate(scenario)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_repository_that_fails_or_holds_other_weights_is_named(swarm: Swarm, wrong: int) -> None:
    async def scenario(bed: Bed) -> None:
        front = bed.source("front", swarm.holder("front", UNITS[:2]))
        failure = None if wrong else PeerUnreachable(Shelf.name, "no answer from the hub")
        shelf, store = Shelf(swarm, wrong, failure), swarm.joiner()
        with pytest.raises(RouteUnavailable, match=r"wrong bytes as chunk 0|no answer from the hub") as caught:
            await fetch_units(bed.joiner, [front], store, swarm.manifest, ("block.3",), bed.options(), repository=shelf)
        assert caught.value.missing == ((3, 4),)
        assert store.missing_units(swarm.manifest, ("block.3",))

    simulate(scenario)


def test_too_little_disk_stops_it_before_anything_is_asked(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(swarm.tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    async def scenario(bed: Bed) -> None:
        peers = [bed.source("founder", swarm.store)]
        with pytest.raises(ConfigError, match="not enough disk"):
            await fetch_units(bed.joiner, peers, swarm.joiner(), swarm.manifest, UNITS, bed.options())
        assert not [entry for entry in bed.world.log if entry[1] == "frame"]

    simulate(scenario)


# ---- the service


def test_the_service_refuses_what_is_not_there_and_goes_on(swarm: Swarm) -> None:
    spec = swarm.manifest.unit("head")

    async def scenario(bed: Bed) -> None:
        stream = await bed.joiner.open(bed.source("founder", swarm.store), FILES)

        async def ask(request: FileMessage) -> FileMessage:
            await stream.send(*file_codec.encode(request))
            frame = await stream.receive()
            assert frame is not None
            return file_codec.decode_only(frame)

        assert isinstance(await ask(GetManifest(bytes(32))), NotHere)
        assert isinstance(await ask(GetFile(swarm.id, bytes(32), 0, 1)), NotHere)
        assert isinstance(await ask(GetFile(bytes(32), spec.sha256, 0, 1)), NotHere)
        answer = await ask(GetFile(swarm.id, spec.sha256, spec.size_bytes, 1))
        assert isinstance(answer, NotHere)
        assert str(swarm.directory) not in answer.reason
        assert await ask(GetFile(swarm.id, spec.sha256, 1, 5)) == FileChunk(swarm.blob("head")[1:6])
        assert [event for event, _ in bed.events] == ["files.unreadable"]

    simulate(scenario)


@pytest.mark.parametrize("frame", [b"junk", b"\x00\x00\x00\x00", file_codec.encode(FileChunk(b"x"))[0]])
def test_nonsense_costs_the_asker_its_stream(swarm: Swarm, frame: bytes) -> None:
    async def scenario(bed: Bed) -> None:
        stream = await bed.joiner.open(bed.source("founder", swarm.store), FILES)
        await stream.send(frame)
        with pytest.raises(PeerUnreachable):
            await stream.receive()
        assert any("RemoteProtocolError" in str(entry) for entry in bed.world.log)

    simulate(scenario)


def test_a_stream_that_idles_is_ended(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        stream = await bed.joiner.open(bed.source("founder", swarm.store), FILES)
        began = trio.current_time()
        with pytest.raises(PeerUnreachable):
            await stream.receive()
        assert LIMITS.idle_timeout_s <= trio.current_time() - began < LIMITS.idle_timeout_s + 1

    simulate(scenario)


def test_a_peer_has_few_streams_and_others_are_not_kept_waiting(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        founder = bed.source("founder", swarm.store)
        held = [await bed.joiner.open(founder, FILES) for _ in range(LIMITS.streams_per_peer)]
        await trio.sleep(1)
        refused = await bed.joiner.open(founder, FILES)
        assert await refused.receive() is None
        other = bed.world.add_node("other")
        other.learn(founder, bed.world.node("founder").addresses)
        assert await fetch_manifest(other, [founder], swarm.id, bed.options("other")) == swarm.manifest
        await held[0].aclose()
        await trio.sleep(1)
        assert await fetch_manifest(bed.joiner, [founder], swarm.id, bed.options()) == swarm.manifest

    simulate(scenario)


def test_what_is_more_than_a_streams_requests_comes_over_several(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        founder = bed.source("founder", swarm.store, FileLimits(requests_per_stream=5))
        store = swarm.joiner()
        fetched = await fetch_units(bed.joiner, [founder], store, swarm.manifest, UNITS, bed.options())
        n_chunks = sum(unit.n_chunks for unit in swarm.manifest.units)
        assert len(fetched.failures) == n_chunks // 5
        check_whole(store, swarm)

    simulate(scenario)


# ---- the real network


@pytest.mark.loopback
def test_everything_over_the_real_transport_and_real_threads(swarm: Swarm) -> None:
    from mycel.node.libp2p_transport import open_transport
    from mycel.security.identity import Identity

    async def main() -> None:
        listen = ("/ip4/127.0.0.1/tcp/0",)
        async with (
            open_transport(Identity.generate(), listen=listen) as founder,
            open_transport(Identity.generate(), listen=()) as joiner,
        ):
            founder.serve(*serve_files(swarm.store))
            joiner.learn(founder.peer_id, founder.addresses)
            peers, store = [founder.peer_id], swarm.joiner()
            manifest = await fetch_manifest(joiner, peers, swarm.id)
            await fetch_small_files(joiner, peers, store, manifest)
            fetched = await fetch_units(joiner, peers, store, manifest, UNITS)
            assert fetched.by_peer.keys() == set(peers)
            check_whole(store, swarm)

    trio.run(main)
