"""Which blocks this node serves: chosen with others in mind, and changed when the swarm needs it elsewhere.

What is decided stands in swarm (placement, claims, rebalance); here it is done, and said.

Ring: shell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from random import Random

import psutil
import trio

from mycel.node.announcer import OVERHEAD_S, Announcer
from mycel.node.config import NodeConfig
from mycel.node.events import Say
from mycel.node.file_transfer import FileOptions
from mycel.node.files import fetch_units
from mycel.node.hub import repository_of
from mycel.node.model import Model
from mycel.node.model_info import span_tensors
from mycel.node.model_store import ModelStore
from mycel.node.served_span import token_bytes
from mycel.node.station import Station
from mycel.protocols.errors import ConfigError, PeerError, RouteUnavailable
from mycel.swarm.claims import SETTLE_S, must_yield
from mycel.swarm.placement import capacity_blocks, choose_span, judge, show_bytes
from mycel.swarm.rebalance import Move, Rebalancer, pause_s
from mycel.swarm.view import View
from mycel.swarm.watch import REFRESH_S, SwarmWatch

# Of the memory that is free now; the rest is for activations, buffers and whoever else uses the machine.
MEMORY_SHARE = 0.7
# A newcomer that always finds somebody ahead of it takes what it chose last: better twice served than never.
MAX_CHOICES = 4
# The rate of less than this says more about round trips than about the link.
MEASURED_BYTES = 4 << 20
# Before anything was fetched: what a home line takes in.
DEFAULT_BYTES_PER_S = 5e6
# Enough for sessions that never needed the missing blocks.
REPAIR_LEAVE_S = 2.0
_SETTLE_LOOKS = 6
# A newcomer whose bootstrap peers are busy asks again: a choice made blindly is made for long.
_LOOKS = 4
_LOOK_AGAIN_S = 2.0


@dataclass(eq=False, slots=True)
class Placing:
    """The choices of one node. Made once its model is known and its speed measured."""

    config: NodeConfig
    model: Model
    store: ModelStore
    watch: SwarmWatch
    station: Station
    announcer: Announcer
    say: Say
    rng: Random = field(default_factory=Random)
    capacity: int = field(default=0, init=False)
    _said: str = field(default="", init=False)
    _told: set[str] = field(default_factory=set, init=False)  # since the last move

    @property
    def me(self) -> str:
        return self.station.network.identity.peer_id

    async def join(self) -> None:
        """Choose blocks, say so, and have their weights. Raises ConfigError if the memory does not hold them."""
        if self.config.blocks is not None:
            start, end = self.config.blocks
            _demand_memory(self.config, self.model, start, end)
            self.say(f"blocks {start}:{end}, as asked")
            self.station.claim(start, end)
            await self.announcer.say()
            await self.fetch(await self.look(), start, end)
            return
        self.capacity = _capacity(self.config, self.model, self.say)
        for choice in range(1, MAX_CHOICES + 1):
            before = (await self.look()).without({self.me})
            start, end = self._choose(before)
            self.station.claim(start, end)
            await self.announcer.say()
            await self.fetch(before, start, end)
            if not before.peers:
                break  # we found the swarm: who else could have chosen?
            reason = must_yield(await self.watch.view(fresh=True), self.me, before, bytes_per_token=self._token_bytes)
            if reason is None or choice == MAX_CHOICES:
                break
            self.say(reason)

    async def look(self) -> View:
        """The swarm now. Where we were invited there is somebody: if nobody is seen, none has answered in time."""
        for _ in range(_LOOKS):
            view = await self.watch.view(fresh=True)
            if self.config.invite is None or view.without({self.me}).peers:
                break
            await trio.sleep(_LOOK_AGAIN_S)
        return view

    async def rebalance(self) -> None:
        """Look for ever whether the swarm needs this node elsewhere, and go there."""
        if self.config.blocks is not None or self.capacity >= self.model.info.n_blocks or not self.config.rebalance_s:
            return
        rebalancer = Rebalancer(self.me, self.capacity, trio.current_time(), self._token_bytes)
        while True:
            await self._pause()
            try:
                view = await self.watch.view(fresh=True)
                decide = partial(rebalancer.decide, view, trio.current_time(), download_s=self._download_s(view))
                decision = await trio.to_thread.run_sync(decide)  # in a large swarm it takes a quarter of a second
                if isinstance(decision, Move):
                    await self._move(rebalancer, decision, view)
                else:
                    self._stays(decision.reason)
            except (ConfigError, PeerError, RouteUnavailable) as error:
                if self.station.service is None:
                    raise  # neither the new blocks nor the old ones can be loaded: it is of no use here
                self.station.event("node.stays", reason=f"no move: {error}")
                self._tell(f"stays after all: {error}")
                await self.announcer.say()

    async def _pause(self) -> None:
        """Until the next look, which is soon once blocks are missing: that may begin at any time."""
        period_s, began, urgent = self.config.rebalance_s, trio.current_time(), False
        until_s = began + pause_s(self.rng, period_s, urgent=False)
        while trio.current_time() < until_s:
            if not urgent and (await self.watch.view()).staying().missing():
                urgent = True
                until_s = min(until_s, trio.current_time() + pause_s(self.rng, period_s, urgent=True))
            await trio.sleep(min(REFRESH_S, max(0.0, until_s - trio.current_time())))

    def _tell(self, text: str) -> None:
        """To the person at the terminal, once: what cannot be done now is tried every few seconds."""
        if text not in self._told:
            self._told.add(text)
            self.say(text)

    def _stays(self, reason: str) -> None:
        if reason != self._said:
            self._said = reason
            self.station.event("node.stays", reason=reason)

    @property
    def _token_bytes(self) -> float:
        return float(self.model.activation_bytes)

    def _choose(self, view: View) -> tuple[int, int]:
        station = self.station
        speed = {
            "block_time_s": station.block_time_s,
            "overhead_s": OVERHEAD_S,
            "link_bytes_per_s": station.link_bytes_per_s,
            "bytes_per_token": self._token_bytes,
        }
        start, end, reason = choose_span(view, self.capacity, **speed)
        self.say(reason)
        if view.peers:
            self.say(judge(view, start, end, **speed).reason)
        return start, end

    def _download_s(self, view: View) -> float:
        """Expected seconds to fetch as many blocks as this node holds; infinite if there is nobody to fetch from."""
        if self.config.model is not None:
            return 0.0
        if not view.without({self.me}).peers:
            return math.inf
        block_bytes = max(self.model.info.block_bytes) * self.capacity
        return block_bytes / (self.station.link_bytes_per_s or DEFAULT_BYTES_PER_S)

    async def fetch(self, view: View, start: int, end: int) -> None:
        """Have the weights of [start, end), from peers unless a directory was given."""
        if self.config.model is not None:
            return
        units = tuple(span_tensors(self.model.info, start, end))
        todo_bytes = self.store.require_space(self.model.manifest, units)
        if todo_bytes:
            others = view.without({self.me}).peers
            sources = "1 peer" if len(others) == 1 else f"{len(others)} peers"
            self.say(f"fetching {show_bytes(todo_bytes)} of weights from {sources}")
            transport = self.station.network.transport
            for peer in others.values():
                transport.learn(peer.peer, peer.addresses)
            manifest = self.model.manifest
            options = FileOptions(event=self.station.event)
            fetched = await fetch_units(
                transport, sorted(others), self.store, manifest, units, options, repository=repository_of(manifest)
            )
            if fetched.size_bytes >= MEASURED_BYTES:
                self.station.link_bytes_per_s = max(self.station.link_bytes_per_s, fetched.bytes_per_s)
            said = f"verified {len(units)} units (SHA-256) in {fetched.seconds:.1f} s"
            self.say(f"{said}, from {', '.join(source[-8:] for source in sorted(fetched.by_peer))}")
        self.store.share(self.model.manifest)

    async def _move(self, rebalancer: Rebalancer, move: Move, before: View) -> None:
        """Say where we go and fetch it while the old blocks are served; go there unless another was first."""
        self._tell(move.reason)
        home = self.station.claimed
        self.station.claim(move.start, move.end)
        try:
            await self.announcer.say()
            began = trio.current_time()
            await self.fetch(before, move.start, move.end)
            reason = await self._settle(before, began + min(SETTLE_S, self.config.rebalance_s / 2))
        except BaseException:
            self.station.stay()
            rebalancer.went_back()
            raise
        if reason is not None:
            self.station.stay()
            rebalancer.went_back()
            await self.announcer.say()
            self.say(reason)
            return
        self.station.event("node.moving", blocks=f"{move.start}:{move.end}", reason=move.reason)
        # While blocks are missing no session goes on, and none can be handed over: they wait for this very move.
        whole = not before.staying().missing()
        self.station.retire()
        await self.announcer.say()  # no client needs to be refused first
        await self.station.close(self.config.leave_s if whole else min(self.config.leave_s, REPAIR_LEAVE_S))
        try:
            await self.station.open()
        except ConfigError:
            self.station.claim(*home)
            rebalancer.went_back()
            await self.station.open()
            raise
        await self.announcer.say()
        self._told.clear()
        self.say(f"serving blocks {move.start}:{move.end}")

    async def _settle(self, before: View, until_s: float) -> str | None:
        """Wait until others that chose at the same time would be seen; why to go back, if one of them was first."""
        while True:
            view = await self.watch.view(fresh=True)
            if reason := must_yield(view, self.me, before, bytes_per_token=self._token_bytes):
                return reason
            now = trio.current_time()
            if now >= until_s:
                return None
            await trio.sleep(min(until_s - now, SETTLE_S / _SETTLE_LOOKS))


def _memory_bytes(config: NodeConfig) -> int:
    return config.memory_bytes or int(psutil.virtual_memory().available * MEMORY_SHARE)


def _demand_memory(config: NodeConfig, model: Model, start: int, end: int) -> None:
    n_blocks = model.info.n_blocks
    if not 0 <= start < end <= n_blocks:
        raise ConfigError(f"blocks {start}:{end} are not blocks of a model with {n_blocks}")
    needed_bytes, memory_bytes = model.memory_bytes(start, end, config.kv_tokens), _memory_bytes(config)
    if needed_bytes > memory_bytes:
        needs, free = show_bytes(needed_bytes), show_bytes(memory_bytes)
        raise ConfigError(
            f"not enough memory: blocks {start}:{end} need {needs} with their KV cache, {free} may be used"
        )


def _capacity(config: NodeConfig, model: Model, say: Say) -> int:
    """How many blocks this machine holds. Raises ConfigError for none."""
    info, n_blocks, itemsize = model.info, model.info.n_blocks, model.dtype.itemsize
    # With tied embeddings the last span needs the token table too.
    last_units = span_tensors(info, n_blocks - 1, n_blocks) if n_blocks > 1 else {}
    table_bytes = sum(entry.size_bytes for entry in last_units.get("embed", ()))
    capacity, reason = capacity_blocks(
        _memory_bytes(config),
        block_bytes=[model.scaled(size) for size in info.block_bytes],
        embed_bytes=model.scaled(info.embed_bytes),
        head_bytes=model.scaled(info.head_bytes + table_bytes),
        kv_bytes_per_token=[token_bytes(info, block, block + 1, itemsize) for block in range(n_blocks)],
        kv_tokens=config.kv_tokens,
        shared_bytes=model.scaled(table_bytes),
    )
    say(reason)
    if capacity < 1:
        raise ConfigError(f"not enough memory: {reason}")
    return min(capacity, config.max_blocks or capacity)
