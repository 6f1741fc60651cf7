"""Repositories: what a founder downloads, and byte ranges for those whom no peer can help; on a hub of our own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from mycel.node.fetch_units import fetch_units
from mycel.node.file_transfer import FileOptions
from mycel.node.hub import HubLimits, HubRepository, download_snapshot, is_repository, locate_model, repository_of
from mycel.node.model_store import ModelStore, build_manifest
from mycel.protocols.errors import (
    ConfigError,
    PeerError,
    PeerRefused,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
)
from mycel.security.identity import Identity
from mycel.swarm.manifest import Manifest, sign_manifest, unit_names
from tests.node.hub_server import COMMIT, REPOSITORY, Hub, serving_hub, use_hub
from tests.sim.transport import SimTransport
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

N_BLOCKS = 3
UNITS = unit_names(N_BLOCKS)
SOURCE = f"{REPOSITORY}@{COMMIT}"
LIMITS = HubLimits(timeout_s=10.0, first_rest_s=0.0)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, blocks of three chunks."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_tokenizer(make_tiny_model("llama", folder, n_blocks=N_BLOCKS, intermediate_size=6_000))


@pytest.fixture(scope="session")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in many files."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model("llama", folder, n_blocks=N_BLOCKS, intermediate_size=6_000, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return make_tiny_tokenizer(folder)


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub(model) as hub:
        use_hub(hub, tmp_path / "hub", monkeypatch)
        yield hub


@pytest.fixture
def manifest(model: Path, tmp_path: Path) -> Manifest:
    return sign_manifest(build_manifest(model, tmp_path / "cache", source=SOURCE)[0], Identity.from_seed(bytes(32)))


def joiner(model: Path, manifest: Manifest, tmp_path: Path) -> ModelStore:
    """A store with the chunk list, which any peer of the swarm gives, and nothing else."""
    owner, store = ModelStore(tmp_path / "owner"), ModelStore(tmp_path / "joiner")
    _, index = build_manifest(model, tmp_path / "cache")
    owner.share(manifest, index)
    store.save_manifest(manifest)
    store.save_chunk_list(manifest, owner_read(owner, manifest, manifest.chunks, manifest.chunk_list_bytes))
    return store


def owner_read(owner: ModelStore, manifest: Manifest, digest: bytes, size_bytes: int) -> bytes:
    from mycel.swarm.manifest import swarm_id

    return owner.read(swarm_id(manifest), digest, 0, size_bytes)


def fetch(store: ModelStore, manifest: Manifest, units: tuple[str, ...], events: list[tuple[str, dict[str, object]]]):
    """Fetch with no peer at all."""

    async def main():
        options = FileOptions(event=lambda name, /, **facts: events.append((name, facts)))
        repository = HubRepository(manifest, LIMITS)
        transport: SimTransport = None  # type: ignore[assignment]  # nobody is asked
        return await fetch_units(transport, [], store, manifest, units, options, repository=repository)

    return trio.run(main)


# ---- founding


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_a_founder_gets_weights_configuration_and_tokenizer_and_nothing_else(
    hub: Hub, sharded: Path, tmp_path: Path, layout: str
) -> None:
    wanted = hub.directory if layout == "one file" else sharded
    hub.directory = shutil.copytree(wanted, tmp_path / "repository")
    for other in ("pytorch_model.bin", "consolidated.safetensors", "modeling_tiny.py", "README.md", "recipe.toml"):
        (hub.directory / other).write_bytes(b"not wanted")
    snapshot = download_snapshot(f"{REPOSITORY}@main")
    assert snapshot.source == SOURCE
    names = {path.name for path in wanted.iterdir()}
    assert {path.name for path in snapshot.directory.iterdir()} == names
    assert all((snapshot.directory / name).read_bytes() == (wanted / name).read_bytes() for name in names)
    manifest, _ = build_manifest(snapshot.directory, tmp_path / "cache", source=snapshot.source)
    assert (manifest.name, manifest.source) == ("Tiny-1B", SOURCE)
    gets = [path for method, path, _ in hub.asked if method == "GET" and "api" not in path]
    assert download_snapshot(REPOSITORY) == snapshot
    assert [path for method, path, _ in hub.asked if method == "GET" and "api" not in path] == gets


def test_what_is_no_repository_or_not_there_gives_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert [is_repository(text) for text in (REPOSITORY, f"{REPOSITORY}@v1.0", f"{REPOSITORY}@refs/pr/1")] == [True] * 3
    for text in ("tiny", "/org/model", "org/model/", "../model", "org/model@", "a/b/c", "org/mo del", "org/model@../x"):
        assert not is_repository(text)
        with pytest.raises(ConfigError, match="written ORG/NAME"):
            download_snapshot(text)
    with pytest.raises(ConfigError, match=r"cannot download org/other: ") as caught:
        download_snapshot("org/other")
    assert "\n" not in str(caught.value)
    hub.token = "secret"
    with pytest.raises(ConfigError, match=f"cannot download {REPOSITORY}: .*gated") as caught:
        download_snapshot(REPOSITORY)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"cannot download {REPOSITORY}: "):
        download_snapshot(REPOSITORY)


def test_a_directory_goes_before_a_repository_of_its_name(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_model(model).directory == model
    assert locate_model(Path("nothing")).source == ""  # no repository either: whoever opens it says so
    assert not hub.asked
    assert locate_model(Path(REPOSITORY)).source == SOURCE
    with pytest.raises(ConfigError, match="there is no directory org/other, and no such repository can be had"):
        locate_model(Path("org/other"))
    (tmp_path / REPOSITORY).mkdir(parents=True)
    assert locate_model(Path(REPOSITORY)).source == ""


@pytest.mark.parametrize("file", ["../../etc/passwd", "sub/model.safetensors", "*.safetensors", "model.bin"])
def test_an_index_that_leads_elsewhere_is_refused(hub: Hub, tmp_path: Path, file: str) -> None:
    hub.directory = tmp_path / "repository"
    hub.directory.mkdir()
    (hub.directory / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"w": "{file}"}}}}')
    with pytest.raises(ConfigError, match="no safetensors file"):
        download_snapshot(REPOSITORY)


def test_the_environment_names_hub_cache_and_token(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, since huggingface_hub reads its environment once."""
    hub.token = "secret"
    code = f"from mycel.node.hub import download_snapshot; print(download_snapshot({REPOSITORY!r}).directory)"
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "elsewhere"),
        "HF_TOKEN": "secret",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "elsewhere")
    assert not hub.cdn_saw_token


# ---- byte ranges


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_exactly_the_bytes_of_the_units_are_read(
    hub: Hub, model: Path, sharded: Path, manifest: Manifest, tmp_path: Path, layout: str
) -> None:
    hub.directory = model if layout == "one file" else sharded
    store = joiner(model, manifest, tmp_path)
    events: list[tuple[str, dict[str, object]]] = []
    fetched = fetch(store, manifest, ("block.1", "head"), events)
    wanted = sum(manifest.unit(unit).size_bytes for unit in ("block.1", "head"))
    assert fetched.size_bytes == wanted
    assert fetched.by_peer.keys() == {SOURCE}
    assert store.missing_units(manifest, UNITS) == ("embed", "block.0", "block.2")
    headers = {path: int.from_bytes((hub.directory / path).read_bytes()[:8], "little") + 8 for path in hub.sent}
    assert sum(hub.sent.values()) == wanted + sum(headers.values())
    if layout == "shards":
        assert len(hub.sent) < len(list(sharded.glob("*.safetensors")))
    assert [name for name, _ in events] == ["fetch.repository"]


def test_what_is_half_here_is_not_read_again(hub: Hub, model: Path, manifest: Manifest, tmp_path: Path) -> None:
    store = joiner(model, manifest, tmp_path)
    owner = ModelStore(tmp_path / "owner")
    owner.share(manifest, build_manifest(model, tmp_path / "cache")[1])
    spec = manifest.unit("block.0")
    data = owner_read(owner, manifest, spec.sha256, spec.size_bytes)
    hashes = store.chunk_list(manifest)
    assert hashes is not None
    with store.downloading(manifest, ("block.0",)) as folder:
        part = folder.unit(spec, hashes["block.0"])
        for index in (0, 2):
            assert part.keep(index, data[spec.chunk(index).start : spec.chunk(index).stop])
    fetched = fetch(store, manifest, ("block.0",), [])
    assert fetched.size_bytes == spec.size_bytes - sum(len(spec.chunk(index)) for index in (0, 2))


def test_trouble_that_passes_is_waited_out_and_no_byte_comes_twice(
    hub: Hub, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    hub.statuses = [503, 429, 500]
    hub.breaks = [3, 1, 100, 0, 50_000, 0]
    fetched = fetch(joiner(model, manifest, tmp_path), manifest, ("block.2",), [])
    assert not hub.statuses
    assert not hub.breaks
    header = int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little") + 8
    assert hub.sent["model.safetensors"] == fetched.size_bytes + header


def test_a_hub_whose_trouble_does_not_pass_is_given_up(
    hub: Hub, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    hub.statuses = [503] * 100
    events: list[tuple[str, dict[str, object]]] = []
    with pytest.raises(RouteUnavailable, match="status 503") as caught:
        fetch(joiner(model, manifest, tmp_path), manifest, ("block.2",), events)
    assert caught.value.missing == ((2, 3),)
    assert 100 - len(hub.statuses) <= 4 * LIMITS.tries
    assert {facts["kind"] for name, facts in events if name == "fetch.failed"} == {"PeerUnreachable"}


def test_a_hub_with_other_weights_is_caught_at_the_chunk(
    hub: Hub, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    hub.wrong_byte = 1  # the last byte of the file: of the last norm or block
    store = joiner(model, manifest, tmp_path)
    with pytest.raises(RouteUnavailable, match="wrong bytes as chunk"):
        fetch(store, manifest, UNITS, [])
    assert len(store.missing_units(manifest, UNITS)) >= 1


def read(manifest: Manifest, unit: str = "block.0", extent: range = range(100)) -> bytes:
    async def main() -> bytes:
        repository = repository_of(manifest, LIMITS)
        assert repository is not None
        return await repository.read(unit, extent)

    return trio.run(main)


def test_a_hub_that_gives_whole_files_is_left_before_it_has_sent_one(hub: Hub, manifest: Manifest) -> None:
    hub.ignores_ranges = True
    with pytest.raises(RemoteProtocolError, match="whole files and no byte ranges") as caught:
        read(manifest)
    assert caught.value.peer == SOURCE


def test_a_hub_that_sends_other_bytes_than_asked_is_left(hub: Hub, manifest: Manifest) -> None:
    hub.shifted = True
    with pytest.raises(RemoteProtocolError, match="other bytes came than were asked for"):
        read(manifest)


def test_a_repository_that_ends_early_or_is_not_there_is_left(
    hub: Hub, model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    whole, size_bytes = (model / "model.safetensors").read_bytes(), manifest.unit("block.2").size_bytes
    hub.directory = tmp_path / "repository"
    hub.directory.mkdir()
    cases: list[tuple[bytes | None, type[PeerError], str]] = [
        (None, PeerRefused, "has no model.safetensors"),
        (whole[: len(whole) // 4], RemoteProtocolError, "ends before its own header says"),
        (b"\xff" * 100, RemoteProtocolError, "has a header of"),
        ((10).to_bytes(8, "little") + b"no header.", RemoteProtocolError, "is no safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", RemoteProtocolError, "holds no tensor"),
    ]
    for data, kind, reason in cases:
        if data is not None:
            (hub.directory / "model.safetensors").write_bytes(data)
        with pytest.raises(kind, match=reason):
            read(manifest, "block.2", range(size_bytes - 10, size_bytes))


def test_a_tensor_of_another_shape_is_noticed_before_it_is_read(hub: Hub, manifest: Manifest, tmp_path: Path) -> None:
    hub.directory = make_tiny_model("llama", tmp_path / "other", n_blocks=N_BLOCKS, intermediate_size=96)
    with pytest.raises(RemoteProtocolError, match=r"holds another .*mlp.* than the swarm"):
        read(manifest, "block.0", range(200, 300))


def test_a_hub_that_wants_a_token_says_so_and_its_cdn_never_sees_it(
    hub: Hub, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    with pytest.raises(PeerRefused, match="set HF_TOKEN"):
        read(manifest)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert len(read(manifest)) == 100
    assert not hub.cdn_saw_token


def test_nothing_is_asked_where_the_user_wants_to_be_offline(
    hub: Hub, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PeerRefused, match="HF_HUB_OFFLINE"):
        read(manifest)
    assert not hub.asked


def test_a_hub_that_is_not_there_is_unreachable(hub: Hub, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(PeerUnreachable, match=f"{SOURCE} cannot be read"):
        read(manifest)


def test_a_swarm_that_names_no_repository_has_none(manifest: Manifest) -> None:
    assert repository_of(sign_manifest(replace_source(manifest, ""), Identity.from_seed(bytes(32)))) is None


def replace_source(manifest: Manifest, source: str) -> Manifest:
    import msgspec

    return msgspec.structs.replace(manifest, source=source)
