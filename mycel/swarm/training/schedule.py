"""The learning rate of each step.

Ring: pure.
"""

from __future__ import annotations

import math

from mycel.swarm.training.recipe import SchedulePart

__all__ = ["learning_rate"]


def learning_rate(schedule: SchedulePart, peak: float, version: int, n_steps: int) -> float:
    """What the step from `version` to `version + 1` uses, of `n_steps` in all.

    Up on a line to `peak` at step `warmup_steps` (the first, if that is 0), then on half a cosine, on a line or not at
    all down to `final * peak` at the last step.

    >>> [learning_rate(SchedulePart("linear", warmup_steps=2, final=0.0), 1.0, v, 6) for v in range(6)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if version < schedule.warmup_steps:
        return peak * (version + 1) / schedule.warmup_steps
    top = max(0, schedule.warmup_steps - 1)  # the step that uses `peak`
    if schedule.name == "constant" or version <= top:
        return peak
    done = min(1.0, (version - top) / max(1, n_steps - 1 - top))
    left = 1.0 - done if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (schedule.final + (1.0 - schedule.final) * left)
