"""The exact account of session memory: reserved before a session is admitted, returned when it ends.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mycel.protocols.errors import PeerRefused
from mycel.swarm.placement import show_bytes


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
            wanted, free = show_bytes(size_bytes), show_bytes(self.free_bytes)
            if wanted == free:
                wanted, free = f"{size_bytes:,} bytes", f"{self.free_bytes:,}"
            raise PeerRefused("", f"KV memory is full: {wanted} wanted, {free} free")
        self.reserved_bytes += size_bytes
        try:
            yield
        finally:
            self.reserved_bytes -= size_bytes
