"""A node's part in a run of one-byte updates: what `make_life` starts when the recipe's method is "zeroth-order".

Every node holds the whole model, and measures; it answers no inference meanwhile.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import trio
from torch import Tensor

from mycel.node.compute import DeviceCompute
from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.group import Group
from mycel.node.rounds.group_port import GroupPlace, GroupPorts, Standing
from mycel.node.rounds.round_streams import RoundDoor
from mycel.node.training.checkpoints import is_due
from mycel.node.training.ground import Ground
from mycel.node.training.metrics import MetricsFile, StepMetrics
from mycel.node.training.state_service import StateService
from mycel.node.zeroth.catching_up import SNAPSHOT, CatchUp, StateHolder, archive_of
from mycel.node.zeroth.files import RunFiles
from mycel.node.zeroth.measuring import Batches, Measurer, Sending
from mycel.node.zeroth.models import TunedModel, load_tuned
from mycel.node.zeroth.peer import Applied, NothingToReduce, ZerothPeer
from mycel.protocols.codec import round_codec
from mycel.protocols.errors import ConfigError, PeerError, RouteUnavailable
from mycel.protocols.messages import PeerAddress
from mycel.protocols.rounds import Certificates, GetCertificates
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.pipeline import Load
from mycel.swarm.training.progress import StageProgress
from mycel.swarm.training.recipe import Recipe, canonical
from mycel.swarm.watch import REFRESH_S, SwarmWatch
from mycel.swarm.zeroth.course import Course
from mycel.swarm.zeroth.defence import Measured
from mycel.swarm.zeroth.lattice import add_updates, state_hash
from mycel.swarm.zeroth.options import ZerothOptions, make_rule
from mycel.swarm.zeroth.run_log import LogHead
from mycel.swarm.zeroth.scalars import Batch, start
from mycel.swarm.zeroth.seeds import batch_of

__all__ = ["ZerothLife", "batches_of", "make_zeroth_life", "zeroth_terms"]

_SCOPE = "run"
# Positions in the endless order of samples.
_SPAN = 1 << 40
_HURRY_FOR_S, _HURRY_S = 60.0, 1.0
_SAY_EVERY_S = 10.0
# Of so many elements and updates a machine's speed is measured.
_PROBE_ELEMENTS, _PROBE_UPDATES = 1 << 20, 8
_LIE = 20.0


@dataclass(eq=False)
class ZerothLife:
    """Made by `make_zeroth_life`; `run` until cancelled."""

    peer: ZerothPeer
    blobs: BlobExchange
    watch: SwarmWatch
    ground: Ground

    @property
    def ready(self) -> trio.Event:
        return self.peer.ready

    async def run(self, tasks: trio.Nursery) -> None:
        """Measure until cancelled."""
        await self.ground.workshop.choose(0)
        tasks.start_soon(self._meet)
        await tasks.start(self.blobs.run)
        await self.peer.run()

    async def leave(self, within_s: float) -> None:
        """Have the others go on without this peer."""
        with trio.move_on_after(within_s):
            await self.peer.group.leave()

    async def _meet(self) -> None:
        """Whoever is in the directory may be of the group."""
        calm_s, me = trio.current_time() + _HURRY_FOR_S, self.peer.catch_up.transport.peer_id
        while True:
            try:
                for peer in (await self.watch.view(fresh=True)).peers.values():
                    if peer.peer != me:
                        self.peer.group.meet(PeerAddress(peer.peer, peer.addresses))
            except PeerError:
                pass  # the next look tells
            await trio.sleep(REFRESH_S if trio.current_time() > calm_s else _HURRY_S)


def zeroth_terms(recipe: Recipe, n_elements: int) -> GroupTerms:
    """What a recipe says of rounds, for scalars: nobody reduces anything."""
    part = recipe.round
    return GroupTerms(
        n_elements,
        aggregators=0,
        open=part.open,
        min_members=part.peers,
        contributors=part.contributors,
        absences=part.absences,
        audits=0,
        patience_s=part.patience_s,
        longest_grace_s=part.patience_s / 2,
    )


def batches_of(load: Load, n_sequences: int) -> Batches:
    """The text of a sample, from the run's endless order: `n_sequences` in a row from where the seed says."""
    return partial(_batch, load, n_sequences)


async def _batch(load: Load, n_sequences: int, seed: bytes) -> Batch:
    tokens_BT1: Tensor = await load(batch_of(seed, _SPAN, 1)[0], n_sequences)
    return Batch(tokens_BT1[:, :-1], tokens_BT1[:, 1:])


async def make_zeroth_life(ground: Ground) -> ZerothLife:
    """Everything that a node needs. Raises ConfigError for a model that cannot be tuned so."""
    recipe, plan, station, workshop = ground.recipe, ground.plan, ground.station, ground.workshop
    options, network, event = recipe.method, station.network, station.event
    assert isinstance(options, ZerothOptions)
    first, last = plan.spans[0]
    await workshop.fetch(first, last)
    compute, disk = station.compute, DeviceCompute("disk")
    tuned = (await compute.run(partial(load_tuned, workshop.directory, options))).value
    theta_P = (await compute.run(partial(start, tuned.tunable))).value
    rule = make_rule(options, plan.run, state_hash(theta_P), theta_P.size)
    course = Course(rule, plan.run, theta_P)
    founder, terms = station.model.manifest.founder, zeroth_terms(recipe, theta_P.size)
    folder = ground.metrics.parent
    files = RunFiles(folder / "zeroth", LogHead(plan.run, _SCOPE, founder, rule.pack(), terms.open, canonical(recipe)))
    await disk.run(partial(files.open, course))
    blobs = BlobExchange(network.transport, event=event)
    ports = GroupPorts(RoundDoor(network.transport), blobs, network.identity, compute, disk, event)
    place = GroupPlace(plan.run, _SCOPE, terms, founder)
    group = Group(place, ports, NothingToReduce(), folder / "group", Standing(course.digest(), course.number))
    states = StateService(
        network.transport,
        plan.run,
        SNAPSHOT,
        StateHolder(course),
        compute,
        event,
        max_held=8,
        hashing=DeviceCompute("hashing"),
        archive=archive_of(course, files, disk),
    )
    measurer = None
    if ground.load is not None:
        batches = batches_of(ground.load, plan.n_sequences)
        me = network.transport.peer_id
        measurer = Measurer(me, course, tuned.tunable, batches, compute, event, options.audits)
        measurer.sending = _sending(ground) or measurer.sending
    else:
        ground.say("this node has not the text: it signs, and measures nothing of its own")
    speeds = partial(_speeds, blobs, place, disk)
    catch_up = CatchUp(network.transport, group, course, files, compute, disk, event, speeds, theta_P.copy())
    teller = ZerothTeller(ground, group)
    checkpoints = Checkpoints(ground, tuned, files)
    peer = ZerothPeer(
        group,
        course,
        measurer,
        catch_up,
        states,
        files,
        compute,
        disk,
        event,
        plan.n_steps,
        teller.applied,
        checkpoints.after_round,
    )
    return ZerothLife(peer, blobs, ground.placing.watch, ground)


def _sending(ground: Ground) -> Sending | None:
    """What a node sends that lies on purpose. Raises ConfigError for a lie that there is not."""
    if not ground.config.liar:
        return None
    if ground.config.liar != "sign-flip":
        raise ConfigError(f"liars about scalars play sign-flip, not {ground.config.liar}")
    ground.say("this node lies on purpose: sign-flip")
    return lambda found: Measured(-_LIE * found.g, found.loss_plus, found.loss_minus).code


async def _speeds(
    blobs: BlobExchange, place: GroupPlace, disk: DeviceCompute, peers: Sequence[str]
) -> tuple[float, float]:
    """Bytes a second from the first of these peers that answers, and seconds per direction and parameter here.

    The certificates from the beginning are what is asked for, less what a question for nothing takes.
    """
    store, bytes_per_s = blobs.store(*place.key), 1e6
    for peer in peers:
        try:
            began_s = trio.current_time()
            await store.ask(peer, GetCertificates(*place.key, 1 << 40))
            empty_s = trio.current_time() - began_s
            answer = await store.ask(peer, GetCertificates(*place.key, 1))
        except (PeerError, RouteUnavailable):
            continue
        took_s = max(trio.current_time() - began_s - 2 * empty_s, 1e-4)
        if isinstance(answer, Certificates):
            n_bytes = sum(len(part) for part in round_codec.encode(answer))
            bytes_per_s = max(n_bytes / took_s, 1.0)
            break
    return bytes_per_s, (await disk.run(_s_per_element)).value


def _s_per_element() -> float:
    """Seconds that this machine takes for an element of a direction."""
    theta_P = np.zeros(_PROBE_ELEMENTS, np.int64)
    updates = [(number.to_bytes(32, "little"), 1) for number in range(_PROBE_UPDATES)]
    began_s = time.perf_counter()
    add_updates(theta_P, updates)
    return (time.perf_counter() - began_s) / (_PROBE_ELEMENTS * _PROBE_UPDATES)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Writes the tuned model where the recipe wants one."""

    ground: Ground
    tuned: TunedModel
    files: RunFiles

    async def after_round(self, course: Course) -> None:
        """Between two rounds: nothing else uses the model then. Raises ConfigError."""
        plan, version, place = self.ground.plan, course.version, self.ground.config.checkpoints
        if place is None or not is_due(self.ground.recipe.checkpoint, version, plan.n_steps):
            return
        folder = place / f"step-{version:08d}"
        notes = {"run": plan.run.hex(), "round": str(course.number), "state": course.digest().hex()}
        theta_P = course.state.theta_P.copy()
        await self.ground.station.compute.run(partial(self.tuned.write, theta_P, folder, notes))
        self.ground.station.event("checkpoint.written", step=version, path=str(folder))


@dataclass(eq=False)
class ZerothTeller:
    """A node's account of a run: a line in its metrics file after each round, and now and then a sentence."""

    ground: Ground
    group: Group
    file: MetricsFile = field(init=False)
    _tokens: int = field(default=-1, init=False)
    _said_at_s: float = field(default=-_SAY_EVERY_S, init=False)
    _members: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        self.file = MetricsFile(self.ground.metrics)

    def applied(self, done: Applied) -> None:
        """A round has brought updates."""
        plan, options = self.ground.plan, self.ground.recipe.method
        assert isinstance(options, ZerothOptions)
        tokens = done.step.n_updates * plan.n_sequences * plan.n_tokens
        # Of what came before this node it knows no better than that it was like now.
        self._tokens = done.version * tokens if self._tokens < 0 else self._tokens + tokens
        members = frozenset(self.group.members)
        before = self._members or members
        self._members = members
        self.file.append(
            StepMetrics(
                step=done.version,
                tokens=self._tokens,
                loss=done.loss,
                tokens_per_s=tokens / done.seconds if done.seconds > 0 else None,
                seconds=done.seconds,
                learning_rate=options.rate,
                peers=(done.members,),
                sent_bytes=self.group.said_bytes,
                unix=time.time(),
                stages=(StageProgress(training=done.members, version=done.version),),
                joined=tuple(sorted(members - before)),
                lost=tuple(sorted(before - members)),
                params={0: done.digest.hex()},
            )
        )
        now = trio.current_time()
        if now - self._said_at_s >= _SAY_EVERY_S or done.version == plan.n_steps:
            self._said_at_s = now
            loss = "" if done.loss is None else f"  loss {done.loss:.3f}"
            part = f"{done.step.n_updates} updates of {done.contributors} peers, {done.members} members"
            self.ground.say(f"step {done.version}/{plan.n_steps}{loss}  {part}  in {done.seconds:.1f} s")
