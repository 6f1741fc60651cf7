"""The manifest: everything that makes a swarm this swarm and no other, signed by its founder. Its SHA-256 is the id.

It names the small files of a model (configuration, tokenizer) and, for each unit ("embed", "block.0", ..., "head"), its
tensors. A unit's blob is the tensors' raw bytes, one after the other, in the order of the manifest. The SHA-256 of each
1 MiB of every blob stand in the chunk list, a file of its own whose digest the manifest holds: 32 bytes for each MiB,
12 MB for 400 GB. So who knows the id can take any chunk of the model from anybody and check it before keeping it. This
module knows no file and no peer.

Ring: pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from math import prod
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.messages import MAX_BLOCKS, MAX_FILE_CHUNK_BYTES, Count, Key, TokenId
from mycel.security.signatures import Signer, verify

__all__ = [
    "CHUNK_BYTES",
    "DTYPES",
    "HASH_BYTES",
    "RECIPE_FILE",
    "SMALL_FILES",
    "FileSpec",
    "Manifest",
    "TensorSpec",
    "UnitSpec",
    "check_unsigned",
    "decode_manifest",
    "manifest_bytes",
    "same_model",
    "sign_manifest",
    "split_chunk_list",
    "swarm_id",
    "tensor_order",
    "unit_header",
    "unit_names",
]

VERSION = 2
# What is verified, kept and resumed as one; one answer of a peer.
CHUNK_BYTES = MAX_FILE_CHUNK_BYTES
HASH_BYTES = 32
MAX_MANIFEST_BYTES = 8 * 1024 * 1024
MAX_TENSORS = 200_000
MAX_SMALL_FILE_BYTES = 64 * 2**20
MAX_UNIT_BYTES = 2**38
# Its chunk list has 64 MiB then, as much as any small file may have.
MAX_TOTAL_BYTES = 2**41

# our name -> (safetensors' name, bytes an element)
DTYPES: Mapping[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}

# What only a training run carries: mycel/swarm/training/recipe.py.
RECIPE_FILE = "recipe.toml"
# The only files besides weights that a swarm carries. No code among them, and the licence travels with the weights.
SMALL_FILES = frozenset(
    {
        "LICENSE",
        "LICENSE-PSF.txt",
        "LICENSE.md",
        "LICENSE.txt",
        "NOTICE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        RECIPE_FILE,
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)

# What a terminal may print and a file system may hold. \Z and not $, which would let a line end through.
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ +-]*\Z", max_length=64)]
TensorName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*\Z", max_length=256)]
Size = Annotated[int, Meta(ge=0, le=MAX_UNIT_BYTES)]
# "", or a repository and its revision, as a Hugging Face hub names them: ORG/NAME@REVISION.
Source = Annotated[
    str,
    Meta(
        pattern=r"^(([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9._-]*)?\Z",
        max_length=256,
    ),
]

_DOMAIN = b"mycel/manifest/2\0"


class TensorSpec(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: TensorName
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**40)], ...], Meta(max_length=8)]

    @property
    def size_bytes(self) -> int:
        """The raw bytes of the tensor; its dtype must be one of DTYPES."""
        return prod(self.shape) * DTYPES[self.dtype][1]


class FileSpec(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A small file."""

    name: Annotated[str, Meta(max_length=64)]
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_SMALL_FILE_BYTES)]
    sha256: Key


class UnitSpec(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A part of the model that is served or not served as a whole.

    `size_bytes` is the size of its blob; `sha256`, which names the blob, is the SHA-256 of its chunks' hashes together.
    """

    name: Annotated[str, Meta(max_length=16)]
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=MAX_TENSORS)]
    size_bytes: Size
    sha256: Key

    @property
    def n_chunks(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES)

    def chunk(self, index: int) -> range:
        """Where chunk `index` lies in the blob; the last one may be short."""
        start = index * CHUNK_BYTES
        return range(start, min(start + CHUNK_BYTES, self.size_bytes))


class Manifest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A model, described so that two that differ in one byte have different ids.

    `founder` is the peer id of who made the swarm, `signature` its Ed25519 signature over all the rest. `source` is the
    repository where the weights can be had when no peer has them, or "".
    """

    version: Annotated[int, Meta(ge=1, le=255)]
    name: Name
    founder: Annotated[str, Meta(max_length=128)]
    source: Source
    architecture: Name
    n_blocks: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
    hidden_size: Annotated[int, Meta(ge=1, le=2**24)]
    vocab_size: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    dtype: Annotated[str, Meta(max_length=16)]
    max_positions: Count
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)]
    files: Annotated[tuple[FileSpec, ...], Meta(max_length=len(SMALL_FILES))]
    # SHA-256 of the chunk list: the hashes of all chunks of all units, in order.
    chunks: Key
    units: Annotated[tuple[UnitSpec, ...], Meta(max_length=MAX_BLOCKS + 2)]
    signature: Annotated[bytes, Meta(max_length=64)]

    @property
    def chunk_list_bytes(self) -> int:
        """The size of the chunk list."""
        return HASH_BYTES * sum(unit.n_chunks for unit in self.units)

    def unit(self, name: str) -> UnitSpec:
        """The unit of that name. Raises KeyError."""
        index = {"embed": 0, "head": self.n_blocks + 1}.get(name)
        if index is None:
            kind, _, number = name.partition(".")
            if kind != "block" or not number.isdecimal() or not int(number) < self.n_blocks:
                raise KeyError(name)
            index = int(number) + 1
        return self.units[index]


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(Manifest)


def unit_names(n_blocks: int) -> tuple[str, ...]:
    """The units of a model in their order: embed, block.0, ..., block.(n_blocks - 1), head."""
    return ("embed", *(f"block.{index}" for index in range(n_blocks)), "head")


def tensor_order(tensors: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The order of tensors in a blob: wide elements first, then by name, so that each starts aligned."""
    return tuple(sorted(tensors, key=lambda tensor: (-DTYPES[tensor.dtype][1], tensor.name)))


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one encoding of a manifest; equal manifests have equal bytes."""
    return _encoder.encode(manifest)


def swarm_id(manifest: Manifest) -> bytes:
    """SHA-256 of the manifest's bytes: 32 bytes."""
    return hashlib.sha256(manifest_bytes(manifest)).digest()


def sign_manifest(manifest: Manifest, founder: Signer) -> Manifest:
    """The manifest as `founder` puts it into the world. The same key and model give the same bytes, so the same id."""
    named = msgspec.structs.replace(manifest, founder=founder.peer_id, signature=b"")
    return msgspec.structs.replace(named, signature=founder.sign(_signed_bytes(named)))


def _signed_bytes(manifest: Manifest) -> bytes:
    return _DOMAIN + manifest_bytes(msgspec.structs.replace(manifest, signature=b""))


def same_model(ours: Manifest, theirs: Manifest) -> bool:
    """Whether both describe the same files and weights, whoever founded a swarm with them and under which name."""
    told = {name: getattr(theirs, name) for name in ("name", "founder", "source", "dtype", "signature")}
    return msgspec.structs.replace(ours, **told) == theirs


def decode_manifest(data: bytes | memoryview) -> Manifest:
    """A checked manifest that its founder signed.

    Raises RemoteProtocolError for anything else, also for a second encoding of a valid one.
    """
    manifest = _decode(data)
    if not verify(manifest.founder, manifest.signature, _signed_bytes(manifest)):
        raise RemoteProtocolError("manifest refused: it is not signed by the founder that it names")
    return manifest


def check_unsigned(manifest: Manifest) -> None:
    """Refuse, before it is signed, what no peer would take. Raises RemoteProtocolError with the reason."""
    # Through its bytes: building and encoding a Struct checks no limit of a field.
    _decode(manifest_bytes(manifest))


def _decode(data: bytes | memoryview) -> Manifest:
    if len(data) > MAX_MANIFEST_BYTES:
        raise RemoteProtocolError(f"a manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST_BYTES}")
    # Other versions have other fields: the number, the first one of an array, is the more useful thing to say.
    if len(data) > 1 and 0x90 <= data[0] < 0xA0 and 0 < data[1] < 0x80 and data[1] != VERSION:
        raise RemoteProtocolError(f"manifest refused: version {data[1]}; this Mycel knows version {VERSION}")
    try:
        manifest = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"manifest refused: {str(error)[:200]}") from None
    if reason := _flaw(manifest):
        raise RemoteProtocolError(f"manifest refused: {reason}")
    if manifest_bytes(manifest) != data:
        raise RemoteProtocolError("manifest refused: not in its canonical encoding")
    return manifest


def _flaw(manifest: Manifest) -> str | None:
    """What the types cannot say."""
    if manifest.version != VERSION:
        return f"version {manifest.version}; this Mycel knows version {VERSION}"
    if manifest.dtype not in DTYPES:
        return f"unknown dtype {manifest.dtype!r}"
    if manifest.eos_token_ids != tuple(sorted(set(manifest.eos_token_ids))):
        return "eos_token_ids are not sorted or not unique"
    return _files_flaw(manifest) or _units_flaw(manifest)


def _files_flaw(manifest: Manifest) -> str | None:
    names = [file.name for file in manifest.files]
    if names != sorted(set(names)):
        return "files are not sorted or not unique"
    if other := set(names) - SMALL_FILES:
        return f"a swarm carries no file {min(other)!r}"
    if "config.json" not in names:
        return "it has no config.json"
    return None


def _units_flaw(manifest: Manifest) -> str | None:
    if tuple(unit.name for unit in manifest.units) != unit_names(manifest.n_blocks):
        return f"its units are not those of {manifest.n_blocks} blocks, in order"
    if sum(len(unit.tensors) for unit in manifest.units) > MAX_TENSORS:
        return f"more than {MAX_TENSORS} tensors"
    if sum(unit.size_bytes for unit in manifest.units) > MAX_TOTAL_BYTES:
        return f"more than {MAX_TOTAL_BYTES} bytes of weights"
    seen: set[str] = set()
    for unit in manifest.units:
        if reason := _unit_flaw(unit, seen):
            return f"{unit.name}: {reason}"
    return None


def _unit_flaw(unit: UnitSpec, seen: set[str]) -> str | None:
    for tensor in unit.tensors:
        if tensor.dtype not in DTYPES:
            return f"unknown dtype {tensor.dtype!r}"
        if tensor.name in seen:
            return f"tensor {tensor.name} is there twice"
        seen.add(tensor.name)
    if unit.tensors != tensor_order(unit.tensors):
        return "its tensors are not in order"
    if unit.size_bytes != sum(tensor.size_bytes for tensor in unit.tensors):
        return f"{unit.size_bytes} bytes are not what its tensors take"
    return None


def split_chunk_list(manifest: Manifest, data: bytes) -> dict[str, bytes]:
    """unit -> the hashes of its chunks, one after the other, from the swarm's chunk list.

    Raises RemoteProtocolError if `data` is not that list.
    """
    if len(data) != manifest.chunk_list_bytes or hashlib.sha256(data).digest() != manifest.chunks:
        raise RemoteProtocolError("this is not the chunk list of the swarm")
    hashes: dict[str, bytes] = {}
    start = 0
    for unit in manifest.units:
        end = start + HASH_BYTES * unit.n_chunks
        hashes[unit.name] = data[start:end]
        if hashlib.sha256(hashes[unit.name]).digest() != unit.sha256:
            raise RemoteProtocolError(f"the swarm's founder has listed other chunks of {unit.name} than it named")
        start = end
    return hashes


def unit_header(unit: UnitSpec) -> bytes:
    """What turns the unit's blob into a safetensors file when it stands before it; a multiple of 8 bytes."""
    entries: dict[str, object] = {}
    offset = 0
    for tensor in unit.tensors:
        end = offset + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
