"""Connecting to a swarm, of which some peers do not answer."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
import trio

from mycel.node.client import connect
from mycel.node.events import no_events
from mycel.node.files import serve_files
from mycel.node.model_store import ModelStore, build_manifest
from mycel.node.network import open_network
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from mycel.swarm.invite import make_invite
from mycel.swarm.manifest import sign_manifest, swarm_id
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer


@pytest.mark.loopback
def test_a_silent_peer_of_the_invite_keeps_nobody_waiting(tmp_path: Path) -> None:
    """It accepts connections and says nothing, as a process does that was stopped or swapped out."""
    make_tiny_model("llama", tmp_path / "model")
    make_tiny_tokenizer(tmp_path / "model")
    store = ModelStore(tmp_path / "cache")
    unsigned, blobs = build_manifest(tmp_path / "model", store.cache_dir)
    manifest = sign_manifest(unsigned, Identity.generate())
    store.share(manifest, blobs)

    async def hold(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        async with (
            trio.open_nursery() as nursery,
            open_network(Identity.generate(), ("/ip4/127.0.0.1/tcp/0",), no_events) as node,
        ):
            node.transport.serve(*serve_files(store))
            listeners = await nursery.start(partial(trio.serve_tcp, hold, 0, host="127.0.0.1"))
            silent_at = f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}"
            bootstrap = [
                PeerAddress(Identity.generate().peer_id, (silent_at,)),
                PeerAddress(node.identity.peer_id, node.transport.addresses),
            ]
            invite = make_invite(
                node.identity, swarm_id(manifest), "tiny", bootstrap, now=time.time(), lifetime_s=3600.0
            )
            with trio.fail_after(4.5):  # less than the 5 s for which a single question waits for the silent one
                async with connect(invite.text) as model:
                    assert model.manifest == manifest
            nursery.cancel_scope.cancel()

    trio.run(main)
