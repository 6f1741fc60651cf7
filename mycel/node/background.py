"""A nursery for tasks that serve a block of code, out of which a single failure comes as itself.

trio wraps whatever leaves a nursery into a group. Users of `async with connect(...)` did not ask for a nursery, so they
shall not meet its groups: the error that names who must act is what comes out.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import trio

from mycel.protocols.errors import MycelError


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """Tasks that end with the block. A failure of the block or of one task is raised bare, several as a group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise cause_of(group) from None


def cause_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception that a group is about, or the group itself if it is about several."""
    leaves = list(_leaves(group))
    interrupts = [leaf for leaf in leaves if isinstance(leaf, KeyboardInterrupt)]
    if interrupts:
        return interrupts[0]
    if len(leaves) == 1 or all(isinstance(leaf, MycelError) for leaf in leaves):
        return leaves[0]
    return group


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
