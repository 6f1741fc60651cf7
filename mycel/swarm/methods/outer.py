"""What all peers of a run hold alike, bit for bit, and the steps that move it.

Every step is made of single float32 operations, element by element and in one order: no fused multiply-add (no addcmul,
no `alpha=` other than 1), no sum whose order depends on the machine. So equal states and equal results give equal bits
on every processor and with any number of threads, which is what lets a hash stand for the state.

Legend: P parameters, M moments (what the outer optimizer remembers of each parameter), S elements of a round's scope.

Ring: algorithms.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mycel.protocols.errors import ConfigError, RemoteProtocolError

__all__ = [
    "MAX_RESULT",
    "SharedState",
    "adamw_step",
    "check_result",
    "dot",
    "momentum_step",
    "nesterov_step",
    "plain_step",
    "scope_size",
    "slices",
]

# An element of a result beyond this is no training; so no sequence of results drives the state out of float32.
MAX_RESULT = 1e6
_DOMAIN = b"mycel shared state v1"
_HEADER = struct.Struct("<QQI")  # version, P, M
_ITEM_BYTES = 4
_PIECE = 1 << 18  # elements handled at a time: temporary tensors stay small and in the processor's cache
_LEAF = 1 << 12  # elements that `dot` folds in halves

Scope = Sequence[slice]


class SharedState:
    """The parameters and the outer optimizer's moments after `version` results."""

    def __init__(self, theta_P: Tensor, n_moments: int) -> None:
        if theta_P.dim() != 1 or theta_P.dtype != torch.float32 or theta_P.device.type != "cpu":
            raise ValueError(
                f"flat float32 parameters on the CPU are needed, not {list(theta_P.shape)} {theta_P.dtype}"
            )
        if sys.byteorder != "little":
            raise ConfigError("training needs a little-endian processor")
        self.theta_P = theta_P.detach().clone().contiguous()
        self.moments_MP = torch.zeros(n_moments, theta_P.numel())
        self.version = 0

    @property
    def n_elements(self) -> int:
        """Parameters."""
        return self.theta_P.numel()

    @property
    def size_bytes(self) -> int:
        """Of `snapshot`."""
        return _HEADER.size + (1 + self.moments_MP.shape[0]) * self.n_elements * _ITEM_BYTES

    def digest(self) -> bytes:
        """SHA-256 of the version and of every bit."""
        hashed = hashlib.sha256(_DOMAIN + self._header())
        for row_P in (self.theta_P, *self.moments_MP):
            hashed.update(memoryview(row_P.numpy()).cast("B"))
        return hashed.digest()

    def snapshot(self) -> bytes:
        """The state as bytes: a header, the parameters, then each moment, as little-endian float32."""
        return b"".join((self._header(), *(row_P.numpy().tobytes() for row_P in (self.theta_P, *self.moments_MP))))

    def load(self, data: bytes | memoryview) -> None:
        """Become the state of which `data` is the snapshot.

        Raises RemoteProtocolError, and changes nothing, for another size or header, or for numbers that are not finite.
        """
        view = memoryview(data).cast("B")
        if view.nbytes != self.size_bytes:
            raise RemoteProtocolError(f"a state of {view.nbytes} bytes, where {self.size_bytes} are needed")
        version, n_elements, n_moments = _HEADER.unpack(view[: _HEADER.size])
        if (n_elements, n_moments) != (self.n_elements, self.moments_MP.shape[0]) or version >> 63:
            raise RemoteProtocolError(f"a state of {n_elements} parameters with {n_moments} moments, version {version}")
        # A copy: `data` may be read-only, or belong to somebody who goes on writing.
        rows_P = torch.frombuffer(bytearray(view[_HEADER.size :]), dtype=torch.float32).view(1 + n_moments, n_elements)
        if not all(bool(part.isfinite().all()) for row_P in rows_P for part in row_P.split(_PIECE)):
            raise RemoteProtocolError("a state with numbers that are not finite")
        self.theta_P.copy_(rows_P[0])
        self.moments_MP.copy_(rows_P[1:])
        self.version = version

    def _header(self) -> bytes:
        return _HEADER.pack(self.version, self.n_elements, self.moments_MP.shape[0])


def slices(scope: Scope, x_P: Tensor) -> Tensor:
    """The elements of `x_P` inside `scope`, one after another: [S]. A copy."""
    return torch.cat([x_P[part] for part in scope])


def scope_size(scope: Scope) -> int:
    """S, the number of elements in `scope`."""
    return sum(part.stop - part.start for part in scope)


def check_result(result_S: Tensor, size: int) -> None:
    """Raises RemoteProtocolError for another size, or for elements that are not finite or beyond MAX_RESULT."""
    if result_S.shape != (size,) or result_S.dtype != torch.float32:
        raise RemoteProtocolError(f"a result of {list(result_S.shape)} {result_S.dtype}, where {size} float32 are due")
    if size:
        least, most = torch.aminmax(result_S)
        if not (float(least) >= -MAX_RESULT and float(most) <= MAX_RESULT):  # also false for NaN
            raise RemoteProtocolError("a result that is not finite, or beyond all bounds")


def plain_step(state: SharedState, scope: Scope, result_S: Tensor, rate: float) -> None:
    """theta <- theta - rate * result."""
    for here, there in _pieces(scope):
        state.theta_P[here].sub_(result_S[there] * rate)


def momentum_step(state: SharedState, scope: Scope, result_S: Tensor, rate: float, momentum: float) -> None:
    """m <- momentum * m + result;  theta <- theta - rate * m. The moment is the state's first."""
    for here, there in _pieces(scope):
        moment = state.moments_MP[0, here]
        moment.mul_(momentum).add_(result_S[there])
        state.theta_P[here].sub_(moment * rate)


def nesterov_step(
    state: SharedState, scope: Scope, result_S: Tensor, rate: float, momentum: float, braking: float = 0.0
) -> None:
    """m <- momentum * m + b;  theta <- theta - rate * (b + momentum * m), with b = result unless braking.

    Source: DiLoCo, arXiv 2311.08105, algorithm 1. Adaptive braking (arXiv 2007.01397, equation 3) takes
    b = (1 - braking * cos(result, m)) * result: a result along the momentum counts less, one against it more.
    """
    factor = 1.0 - braking * _cosine(result_S, slices(scope, state.moments_MP[0])) if braking else 1.0
    for here, there in _pieces(scope):
        moment = state.moments_MP[0, here]
        step = result_S[there] * factor
        moment.mul_(momentum).add_(step)
        step.add_(moment * momentum).mul_(rate)
        state.theta_P[here].sub_(step)


def adamw_step(
    state: SharedState, scope: Scope, gradient_S: Tensor, rate: float, betas: tuple[float, float], epsilon: float
) -> None:
    """AdamW without its decay; the state's moments are those of the gradient and of its square.

    The step's number is `state.version + 1`: count the version up after it.
    """
    first, second = betas
    scale_first = 1.0 / (1.0 - _power(first, state.version + 1))
    scale_second = 1.0 / (1.0 - _power(second, state.version + 1))
    for here, there in _pieces(scope):
        gradient = gradient_S[there]
        mean, square = state.moments_MP[0, here], state.moments_MP[1, here]
        mean.mul_(first).add_(gradient * (1.0 - first))
        square.mul_(second).add_((gradient * gradient).mul_(1.0 - second))
        scale = (square * scale_second).sqrt_().add_(epsilon)
        state.theta_P[here].sub_((mean * scale_first).mul_(rate).div_(scale))


def dot(left_S: Tensor, right_S: Tensor) -> float:
    """The scalar product, summed in float64 in one order whatever the machine.

    Pieces of 4096 are folded in halves, element by element, and their sums added one after another.
    """
    total = 0.0
    for start in range(0, left_S.numel(), _LEAF * 64):
        # Products of float32 are exact in float64.
        product = left_S[start : start + _LEAF * 64].double() * right_S[start : start + _LEAF * 64].double()
        rows = torch.nn.functional.pad(product, (0, -product.numel() % _LEAF)).view(-1, _LEAF)
        while rows.shape[1] > 1:
            half = rows.shape[1] // 2
            rows = rows[:, :half] + rows[:, half:]
        for value in rows[:, 0].tolist():
            total += value
    return total


def _cosine(left_S: Tensor, right_S: Tensor) -> float:
    norms = (dot(left_S, left_S) * dot(right_S, right_S)) ** 0.5
    return dot(left_S, right_S) / norms if norms > 0.0 else 0.0


def _power(base: float, exponent: int) -> float:
    """base ** exponent by multiplications alone: C libraries differ in the last bit of pow."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _pieces(scope: Scope) -> Iterator[tuple[slice, slice]]:
    """Pairs of the same elements' places: in the parameters, and in a vector over the scope."""
    offset = 0
    for part in scope:
        for start in range(part.start, part.stop, _PIECE):
            end = min(start + _PIECE, part.stop)
            yield slice(start, end), slice(offset, offset + end - start)
            offset += end - start
