"""A log file and a model directory to the state that they lead to.

Ring: shell (files). Blocking.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mycel.node.zeroth.models import load_tuned
from mycel.protocols.errors import ConfigError
from mycel.swarm.training.recipe import parse_recipe
from mycel.swarm.zeroth.chain import BadLine, ForgedLine
from mycel.swarm.zeroth.course import Course, Step
from mycel.swarm.zeroth.options import ZerothOptions
from mycel.swarm.zeroth.run_log import LoggedRound, read_head, replay_rounds
from mycel.swarm.zeroth.scalars import start

__all__ = ["Replayed", "replay_file"]


@dataclass(frozen=True, slots=True)
class Replayed:
    """`state` is the SHA-256 (hex) of the state after the last round; `wrong` names the line that is not right."""

    state: str
    n_rounds: int
    n_updates: int
    n_elements: int
    run: str = ""
    wrong: str = ""


def replay_file(path: Path, model: Path) -> Replayed:
    """Raises ConfigError for a model or a recipe that cannot be used, OSError for a file that cannot be read."""
    data = path.read_bytes()
    n_updates = 0

    def count(course: Course, logged: LoggedRound, step: Step) -> None:
        nonlocal n_updates
        n_updates += step.n_updates

    try:
        head, size = read_head(data)
        options = parse_recipe(head.recipe, f"the recipe in {path}").method
        if not isinstance(options, ZerothOptions):
            raise ConfigError(f"the recipe in {path} is not of this method")
        theta_P = start(load_tuned(model, options).tunable)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            course = replay_rounds(head, memoryview(data)[size:], theta_P, on_step=count, run_pieces=pool.map)
    except (BadLine, ForgedLine) as error:
        return Replayed("", 0, 0, 0, wrong=error.reason)
    return Replayed(course.digest().hex(), course.number, n_updates, theta_P.size, head.run.hex())
