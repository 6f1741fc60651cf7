"""From the first parameters and a log to the state, checked against every hash that the log states.

Whatever the order of the updates, the number of threads or the device, the state is one: its SHA-256 is the run's
result, and whoever has the first parameters can ask whether the log's lines lead there.

Legend: P parameters.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mycel.swarm.zeroth.chain import NO_HASH, BadLine, ForgedLine, Round
from mycel.swarm.zeroth.lattice import Lattice, Reach, RunPieces, Update, add_updates, state_hash
from mycel.swarm.zeroth.log import Log

__all__ = ["State", "replay", "replay_from"]

# Seeds take more memory than their codes did, and whoever wrote the log chose how many there are between two hashes.
_MOST_WAITING = 1 << 16


class State:
    """The parameters of a run on their lattice, and how far updates have reached."""

    def __init__(self, theta_P: Lattice, reach: Reach | None = None) -> None:
        self.theta_P = np.array(theta_P, np.int64)
        self.reach = reach or Reach.of(theta_P)

    def apply(self, updates: Sequence[Update], run_pieces: RunPieces = map) -> None:
        """Raises OverflowError, and changes nothing, where the lattice could overflow."""
        reach = self.reach.after(step for _, step in updates)
        add_updates(self.theta_P, updates, run_pieces)
        self.reach = reach

    def add(self, moved_P: Lattice) -> None:
        """Adds a vector of the lattice, as an aggregate of pseudo-gradients is one: in any order with updates.

        Raises OverflowError, and changes nothing, where the lattice could overflow.
        """
        reach = self.reach.after([Reach.of(moved_P).units])
        self.theta_P += moved_P
        self.reach = reach

    def take_back(self, updates: Iterable[Update], run_pieces: RunPieces = map) -> None:
        """Undoes updates bit for bit; the reach stays what it was."""
        add_updates(self.theta_P, [(seed, -step) for seed, step in updates], run_pieces)

    def hash(self) -> bytes:
        return state_hash(self.theta_P)


def replay(theta0_P: Lattice, log: Log, run_pieces: RunPieces = map) -> State:
    """The state after the last closed round of a whole log.

    Raises BadLine if these are not the log's first parameters, ForgedLine at the first line whose state is not the one
    that the lines before it lead to.
    """
    if state_hash(theta0_P) != log.rule.theta or theta0_P.size != log.rule.n_elements:
        raise BadLine("the log begins with other parameters", 1, log.source)
    state = State(theta0_P)
    replay_from(state, log, log.rounds, run_pieces)
    return state


def replay_from(state: State, log: Log, rounds: Iterable[Round], run_pieces: RunPieces = map) -> None:
    """Rounds of the log that follow on `state`, in place. Rounds between two hashes are added in one pass."""
    waiting: list[Update] = []
    for closed in rounds:
        waiting += log.updates(closed)
        if len(waiting) > _MOST_WAITING:
            _apply(state, waiting, closed, log, run_pieces)
            waiting = []
        if closed.close.state != NO_HASH:
            _apply(state, waiting, closed, log, run_pieces)
            waiting = []
            if state.hash() != closed.close.state:
                reason = f"round {closed.number} leads to another state than it says"
                raise ForgedLine(reason, closed.line, log.source, closed.close.pack())
    if waiting:
        _apply(state, waiting, closed, log, run_pieces)


def _apply(state: State, updates: Sequence[Update], closed: Round, log: Log, run_pieces: RunPieces) -> None:
    try:
        state.apply(updates, run_pieces)
    except OverflowError as error:
        raise BadLine(str(error), closed.line, log.source) from None
