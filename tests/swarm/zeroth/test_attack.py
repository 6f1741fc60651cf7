"""Liars in a real run: found by measuring again, banned in the log, and nobody else with them."""

from __future__ import annotations

import pytest

from benchmarks.zeroth import N_PEERS, Run, Task, honest, liar
from mycel.swarm.zeroth.log import Log
from mycel.swarm.zeroth.replay import replay


@pytest.mark.slow
def test_liars_are_banned_and_training_goes_on():
    task = Task.make(seed=0, steps=100)
    lying = [liar, liar] + [honest] * (N_PEERS - 2)
    bare, audited = Run(task), Run(task, clip=16)
    before = bare.loss()
    for _ in range(25):
        bare.round(lying)
        audited.round(lying)
        # More than the tenth of the benchmark: which updates are drawn differs between machines, and no luck is asked.
        assert audited.audit(0.4, range(2)) == 0
    assert sorted(audited.bans) == [0, 1]
    assert audited.loss() < before < bare.loss()
    found = Log.read(audited.log.pack())
    assert replay(audited.theta0_P, found).hash() == audited.state.hash()
    assert [member.banned for member in found.members] == [True, True] + [False] * (N_PEERS - 2)
