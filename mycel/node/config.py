"""What a node is told when it starts: one frozen tree, made once by the command line or by a test.

Ring: shell (names places on disk).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mycel.dht.directory import TTL_S
from mycel.swarm.invite import Invite
from mycel.swarm.rebalance import PERIOD_S

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`invite` joins a swarm, `model` founds one (or spares the download), `recipe` founds a run; one of them is given.

    `blocks` is a span to serve whatever the swarm needs, `max_blocks` and `memory_bytes` bound the choice. `dtype` is
    what a founder computes in: "auto", "float32", "bfloat16" or "float16"; a joiner takes the swarm's.

    `announce` are the addresses that others are told, in place of those listened on. `network` is the engine: "libp2p",
    "p2pd" or "auto". `shape` makes every link worse on purpose (see swarm/chaos.py). `leave_s` bounds a planned exit.
    `rebalance_s` is how often a node looks whether it is needed elsewhere, 0 for never. `hivemind_dht` are addresses of
    an existing hivemind DHT in which the node announces itself as well.

    `recipe` founds a training run; who joins one with it reads there where the text lies on this machine. `data` says
    that the node has the text and drives microbatches. `checkpoints` is where whole checkpoints are written, and what
    the run resumes from. `liar` names what the node plays in experiments with liars (security/attacks), "" for none.
    """

    data_dir: Path
    listen: tuple[str, ...]
    model: Path | None = None
    invite: Invite | None = None
    blocks: tuple[int, int] | None = None
    max_blocks: int | None = None
    memory_bytes: int | None = None
    kv_tokens: int = 8192
    dtype: str = "auto"
    threads: int = 1
    ttl_s: float = TTL_S
    mdns: bool = False
    invite_lifetime_s: float = 7 * DAY_S
    announce: tuple[str, ...] = ()
    network: str = "auto"
    shape: str = ""
    leave_s: float = 30.0
    rebalance_s: float = PERIOD_S
    hivemind_dht: tuple[str, ...] = ()
    recipe: Path | None = None
    checkpoints: Path | None = None
    data: bool = False
    liar: str = ""
