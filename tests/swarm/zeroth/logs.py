"""Logs of random updates, for the tests."""

from __future__ import annotations

import random

import numpy as np

from mycel.security.identity import Identity
from mycel.swarm.zeroth.lattice import from_float, state_hash
from mycel.swarm.zeroth.lines import parse
from mycel.swarm.zeroth.log import Log
from mycel.swarm.zeroth.replay import State
from mycel.swarm.zeroth.rule import Rule, in_rate, in_units

PEERS = tuple(Identity.from_seed(bytes([number]) * 32) for number in range(6))
N_ELEMENTS = 300
THETA0 = from_float(np.random.default_rng(0).normal(size=N_ELEMENTS).astype(np.float32))


def made_rule(**fields) -> Rule:
    values = {"clip": 8, **fields}
    return Rule(bytes(32), state_hash(THETA0), N_ELEMENTS, in_rate(1e-2), in_units(1e-3), **values).checked()


def begun(rule: Rule, n_peers: int = 4) -> tuple[Log, State]:
    """A log that peers have joined, after its round 0."""
    log, state = Log(rule), State(THETA0)
    for peer in PEERS[:n_peers]:
        log.append(log.make_join(peer))
    log.close_round(state.hash())
    return log, state


def go_on(log: Log, state: State, rng: random.Random, n_samples: int = 3) -> None:
    """A round in which all who may send random codes, in a random order."""
    numbers = [n for n, member in enumerate(log.members) if not member.banned and member.joined < log.round]
    for number in rng.sample(numbers, len(numbers)):
        log.append(log.make_entry(PEERS[number], [rng.randrange(256) for _ in range(n_samples)]))
    state.apply(log.updates())
    log.close_round(state.hash())


def made_log(n_rounds: int = 6, seed: int = 0, **fields) -> tuple[Log, State]:
    """A log with a ban after round 3, and a newcomer in round 2."""
    rng = random.Random(seed)
    log, state = begun(made_rule(**fields))
    for _ in range(n_rounds):
        if log.round == 2:
            log.append(log.make_join(PEERS[4]))
        if log.round == 4:
            said = log.code_of(1, 3, 2)
            log.append(log.make_ban(PEERS[0], 1, 3, 2, said ^ 0x40))
        go_on(log, state, rng)
    return log, state


def lines_of(data: bytes) -> list[bytes]:
    view, found = memoryview(data), []
    while view:
        _, size = parse(view)
        found.append(bytes(view[:size]))
        view = view[size:]
    return found
