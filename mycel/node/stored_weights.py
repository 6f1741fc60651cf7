"""Where each tensor of a downloaded model lies or will lie, from its manifest: weights may be missing.

The counterpart of `weights_map.py`, which reads whole checkpoints.

Ring: shell (reads files).
"""

from __future__ import annotations

from pathlib import Path

from mycel.node.weights_map import TensorEntry
from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.swarm.manifest import decode_manifest, unit_header

__all__ = ["MANIFEST_FILE", "is_stored", "stored_entries"]

MANIFEST_FILE = "manifest.mycel"


def is_stored(directory: Path) -> bool:
    """Whether `directory` is one of a ModelStore."""
    return (directory / MANIFEST_FILE).is_file()


def stored_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a stored model by name, also of units whose files are not there yet.

    Raises ConfigError if `directory` is not one of a ModelStore.
    """
    path = directory / MANIFEST_FILE
    try:
        manifest = decode_manifest(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except RemoteProtocolError as error:
        raise ConfigError(f"{path} is damaged, or of another Mycel: {error}") from None
    entries = {}
    for unit in manifest.units:
        file = directory / f"{unit.name}.safetensors"
        offset = len(unit_header(unit))
        for tensor in unit.tensors:
            size_bytes = tensor.size_bytes
            entries[tensor.name] = TensorEntry(tensor.name, tensor.dtype, tensor.shape, file, offset, size_bytes)
            offset += size_bytes
    return entries
