"""The chaotic side of `mycel up` without processes: what it is told, whom it hits when, and how it ends."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
import trio
from click.testing import CliRunner
from trio.testing import MockClock

from mycel.cli.chaos import ChaosRun
from mycel.cli.chaos_options import Chaos, chaos_of, chaos_options
from mycel.cli.exits import FAILURE, INTERRUPTED, NodeFailedError
from mycel.cli.processes import Ready
from mycel.cli.up import LocalPlan
from mycel.cli.verdict import Answer
from mycel.protocols.errors import ConfigError
from mycel.swarm.chaos import Fault, Rates, Schedule, Shape

SPANS = ((0, 4), (4, 8), (0, 4), (4, 8))


def typed(*arguments: str) -> Chaos:
    """What the options make of a command line."""
    made: list[Chaos] = []

    @click.command()
    @chaos_options
    def command(**options: object) -> None:
        made.append(chaos_of(options))

    result = CliRunner().invoke(command, arguments, catch_exceptions=True)
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return made[0]


def test_the_options_of_the_issue() -> None:
    line = "--rtt 80ms --jitter 20ms --loss 1% --bandwidth 100mbit --kill 1/20s --seed 7 --for 2m"
    shape = Shape(rtt_s=0.08, jitter_s=0.02, loss=0.01, bytes_per_s=12.5e6, seed=7)
    assert typed(*line.split()) == Chaos(shape, Rates(kill=0.05), 7, 120.0, None, last_too=False)


def test_only_what_has_an_end_or_faults_is_driven() -> None:
    assert not typed().is_driven
    assert not typed("--rtt", "80ms").is_driven
    assert all(typed(*line.split()).is_driven for line in ("--for 1s", "--load 1", "--leave 1/m"))


def test_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="no time"):
        typed("--for", "0s")


# --------------------------------------------------------------------------------------------------------------- faults


@dataclass(eq=False)
class FakeNode:
    """As much of a LocalNode as faults need; `done` is what was done to it, and when."""

    name: str
    span: tuple[int, int]
    done: list[tuple[str, float]] = field(default_factory=list)
    expected: bool = False

    @property
    def serving(self) -> Ready:
        return Ready(f"peer of {self.name}", (), f"invite of {self.name}", "model", *self.span, 8)

    @property
    def blocks(self) -> str:
        return "{}:{}".format(*self.span)

    def note(self, what: str) -> None:
        self.done.append((what, round(trio.current_time(), 6)))

    @property
    def process(self) -> FakeNode:
        return self

    async def wait(self) -> int:
        await trio.sleep_forever()
        raise AssertionError

    def kill(self) -> None:
        self.note("kill")

    def freeze(self) -> None:
        self.note("freeze")

    def thaw(self) -> None:
        self.note("thaw")

    async def leave(self) -> bool:
        self.note("leave")
        await trio.sleep(2.0)
        return True


@dataclass
class FakeNetwork:
    """Starting takes `start_s`; the first `n_failures` starts fail."""

    start_s: float = 5.0
    n_failures: int = 0

    async def restart(self, node: FakeNode, *arguments: str) -> None:
        node.note("start with " + arguments[1])
        await trio.sleep(self.start_s)
        if self.n_failures:
            self.n_failures -= 1
            raise NodeFailedError("nobody answers", FAILURE)
        node.note("back")


def hit(*faults: Fault, network: FakeNetwork | None = None, until_s: float = 60.0, last_too: bool = False) -> ChaosRun:
    """Carry out faults on four nodes; time begins at 0."""
    chaos = Chaos(Shape(), Rates(kill=1.0), 1, until_s, None, last_too)
    run = ChaosRun(LocalPlan(Path("model"), SPANS, ("--shape", "x")), chaos, Path(), Schedule(faults))
    run._nodes = [FakeNode(f"node-{index}", span) for index, span in enumerate(SPANS)]  # type: ignore[assignment]

    async def main() -> None:
        with trio.move_on_after(until_s):
            await run._inject_all(network or FakeNetwork())  # type: ignore[arg-type]

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return run


def done(run: ChaosRun) -> list[list[tuple[str, float]]]:
    return [node.done for node in run._nodes]  # type: ignore[attr-defined]


def test_a_killed_node_is_started_again_through_one_that_is_there() -> None:
    run = hit(Fault(3.0, "kill", 3, 4.0))
    assert done(run)[3] == [("kill", 3.0), ("start with invite of node-2", 7.0), ("back", 12.0)]
    assert [(fault.at_s, fault.kind, fault.peer) for fault in run.injected] == [(3.0, "kill", "peer of node-3")]
    assert run.crashes == []


def test_a_node_that_leaves_is_started_again_once_it_has_left() -> None:
    assert done(hit(Fault(1.0, "leave", 0, 4.0)))[0] == [
        ("leave", 1.0),
        ("start with invite of node-3", 7.0),
        ("back", 12.0),
    ]


def test_a_fault_waits_for_the_other_holder_of_its_blocks() -> None:
    run = hit(Fault(1.0, "kill", 0, 4.0), Fault(2.0, "kill", 2, 4.0), Fault(3.0, "kill", 1, 4.0))
    assert done(run)[0] == [("kill", 1.0), ("start with invite of node-3", 5.0), ("back", 10.0)]
    assert done(run)[2][0] == ("kill", 10.0)
    assert done(run)[1][0] == ("kill", 3.0), "of other blocks: it need not wait"
    spared_none = hit(Fault(1.0, "kill", 0, 4.0), Fault(2.0, "kill", 2, 4.0), last_too=True)
    assert done(spared_none)[2][0] == ("kill", 2.0)


def test_a_start_that_fails_is_repeated_a_few_times() -> None:
    run = hit(Fault(1.0, "kill", 3, 4.0), network=FakeNetwork(n_failures=2))
    assert [what for what, _ in done(run)[3]].count("start with invite of node-2") == 3
    assert done(run)[3][-1][0] == "back"
    assert run.crashes == []
    given_up = hit(Fault(1.0, "kill", 3, 4.0), network=FakeNetwork(n_failures=99))
    assert given_up.crashes == ["node-3 could not be started again in 5 attempts"]


def test_a_stopped_node_goes_on_even_if_the_run_ends_before() -> None:
    assert done(hit(Fault(1.0, "stop", 0, 4.0)))[0] == [("freeze", 1.0), ("thaw", 5.0)]
    assert done(hit(Fault(1.0, "stop", 0, 4.0), until_s=2.0))[0] == [("freeze", 1.0), ("thaw", 2.0)]


# -------------------------------------------------------------------------------------------------------------- the end


def concluded(code: int, *answers: Answer, crashes: tuple[str, ...] = ()) -> int:
    chaos = Chaos(Shape(), Rates(), 1, 10.0, None, last_too=False)
    run = ChaosRun(LocalPlan(Path("model"), SPANS), chaos, Path(), Schedule(()), list(answers), crashes=list(crashes))
    return run.conclude(code, as_object=True)


def answer(*tokens: int, finish: str = "length") -> Answer:
    return Answer(1, "a prompt", (1, 2), 0.0, list(tokens), [0.1] * len(tokens), finish=finish)


def test_the_exit_code_is_0_only_if_all_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert concluded(0, answer(1, 2)) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert concluded(0, answer(1, 2), answer(1, 3)) == FAILURE
    assert json.loads(capsys.readouterr().out)["reason"] == "token 2 of a prompt is 3, not 2"
    assert concluded(0) == FAILURE
    assert concluded(0, answer(1, 2), crashes=("node-1 ended by itself",)) == FAILURE


def test_an_interruption_keeps_its_code_unless_something_was_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert concluded(INTERRUPTED) == INTERRUPTED
    assert capsys.readouterr().out == "", "there is nothing to judge"
    assert concluded(INTERRUPTED, answer(1, 2), answer(1, finish="")) == INTERRUPTED
    assert json.loads(capsys.readouterr().out)["interrupted"] is True
    assert concluded(INTERRUPTED, answer(1, finish="")) == INTERRUPTED
    assert concluded(INTERRUPTED, answer(9, finish="")) == FAILURE
