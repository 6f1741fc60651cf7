"""The swarm's model as this node has it: found in a directory of one's own, or fetched from peers but for the weights.

Ring: shell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch
import trio

from mycel.node.config import NodeConfig
from mycel.node.files import fetch_chunk_list, fetch_manifest, fetch_small_files
from mycel.node.hub import locate_model
from mycel.node.model_info import DTYPE_BYTES, ModelInfo, inspect_model, span_tensors
from mycel.node.model_store import ModelStore, build_manifest
from mycel.node.network import Network
from mycel.node.served_span import token_bytes
from mycel.node.text import TextCodec
from mycel.node.training.founding import refuse_bottlenecks
from mycel.protocols.errors import ConfigError
from mycel.protocols.ports import Compute
from mycel.swarm.manifest import Manifest, same_model, sign_manifest, swarm_id

# Below this, weights in float32 are affordable, and greedy text does not depend on how a prompt was cut into chunks.
FLOAT32_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """A swarm's model: `directory` may lack the weights of blocks that this node does not serve."""

    manifest: Manifest
    directory: Path
    info: ModelInfo
    dtype: torch.dtype

    @property
    def swarm(self) -> bytes:
        return swarm_id(self.manifest)

    @property
    def activation_bytes(self) -> int:
        """Of one token between two hops."""
        return self.info.hidden_size * self.dtype.itemsize

    def scaled(self, size_bytes: int) -> int:
        """Bytes in the files -> bytes in memory, in the dtype computed in."""
        return size_bytes * self.dtype.itemsize // DTYPE_BYTES[self.info.dtype]

    def memory_bytes(self, start: int, end: int, kv_tokens: int) -> int:
        """Weights of the span and KV memory for `kv_tokens`."""
        weights = sum(entry.size_bytes for unit in span_tensors(self.info, start, end).values() for entry in unit)
        return self.scaled(weights) + kv_tokens * token_bytes(self.info, start, end, self.dtype.itemsize)


async def find_model(config: NodeConfig, network: Network, store: ModelStore, compute: Compute) -> Model:
    """Our own directory if we found the swarm or were given one, else what peers have.

    Raises ConfigError for a directory that is no model, or not the swarm's; PeerError if no peer of the invite answers.
    """
    invite, directory = config.invite, config.model
    manifest: Manifest | None = None
    if invite is not None:
        manifest = await fetch_manifest(network.transport, network.answering_first(invite.bootstrap), invite.swarm)
    if directory is not None:
        snapshot = await trio.to_thread.run_sync(locate_model, directory)
        directory = snapshot.directory
        refuse_bottlenecks(directory)
        build = partial(build_manifest, directory, store.cache_dir, source=snapshot.source)
        own, blobs = (await compute.run(build)).value
        if manifest is None:
            manifest = sign_manifest(msgspec.structs.replace(own, dtype=_dtype_of(config, own)), network.identity)
        elif not same_model(own, manifest):
            raise ConfigError(f"{directory} is not the model of the swarm {manifest.name}")
        store.share(manifest, blobs)
    else:
        assert manifest is not None
        assert invite is not None
        directory = store.save_manifest(manifest)
        peers = network.answering_first(invite.bootstrap)
        await fetch_small_files(network.transport, peers, store, manifest)
        # Of all blocks: with it the weights may come from anywhere, also when no peer is left that has them.
        await fetch_chunk_list(network.transport, peers, store, manifest)
    info = (await compute.run(lambda: inspect_model(directory))).value
    TextCodec.load(directory, info.vocab_size)  # refused here: no client could speak with the swarm
    return Model(manifest, directory, info, getattr(torch, manifest.dtype))


def _dtype_of(config: NodeConfig, manifest: Manifest) -> str:
    if config.dtype != "auto":
        return config.dtype
    stored_bytes = sum(unit.size_bytes for unit in manifest.units)
    return "float32" if stored_bytes * 4 // DTYPE_BYTES[manifest.dtype] <= FLOAT32_BYTES else manifest.dtype
