"""One running node, from its key file to its last word: `run_node` tells the whole walk.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

import psutil
import torch
import trio

from mycel.dht.addresses import MAX_ADDRESSES
from mycel.node.announcer import Announcer
from mycel.node.background import background
from mycel.node.compute import DeviceCompute
from mycel.node.config import NodeConfig
from mycel.node.discovery import LAST_WORD_S, announce_in_hivemind, meet_neighbours
from mycel.node.events import EventSink, Say
from mycel.node.file_transfer import FileOptions
from mycel.node.files import serve_files
from mycel.node.model import find_model
from mycel.node.model_store import ModelStore
from mycel.node.network import Network, open_network
from mycel.node.placing import Placing
from mycel.node.speed import measure_block_s
from mycel.node.station import Station
from mycel.node.training.founding import FoundedRun, found_run
from mycel.node.training.ground import prepare, recipe_of
from mycel.node.training.life import make_life
from mycel.protocols.errors import PeerError
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import load_or_create
from mycel.swarm.invite import Invite, make_invite
from mycel.swarm.placement import show_bytes
from mycel.swarm.watch import SwarmWatch


@dataclass(frozen=True, slots=True)
class Serving:
    """What a node that is ready tells whoever started it."""

    peer: str
    addresses: tuple[str, ...]
    invite: Invite
    model: str
    start: int
    end: int
    n_blocks: int


async def run_node(
    config: NodeConfig,
    event: EventSink,
    say: Say,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Join or found a swarm, take a span, and serve until `stop`; started once the span can be used by others.

    On `stop` the node says that it leaves, has its sessions handed over, for at most `config.leave_s`, and ends.

    Raises ConfigError for what the user has to change, PeerError or RouteUnavailable if the swarm cannot be reached.
    """
    torch.set_num_threads(config.threads)
    identity = load_or_create(config.data_dir / "identity.key")
    founded: FoundedRun | None = None
    if config.recipe is not None and config.invite is None:
        say(f"founding the run of {config.recipe}")
        founded = await trio.to_thread.run_sync(found_run, config.recipe, config.data_dir)
        config = replace(config, model=founded.directory, dtype="float32")
    store, compute = ModelStore(config.data_dir / "cache"), DeviceCompute()
    async with open_network(
        identity, config.listen, event, announce=config.announce, engine=config.network, shape=config.shape
    ) as network:
        say(f"identity {identity.peer_id}")
        say(_machine(config))
        if config.invite is not None:
            await network.join(config.invite.bootstrap)
            n_peers = len(network.transport.connected())
            say(f"swarm {config.invite.name}: connected to {n_peers} peer{'' if n_peers == 1 else 's'}")
        model = await find_model(config, network, store, compute)
        say(
            f"model {model.manifest.name}: {model.info.architecture}, {model.info.n_blocks} blocks, "
            f"computed in {model.manifest.dtype}"
        )
        network.transport.serve(*serve_files(store, FileOptions(event=event)))
        block_time_s = (await compute.run(lambda: measure_block_s(model.directory, model.dtype))).value
        say(f"this machine takes {block_time_s * 1e3:.2f} ms for a token through a block")
        station = Station(config, network, model, compute, event, block_time_s)
        announcer = Announcer(network.directory, station.describe, event, config.ttl_s)
        watch = SwarmWatch(network.directory, model.swarm, model.info.n_blocks, time.time)
        placing = Placing(config, model, store, watch, station, announcer, say)
        async with _last_word(network, model.swarm), background() as tasks:
            tasks.start_soon(announcer.run)  # from the first: a download takes longer than an announcement lives
            tasks.start_soon(watch.run)
            recipe, life = recipe_of(model), None
            if recipe is None:
                await placing.join()
                await station.open()
                await announcer.say()
                tasks.start_soon(placing.rebalance)
            else:
                life = await make_life(await prepare(config, recipe, founded, station, announcer, placing, say))
                tasks.start_soon(life.run, tasks)
                await life.ready.wait()
            if config.hivemind_dht:
                tasks.start_soon(announce_in_hivemind, config.hivemind_dht, station, config.ttl_s)
            if config.mdns:
                tasks.start_soon(meet_neighbours, network, event)
            serving = _serving(config, station)
            task_status.started(serving)
            event(
                "node.serving",
                peer=identity.peer_id,
                blocks=f"{serving.start}:{serving.end}",
                block_ms=round(station.block_time_s * 1e3, 3),
            )
            await stop.wait()
            if life is not None:
                await life.leave(config.leave_s)
        await station.close(config.leave_s)
        event("node.left", peer=identity.peer_id)


@asynccontextmanager
async def _last_word(network: Network, swarm: bytes) -> AsyncIterator[None]:
    """However the block ends, the directory is told that we leave: others count on who joins, too."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(LAST_WORD_S), suppress(PeerError):
            await network.directory.withdraw(swarm)


def _machine(config: NodeConfig) -> str:
    free = show_bytes(psutil.virtual_memory().available)
    return f"machine: {psutil.cpu_count()} cores, {config.threads} to compute with; {free} of memory free"


def _serving(config: NodeConfig, station: Station) -> Serving:
    """What others can use now, with an invite of our own: us first, then whom we came by."""
    network, model = station.network, station.model
    me = PeerAddress(network.identity.peer_id, network.transport.addresses[:MAX_ADDRESSES])
    others = config.invite.bootstrap if config.invite else ()
    bootstrap = [me, *(address for address in others if address.peer != me.peer)][:3]
    invite = make_invite(
        network.identity,
        model.swarm,
        model.manifest.name,
        bootstrap,
        now=time.time(),
        lifetime_s=config.invite_lifetime_s,
    )
    start, end = station.claimed
    return Serving(me.peer, network.transport.addresses, invite, model.manifest.name, start, end, model.info.n_blocks)
