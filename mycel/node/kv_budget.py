"""The exact account of session memory: reserved before a session is admitted, returned when it ends.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mycel.protocols.errors import PeerRefused


@dataclass(slots=True)
class KVBudget:
    """Bytes of KV cache and output history that sessions may reserve."""

    total_bytes: int
    reserved_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.reserved_bytes

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Hold `size_bytes` for the block. Raises PeerRefused, with nothing reserved, if they are not free."""
        if size_bytes > self.free_bytes:
            raise PeerRefused("", f"KV memory is full: {size_bytes} bytes wanted, {self.free_bytes} free")
        self.reserved_bytes += size_bytes
        try:
            yield
        finally:
            self.reserved_bytes -= size_bytes
