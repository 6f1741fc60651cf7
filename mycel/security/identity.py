"""Who we are: an Ed25519 key in a file that only its owner can read, and the peer id that follows from it.

What a peer id is and how signatures are checked stands in signatures.py, which is pure. Knows files, no network.

Ring: shell (key files).
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from mycel.protocols.errors import AccessDenied, ConfigError
from mycel.security.signatures import peer_id_of

_SEED_BYTES = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """A key pair and its peer id; the private half never shows in a repr."""

    private_key: Ed25519PrivateKey = field(repr=False)
    peer_id: str

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte secret."""
        key = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(key, peer_id_of(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)))

    @classmethod
    def generate(cls) -> Identity:
        return cls.from_seed(os.urandom(_SEED_BYTES))

    @property
    def seed(self) -> bytes:
        return self.private_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    def sign(self, data: bytes) -> bytes:
        """A 64-byte signature; callers put a versioned domain string in front of `data`."""
        return self.private_key.sign(data)


def load_or_create(path: Path) -> Identity:
    """The identity in `path`, made there with mode 0600 if the file does not exist.

    Of several processes that start at once one makes the key and all get it; nobody ever sees a part of it.
    Raises AccessDenied if others could read the file or it is not ours to read or write; ConfigError if it is no key.
    """
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _denied("read", path, error) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _create(path)
        return _load(path)  # ours, or that of a process which was first
    except OSError as error:
        raise _denied("write", path, error) from None


def _create(path: Path) -> None:
    """Put a new key at `path`, whole, unless there is a file already."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(Identity.generate().seed)
            file.flush()
            os.fsync(file.fileno())
        _link(Path(temporary), path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Give a finished file its name, which must not be taken; where a file system has no links, the last one wins."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        if not target.exists():
            source.replace(target)


def _load(path: Path) -> Identity:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        seed = file.read(_SEED_BYTES + 1)
    if os.name == "posix" and mode & 0o077:
        raise AccessDenied(f"identity key {path} has mode {mode:04o}; others could read it: chmod 600 it or delete it")
    if len(seed) != _SEED_BYTES:
        size = f"{len(seed)} bytes" if len(seed) < _SEED_BYTES else "more bytes"
        raise ConfigError(f"identity key {path} is damaged ({size} instead of {_SEED_BYTES}): delete it")
    return Identity.from_seed(seed)


def _denied(verb: str, path: Path, error: OSError) -> ConfigError:
    kind = AccessDenied if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ConfigError
    return kind(f"cannot {verb} the identity key {path}: {error.strerror}")
