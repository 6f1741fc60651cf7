"""A Hugging Face repository: what a founder starts from, and where chunks come from that no peer has.

Everything goes through huggingface_hub's own session, so its settings hold here too: HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE, HF_HOME, proxies. Of a repository only the byte ranges of wanted tensors are read; whoever keeps them
verifies them.

Ring: shell (network, disk).
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from mycel.protocols.errors import ConfigError, PeerRefused, PeerUnreachable, RemoteProtocolError, one_line
from mycel.swarm.manifest import DTYPES, RECIPE_FILE, SMALL_FILES, Manifest, TensorSpec

__all__ = [
    "HubLimits",
    "HubRepository",
    "Snapshot",
    "download_snapshot",
    "is_repository",
    "locate_model",
    "repository_of",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_INDEX_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS = 200_000

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"({_NAME}/{_NAME})(?:@({_NAME}(?:/{_NAME})*))?\Z")
_WEIGHTS = re.compile(rf"{_NAME}\.safetensors\Z")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


# ---- founding


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model's files on this disk, and the repository with the revision they are of: "ORG/NAME@COMMIT", or ""."""

    directory: Path
    source: str


def is_repository(text: str) -> bool:
    """Whether `text` reads as ORG/NAME or ORG/NAME@REVISION. A directory of that name goes first: look there before."""
    return _REPOSITORY.match(text) is not None


def download_snapshot(text: str) -> Snapshot:
    """Bring configuration, tokenizer and safetensors of ORG/NAME[@REVISION] into huggingface_hub's cache. Blocks.

    What is there already costs nothing, and nothing else of the repository is fetched. Raises ConfigError, one line.
    """
    from huggingface_hub import snapshot_download

    match = _REPOSITORY.match(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a repository: it is written ORG/NAME or ORG/NAME@REVISION")
    name, revision = match[1], match[2] or "main"
    # A file of that name would make the swarm a training run.
    wanted = [*sorted(SMALL_FILES - {RECIPE_FILE}), INDEX_FILE]
    try:
        small = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        # Its folder is named by the commit: the second half is of the same one, whatever happens there meanwhile.
        directory = Path(snapshot_download(name, revision=small.name, allow_patterns=_weight_files(small, name)))
    except _hub_errors() as error:
        raise ConfigError(f"cannot download {text}: {_reason(error)}") from None
    return Snapshot(directory, f"{name}@{directory.name}")


def locate_model(model: Path) -> Snapshot:
    """The directory `model`, or a copy of the repository that it names if there is no such directory. Blocks.

    Raises ConfigError, one line.
    """
    name = model.as_posix()
    if model.exists() or not is_repository(name):
        return Snapshot(model, "")
    try:
        return download_snapshot(name)
    except ConfigError as error:
        raise ConfigError(f"there is no directory {name}, and no such repository can be had: {error}") from None


def _weight_files(directory: Path, name: str) -> list[str]:
    index = directory / INDEX_FILE
    if not index.is_file():
        return [SINGLE_FILE]
    try:
        return sorted(set(_weight_map(index.read_bytes()).values()))
    except ValueError as error:
        raise ConfigError(f"{name} cannot be used: {error}") from None


# ---- byte ranges


@dataclass(frozen=True, slots=True)
class HubLimits:
    """Patience with a repository."""

    # for an answer to begin or go on, and for all of it; what came by then is used
    timeout_s: float = 30.0
    answer_s: float = 60.0
    # for one range: requests in a row without a byte, with rests of 1, 2 and 4 s between them, and requests in all
    tries: int = 4
    first_rest_s: float = 1.0
    longest_rest_s: float = 60.0
    requests: int = 16


@dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of a file in the repository."""

    file: str
    extent: range


@dataclass(frozen=True, slots=True)
class _Answer:
    """The bytes that came of a request, what kept it from giving all of them, and how long the hub wants to rest."""

    data: bytes
    trouble: str = ""
    rest_s: float = 0.0


class _Raw(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0, le=2**62)], Annotated[int, msgspec.Meta(ge=0, le=2**62)]]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def repository_of(manifest: Manifest, limits: HubLimits | None = None) -> HubRepository | None:
    """The repository that a swarm's model came from, if the manifest names one."""
    return HubRepository(manifest, limits or HubLimits()) if manifest.source else None


class HubRepository:
    """A `Repository` for `fetch_units`: the units' blobs, put together from byte ranges of the manifest's source."""

    def __init__(self, manifest: Manifest, limits: HubLimits) -> None:
        self._manifest = manifest
        self._limits = limits
        self._id, _, self._revision = manifest.source.partition("@")
        self._lock = trio.Lock()  # headers are read once, whoever comes first
        self._files: Mapping[str, str] | None = None
        self._headers: dict[str, Mapping[str, tuple[_Raw, int]]] = {}

    @property
    def name(self) -> str:
        return self._manifest.source

    async def read(self, unit: str, extent: range) -> bytes:
        """Bytes `extent` of the unit's blob, not verified.

        Raises PeerUnreachable when trying again has not helped, PeerRefused if the hub does not let us, and
        RemoteProtocolError if the repository holds something else or gives no byte ranges.
        """
        parts = [await self._get(place) for place in await self._places(unit, extent)]
        return b"".join(parts)

    async def _places(self, unit: str, extent: range) -> list[_Place]:
        """Where the bytes lie, neighbours joined."""
        found: list[_Place] = []
        start = 0
        for tensor in self._manifest.unit(unit).tensors:
            end = start + tensor.size_bytes
            first, last = max(start, extent.start), min(end, extent.stop)
            if first < last:
                whole = await self._tensor(tensor)
                part = range(whole.extent.start + first - start, whole.extent.start + last - start)
                if found and (found[-1].file, found[-1].extent.stop) == (whole.file, part.start):
                    part = range(found.pop().extent.start, part.stop)
                found.append(_Place(whole.file, part))
            start = end
        return found

    async def _tensor(self, tensor: TensorSpec) -> _Place:
        async with self._lock:
            if self._files is None:
                self._files = await self._read_index()
            file = self._files.get(tensor.name, "") if self._files else SINGLE_FILE
            if file and file not in self._headers:
                self._headers[file] = await self._read_header(file)
        found = self._headers[file].get(tensor.name) if file else None
        if found is None:
            raise RemoteProtocolError(f"{self.name} holds no tensor {tensor.name}", self.name)
        raw, data_start = found
        begin, end = raw.data_offsets
        if (raw.dtype, raw.shape, end - begin) != (DTYPES[tensor.dtype][0], tensor.shape, tensor.size_bytes):
            raise RemoteProtocolError(f"{self.name} holds another {tensor.name} than the swarm", self.name)
        return _Place(file, range(data_start + begin, data_start + end))

    async def _read_index(self) -> Mapping[str, str]:
        """tensor -> file, or nothing for a checkpoint of a single file."""
        data = await self._get(_Place(INDEX_FILE, range(0)))
        if not data:
            return {}
        try:
            return _weight_map(data)
        except ValueError as error:
            raise RemoteProtocolError(f"{self.name}: {error}", self.name) from None

    async def _read_header(self, file: str) -> Mapping[str, tuple[_Raw, int]]:
        """tensor -> what the header says of it, and where the file's data begin."""
        length = int.from_bytes(await self._get(_Place(file, range(8))), "little")
        if length > MAX_HEADER_BYTES:
            raise RemoteProtocolError(f"{file} of {self.name} has a header of {length} bytes", self.name)
        data = await self._get(_Place(file, range(8, 8 + length)))
        try:
            fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            fields.pop("__metadata__", None)
            if len(fields) > MAX_TENSORS:
                raise RemoteProtocolError(f"{file} of {self.name} has {len(fields)} tensors", self.name)
            return {name: (msgspec.json.decode(raw, type=_Raw), 8 + length) for name, raw in fields.items()}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise RemoteProtocolError(f"{file} of {self.name} is no safetensors file", self.name) from None

    async def _get(self, place: _Place) -> bytes:
        """The bytes of a place, trying again where that may help; an empty extent means the whole (small) file."""
        data = b""
        fruitless = 0
        for _ in range(self._limits.requests):
            rest = _Place(place.file, place.extent[len(data) :])
            answer = await trio.to_thread.run_sync(self._request, rest, abandon_on_cancel=True)
            if not answer.trouble:
                return data + answer.data
            # A whole file has no rest to go on with.
            data += answer.data if place.extent else b""
            fruitless = 0 if answer.data else fruitless + 1
            if fruitless >= self._limits.tries:
                break
            rest_s = max(self._limits.first_rest_s * 2 ** max(0, fruitless - 1), answer.rest_s)
            await trio.sleep(min(rest_s, self._limits.longest_rest_s))
        raise PeerUnreachable(self.name, f"{self.name} cannot be read: {answer.trouble}")

    # ---- in a thread

    def _request(self, place: _Place) -> _Answer:
        """One request. Raises PeerRefused and RemoteProtocolError for what trying again does not change."""
        import httpx2
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

        url = hf_hub_url(self._id, place.file, revision=self._revision)
        headers = {**build_hf_headers(library_name="mycel"), "Accept-Encoding": "identity"}
        if place.extent:
            headers["Range"] = f"bytes={place.extent.start}-{place.extent.stop - 1}"
        data = bytearray()
        ends_at = time.monotonic() + self._limits.answer_s
        try:
            with get_session().stream("GET", url, headers=headers, timeout=self._limits.timeout_s) as response:
                status = response.status_code
                if status == 404 and place.file == INDEX_FILE:
                    return _Answer(b"")
                if status in _PASSING:
                    wanted_s = response.headers.get("Retry-After", "")
                    rest_s = float(wanted_s) if wanted_s.isdecimal() else 0.0
                    return _Answer(b"", f"the hub answers with status {status}", rest_s)
                self._check(place, status, response.headers.get("Content-Range", ""))
                limit = len(place.extent) or MAX_INDEX_BYTES
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > limit:
                        raise RemoteProtocolError(f"{place.file}: more than {limit} bytes came", self.name)
                    if time.monotonic() > ends_at:
                        return _Answer(bytes(data), f"{len(data)} bytes came in {self._limits.answer_s:.0f} s")
        except OfflineModeIsEnabled:
            raise PeerRefused(self.name, "huggingface_hub is set to be offline (HF_HUB_OFFLINE)") from None
        except httpx2.HTTPError as error:
            return _Answer(bytes(data), _reason(error))
        broke_off = len(data) < len(place.extent)
        return _Answer(bytes(data), f"the answer ended after {len(data)} bytes" if broke_off else "")

    def _check(self, place: _Place, status: int, content_range: str) -> None:
        if status in {401, 403}:
            refusal = "it needs a token of an account that may read it: set HF_TOKEN, or run `hf auth login`"
            raise PeerRefused(self.name, f"{self.name} may not be read: {refusal}")
        if status == 404:
            raise PeerRefused(self.name, f"{self.name} has no {place.file}")
        if status == 416:
            raise RemoteProtocolError(f"{place.file} of {self.name} ends before its own header says", self.name)
        if status == 200 and place.extent:
            # Whole files would be far more than what is wanted.
            raise RemoteProtocolError(f"{self.name} gives whole files and no byte ranges", self.name)
        if status != (206 if place.extent else 200):
            raise RemoteProtocolError(f"{place.file} of {self.name}: status {status}", self.name)
        if place.extent and not content_range.startswith(f"bytes {place.extent.start}-{place.extent.stop - 1}/"):
            raise RemoteProtocolError(f"{place.file} of {self.name}: other bytes came than were asked for", self.name)


def _weight_map(data: bytes) -> dict[str, str]:
    """tensor -> file of a sharded checkpoint. Raises ValueError with the reason."""
    try:
        files = msgspec.json.decode(data, type=_Index).weight_map
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"its {INDEX_FILE} is damaged") from None
    for file in files.values():
        # A plain file name: the index must not lead anywhere else, and the name becomes a pattern.
        if not _WEIGHTS.match(file):
            raise ValueError(f"its {INDEX_FILE} names {one_line(file)[:80]!r}, which is no safetensors file")
    return files


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for a network, a hub or a disk that fails, and for a name that cannot be one."""
    import httpx2
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    return (httpx2.HTTPError, OfflineModeIsEnabled, HFValidationError, OSError)


def _reason(error: Exception) -> str:
    """The line of a message that says most; some have a page of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if not re.match(r"\d{3} \w+ Error", line)), lines[0] if lines else "")
    return one_line(told)[:300] or type(error).__name__
