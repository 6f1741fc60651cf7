"""Files between peers, in the simulated world: several sources at once, liars, deaths, silence, and resuming."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
import trio

from mycel.node.fetch_units import FetchProgress
from mycel.node.files import FileLimits, FileOptions, fetch_manifest, fetch_small_files, fetch_units, serve_files
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
from mycel.swarm.manifest import Manifest, manifest_bytes, swarm_id, unit_names
from tests.sim.compute import SimCompute
from tests.sim.faults import LinkFaults
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

N_BLOCKS = 4
UNITS = unit_names(N_BLOCKS)
LIMITS = FileLimits(chunk_bytes=2000, window=4)
SLOW = LinkFaults(latency_s=0.02, bandwidth_bytes_per_s=1e6)


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
        with store.downloading(self.manifest, units) as folder:
            for unit in units:
                with folder.unit(self.manifest, unit) as part:
                    part.append(self.blob(unit))
                    assert part.finish()
        store.share(self.manifest)
        return store

    def blob(self, unit: str) -> bytes:
        spec = self.manifest.unit(unit)
        return self.store.read(self.id, spec.sha256, 0, spec.size_bytes)

    def joiner(self) -> ModelStore:
        return ModelStore(self.tmp_path / "joiner")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(make_tiny_model("qwen2", tmp_path_factory.mktemp("models") / "tiny", n_blocks=N_BLOCKS))


@pytest.fixture
def swarm(directory: Path, tmp_path: Path) -> Swarm:
    store = ModelStore(tmp_path / "founder")
    manifest, index = build_manifest(directory, store.cache_dir)
    store.share(manifest, index)
    return Swarm(directory, manifest, store, tmp_path)


@dataclass
class Bed:
    """A world with a joiner and the sources it knows."""

    world: World
    joiner: SimTransport
    peers: dict[str, str] = field(default_factory=dict)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def options(self, name: str = "joiner", limits: FileLimits = LIMITS) -> FileOptions:
        return FileOptions(
            SimCompute(self.world, name), limits, lambda event, /, **facts: self.events.append((event, facts))
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

    def names(self, sources: dict[str, str]) -> dict[str, str]:
        back = {peer: name for name, peer in self.peers.items()}
        return {unit: back[peer] for unit, peer in sources.items()}


def simulate(scenario: Callable[[Bed], Awaitable[None]], seed: int = 1) -> World:
    async def main(world: World) -> None:
        await scenario(Bed(world, world.add_node("joiner")))

    return run_world(seed, main)


def answering(answer: Callable[[FileMessage], FileMessage | None]) -> Handler:
    """A handler that answers by a function; None is silence."""

    async def handle(stream: Stream) -> None:
        while (frame := await stream.receive()) is not None:
            message = answer(file_codec.decode_only(frame))
            if message is not None:
                await stream.send(*file_codec.encode(message))

    return handle


def lying(store: ModelStore) -> Handler:
    """Right sizes, wrong bytes."""

    def answer(request: FileMessage) -> FileMessage:
        assert isinstance(request, GetFile)
        data = store.read(request.swarm, request.digest, request.offset, request.size_bytes)
        return FileChunk(bytes([data[0] ^ 1]) + data[1:])

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
    other = manifest_bytes(msgspec.structs.replace(swarm.manifest, name="other"))

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
    later = manifest_bytes(msgspec.structs.replace(swarm.manifest, version=9))

    async def scenario(bed: Bed) -> None:
        founder = bed.source("founder", answering(lambda _: ManifestBytes(later)))
        with pytest.raises(ConfigError, match="version 9"):
            await fetch_manifest(bed.joiner, [founder], hashlib.sha256(later).digest(), bed.options())

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


def test_units_come_from_all_who_have_them_side_by_side(swarm: Swarm) -> None:
    def fetch(n_sources: int) -> float:
        store = ModelStore(swarm.tmp_path / f"joiner {n_sources}")
        took: list[float] = []

        async def scenario(bed: Bed) -> None:
            peers = [bed.source(f"source {number}", swarm.store) for number in range(n_sources)]
            shown: list[FetchProgress] = []
            began = trio.current_time()
            fetched = await fetch_units(
                bed.joiner, peers, store, swarm.manifest, UNITS, bed.options(), on_progress=shown.append
            )
            took.append(trio.current_time() - began)
            assert fetched.sources.keys() == set(UNITS)
            assert set(fetched.sources.values()) == set(peers)
            assert not fetched.failures
            total = sum(unit.size_bytes for unit in swarm.manifest.units)
            assert (shown[-1].done_bytes, shown[-1].total_bytes) == (total, total)
            again = await fetch_units(bed.joiner, [], store, swarm.manifest, UNITS, bed.options())
            assert not again.sources

        simulate(scenario)
        check_whole(store, swarm)
        return took[0]

    assert fetch(3) < 0.6 * fetch(1)


def test_the_window_hides_the_round_trips(swarm: Swarm) -> None:
    def fetch(window: int) -> float:
        took: list[float] = []

        async def scenario(bed: Bed) -> None:
            peers = [bed.source("founder", swarm.store)]
            options = bed.options(limits=FileLimits(chunk_bytes=1000, window=window))
            store = ModelStore(swarm.tmp_path / f"joiner {window}")
            began = trio.current_time()
            await fetch_units(bed.joiner, peers, store, swarm.manifest, ("embed",), options)
            took.append(trio.current_time() - began)

        simulate(scenario)
        return took[0]

    assert fetch(8) < 0.3 * fetch(1)


def test_each_holder_is_asked_for_what_it_has(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        front = bed.source("front", swarm.holder("front", ("embed", "block.0", "block.1")))
        back = bed.source("back", swarm.holder("back", ("block.2", "block.3", "head")))
        holders = {unit: (front,) if unit in UNITS[:3] else (back,) for unit in UNITS}
        store = swarm.joiner()
        fetched = await fetch_units(bed.joiner, holders, store, swarm.manifest, UNITS, bed.options())
        assert bed.names(dict(fetched.sources)) == dict(zip(UNITS, ["front"] * 3 + ["back"] * 3, strict=True))
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
        assert set(bed.names(dict(fetched.sources)).values()) == {"front", "back"}
        assert all(isinstance(error, PeerRefused) for error in fetched.failures)
        check_whole(store, swarm)

    simulate(scenario)


def test_a_joiner_serves_what_it_has_fetched(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        founder = bed.source("founder", swarm.store)
        store = swarm.joiner()
        await fetch_small_files(bed.joiner, [founder], store, swarm.manifest, bed.options())
        await fetch_units(bed.joiner, [founder], store, swarm.manifest, ("block.1",), bed.options())
        store.share(swarm.manifest)
        bed.joiner.serve(*serve_files(store, bed.options()))
        third = bed.world.add_node("third")
        third.learn(bed.joiner.peer_id, bed.joiner.addresses)
        theirs = ModelStore(swarm.tmp_path / "third")
        options = bed.options("third")
        peers = [bed.joiner.peer_id]
        manifest = await fetch_manifest(third, peers, swarm.id, options)
        await fetch_small_files(third, peers, theirs, manifest, options)
        await fetch_units(third, peers, theirs, manifest, ("block.1",), options)
        check_whole(theirs, swarm, ("block.1",))

    simulate(scenario)


@pytest.mark.parametrize("seed", range(3))
def test_a_liar_is_caught_named_and_not_asked_again(swarm: Swarm, seed: int) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("liar", lying(swarm.store)), bed.source("founder", swarm.store)]
        store = swarm.joiner()
        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options())
        (error,) = fetched.failures
        assert isinstance(error, VerificationError)
        assert error.peer == peers[0]
        assert "sent wrong bytes as" in error.reason
        assert set(bed.names(dict(fetched.sources)).values()) == {"founder"}
        check_whole(store, swarm)

    simulate(scenario, seed)


def test_with_liars_alone_nothing_is_kept(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("one", lying(swarm.store)), bed.source("two", lying(swarm.store))]
        store = swarm.joiner()
        with pytest.raises(RouteUnavailable, match="no peer could send") as caught:
            await fetch_units(bed.joiner, peers, store, swarm.manifest, ("block.2", "block.3"), bed.options())
        assert caught.value.missing == ((2, 3), (3, 4))
        assert not list(store.directory(swarm.id).glob("*.safetensors"))

    simulate(scenario)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda request: FileChunk(bytes(request.size_bytes - 1)), RemoteProtocolError),
        (lambda request: FileChunk(bytes(request.size_bytes + 1)), RemoteProtocolError),
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
        with pytest.raises(RouteUnavailable, match=r"no peer could send block\.0"):
            await fetch_units(bed.joiner, [bad], store, swarm.manifest, ("block.0",), bed.options())
        assert {facts["kind"] for _, facts in bed.events} <= {kind.__name__, "FileNotHere"}
        good = bed.source("good", swarm.store)
        fetched = await fetch_units(bed.joiner, [bad, good], store, swarm.manifest, UNITS, bed.options())
        assert set(bed.names(dict(fetched.sources)).values()) == {"good"}
        assert all(isinstance(error, kind) and error.peer == bad for error in fetched.failures)
        check_whole(store, swarm)

    simulate(scenario)


def test_a_source_that_dies_in_the_middle_is_replaced_and_nothing_comes_twice(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("first", swarm.store), bed.source("second", swarm.store)]
        store = swarm.joiner()
        sent: dict[str, int] = dict.fromkeys(peers, 0)
        last: dict[str, int] = {}

        def watch(progress: FetchProgress) -> None:
            sent[progress.peer] += max(0, progress.done_bytes - last.get("done", 0))
            last["done"] = progress.done_bytes
            if sent[peers[0]] > 10_000 and not bed.world.node("first").crashed:
                bed.world.crash("first")

        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options(), on_progress=watch)
        assert bed.world.node("first").crashed
        assert fetched.failures
        assert {error.peer for error in fetched.failures} == {peers[0]}
        assert all(isinstance(error, PeerUnreachable) for error in fetched.failures)
        # what the dead one had sent of its unit was used
        assert sum(sent.values()) == sum(unit.size_bytes for unit in swarm.manifest.units)
        check_whole(store, swarm)

    simulate(scenario)


def test_a_source_that_comes_back_goes_on(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peer = bed.source("only", swarm.store)
        store = swarm.joiner()
        crashed: list[bool] = []

        def watch(progress: FetchProgress) -> None:
            if progress.done_bytes > 20_000 and not crashed:
                crashed.append(True)
                bed.world.crash("only")
                node = bed.world.restart("only")
                node.serve(*serve_files(swarm.store, bed.options("only")))

        fetched = await fetch_units(bed.joiner, [peer], store, swarm.manifest, UNITS, bed.options(), on_progress=watch)
        assert crashed
        assert len(fetched.failures) >= 1
        check_whole(store, swarm)

    simulate(scenario)


def test_a_mixture_that_turns_out_wrong_accuses_nobody_and_is_fetched_again_from_one(swarm: Swarm) -> None:
    spec = swarm.manifest.unit("block.0")

    async def scenario(bed: Bed) -> None:
        store = swarm.joiner()
        store.save_manifest(swarm.manifest)
        with store.downloading(swarm.manifest, ("block.0",)) as folder, folder.unit(swarm.manifest, "block.0") as part:
            part.append(bytes(5000))  # an earlier run that was lied to
        peer = bed.source("honest", swarm.store)
        asked: list[int] = []
        fetched = await fetch_units(
            bed.joiner,
            [peer],
            store,
            swarm.manifest,
            ("block.0",),
            bed.options(),
            on_progress=lambda progress: asked.append(progress.done_bytes),
        )
        assert not fetched.failures
        assert [event for event, _ in bed.events] == ["fetch.wrong"]
        assert asked[0] == 5000
        assert 0 in asked
        assert asked[-1] == spec.size_bytes
        check_whole(store, swarm, ("block.0",))

    simulate(scenario)


def spoiling() -> Handler:
    """Sends one wrong chunk of whatever it is asked for, and goes."""

    async def handle(stream: Stream) -> None:
        frame = await stream.receive()
        if frame is not None:
            await stream.send(*file_codec.encode(FileChunk(bytes(file_codec.decode_only(frame).size_bytes))))

    return handle


def test_who_spoils_the_beginning_and_goes_cannot_have_others_blamed_or_keep_it_from_ending(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        one, two = bed.source("one", spoiling()), bed.source("two", spoiling())
        store = swarm.joiner()
        with pytest.raises(RouteUnavailable):
            await fetch_units(bed.joiner, [one, two], store, swarm.manifest, ("head",), bed.options())
        honest = bed.source("honest", swarm.store)
        bed.events.clear()
        peers = [one, two, honest]
        fetched = await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options())
        assert honest not in {error.peer for error in fetched.failures}
        mixed = [facts["what"] for event, facts in bed.events if event == "fetch.wrong"]
        assert mixed
        assert len(mixed) == len(set(mixed))  # no unit is put together twice
        check_whole(store, swarm)

    for seed in range(2):
        shutil.rmtree(swarm.joiner().cache_dir, ignore_errors=True)
        simulate(scenario, seed)


def test_a_cancelled_download_goes_on_where_it_stopped(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        peers = [bed.source("founder", swarm.store)]
        store = swarm.joiner()
        with trio.move_on_after(0.15) as scope:
            await fetch_units(bed.joiner, peers, store, swarm.manifest, UNITS, bed.options())
        assert scope.cancelled_caught
        parts = list(store.directory(swarm.id).rglob("*.part"))
        done_before = [unit for unit in UNITS if unit not in store.missing_units(swarm.manifest, UNITS)]
        assert len(parts) == 1
        assert len(done_before) < len(UNITS)
        shown: list[FetchProgress] = []
        fetched = await fetch_units(
            bed.joiner, peers, store, swarm.manifest, UNITS, bed.options(), on_progress=shown.append
        )
        assert set(fetched.sources) == set(UNITS) - set(done_before)
        assert max(p.done_bytes for p in shown if p.unit == parts[0].stem) > 0
        assert not [event for event, _ in bed.events]
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


def test_a_unit_larger_than_a_streams_requests_comes_over_several(swarm: Swarm) -> None:
    async def scenario(bed: Bed) -> None:
        founder = bed.source("founder", swarm.store, FileLimits(requests_per_stream=5))
        store = swarm.joiner()
        fetched = await fetch_units(bed.joiner, [founder], store, swarm.manifest, ("embed",), bed.options())
        assert len(fetched.failures) == swarm.manifest.unit("embed").size_bytes // (5 * LIMITS.chunk_bytes)
        check_whole(store, swarm, ("embed",))

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
            assert set(fetched.sources.values()) == set(peers)
            check_whole(store, swarm)

    trio.run(main)
