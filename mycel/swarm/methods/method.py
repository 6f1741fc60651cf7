"""What a way of training is to a round: vectors in and out, and one state that all peers hold alike.

A round knows no training, a method no network. The round asks which elements it is about (`scope`), takes the peer's
vector over them (`contribution`), has all of them aggregated, and gives the result to every peer: first to what they
share (`apply`, the same bits for all), then to what the peer goes on from (`merge`).

With a delay the order at the end of a round is: contribution of this round, then `apply` and `merge` of the round that
is due. Rounds are applied in their order; one that came to nothing is never applied, and the peer simply goes on.

Legend: P parameters, S elements of the round's scope.

Ring: algorithms.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.outer import SharedState

__all__ = ["Method", "Sends"]

# What `contribution` is made from: the peer's parameters after its steps, or the mean gradient of the round's batches
# at the parameters that it went on from (then it makes no steps of its own).
Sends = Literal["parameters", "gradient"]


class Method(Protocol):
    """One peer's side of a method; `make_method` builds it."""

    @property
    def name(self) -> str: ...

    @property
    def sends(self) -> Sends: ...

    @property
    def state(self) -> SharedState:
        """What all peers hold alike."""
        ...

    @property
    def inner_steps(self) -> int:
        """Steps (batches) a round, for a peer of normal speed."""
        ...

    @property
    def delay(self) -> int:
        """Steps that the peer goes on for before a round's result is applied; 0: it waits."""
        ...

    @property
    def codec(self) -> str:
        """The codec of contributions, where the run names none."""
        ...

    @property
    def result_codec(self) -> str:
        """The codec of results, where the run names none."""
        ...

    @property
    def n_scopes(self) -> int:
        """Rounds r and r + n_scopes are about the same elements, so that what a codec carries over fits."""
        ...

    def scope(self, number: int) -> tuple[slice, ...]:
        """Which elements the round is about, ascending."""
        ...

    def layout(self, number: int) -> Layout:
        """The shapes of the tensors, or parts of tensors, in `scope`."""
        ...

    def contribution(self, number: int, local_P: Tensor) -> Tensor:
        """The vector [S] that this peer offers. Once a round."""
        ...

    def apply(self, number: int, result_S: Tensor, contributors: int = 1) -> None:
        """Move the shared state by the aggregate of so many contributions: the same bits on every peer.

        Raises RemoteProtocolError, and changes nothing, for a result that no honest round gives.
        """
        ...

    def merge(self, number: int, local_P: Tensor) -> Tensor:
        """What the peer goes on from after `apply`, a tensor of its own."""
        ...

    def restart(self) -> Tensor:
        """What a peer starts from after it joined or loaded the state; forgets what it remembered of its own."""
        ...
