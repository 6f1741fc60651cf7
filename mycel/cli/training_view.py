"""Watching a local network train: what its nodes write after each step, shown as lines, or on a terminal as a table.

It reads the nodes' metrics files and asks no peer, so it sees what a node saw, and goes on when any node ends.

Ring: shell.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click
import trio

from mycel.cli.answers import columns
from mycel.cli.exits import CommandFailedError, printable
from mycel.node.training.metrics import MetricsTail, StepMetrics, metrics_path
from mycel.swarm.training.progress import Progress, progress_line, show_duration, stage_rows
from mycel.swarm.training.recipe import Recipe, n_steps

if TYPE_CHECKING:
    from mycel.cli.processes import LocalNetwork, LocalNode

# Without a terminal, a line at most so often.
_LINE_EVERY_S = 5.0
# A step that takes longer than this is worth a word.
_QUIET_S = 20.0


@dataclass(eq=False, slots=True)
class NodesWatch:
    """The nodes of a network that trains: what they have written since this was made, and who has ended."""

    network: LocalNetwork
    recipe: Recipe
    tell: Callable[[str], None]
    n_lost: int = 0
    _began_unix: float = field(default_factory=time.time)
    _tails: dict[str, MetricsTail] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)

    def look(self) -> StepMetrics | None:
        """The last step of the node that is furthest, None before the first. Tells of nodes that have ended.

        Raises CommandFailedError when too few nodes are left to hold all stages.
        """
        self._count_nodes()
        latest = [record for node in self.network.nodes if (record := self._latest(node)) is not None]
        return max(latest, key=lambda record: (record.step, -record.unix), default=None)

    def stage_of(self, node: LocalNode) -> int | None:
        """The stage whose parameters the node has stepped last, None before its first step."""
        record = self._latest(node)
        return next(iter(record.params), None) if record is not None else None

    def step_of(self, node: LocalNode) -> int:
        """The step that this node has made last, 0 before the first."""
        return record.step if (record := self._latest(node)) is not None else 0

    def slowest(self) -> int:
        """The step that every node has made that is there."""
        there = [node for node in self.network.nodes if node.process.poll() is None]
        return min((self.step_of(node) for node in there), default=0)

    def _latest(self, node: LocalNode) -> StepMetrics | None:
        if node.ready is None or node.process.poll() is not None:
            return None
        tail = self._tails.get(node.name)
        if tail is None:
            path = metrics_path(self.network.directory / node.name, bytes.fromhex(node.ready.swarm))
            tail = self._tails[node.name] = MetricsTail(path)
        tail.look()
        # What it wrote in an earlier life says nothing about where the run is now.
        return tail.latest if tail.latest is not None and tail.latest.unix >= self._began_unix else None

    def _count_nodes(self) -> None:
        for node in self.network.nodes:
            if node.process.poll() is None or node.pid in self._ended:
                continue
            self._ended.add(node.pid)
            self.n_lost += 1
            if not node.expected:
                self.tell(f"{node.name} (pid {node.pid}) ended with exit code {node.process.returncode}; {node.log}:")
                for line in node.last_words():
                    self.tell(f"  {line}")
        left = sum(node.process.poll() is None for node in self.network.nodes)
        if left < self.recipe.stages:
            raise CommandFailedError(f"{left} nodes are left, too few for {self.recipe.stages} stages")


@dataclass(eq=False, slots=True)
class ProgressView:
    """Where a person watches: a line now and then, or a table that is drawn over itself."""

    is_terminal: bool = field(default_factory=sys.stderr.isatty)
    clock: Callable[[], float] = trio.current_time
    _n_drawn: int = 0
    _shown_step: int = -1
    _shown_at_s: float = float("-inf")
    _changed_at_s: float | None = None
    _step: int = -1

    def show(self, progress: Progress) -> None:
        """The run as it is now; called often."""
        now = self.clock()
        if self._changed_at_s is None or progress.step != self._step:
            self._step, self._changed_at_s = progress.step, now
        quiet_s = now - self._changed_at_s
        line = progress_line(progress)
        if quiet_s >= _QUIET_S and not progress.is_done:
            line += f"  (no step for {show_duration(quiet_s)})"
        if self.is_terminal:
            self._draw([line, *(f"  {row}" for row in columns(stage_rows(progress)))])
            return
        is_new = progress.step != self._shown_step
        if (is_new and (progress.is_done or now - self._shown_at_s >= _LINE_EVERY_S)) or (
            quiet_s >= _QUIET_S and now - self._shown_at_s >= _QUIET_S
        ):
            self._shown_step, self._shown_at_s = progress.step, now
            click.echo(printable(line), err=True)

    def tell(self, text: str) -> None:
        """A sentence that stays."""
        self._erase()
        click.echo(printable(text), err=True)

    def close(self) -> None:
        """What is drawn stays as it is."""
        self._n_drawn = 0

    def _draw(self, lines: list[str]) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._erase()
        for line in lines:
            click.echo(printable(line)[:width], err=True)
        self._n_drawn = len(lines)

    def _erase(self) -> None:
        if self._n_drawn:
            click.echo(f"\x1b[{self._n_drawn}F\x1b[J", nl=False, err=True, color=True)  # up, and clear below
            self._n_drawn = 0


def progress_of(record: StepMetrics, recipe: Recipe) -> Progress:
    """What a node wrote down, as what it had seen."""
    left = max(0, n_steps(recipe) - record.step) * recipe.step.batch_tokens
    return Progress(
        step=record.step,
        n_steps=n_steps(recipe),
        tokens=record.tokens,
        loss=record.loss,
        tokens_per_s=record.tokens_per_s,
        eta_s=left / record.tokens_per_s if record.tokens_per_s else None,
        seconds=record.seconds,
        stages=record.stages,
        sent_bytes=record.sent_bytes,
        step_bytes=record.step_bytes,
        commits=0,
    )
