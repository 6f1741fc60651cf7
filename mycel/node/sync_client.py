"""The client for ordinary code: the same model behind plain calls and iterators, its network in a thread of its own.

Ring: shell (a thread).
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import trio

from mycel.node.background import background
from mycel.node.client import PATIENCE_S, Generation, Model, Piece, connect
from mycel.protocols.errors import ConfigError, MycelError
from mycel.protocols.messages import SamplingParams
from mycel.swarm.estimate import Estimate
from mycel.swarm.trace import RouteTrace

T = TypeVar("T")
_CLOSED = "this connection to the swarm was closed"


class SyncGeneration:
    """An answer on its way: iterate for its pieces, or ask for `text()`; leave `with` (or `close`) to stop early."""

    def __init__(self, call: Callable[..., Any], start: Callable[[SyncGeneration], Any]) -> None:
        """`call` runs an async function in the network's thread."""
        self._call = call
        self._closing = trio.Event()
        self._closed = trio.Event()
        self._failure: MycelError | None = None
        self._generation: Generation = call(start, self)

    async def drive(
        self,
        model: Model,
        prompt: str | Sequence[int],
        options: dict[str, Any],
        *,
        task_status: trio.TaskStatus[Generation],
    ) -> None:
        """In the network's thread: hold the generation open until it is over or closed."""
        started = False
        try:
            async with model.generate(prompt, **options) as generation:
                task_status.started(generation)
                started = True
                await self._closing.wait()
        except MycelError as error:
            if not started:
                raise  # to whoever called `generate`
            self._failure = error
        finally:
            self._closed.set()

    async def _next(self) -> Piece | None:
        if not self._closing.is_set():
            try:
                return await anext(self._generation)
            except StopAsyncIteration:
                pass
            except trio.ClosedResourceError:  # by another thread
                if not self._closing.is_set():
                    raise ConfigError(_CLOSED) from None
        await self._close()
        return None

    async def _close(self) -> None:
        self._closing.set()
        await self._closed.wait()

    @property
    def trace(self) -> RouteTrace:
        """The route and where the time went, so far."""
        return self._generation.trace

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece: Piece | None = self._call(self._next)
        if piece is not None:
            return piece
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def text(self) -> str:
        """The whole answer, once it is there."""
        for _ in self:
            pass
        return self._generation.text

    def close(self) -> None:
        """Stop generating; what the swarm holds for it is freed. Idempotent."""
        with suppress(ConfigError):  # the model was closed, and all its generations with it
            self._call(self._close)

    def __enter__(self) -> SyncGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SyncModel:
    """A model that a swarm serves, for code without trio. Use it in `with`, or close it."""

    def __init__(self, invite: str, cache_dir: Path | None = None) -> None:
        """Connects. Raises ConfigError for an invite that is not one, PeerUnreachable if nobody of it answers."""
        ready: SimpleQueue[Exception | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._closing = trio.Event()
        self._thread = threading.Thread(
            target=self._run, args=(invite, cache_dir, ready), name="mycel-client", daemon=True
        )
        self._thread.start()
        failure = ready.get()
        if failure is not None:
            self._thread.join()
            raise failure

    def _run(self, invite: str, cache_dir: Path | None, ready: SimpleQueue[Exception | None]) -> None:
        async def main() -> None:
            async with connect(invite, cache_dir=cache_dir) as self._model, background() as self._tasks:
                self._token = trio.lowlevel.current_trio_token()
                ready.put(None)
                await self._closing.wait()

        try:
            trio.run(main)
        except Exception as error:  # noqa: BLE001  the root of a thread: whoever waits or calls gets it
            self._failure = error
            ready.put(error)

    def _call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run `function` in the network's thread. Raises ConfigError if that is closed, or what ended it."""
        try:
            return trio.from_thread.run(function, *arguments, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            self._thread.join()
            raise self._failure or ConfigError(_CLOSED) from None

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        patience_s: float = PATIENCE_S,
    ) -> SyncGeneration:
        """Generate from text or token ids: an iterator of pieces, or `.text()`.

        Raises ConfigError for a request that the model cannot take; iterating raises RouteUnavailable or PeerTimeout.
        """
        self._model.encode(prompt)  # refused here, not in the first next()
        options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop, "patience_s": patience_s}

        async def start(generation: SyncGeneration) -> Generation:
            started: Generation = await self._tasks.start(generation.drive, self._model, prompt, options)
            return started

        return SyncGeneration(self._call, start)

    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingParams | None = None,
    ) -> list[str]:
        """The texts for several prompts of any lengths, generated side by side."""

        async def complete() -> list[str]:
            return await self._model.complete(prompts, max_new_tokens=max_new_tokens, sampling=sampling)

        return self._call(complete)

    def estimate(self) -> Estimate:
        """What the swarm can do now."""
        return self._call(self._model.estimate)

    def close(self) -> None:
        """Leave the swarm. Idempotent."""
        if self._thread.is_alive():
            self._token.run_sync_soon(self._closing.set)
            self._thread.join()

    def __enter__(self) -> SyncModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
