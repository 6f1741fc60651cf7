"""A run's figures on disk, one JSON object for each step that was made: written by every node, merged by who reads.

A node's file follows its parameters: when they go back to a checkpoint, so does the file. A hole (a step that a node
was not there for) is filled from another node's file.

Ring: shell (files, clocks).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio
from msgspec import Struct

from mycel.node.events import Say
from mycel.protocols.errors import AccessDenied, ConfigError
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.progress import (
    ProgressTracker,
    StageProgress,
    grad_norm,
    mean_loss,
    progress_line,
)

__all__ = [
    "MetricsFile",
    "MetricsTail",
    "StepMetrics",
    "StepReporter",
    "disagreements",
    "merge",
    "metrics_path",
    "read_each",
    "read_metrics",
    "write_metrics",
]

FILE_NAME = "metrics.jsonl"
# A line longer than this is not one of ours.
_MAX_LINE_BYTES = 1 << 20
# How often a node in the foreground tells how far the run is.
_SAY_EVERY_S = 10.0


class StepMetrics(Struct, frozen=True):
    """One step: `step` counts from 1, `tokens` are those of all steps up to it, `loss` is per target token.

    `seconds` is what it took. `peers` computed in each stage, `stages` says more of them. `sent_bytes` is what all
    peers have sent in all, `step_bytes` a mean of the last steps. `joined` and `lost` are peers since the line before.
    `params` is the SHA-256 (hex) of the parameters after the step by stage, of the stages that the writer knows itself.
    """

    step: int
    tokens: int
    loss: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    peers: tuple[int, ...] = ()
    sent_bytes: int = 0
    step_bytes: float | None = None
    unix: float = 0.0
    stages: tuple[StageProgress, ...] = ()
    joined: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    params: dict[int, str] = {}


def metrics_path(data_dir: Path, run: bytes) -> Path:
    """Where a node with this data directory writes the metrics of this run."""
    return data_dir / "runs" / run.hex()[:16] / FILE_NAME


# ------------------------------------------------------------------------------------------------------------- writing


class MetricsFile:
    """Appends steps, each a whole line in the file when `append` returns.

    The steps of the file rise: a step that is there already, and what came after it, makes room for the new one. What a
    crash tore off at the end is removed. Between two steps the file is closed.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _whole_lines(path)
            with path.open("ab") as file:
                file.truncate(len(kept))
        except OSError as error:
            raise AccessDenied(f"cannot write {path}: {error.strerror}") from None
        self.last_step = max((record.step for record in _decoded(kept.splitlines())), default=0)

    def append(self, record: StepMetrics) -> None:
        """Raises ConfigError if the disk does not take it."""
        try:
            if record.step <= self.last_step:
                # Another file takes the place of this one, so that a reader sees that something has gone.
                kept = _decoded(_whole_lines(self.path).splitlines())
                _replace(self.path, [earlier for earlier in kept if earlier.step < record.step])
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(record) + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from None
        self.last_step = record.step


def write_metrics(path: Path, records: Iterable[StepMetrics]) -> None:
    """A file of these, whole or not at all. Raises ConfigError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, records)
    except OSError as error:
        raise AccessDenied(f"cannot write {path}: {error.strerror}") from None


def _replace(path: Path, records: Iterable[StepMetrics]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- reading


def read_metrics(paths: Iterable[Path]) -> list[StepMetrics]:
    """The steps of all these files that are there, in order, each once. Raises ConfigError for one it cannot read."""
    return merge(read_each(paths))


def read_each(paths: Iterable[Path]) -> list[StepMetrics]:
    """All that stands in these files, as it was written. Raises ConfigError for one it cannot read."""
    records: list[StepMetrics] = []
    for path in paths:
        try:
            records += _decoded(_whole_lines(path).splitlines())
        except OSError as error:
            raise AccessDenied(f"cannot read {path}: {error.strerror}") from None
    return records


def merge(records: Iterable[StepMetrics]) -> list[StepMetrics]:
    """One record a step, in order: that of who wrote it first and knew the loss, with what all knew of peers."""
    by_step: dict[int, list[StepMetrics]] = {}
    for record in records:
        by_step.setdefault(record.step, []).append(record)
    return [_merged(by_step[step]) for step in sorted(by_step)]


def disagreements(records: Iterable[StepMetrics]) -> list[str]:
    """A sentence for each stage and step after which two nodes had other parameters. `records`: as nodes wrote them."""
    seen: dict[tuple[int, int], str] = {}
    wrong: dict[tuple[int, int], str] = {}
    for record in records:
        for stage, params in record.params.items():
            first = seen.setdefault((record.step, stage), params)
            if first != params:
                wrong[record.step, stage] = f"stage {stage} after step {record.step}: {first[:8]} and {params[:8]}"
    return [wrong[key] for key in sorted(wrong)]


def _merged(same: list[StepMetrics]) -> StepMetrics:
    first = min(same, key=lambda record: (record.loss is None, record.unix))
    params: dict[int, str] = {}
    for record in same:
        params = {**record.params, **params}
    return msgspec.structs.replace(
        first,
        joined=tuple(sorted({peer for record in same for peer in record.joined})),
        lost=tuple(sorted({peer for record in same for peer in record.lost})),
        params=dict(sorted(params.items())),
    )


def _whole_lines(path: Path) -> bytes:
    """The file up to its last line end; nothing if there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


_decoder = msgspec.json.Decoder(StepMetrics)


def _decoded(lines: Iterable[bytes]) -> list[StepMetrics]:
    """What is a record; a line that a crash has damaged is a hole."""
    records = []
    for line in lines:
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            records.append(_decoder.decode(line))
    return records


class MetricsTail:
    """Reads what is new in a growing file, and begins again when another has taken its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.latest: StepMetrics | None = None
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def look(self) -> list[StepMetrics]:
        """The records since the last look (all that are left, if some have gone); `latest` is then the last of all."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = status.st_dev, status.st_ino
                if identity != self._identity or status.st_size < self._offset:
                    self._identity, self._offset, self.latest = identity, 0, None
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []  # not there yet, or being replaced: the next look tells
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = _decoded(line for line in whole.splitlines() if len(line) <= _MAX_LINE_BYTES)
        if records:
            self.latest = records[-1]
        return records


# ----------------------------------------------------------------------------------------------------------- reporting


@dataclass(eq=False, slots=True)
class StepReporter:
    """A node's account of the run: a line in its metrics file after each step, and now and then a sentence.

    `learning_rate` gives the rate of step `version`. Called by the stepper after each step that this node made, once
    its own status says so, and before it says anything of the next.
    """

    plan: RunPlan
    members: Members
    file: MetricsFile
    learning_rate: Callable[[int], float]
    say: Say = lambda _: None
    clock: Callable[[], float] = trio.current_time
    unix_clock: Callable[[], float] = time.time
    tracker: ProgressTracker = field(init=False)
    _said_at_s: float = field(default=-_SAY_EVERY_S, init=False)

    def __post_init__(self) -> None:
        self.tracker = ProgressTracker(self.plan)

    def made(self, step: int) -> StepMetrics:
        """This node's parameters have made `step` steps: write it down, and say it if it is time."""
        now, version = self.clock(), step - 1
        self.tracker.begin(version)
        progress = self.tracker.observe(self.members, now)
        changes = self.tracker.take_changes()
        record = StepMetrics(
            step=step,
            tokens=step * self.plan.step_tokens,
            loss=mean_loss(self.members, self.plan, version),
            tokens_per_s=progress.tokens_per_s,
            seconds=progress.seconds,
            learning_rate=self.learning_rate(version),
            grad_norm=grad_norm(self.members, self.plan, version),
            peers=tuple(stage.peers for stage in progress.stages),
            sent_bytes=progress.sent_bytes,
            step_bytes=progress.step_bytes,
            unix=self.unix_clock(),
            stages=progress.stages,
            joined=changes.joined,
            lost=changes.lost,
            params=self._params(step),
        )
        self.file.append(record)
        if now - self._said_at_s >= _SAY_EVERY_S or step == self.plan.n_steps:
            self.say(progress_line(progress))
            self._said_at_s = now
        return record

    def _params(self, step: int) -> dict[int, str]:
        me = self.members.get(self.members.me)
        if me is None or me.version != step or not me.status.params:
            return {}
        return {me.stage: me.status.params.hex()}
