"""A node's part in a run of rounds: what `run_node` starts when the recipe's method is not "exact".

Every node holds the whole model, trains alone for a round and shares what it learned; it answers inference meanwhile.

Ring: shell.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import trio

from mycel.node.compute import DeviceCompute
from mycel.node.events import Say
from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.group import Group
from mycel.node.rounds.group_port import GroupPlace, GroupPorts, Standing
from mycel.node.rounds.round_streams import RoundDoor
from mycel.node.training.ground import Ground
from mycel.node.training.local_work import LocalWork
from mycel.node.training.metrics import MetricsFile, StepMetrics
from mycel.node.training.optimizer import FlatState
from mycel.node.training.outgoing import Outgoing, Twist
from mycel.node.training.replica import Applied, Kept, Replica, ReplicaPorts
from mycel.node.training.scoped_reducer import ScopedReducer
from mycel.node.training.shared_state import SharedHolder, WeightsHolder, load_shared
from mycel.node.training.stage import TorchStage
from mycel.node.training.state_service import StateService
from mycel.node.training.workshop import TorchWorkshop
from mycel.node.training.workshop_port import Holding
from mycel.protocols.errors import PeerError
from mycel.protocols.messages import PeerAddress
from mycel.security.attacks import play
from mycel.swarm.codecs import Layout, make_codec
from mycel.swarm.methods.make import make_method
from mycel.swarm.methods.method import Method
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.progress import StageProgress
from mycel.swarm.training.recipe import ExactOptions, Recipe
from mycel.swarm.training.schedule import learning_rate
from mycel.swarm.watch import REFRESH_S, SwarmWatch
from mycel.swarm.zeroth.options import ZerothOptions

__all__ = ["DEFAULT_RULE", "ReplicaLife", "group_terms", "make_replica_life"]

# What brings contributions together where some of them may be lies, and the recipe names nothing else.
DEFAULT_RULE = "caf"
_SCOPE = "run"
# Within so long after its start a node looks often for others, to begin together.
_HURRY_FOR_S, _HURRY_S = 60.0, 1.0
_SAY_EVERY_S = 10.0


@dataclass(eq=False)
class ReplicaLife:
    """Made by `make_replica_life`; `run` until cancelled."""

    replica: Replica
    workshop: TorchWorkshop
    holding: Holding
    blobs: BlobExchange
    watch: SwarmWatch

    @property
    def ready(self) -> trio.Event:
        return self.replica.ready

    async def run(self, tasks: trio.Nursery) -> None:
        """Train until cancelled."""
        self.workshop.tasks = tasks
        await self.workshop.open(self.holding)
        tasks.start_soon(self._meet)
        await tasks.start(self.blobs.run)
        await self.replica.run()

    async def leave(self, within_s: float) -> None:
        """Have the others go on without this peer, and let the checkpoint that was taken be written."""
        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.workshop.settled)
                nursery.start_soon(self.replica.leave)

    async def _meet(self) -> None:
        """Whoever is in the directory may be of the group."""
        calm_s = trio.current_time() + _HURRY_FOR_S
        while True:
            try:
                for peer in (await self.watch.view(fresh=True)).peers.values():
                    if peer.peer != self.replica.ports.transport.peer_id:
                        self.replica.group.meet(PeerAddress(peer.peer, peer.addresses))
            except PeerError:
                pass  # the next look tells
            await trio.sleep(REFRESH_S if trio.current_time() > calm_s else _HURRY_S)


def group_terms(recipe: Recipe, method: Method) -> GroupTerms:
    """What a recipe says of rounds. Raises ConfigError, one line, for a rule or a codec that there is not."""
    part = recipe.round
    terms = GroupTerms(
        method.state.n_elements,
        rule=part.rule or (DEFAULT_RULE if part.liars else "mean"),
        codec=method.codec,
        result_codec=method.result_codec,
        liars=part.liars,
        aggregators=part.aggregators,
        open=part.open,
        min_members=part.peers,
        contributors=part.contributors,
        absences=part.absences,
        audits=part.audits,
        patience_s=part.patience_s,
        longest_grace_s=part.patience_s / 2,
    )
    make_codec(terms.codec)
    make_codec(terms.result_codec)
    return terms


async def make_replica_life(ground: Ground) -> ReplicaLife:
    """Everything that a node needs to train in a run of rounds. Raises ConfigError for terms that make no sense."""
    recipe, plan, station, workshop = ground.recipe, ground.plan, ground.station, ground.workshop
    assert not isinstance(recipe.method, ExactOptions | ZerothOptions)
    network, event, say = station.network, station.event, ground.say
    holding = await workshop.make(0)
    stage, inner = holding.stage, holding.state
    assert isinstance(stage, TorchStage)
    assert isinstance(inner, FlatState)
    layout = Layout(tuple(tensor.shape for tensor in stage.tensors))

    def schedule(version: int) -> float:
        return learning_rate(recipe.schedule, 1.0, version, plan.n_steps)

    method = make_method(recipe.method, layout, stage.params_P, schedule)
    workshop.stride = method.inner_steps
    terms, folder = group_terms(recipe, method), ground.metrics.parent / "group"
    path, disk = folder / "shared.state", DeviceCompute("disk")
    known = (await disk.run(partial(load_shared, path, method.state))).value or 0
    # What rounds bring stays on disk until the state after them is there: all nodes may be killed at once.
    standing = Standing((await station.compute.run(method.state.digest)).value, known, keeps_rounds=True)
    blobs, reducer = BlobExchange(network.transport, event=event), ScopedReducer(method, terms)
    group_ports = GroupPorts(RoundDoor(network.transport), blobs, network.identity, station.compute, disk, event)
    group = Group(
        GroupPlace(plan.run, _SCOPE, terms, station.model.manifest.founder), group_ports, reducer, folder, standing
    )
    holder = SharedHolder(method.state, known)
    states = StateService(
        network.transport, plan.run, 0, holder, station.compute, event, hashing=DeviceCompute("hashing")
    )

    async def after_round(_: int) -> None:
        steps = min(method.state.version * method.inner_steps, plan.n_steps)
        await workshop.after_step(Holding(stage, WeightsHolder(method.state, steps)), steps)

    replica = Replica(
        ReplicaPorts(network.transport, station.compute, disk, event),
        group,
        method,
        reducer,
        Outgoing(reducer, _twist(ground.config.liar, say)),
        Kept(path, holder, states, after_round),
        -(-plan.n_steps // method.inner_steps),
        _work(ground, stage, inner),
        stage.params_P,
        RoundTeller(ground, method, group).applied,
    )
    return ReplicaLife(replica, workshop, holding, blobs, ground.placing.watch)


def _work(ground: Ground, stage: TorchStage, inner: FlatState) -> LocalWork | None:
    if ground.load is None:
        ground.say(
            "this node has not the text: it follows the training, answers with what came of it, and signs nothing"
        )
        return None
    me, compute = ground.station.network.transport.peer_id, ground.station.compute
    return LocalWork(me, ground.plan, stage, inner, stage.params_P, compute, ground.load, ground.recipe.optimizer.clip)


def _twist(liar: str, say: Say) -> Twist | None:
    if not liar:
        return None
    say(f"this node lies on purpose: {liar}")
    return play(liar)


@dataclass(eq=False)
class RoundTeller:
    """A node's account of a run: a line in its metrics file after each result, and now and then a sentence."""

    ground: Ground
    method: Method
    group: Group
    file: MetricsFile = field(init=False)
    _tokens: int = field(default=-1, init=False)
    _said_at_s: float = field(default=-_SAY_EVERY_S, init=False)
    _members: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        self.file = MetricsFile(self.ground.metrics)

    def applied(self, done: Applied) -> None:
        """The shared state has taken one more result."""
        plan, recipe = self.ground.plan, self.ground.recipe
        step = min(done.version * self.method.inner_steps, plan.n_steps)
        round_tokens = done.contributors * self.method.inner_steps * plan.step_tokens
        # Of what came before this node it knows no better than that it was like now.
        self._tokens = done.version * round_tokens if self._tokens < 0 else self._tokens + round_tokens
        members = frozenset(self.group.members)
        before = self._members or members
        self._members = members
        record = StepMetrics(
            step=step,
            tokens=self._tokens,
            loss=done.loss,
            tokens_per_s=round_tokens / done.seconds if done.seconds > 0 else None,
            seconds=done.seconds / self.method.inner_steps,
            learning_rate=learning_rate(recipe.schedule, recipe.optimizer.learning_rate, step - 1, plan.n_steps),
            peers=(done.members,),
            sent_bytes=self.group.said_bytes + self.group.given_bytes,
            unix=time.time(),
            stages=(StageProgress(training=done.members, version=step),),
            joined=tuple(sorted(members - before)),
            lost=tuple(sorted(before - members)),
            params={0: done.digest.hex()},
        )
        self.file.append(record)
        now = trio.current_time()
        if now - self._said_at_s >= _SAY_EVERY_S or step == plan.n_steps:
            self._said_at_s = now
            loss = "" if done.loss is None else f"  loss {done.loss:.3f}"
            part = f"{done.contributors} of {done.members} contributed"
            self.ground.say(f"step {step}/{plan.n_steps}  round {done.round}{loss}  {part}  in {done.seconds:.1f} s")
