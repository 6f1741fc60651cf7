"""Connections in virtual time: two wires, each in order, with bandwidth, delay, stalls and death.

Knows nothing of handlers or of what frames mean. All of it is synchronous: tasks wait in `transport.SimStream`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import trio

from tests.sim.faults import SEGMENT_BYTES

if TYPE_CHECKING:
    from tests.sim.transport import SimStream, SimTransport
    from tests.sim.world import World

Kind = Literal["open", "accept", "refuse", "frame", "end", "reset", "credit"]
_CONTROL_BYTES = 32
_CONTROL_LANE = -1


@dataclass(slots=True, eq=False)
class Item:
    """Something on a wire: a frame, or a word about its stream."""

    kind: Kind
    stream_id: int
    frame: bytearray | None = None
    text: str = ""
    amount_bytes: int = 0
    unsent_bytes: int = 0
    delay_s: float = 0.0
    number: int = -1


class Wire:
    """One direction of a connection: streams take turns by segments, and everything arrives in the order it left."""

    def __init__(self, connection: Connection, source: SimTransport, target: SimTransport) -> None:
        self._connection, self._source, self._target = connection, source, target
        self._world = connection.world
        self._lanes: dict[int, deque[Item]] = {}
        self._busy = False
        self._n_sent = self._n_delivered = 0
        self._arrived: dict[int, Item] = {}  # whole, but something before it is still missing
        self._stalled: list[Item] = []

    def push(self, item: Item) -> None:
        """Put an item behind the others of its stream."""
        item.unsent_bytes = len(item.frame) if item.frame is not None else _CONTROL_BYTES
        lane = _CONTROL_LANE if item.kind == "credit" else item.stream_id
        self._lanes.setdefault(lane, deque()).append(item)
        if not self._busy:
            self._send_segment()

    def drop_lane(self, stream_id: int) -> None:
        """Forget what a stream has not sent yet; a frame that was sent in part is never delivered."""
        self._lanes.pop(stream_id, None)

    def _send_segment(self) -> None:
        if not self._lanes:
            self._busy = False
            return
        self._busy = True
        lane_id = next(iter(self._lanes))
        lane = self._lanes.pop(lane_id)
        item = lane[0]
        size_bytes = min(SEGMENT_BYTES, item.unsent_bytes)
        item.unsent_bytes -= size_bytes
        if item.unsent_bytes == 0:
            lane.popleft()
        if lane:
            self._lanes[lane_id] = lane  # behind the other streams
        faults = self._world.faults(self._source.name, self._target.name)
        sending_s = size_bytes / faults.bandwidth_bytes_per_s * self._world.slowness(self._source.name)
        item.delay_s = max(item.delay_s, faults.delay_s(self._world.chances(faults.n_chances)))
        self._world.agenda.after(sending_s, lambda: self._sent(item))

    def _sent(self, item: Item) -> None:
        if item.unsent_bytes == 0:
            item.number, self._n_sent = self._n_sent, self._n_sent + 1
            self._world.agenda.after(item.delay_s, lambda: self._arrive(item))
        self._send_segment()

    def _arrive(self, item: Item) -> None:
        if self._connection.is_cut:
            self._stalled.append(item)
            return
        self._arrived[item.number] = item
        while (following := self._arrived.pop(self._n_delivered, None)) is not None:
            self._n_delivered += 1
            self._connection.deliver(self._target, following)

    def resume(self) -> None:
        """The cut is over: what was lost in it is sent again."""
        faults = self._world.faults(self._source.name, self._target.name)
        stalled, self._stalled = self._stalled, []
        for item in stalled:
            self._world.agenda.after(faults.delay_s(self._world.chances(1)), lambda item=item: self._arrive(item))


class Connection:
    """What two transports share until one of them is gone or silent. Each side learns of the death by itself."""

    def __init__(self, world: World, dialer: SimTransport, listener: SimTransport) -> None:
        self.world = world
        self._sides = (dialer, listener)
        self._alive = {dialer: True, listener: True}
        self._wires = {dialer: Wire(self, dialer, listener), listener: Wire(self, listener, dialer)}
        self._streams: dict[tuple[SimTransport, int], SimStream] = {}
        self._n_streams = 0
        self._cuts = 0
        self.is_cut = False

    def other(self, side: SimTransport) -> SimTransport:
        return self._sides[1] if side is self._sides[0] else self._sides[0]

    def alive(self, side: SimTransport) -> bool:
        """Whether `side` still believes in this connection."""
        return self._alive[side]

    def new_stream_id(self) -> int:
        self._n_streams += 1
        return self._n_streams

    def add(self, side: SimTransport, stream: SimStream) -> None:
        self._streams[side, stream.stream_id] = stream

    def remove(self, side: SimTransport, stream_id: int) -> None:
        self._streams.pop((side, stream_id), None)

    def push(self, side: SimTransport, item: Item) -> None:
        """Send an item from `side`; nothing leaves a side that is dead."""
        if self._alive[side]:
            self._wires[side].push(item)

    def drop_lane(self, side: SimTransport, stream_id: int) -> None:
        self._wires[side].drop_lane(stream_id)

    def deliver(self, side: SimTransport, item: Item) -> None:
        if not self._alive[side]:
            return
        stream = self._streams.get((side, item.stream_id))
        if item.kind == "open":
            side.accept(self, item)
        elif stream is not None:
            stream.on_item(item)
        elif item.kind == "frame":
            self.push(side, Item("reset", item.stream_id, text="the stream is closed there"))

    def lose(self, side: SimTransport, reason: str) -> None:
        """`side` learns that the connection is dead; all its streams break."""
        if not self._alive[side]:
            return
        self._alive[side] = False
        other = self.other(side)
        side.forget(other.peer_id, self)
        if not side.crashed:
            self.world.record("lost", side.name, other.name, reason)
        for owner, stream_id in [key for key in self._streams if key[0] is side]:
            self._streams.pop((owner, stream_id)).on_broken(reason)

    def crash(self, side: SimTransport) -> None:
        """`side`'s process is gone: its own streams break now, the other side hears of it one latency later."""
        self.lose(side, "this node has crashed")
        self._tell_survivor(side)

    def _tell_survivor(self, dead: SimTransport) -> None:
        survivor = self.other(dead)

        def tell() -> None:
            if not self.is_cut:  # else nothing gets through, and silence will tell
                self.lose(survivor, "connection reset: the peer's process is gone")

        self.world.agenda.after(self.world.faults(dead.name, survivor.name).latency_s, tell)

    def set_cut(self, is_cut: bool) -> None:
        """The link between the two was cut or mended; a cut that lasts for `silence_s` is the end."""
        if is_cut == self.is_cut:
            return
        self.is_cut = is_cut
        self._cuts += 1
        if is_cut:
            started, silence_s = self._cuts, self.world.options.silence_s
            self.world.agenda.after(silence_s, lambda: self._still_cut(started, f"silent for {silence_s:.1f} s"))
            return
        for side in self._sides:
            if side.crashed:
                self._tell_survivor(side)
            self._wires[side].resume()

    def _still_cut(self, started: int, reason: str) -> None:
        if self.is_cut and self._cuts == started:
            for side in self._sides:
                self.lose(side, reason)


def now() -> float:
    """The virtual time, rounded so that a log reads well and compares exactly."""
    return round(trio.current_time(), 9)
