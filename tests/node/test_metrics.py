"""Metrics on disk: written through crashes and restarts, merged from several nodes, drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mycel.node.training.metrics import (
    MetricsFile,
    MetricsTail,
    StepMetrics,
    StepReporter,
    disagreements,
    merge,
    metrics_path,
    read_each,
    read_metrics,
    write_metrics,
)
from mycel.node.training.plots import plot_loss, plot_losses, smoothed
from mycel.protocols.errors import AccessDenied, ConfigError
from mycel.protocols.training import Reduced, StageStatus
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.progress import StageProgress


def record(step: int, **more: object) -> StepMetrics:
    return StepMetrics(step, step * 100, **{"loss": 9.0 - step, "unix": float(step), **more})  # type: ignore[arg-type]


def steps(path: Path) -> list[int]:
    return [found.step for found in read_metrics([path])]


# ------------------------------------------------------------------------------------------------------------- writing


def test_a_line_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    path = metrics_path(tmp_path, bytes(range(32)))
    file = MetricsFile(path)
    stages = (StageProgress(training=2, queue_s=0.5, sequences_per_s=30.0, version=1),)
    written = record(1, peers=(2,), stages=stages, joined=("x",), params={0: "ab"}, grad_norm=0.5)
    file.append(written)
    assert path == tmp_path / "runs" / "0001020304050607" / "metrics.jsonl"
    assert read_metrics([path]) == [written]
    plain = json.loads(path.read_text("utf-8"))
    assert plain["peers"] == [2]
    assert plain["stages"][0]["queue_s"] == 0.5
    assert {"step", "tokens", "loss", "tokens_per_s", "seconds", "learning_rate", "grad_norm", "sent_bytes", "unix"} < {
        *plain
    }


def test_a_restart_goes_on_behind_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (1, 2, 3):
        first.append(record(step))
    again = MetricsFile(path)
    assert again.last_step == 3
    again.append(record(4))
    assert steps(path) == [1, 2, 3, 4]


def test_who_goes_back_to_a_checkpoint_has_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.append(record(step, unix=1.0))
    for step in (4, 5):
        file.append(record(step, unix=2.0))
    assert [(found.step, found.unix) for found in read_metrics([path])] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"], "a temporary file was left"


@pytest.mark.parametrize("torn", [b'{"step":4,"tok', b'{"step":4,"tokens":400}', b"\xff\xfe"])
def test_a_torn_last_line_is_no_step_and_spoils_no_other(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [record(1), record(2), record(3)])
    with path.open("ab") as file:
        file.write(torn)
    assert steps(path) == [1, 2, 3]
    again = MetricsFile(path)
    again.append(record(4))
    assert steps(path) == [1, 2, 3, 4]
    assert path.read_bytes().count(b"\n") == 4


def test_a_damaged_line_is_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [record(1), record(2), record(3)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'\x00\x00{"step":"two"}\n' + lines[2])
    assert steps(path) == [1, 3]


def test_what_cannot_be_written_or_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(AccessDenied, match="cannot write"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")
    with pytest.raises(AccessDenied, match="cannot read"):
        read_metrics([tmp_path])
    assert read_metrics([tmp_path / "none"]) == []


# ------------------------------------------------------------------------------------------------------------- merging


def test_several_nodes_files_become_one_account(tmp_path: Path) -> None:
    early = [record(step, unix=step + 0.1, params={0: f"a{step}"}) for step in (1, 2, 4)]
    late = [record(step, unix=step + 0.2, params={1: f"b{step}"}, lost=("x",) * (step == 2)) for step in (2, 3, 4)]
    write_metrics(tmp_path / "one", early)
    write_metrics(tmp_path / "two", late)
    merged = read_metrics([tmp_path / "two", tmp_path / "one"])
    assert [(found.step, found.unix) for found in merged] == [(1, 1.1), (2, 2.1), (3, 3.2), (4, 4.1)]
    assert merged[1].params == {0: "a2", 1: "b2"}
    assert merged[1].lost == ("x",)
    assert len(read_each([tmp_path / "two", tmp_path / "one"])) == 6


def test_who_knows_the_loss_is_believed_before_who_was_first() -> None:
    (merged,) = merge([record(1, loss=None, unix=1.0), record(1, loss=3.0, unix=2.0), record(1, loss=4.0, unix=3.0)])
    assert merged.loss == 3.0


def test_different_parameters_are_found() -> None:
    same = [record(1, params={0: "aa"}), record(1, params={0: "aa"}), record(1, params={1: "bb"})]
    assert disagreements(same) == []
    (sentence,) = disagreements([*same, record(1, params={1: "cc"})])
    assert sentence == "stage 1 after step 1: bb and cc"


# -------------------------------------------------------------------------------------------------------------- tailing


def test_a_tail_gives_each_step_once_and_never_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.look() == []
    assert tail.latest is None
    file = MetricsFile(path)
    file.append(record(1))
    file.append(record(2))
    assert [found.step for found in tail.look()] == [1, 2]
    assert tail.look() == []
    line = path.read_bytes().splitlines(keepends=True)[0].replace(b'"step":1', b'"step":3')
    with path.open("ab") as raw:
        raw.write(line[:20])
    assert tail.look() == []
    with path.open("ab") as raw:
        raw.write(line[20:])
    assert [found.step for found in tail.look()] == [3]
    assert tail.latest is not None
    assert tail.latest.step == 3


def test_a_tail_follows_a_file_that_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file, tail = MetricsFile(path), MetricsTail(path)
    for step in range(1, 6):
        file.append(record(step))
    tail.look()
    file.append(record(3, unix=77.0))
    assert [found.step for found in tail.look()] == [1, 2, 3]
    assert tail.latest == record(3, unix=77.0)


# ------------------------------------------------------------------------------------------------------------ reporting

PLAN = RunPlan(bytes(32), ((0, 1), (1, 2)), n_steps=3, n_microbatches=1, n_sequences=2, n_tokens=4)


def test_a_node_writes_down_what_the_table_says_and_its_own_hash(tmp_path: Path) -> None:
    members, said, now = Members("a", PLAN.run), [], [0.0]

    def hear(version: int) -> None:
        reduced = (Reduced(version - 1, bytes(32), 2.0, 16.0),)
        for peer, stage in (("a", 0), ("b", 1)):
            params = bytes([version]) * 32
            status = StageStatus(PLAN.run, version, stage, "training", version, params, reduced=reduced)
            members.hear(peer, status, now[0])

    path = tmp_path / "metrics.jsonl"
    reporter = StepReporter(
        PLAN, members, MetricsFile(path), lambda version: 0.1 * version, said.append, lambda: now[0], lambda: 5e8
    )
    for step in (1, 2, 3):
        now[0] += 4.0
        hear(step)
        reporter.made(step)
    first, second, third = read_metrics([path])
    assert (first.loss, first.grad_norm, first.learning_rate, first.tokens) == (2.0, 2.0, 0.0, 8)
    assert (second.seconds, second.tokens_per_s) == (4.0, 2.0)
    assert third.peers == (1, 1)
    assert third.params == {0: "03" * 32}, "of its own stage alone"
    assert third.unix == 5e8
    assert [line.split("  ")[0] for line in said] == ["step 1/3", "step 3/3"], "not after every step"


def test_a_status_of_another_step_gives_no_hash(tmp_path: Path) -> None:
    members = Members("a", PLAN.run)
    members.hear("a", StageStatus(PLAN.run, 1, 0, "training", 1, bytes(32)), 0.0)
    reporter = StepReporter(PLAN, members, MetricsFile(tmp_path / "m"), lambda _: 0.0, clock=lambda: 0.0)
    assert reporter.made(2).params == {}
    assert reporter.made(1).params == {0: "00" * 32}


# ------------------------------------------------------------------------------------------------------------- pictures


def run_of(n_steps: int) -> list[StepMetrics]:
    return [
        record(step, loss=9.0 / step, tokens_per_s=50.0, lost=("x",) * (step == 5), joined=("y",) * (step == 8))
        for step in range(1, n_steps + 1)
    ]


@pytest.mark.parametrize("n_steps", [1, 40])
def test_a_run_is_drawn_twice(tmp_path: Path, n_steps: int) -> None:
    png, svg = plot_loss(run_of(n_steps), tmp_path / "new" / "loss", "a $run$ of 40_0 steps")
    assert png == tmp_path / "new" / "loss.png"
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")  # noqa: S314  our own file
    assert "matplotlib.pyplot" not in sys.modules, "no state for the whole process"


def test_several_runs_in_one_picture(tmp_path: Path) -> None:
    pictures = plot_losses({"one": run_of(20), "two": run_of(30)}, tmp_path / "losses.of.two", "both")
    assert [path.name for path in pictures] == ["losses.of.two.png", "losses.of.two.svg"]
    assert all(path.stat().st_size > 10_000 for path in pictures)


def test_there_must_be_something_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="topics: no step with a loss"):
        plot_loss([record(1, loss=None)], tmp_path / "loss", "topics")
    with pytest.raises(ConfigError, match="no run to draw"):
        plot_losses({}, tmp_path / "loss", "topics")
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(AccessDenied, match="cannot write"):
        plot_loss(run_of(3), tmp_path / "file" / "loss", "topics")


def test_without_matplotlib_the_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'mycel\[train\]'"):
        plot_loss(run_of(3), tmp_path / "loss", "topics")


def test_the_smoothed_line_does_not_lag() -> None:
    assert smoothed([4.0, 2.0, 2.0], 0.5) == pytest.approx([22 / 7, 2.5, 16 / 7])
    straight = [float(value) for value in range(101)]
    assert smoothed(straight, 0.8)[50] == pytest.approx(50.0)
    assert smoothed([], 0.5) == []
