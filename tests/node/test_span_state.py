"""A cache that moved to another node goes on bit for bit as the one that stayed; and what others may not put in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from mycel.node.span import Span, SpanCache
from mycel.node.span_cache import ROLLBACK_TOKENS
from mycel.node.span_port import StatePiece
from mycel.node.span_state import PIECE_BYTES, SpanIntake
from mycel.protocols.errors import PeerRefused, RemoteProtocolError
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.wire import WireTensor
from tests.tiny_models import make_tiny_model

# Full attention, windows in some blocks, experts.
FAST = ("llama", "gemma3", "mixtral")
# Windows in all blocks, keys and values of unlike sizes, one head for all, positions elsewhere than in the keys.
MORE = ("mistral", "deepseek_v3", "gemma2", "qwen3_moe", "falcon", "bloom", "gpt2", "gpt_oss", "phi3", "cohere2")
N_BLOCKS = 3

Models = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def _quiet_transformers() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    made: dict[str, Path] = {}

    def model(architecture: str) -> Path:
        if architecture not in made:
            directory = tmp_path_factory.mktemp("models") / architecture
            made[architecture] = make_tiny_model(architecture, directory, n_blocks=N_BLOCKS)
        return made[architecture]

    return model


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PIECE_BYTES > 100_000
    monkeypatch.setattr("mycel.node.span_state.PIECE_BYTES", 1500)


def inputs(span: Span, n_tokens: int, seed: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    if span.is_first:
        return torch.randint(0, 256, (n_tokens,), generator=chance)
    return torch.randn(n_tokens, span.info.hidden_size, generator=chance)


def grown(span: Span, *chunks: int, seed: int = 0) -> SpanCache:
    cache = span.new_cache()
    grow(span, cache, *chunks, seed=seed)
    return cache


def grow(span: Span, cache: SpanCache, *chunks: int, seed: int = 0) -> list[Tensor]:
    return [span.forward(inputs(span, n, seed + cache.length), cache) for n in chunks]


def travelled(tensor: Tensor) -> Tensor:
    wire = to_wire(tensor)
    return from_wire(WireTensor(wire.header, memoryview(bytearray(wire.data))))


def moved(span: Span, cache: SpanCache, usable: int | None = None) -> SpanCache:
    """The cache as another node of the same span gets it."""
    intake = span.state_intake(cache.length, usable or cache.length)
    for block, position, tensors in span.state_pieces(cache, cache.length):
        intake.take(block, position, [travelled(tensor) for tensor in tensors])
    return intake.finish()


@pytest.mark.parametrize("architecture", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_moved_cache_gives_the_same_bits(architecture: str, models: Models) -> None:
    for start, end in ((0, 2), (1, 3)):
        span = Span.load(models(architecture), start, end)
        stayed = grown(span, 50, 1, 7, *[1] * 30)
        other = moved(span, stayed)
        assert other.length == stayed.length == 88
        later = [grow(span, cache, 1, 1, 5, 1, 64, 1) for cache in (stayed, other)]
        assert all(torch.equal(a, b) for a, b in zip(*later, strict=True))
        if span.is_last:
            assert torch.equal(span.logits(later[0][-1]), span.logits(later[1][-1]))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_cache_that_grows_while_it_is_given_gives_what_it_had(architecture: str, models: Models) -> None:
    """Long enough for buffers to be outgrown, and for windows to have moved on."""
    span = Span.load(models(architecture), 0, N_BLOCKS)
    cache, twin = grown(span, 40, 1, 1), grown(span, 40, 1, 1)
    intake = span.state_intake(42, 42)
    size_bytes, expected_bytes = 0, span.state_bytes(cache, 42)
    for block, position, tensors in span.state_pieces(cache, 42):
        intake.take(block, position, [travelled(tensor) for tensor in tensors])
        size_bytes += sum(tensor.nbytes for tensor in tensors)
        grow(span, cache, 1, 40, 1)
    assert size_bytes == expected_bytes
    assert cache.length > 300
    other = intake.finish()
    assert all(torch.equal(a, b) for a, b in zip(grow(span, twin, 1, 9), grow(span, other, 1, 9), strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral"])
def test_a_moved_cache_may_be_rolled_back_a_little(architecture: str, models: Models) -> None:
    """A last hop can use only what precedes the tokens that it knows."""
    span = Span.load(models(architecture), 0, N_BLOCKS)
    cache = grown(span, 90, *[1] * ROLLBACK_TOKENS)
    for back in (1, ROLLBACK_TOKENS):
        twin = grown(span, 90, *[1] * (ROLLBACK_TOKENS - back))
        other = moved(span, cache, cache.length - back)
        assert other.length == twin.length
        assert all(torch.equal(a, b) for a, b in zip(grow(span, twin, 1, 4), grow(span, other, 1, 4), strict=True))
    if architecture != "llama":
        with pytest.raises(PeerRefused, match="cannot be rolled back"):
            span.state_intake(cache.length, cache.length - ROLLBACK_TOKENS - 1)


def test_a_cache_that_moved_and_was_rolled_back_may_move_again(models: Models) -> None:
    span = Span.load(models("gemma3"), 0, N_BLOCKS)
    cache = grown(span, 90, *[1] * 20)
    once = moved(span, cache, cache.length - 20)
    twice = moved(span, once)
    assert all(torch.equal(a, b) for a, b in zip(grow(span, once, 1, 4), grow(span, twice, 1, 4), strict=True))
    with pytest.raises(PeerRefused, match="cannot roll back"):
        moved(span, once, once.length - ROLLBACK_TOKENS)


def test_a_window_travels_without_what_nobody_sees(models: Models) -> None:
    span = Span.load(models("mistral"), 0, N_BLOCKS)
    sizes = [span.state_bytes(grown(span, 100, *[1] * n), 100 + n) for n in (1, 150)]
    assert sizes[0] == sizes[1] < 50 * sum(span.info.kv_bytes_per_token)


# ---- what is not taken

Spoiled = Callable[[list[StatePiece]], list[StatePiece]]


def _changed(index: int, **fields: object) -> Spoiled:
    def spoil(pieces: list[StatePiece]) -> list[StatePiece]:
        block, position, tensors = pieces[index]
        piece = (fields.get("block", block), fields.get("position", position), fields.get("tensors", tensors))
        return [*pieces[:index], piece, *pieces[index + 1 :]]  # type: ignore[list-item]

    return spoil


def _each(change: Callable[[Tensor], Tensor], which: int = 1) -> Spoiled:
    def spoil(pieces: list[StatePiece]) -> list[StatePiece]:
        block, position, tensors = pieces[0]
        changed = tuple(change(tensor) if index == which else tensor for index, tensor in enumerate(tensors))
        return [(block, position, changed), *pieces[1:]]

    return spoil


def _poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def poison(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[-1, -1, -1] = value
        return tensor

    return poison


SPOILED: dict[str, tuple[Spoiled, str]] = {
    "a block of another span": (_changed(0, block=3), "tensors for block 3"),
    "no block": (_changed(0, block=-1), "tensors for block -1"),
    "the order of pieces": (lambda pieces: [pieces[1], pieces[0], *pieces[2:]], "expected 0"),
    "a piece twice": (lambda pieces: [pieces[0], *pieces], "from token 0, expected"),
    "a piece left out": (lambda pieces: [pieces[0], *pieces[2:]], "expected"),
    "the last piece missing": (lambda pieces: pieces[:-1], "instead of 42"),
    "more than announced": (lambda pieces: [*pieces, (0, 42, pieces[0][2])], "of shape"),
    "keys alone": (lambda pieces: [(b, p, t[:1]) for b, p, t in pieces], "1 tensors for block 0"),
    "a third tensor": (lambda pieces: [(b, p, (*t, t[0])) for b, p, t in pieces], "3 tensors for block 0"),
    "no tensors": (_changed(0, tensors=()), "0 tensors"),
    "another head": (_each(lambda t: torch.cat([t, t[:1]])), "of shape"),
    "another width": (_each(lambda t: t[..., :-1]), "of shape"),
    "another length": (_each(lambda t: t[:, :-1]), "of shape"),
    "two dimensions": (_each(lambda t: t[0]), "of shape"),
    "two dimensions of keys": (_each(lambda t: t[0], 0), "of shape"),
    "four dimensions": (_each(lambda t: t.unsqueeze(0), 0), "of shape"),
    "no rows": (_changed(0, tensors=(torch.zeros(2, 0, 8), torch.zeros(2, 0, 8))), "of shape"),
    "another dtype": (_each(lambda t: t.half()), "in torch.float16 instead of torch.float32"),
    "not a number": (_each(_poisoned(torch.nan)), "not finite"),
    "infinity among keys": (_each(_poisoned(torch.inf), 0), "not finite"),
}


@pytest.mark.parametrize("what", sorted(SPOILED))
def test_a_spoiled_state_is_not_taken(what: str, models: Models) -> None:
    spoil, reason = SPOILED[what]
    span = Span.load(models("llama"), 0, 2)
    pieces = list(span.state_pieces(grown(span, 42), 42))
    assert len(pieces) > 4
    with pytest.raises(RemoteProtocolError, match=reason):
        finish(span.state_intake(42, 42), spoil(pieces))
    assert finish(span.state_intake(42, 42), pieces).length == 42


@pytest.mark.parametrize("begin", [-1, 1, ROLLBACK_TOKENS + 1])
def test_a_window_begins_where_it_has_to(begin: int, models: Models) -> None:
    """At most the margin for rolling back may lack, and nothing older is taken."""
    span = Span.load(models("mistral"), 0, 1)
    cache = grown(span, 80)
    ((block, position, tensors), *_) = (piece for piece in span.state_pieces(cache, 80))
    intake = span.state_intake(80, 80)
    given = (block, position + begin, tuple(t[:, max(begin, 0) :] for t in tensors))
    if 0 <= begin <= ROLLBACK_TOKENS:
        intake.take(*given)
    else:
        with pytest.raises(RemoteProtocolError, match=f"expected {position}"):
            intake.take(*given)


def finish(intake: SpanIntake, pieces: list[StatePiece]) -> SpanCache:
    for piece in pieces:
        intake.take(*piece)
    return intake.finish()
