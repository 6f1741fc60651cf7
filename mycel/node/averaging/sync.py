"""An averager for code without trio, its network in a thread of its own.

Ring: shell.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import trio
from torch import Tensor

from mycel.node.averaging.averager import Averaged, Averager
from mycel.protocols.errors import ConfigError

__all__ = ["SyncAverager"]

T = TypeVar("T")


class SyncAverager:
    """An `Averager` for code without trio; its network runs in a thread of its own. Use it in `with`, or close it."""

    def __init__(self, open_averager: Callable[[], AbstractAsyncContextManager[Averager]]) -> None:
        """`open_averager` gives the async context manager: see `create` and `join`."""
        ready: SimpleQueue[Exception | None] = SimpleQueue()
        self._averager: Averager
        self._failure: Exception | None = None
        self._closing = trio.Event()
        self._thread = threading.Thread(
            target=self._run, args=(open_averager, ready), name="mycel-average", daemon=True
        )
        self._thread.start()
        failure = ready.get()
        if failure is not None:
            self._thread.join()
            raise failure

    @classmethod
    def create(cls, tensors: Mapping[str, Tensor], **options: Any) -> SyncAverager:
        """As `Averager.create`."""
        return cls(partial(Averager.create, tensors, **options))

    @classmethod
    def join(cls, invite: str, tensors: Mapping[str, Tensor], **options: Any) -> SyncAverager:
        """As `Averager.join`."""
        return cls(partial(Averager.join, invite, tensors, **options))

    def _run(
        self, open_averager: Callable[[], AbstractAsyncContextManager[Averager]], ready: SimpleQueue[Exception | None]
    ) -> None:
        async def main() -> None:
            async with open_averager() as self._averager:
                self._token = trio.lowlevel.current_trio_token()
                ready.put(None)
                await self._closing.wait()

        try:
            trio.run(main)
        except Exception as error:  # noqa: BLE001  the root of a thread: whoever waits or calls gets it
            self._failure = error
            ready.put(error)

    def _call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        try:
            return trio.from_thread.run(function, *arguments, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            self._thread.join()
            raise self._failure or ConfigError("this averager was closed") from None

    @property
    def invite(self) -> str:
        return self._averager.invite

    @property
    def members(self) -> int:
        return self._averager.members

    def joined(self, members: int = 1) -> None:
        """Wait until this peer is a member, and the group has so many."""
        self._call(self._averager.joined, members)

    def average(self, tensors: Mapping[str, Tensor], *, weight: int = 1, timeout_s: float = 120.0) -> Averaged:
        """As `Averager.average`."""
        return self._call(partial(self._averager.average, tensors, weight=weight, timeout_s=timeout_s))

    def close(self) -> None:
        """Leave. Idempotent."""
        if self._thread.is_alive():
            self._token.run_sync_soon(self._closing.set)
            self._thread.join()

    def __enter__(self) -> SyncAverager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
