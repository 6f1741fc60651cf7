"""One running node, from its key file to its last word: `run_node` tells the whole walk.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import torch
import trio

from mycel.dht.addresses import MAX_ADDRESSES
from mycel.node.announcer import Announcer
from mycel.node.background import background
from mycel.node.compute import DeviceCompute
from mycel.node.config import NodeConfig
from mycel.node.discovery import meet_neighbours
from mycel.node.events import EventSink
from mycel.node.file_transfer import FileOptions
from mycel.node.files import fetch_manifest, fetch_small_files, fetch_units, serve_files
from mycel.node.hop_service import HopService
from mycel.node.kv_budget import KVBudget
from mycel.node.model_info import DTYPE_BYTES, ModelInfo, inspect_model, span_tensors
from mycel.node.model_store import ModelStore, build_manifest
from mycel.node.network import Network, open_network
from mycel.node.served_span import ServedSpan, token_bytes
from mycel.node.span import Span
from mycel.node.text import TextCodec
from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Compute
from mycel.security.identity import load_or_create
from mycel.swarm.invite import Invite, make_invite
from mycel.swarm.manifest import Manifest, swarm_id
from mycel.swarm.placement import capacity_blocks, choose_span, show_bytes
from mycel.swarm.view import View
from mycel.swarm.watch import SwarmWatch

# Of the memory that is free now; the rest is for activations, buffers and whoever else uses the machine.
MEMORY_SHARE = 0.7
# Below this, weights in float32 are affordable, and greedy text does not depend on how a prompt was cut into chunks.
FLOAT32_BYTES = 4 * 2**30

Say = Callable[[str], None]


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


@dataclass(frozen=True, slots=True)
class Model:
    """A swarm's model as this node has it: the directory may lack weights of other spans."""

    manifest: Manifest
    directory: Path
    info: ModelInfo
    dtype: torch.dtype

    @property
    def swarm(self) -> bytes:
        return swarm_id(self.manifest)

    def scaled(self, size_bytes: int) -> int:
        """Bytes in the files -> bytes in memory, in the dtype computed in."""
        return size_bytes * self.dtype.itemsize // DTYPE_BYTES[self.info.dtype]

    def memory_bytes(self, start: int, end: int, kv_tokens: int) -> int:
        """Weights of the span and KV memory for `kv_tokens`."""
        weights = sum(entry.size_bytes for unit in span_tensors(self.info, start, end).values() for entry in unit)
        return self.scaled(weights) + kv_tokens * token_bytes(self.info, start, end, self.dtype.itemsize)


async def run_node(
    config: NodeConfig,
    event: EventSink,
    say: Say,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Join or found a swarm, take a span, and serve until `stop`; started once the span can be used by others.

    Raises ConfigError for what the user has to change, PeerError or RouteUnavailable if the swarm cannot be reached.
    """
    torch.set_num_threads(config.threads)
    identity = load_or_create(config.data_dir / "identity.key")
    store, compute = ModelStore(config.data_dir / "cache"), DeviceCompute()
    async with open_network(identity, config.listen, event) as network:
        say(f"identity {identity.peer_id}")
        say(_machine(config))
        invite = config.invite
        if invite is not None:
            await network.join(invite.bootstrap)
            say(f"swarm {invite.name}: {len(network.transport.connected())} peers connected")
        model = await _model(config, network, store, compute, say)
        watch = SwarmWatch(network.directory, model.swarm, model.info.n_blocks, time.time)
        view = (await watch.view(fresh=True)).without({identity.peer_id})
        start, end = _choose(config, model, view, say)
        network.transport.serve(*serve_files(store, FileOptions(event=event)))
        if config.model is None:
            await _fetch(network, store, model, view, (start, end), say)
        span = await _load(model, start, end, compute)
        say(f"measured {span.block_time_s * 1e3:.2f} ms for a token through a block")
        service = _service(config, network, model, span, compute, event)
        async with background() as tasks:
            service.start()
            announcer = Announcer(network.directory, service, span, compute, event, config.ttl_s)
            await tasks.start(announcer.run)
            if config.mdns:
                tasks.start_soon(meet_neighbours, network, event)
            task_status.started(_serving(config, network, model, span))
            event(
                "node.serving",
                peer=identity.peer_id,
                blocks=f"{start}:{end}",
                block_ms=round(span.block_time_s * 1e3, 3),
            )
            await stop.wait()
            service.leaving = True
        await network.directory.withdraw(model.swarm)
        event("node.left", peer=identity.peer_id)


async def _model(config: NodeConfig, network: Network, store: ModelStore, compute: Compute, say: Say) -> Model:
    """The swarm's model: our own directory if we found the swarm or were given one, else files from peers."""
    invite, directory = config.invite, config.model
    manifest: Manifest | None = None
    if invite is not None:
        manifest = await fetch_manifest(network.transport, [address.peer for address in invite.bootstrap], invite.swarm)
    if directory is not None:
        path = directory
        own, blobs = (await compute.run(lambda: build_manifest(path, store.cache_dir))).value
        if manifest is None:
            manifest = msgspec.structs.replace(own, dtype=_dtype_of(config, own))
        elif msgspec.structs.replace(own, name=manifest.name, dtype=manifest.dtype) != manifest:
            raise ConfigError(f"{directory} is not the model of the swarm {manifest.name}")
        store.share(manifest, blobs)
    else:
        assert manifest is not None
        assert invite is not None
        directory = store.save_manifest(manifest)
        peers = [address.peer for address in invite.bootstrap]
        await fetch_small_files(network.transport, peers, store, manifest)
    info = (await compute.run(lambda: inspect_model(directory))).value
    TextCodec.load(directory, info.vocab_size)  # refused here: no client could speak with the swarm
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    say(f"model {manifest.name}: {info.architecture}, {info.n_blocks} blocks, computed in {manifest.dtype}")
    return Model(manifest, directory, info, dtype)


def _dtype_of(config: NodeConfig, manifest: Manifest) -> str:
    if config.dtype != "auto":
        return config.dtype
    stored_bytes = sum(unit.size_bytes for unit in manifest.units)
    return "float32" if stored_bytes * 4 // DTYPE_BYTES[manifest.dtype] <= FLOAT32_BYTES else manifest.dtype


def _choose(config: NodeConfig, model: Model, view: View, say: Say) -> tuple[int, int]:
    """The span to serve, with the reasons said. Raises ConfigError if the memory does not hold it."""
    info, n_blocks = model.info, model.info.n_blocks
    memory_bytes = config.memory_bytes or int(psutil.virtual_memory().available * MEMORY_SHARE)
    if config.blocks is not None:
        start, end = config.blocks
        if not 0 <= start < end <= n_blocks:
            raise ConfigError(f"blocks {start}:{end} are not blocks of a model with {n_blocks}")
        needed_bytes = model.memory_bytes(start, end, config.kv_tokens)
        if needed_bytes > memory_bytes:
            needs, free = show_bytes(needed_bytes), show_bytes(memory_bytes)
            raise ConfigError(
                f"not enough memory: blocks {start}:{end} need {needs} with their KV cache, {free} may be used"
            )
        say(f"blocks {start}:{end}, as asked")
        return start, end
    itemsize = model.dtype.itemsize
    # With tied embeddings the last span needs the token table too.
    last_units = span_tensors(info, n_blocks - 1, n_blocks) if n_blocks > 1 else {}
    table_bytes = sum(entry.size_bytes for entry in last_units.get("embed", ()))
    capacity, reason = capacity_blocks(
        memory_bytes,
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
    # The speed of this machine is measured once its blocks are loaded; every peer's typical figure serves to choose.
    known = sorted(peer.block_time_s for peer in view.peers.values())
    start, end, reason = choose_span(
        view, min(capacity, config.max_blocks or capacity), block_time_s=known[len(known) // 2] if known else 0.001
    )
    say(reason)
    return start, end


async def _fetch(
    network: Network, store: ModelStore, model: Model, view: View, span: tuple[int, int], say: Say
) -> None:
    """Get the span's weights from the peers that have them."""
    units = tuple(span_tensors(model.info, *span))
    todo_bytes = store.require_space(model.manifest, units)
    if todo_bytes:
        say(f"fetching {show_bytes(todo_bytes)} of weights from {len(view.peers)} peers")
        for peer in view.peers.values():
            network.transport.learn(peer.peer, peer.addresses)
        began = trio.current_time()
        await fetch_units(network.transport, sorted(view.peers), store, model.manifest, units)
        say(f"verified {len(units)} units (SHA-256) in {trio.current_time() - began:.1f} s")
    store.share(model.manifest)


async def _load(model: Model, start: int, end: int, compute: Compute) -> ServedSpan:
    def load() -> ServedSpan:
        span = ServedSpan(Span.load(model.directory, start, end, dtype=model.dtype), model.dtype)
        span.measure()
        return span

    return (await compute.run(load)).value


def _service(
    config: NodeConfig, network: Network, model: Model, span: ServedSpan, compute: Compute, event: EventSink
) -> HopService:
    per_token = span.session_bytes(span.start, span.end, 1)
    budget = KVBudget(config.kv_tokens * per_token)
    return HopService(network.transport, model.swarm, span, compute, budget, event)


def _machine(config: NodeConfig) -> str:
    free = show_bytes(psutil.virtual_memory().available)
    return f"machine: {psutil.cpu_count()} cores, {config.threads} to compute with; {free} of memory free"


def _serving(config: NodeConfig, network: Network, model: Model, span: ServedSpan) -> Serving:
    """What others can use now, with an invite of our own: us first, then whom we came by."""
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
    addresses, n_blocks = network.transport.addresses, model.info.n_blocks
    return Serving(me.peer, addresses, invite, model.manifest.name, span.start, span.end, n_blocks)
