"""Where peers can be dialled, and dialling them: newest address first, a head start for each, one dial for all callers.

libp2p's own dialling tries one address of a peer, waits 250 ms for nothing and remembers a failure for a minute; here
it is asked for one address at a time, and a failure is remembered for as long as a back-off of our own.

Ring: shell.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import trio
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from mycel.node.libp2p_transport.connection import Connection
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.node.libp2p_transport.tcp import Spawn, SteadyTcpStream
from mycel.protocols.errors import PeerError, PeerTimeout, PeerUnreachable

_HEAD_START_S = 0.3  # how long an address may try before the next one does, too
_FIRST_BACK_OFF_S = 0.05
_MAX_BACK_OFF_S = 2.0
_OVERSLEPT_S = 0.5  # a deadline noticed so late was missed by us, not by the peer
_DIALLED_BY = {"ip4", "ip6", "dns", "dns4", "dns6"}

DialAddress = Callable[[Multiaddr, str], Awaitable[Connection]]


def plain_address(text: str, peer: str) -> str | None:
    """The TCP multiaddr in `text` without its peer id, or None for one that we cannot dial or that is another's."""
    try:
        address = Multiaddr(text)
        parts = [(protocol.name, value) for protocol, value in address.items()]
    except (MultiaddrError, ValueError, TypeError):
        return None
    if len(parts) == 3 and parts[2] == ("p2p", peer):
        parts.pop()
    if [name for name, _ in parts][1:] != ["tcp"] or parts[0][0] not in _DIALLED_BY or parts[1][1] in ("0", 0):
        return None
    return "".join(f"/{name}/{value}" for name, value in parts)


class AddressBook:
    """Addresses of peers, newest first, bounded in both directions: the peer least recently learnt of is forgotten."""

    def __init__(self, max_peers: int, max_addresses: int) -> None:
        self._addresses: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._max_peers = max_peers
        self._max_addresses = max_addresses

    def learn(self, peer: str, addresses: Sequence[str]) -> bool:
        """Put `addresses` first, in their order; whether there was one among them that was not known."""
        known = self._addresses.pop(peer, ())
        plain = (plain_address(text, peer) for text in addresses[: self._max_addresses])
        fresh = tuple(dict.fromkeys(address for address in plain if address is not None))
        merged = fresh + tuple(address for address in known if address not in fresh)
        if merged:
            self._addresses[peer] = merged[: self._max_addresses]
        if len(self._addresses) > self._max_peers:
            self._addresses.popitem(last=False)
        return not set(fresh) <= set(known)

    def addresses(self, peer: str) -> tuple[str, ...]:
        return self._addresses.get(peer, ())


@dataclass(slots=True)
class _Attempt:
    """What became of one address."""

    address: str
    reason: str = "no answer"
    accepted: bool = False  # the peer's kernel took the connection
    connection: Connection | None = None


@dataclass(slots=True)
class _Dial:
    """One dial for all who ask for its peer meanwhile."""

    done: trio.Event = field(default_factory=trio.Event)
    connection: Connection | None = None
    failure: PeerError | None = None


_attempt: ContextVar[_Attempt | None] = ContextVar("_attempt", default=None)


def note_accepted(stream: SteadyTcpStream) -> None:
    """Called by the TCP transport for each connection that was dialled."""
    attempt = _attempt.get()
    if attempt is not None:
        attempt.accepted = True


class Dialler:
    """Dials peers. `dial_address` makes a connection to one address or raises anything."""

    def __init__(self, dial_address: DialAddress, spawn: Spawn, limits: TransportLimits) -> None:
        self._dial_address = dial_address
        self._spawn = spawn
        self._limits = limits
        self._book = AddressBook(limits.max_known_peers, limits.max_addresses_per_peer)
        self._dials: dict[str, _Dial] = {}
        self._back_off: OrderedDict[str, tuple[float, float]] = OrderedDict()  # peer: (not before, length in s)

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        if self._book.learn(peer, addresses):
            self._back_off.pop(peer, None)

    async def connect(self, peer: str) -> Connection:
        """A new connection. Raises PeerUnreachable or PeerTimeout. Cancelled, the dial goes on for others, bounded."""
        dial = self._dials.get(peer)
        if dial is None:
            dial = self._dials[peer] = _Dial()
            running = dial

            async def run() -> None:
                try:
                    running.connection = await self._run(peer)
                except PeerError as error:
                    running.failure = error
                finally:
                    del self._dials[peer]
                    running.done.set()

            self._spawn(run)
        await dial.done.wait()
        if dial.connection is not None:
            return dial.connection
        if dial.failure is None:
            raise PeerUnreachable(peer, "this transport is closed")
        raise type(dial.failure)(peer, dial.failure.reason)

    async def _run(self, peer: str) -> Connection:
        not_before, length_s = self._back_off.get(peer, (0.0, _FIRST_BACK_OFF_S / 2))
        await trio.sleep_until(not_before)
        addresses = self._book.addresses(peer)
        if not addresses:
            raise PeerUnreachable(peer, "no address of it is known")
        attempts, overslept = await self._attempt_all(peer, addresses)
        if overslept:
            attempts, _ = await self._attempt_all(peer, addresses)
        for attempt in attempts:
            if attempt.connection is not None:
                self._back_off.pop(peer, None)
                return attempt.connection
        length_s = min(2 * length_s, _MAX_BACK_OFF_S)
        self._back_off[peer] = (trio.current_time() + length_s, length_s)
        if len(self._back_off) > self._limits.max_known_peers:
            self._back_off.popitem(last=False)
        reasons = "; ".join(f"{attempt.address}: {attempt.reason}" for attempt in attempts)
        if any(attempt.accepted and attempt.reason == "no answer" for attempt in attempts):
            raise PeerTimeout(peer, f"accepts connections but stays silent: {reasons}")
        raise PeerUnreachable(peer, f"cannot be dialled: {reasons}")

    async def _attempt_all(self, peer: str, addresses: Sequence[str]) -> tuple[list[_Attempt], bool]:
        """What became of the addresses; True if nothing did because this process stood still meanwhile.

        After a stop, a suspended laptop or a machine out of memory, every deadline is over at once, before a byte of
        what the peer answered was read.
        """
        attempts = [_Attempt(address) for address in addresses]
        with trio.move_on_after(self._limits.dial_timeout_s) as patience:
            await self._race(peer, attempts)
        failed = all(attempt.connection is None for attempt in attempts)
        return attempts, failed and trio.current_time() > patience.deadline + _OVERSLEPT_S

    async def _race(self, peer: str, attempts: Sequence[_Attempt]) -> None:
        """Start the attempts one after the other, the next when one failed or had its head start; stop at a success."""
        async with trio.open_nursery() as nursery:

            async def run(attempt: _Attempt, over: trio.Event) -> None:
                _attempt.set(attempt)
                try:
                    attempt.connection = await self._dial_address(Multiaddr(attempt.address), peer)
                    nursery.cancel_scope.cancel()
                except Exception as error:  # noqa: BLE001 - libp2p raises a dozen kinds; the reason is what remains
                    attempt.reason = _root_cause(error)
                finally:
                    over.set()

            for attempt in attempts:
                over = trio.Event()
                nursery.start_soon(run, attempt, over)
                with trio.move_on_after(_HEAD_START_S):
                    await over.wait()


def _root_cause(error: BaseException) -> str:
    """What libp2p's chain of exceptions began with, in a few words."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, BaseExceptionGroup) and error.exceptions:
        return _root_cause(error.exceptions[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error).strip() or type(error).__name__
    return "another peer answers there" if "peer id" in text.lower() else text[:200]
