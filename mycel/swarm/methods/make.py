"""The method that a table names.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.data_parallel import DataParallel
from mycel.swarm.methods.demo import Demo
from mycel.swarm.methods.diloco import Diloco
from mycel.swarm.methods.eager import Eager
from mycel.swarm.methods.method import Method
from mycel.swarm.methods.options import (
    DataParallelOptions,
    DemoOptions,
    DilocoOptions,
    EagerOptions,
    MethodOptions,
    SparseLocoOptions,
    StreamingOptions,
    parse_options,
)
from mycel.swarm.methods.sparseloco import SparseLoco
from mycel.swarm.methods.streaming import Streaming

__all__ = ["constant", "make_method"]


def constant(version: int) -> float:
    """The schedule that is none."""
    return 1.0


def make_method(
    table: Mapping[str, object] | MethodOptions,
    layout: Layout,
    theta_P: Tensor,
    schedule: Callable[[int], float] = constant,
) -> Method:
    """One peer's side of the method, starting from `theta_P`, which is copied.

    `schedule`: a factor of the learning rate at each version, for the methods whose optimizer all share; it must give
    the same bits on every machine. Raises ConfigError, one line, for a table that is none.
    """
    if theta_P.shape != (layout.n_elements,):
        raise ValueError(f"{list(theta_P.shape)} parameters for a layout of {layout.n_elements}")
    options = parse_options(table) if isinstance(table, Mapping) else table
    match options:
        case DataParallelOptions():
            return DataParallel(options, layout, theta_P, schedule)
        case DemoOptions():
            return Demo(options, layout, theta_P, schedule)
        case DilocoOptions():
            return Diloco(options, layout, theta_P)
        case StreamingOptions():
            return Streaming(options, layout, theta_P)
        case EagerOptions():
            return Eager(options, layout, theta_P)
        case SparseLocoOptions():
            return SparseLoco(options, layout, theta_P)
