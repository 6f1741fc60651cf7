"""Chains for many streams that run together: spread as the peers' rates are, so that the batch is done soonest.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

from mycel.swarm.routing import Chain, choose_chain
from mycel.swarm.view import View

if TYPE_CHECKING:
    from random import Random

# A batch is spread in so many steps at most: each of them is a search.
MAX_BATCH_CHOICES = 32


def choose_batch(
    view: View,
    n_streams: int,
    *,
    rtts: Mapping[str, float],
    max_tokens: int,
    load: Mapping[str, int] | None = None,
    rng: Random | None = None,
) -> tuple[Chain, ...]:
    """A chain for each of `n_streams` streams that run side by side, so that together they are done soonest.

    One after the other takes the cheapest chain there is then: each waits at its peers for those placed there before,
    which spreads the streams as the peers' rates are, and takes their KV memory from what is free. Arguments and errors
    are choose_chain's. More than MAX_BATCH_CHOICES streams are placed several at a time.
    """
    waiting = dict(load or {})
    chains: list[Chain] = []
    together = ceil(n_streams / MAX_BATCH_CHOICES)
    while len(chains) < n_streams:
        count = min(together, n_streams - len(chains))
        # Chance decides only whom the first takes: from then on the streams see each other.
        chance = rng if not chains else None
        chain = choose_chain(view, rtts=rtts, max_tokens=max_tokens, load=waiting, rng=chance)
        chains += [chain] * count
        for hop in chain.hops:
            waiting[hop.peer.peer] = waiting.get(hop.peer.peer, 0) + count
        view = _reserved(view, chain, count * max_tokens)
    return tuple(chains)


def _reserved(view: View, chain: Chain, n_tokens: int) -> View:
    """The view once the hops of `chain` hold KV memory for `n_tokens` more."""
    peers = dict(view.peers)
    for hop in chain.hops:
        peer = peers[hop.peer.peer]
        peers[peer.peer] = replace(peer, kv_free_tokens=max(0, peer.kv_free_tokens - n_tokens))
    return View(view.n_blocks, peers)
