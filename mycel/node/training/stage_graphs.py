"""Forward passes whose graphs are kept for their backward, within a memory budget, the oldest dropped first.

Keeping one saves computing the forward a second time; dropping one costs nothing but that. What comes out is the same
to the bit, because a graph is used for exactly the input and the parameters that it was made of, or not at all.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Graph", "KeptGraphs", "SavedBytes", "saved_bytes"]


@dataclass(eq=False, slots=True)
class Graph:
    """One forward: its input (a leaf; None on the first stage), its tokens, its output with the graph behind it."""

    tokens_BT1: Tensor  # noqa: N815 - its shape
    input_BTW: Tensor | None  # noqa: N815
    output_BTW: Tensor  # noqa: N815
    version: int
    size_bytes: int = 0

    def fits(self, tokens_BT1: Tensor, input_BTW: Tensor | None, version: int) -> bool:
        """Whether this is the forward of that input at that version of the parameters."""
        if self.version != version or not torch.equal(self.tokens_BT1, tokens_BT1):
            return False
        if self.input_BTW is None or input_BTW is None:
            return self.input_BTW is input_BTW
        return torch.equal(self.input_BTW, input_BTW)


@dataclass(eq=False, slots=True)
class KeptGraphs:
    """By work. `budget_bytes` None: without limit."""

    budget_bytes: int | None
    size_bytes: int = field(default=0, init=False)
    _graphs: dict[bytes, Graph] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._graphs)

    def put(self, work: bytes, graph: Graph) -> None:
        self.take(work)
        self._graphs[work] = graph
        self.size_bytes += graph.size_bytes
        while self.budget_bytes is not None and self.size_bytes > self.budget_bytes:
            self.take(next(iter(self._graphs)))

    def take(self, work: bytes) -> Graph | None:
        """What is kept of `work`; it is kept no longer."""
        graph = self._graphs.pop(work, None)
        if graph is not None:
            self.size_bytes -= graph.size_bytes
        return graph

    def clear(self) -> None:
        self._graphs.clear()
        self.size_bytes = 0


@dataclass(eq=False, slots=True)
class SavedBytes:
    """What the graphs made inside `saved_bytes` hold on to, each piece of memory counted once."""

    by_storage: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_storage.values())


@contextmanager
def saved_bytes(known: Tensor) -> Iterator[SavedBytes]:
    """Counts what autograd saves for backward, but for what is part of `known`, which is there anyway."""
    seen, known_pointer = SavedBytes(), known.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != known_pointer:
            seen.by_storage[storage.data_ptr()] = storage.nbytes()
        # Detached: an output that kept itself through its own graph would never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen
