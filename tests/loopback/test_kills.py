"""A few of the hundred kills of `benchmarks/kills.py`: equal texts, the killed hop replaced and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks.kills import run_kills
from tests.loopback.generating import bounded
from tests.loopback.node_process import Nodes

pytestmark = [pytest.mark.loopback, pytest.mark.slow]


def test_a_hop_is_killed_at_a_random_token(
    llama: Path, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    with Nodes(tmp_path, llama) as nodes:
        report = bounded(partial(run_kills, nodes, 4, 2, 60.0))
    assert len(report.kills) == 4
    assert [kill for kill in report.kills if not kill.good] == []
    assert len(report.pauses_s) >= 3, "losses were noticed only when the text was complete"
    # The bound of 2 s is for a quiet machine and many runs: here it is only noted.
    record_testsuite_property("pause_ms_killed_hop", round(max(report.pauses_s) * 1e3))
