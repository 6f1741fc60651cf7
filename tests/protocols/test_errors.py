"""The error tree: what an error says, whom it names, and that peers cannot write on the user's terminal."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols import errors
from mycel.protocols.errors import (
    AccessDenied,
    ConfigError,
    LocalProtocolError,
    MycelError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
    VerificationError,
    one_line,
)


def test_every_error_is_in_the_tree_and_nothing_else() -> None:
    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert set(errors.__all__) == classes | {"one_line"}
    assert all(issubclass(getattr(errors, name), MycelError) for name in classes)
    assert not issubclass(LocalProtocolError, PeerError), "our own bug is nobody else's fault"
    assert not issubclass(RouteUnavailable, PeerError)
    assert issubclass(AccessDenied, ConfigError)


@pytest.mark.parametrize("kind", [PeerError, PeerUnreachable, PeerTimeout, PeerRefused, VerificationError])
def test_a_peer_error_names_the_peer_shortly(kind: type[PeerError]) -> None:
    error = kind("12D3KooWFGdCYmJcZS2ftUJmY2W9bAaoSsSeSdZedWyKHUx5cF7c", "went away")
    assert error.reason == "went away"
    assert str(error) == "went away (peer HUx5cF7c)"
    assert str(kind("", "went away")) == "went away"


def test_a_protocol_error_may_learn_its_peer_later() -> None:
    assert RemoteProtocolError("nonsense").peer == ""
    assert str(RemoteProtocolError("nonsense", "abc")) == "nonsense (peer abc)"


def test_evidence_is_kept() -> None:
    assert VerificationError("p", "lied", b"proof").evidence == b"proof"


def test_a_missing_route_says_which_blocks() -> None:
    error = RouteUnavailable(((0, 4), (6, 8)))
    assert str(error) == "no live peer serves blocks 0:4, 6:8"
    assert error.missing == ((0, 4), (6, 8))
    assert str(RouteUnavailable((), "because")) == "because"


@given(st.text())
def test_what_a_peer_says_is_one_printable_line(reason: str) -> None:
    for text in (str(PeerRefused(reason, reason)), RemoteProtocolError(reason).reason, one_line(reason)):
        assert text.isprintable()
    assert len(one_line(reason)) == len(reason)


def test_ordinary_words_are_left_alone() -> None:
    for reason in ("KV memory is full: 7 bytes wanted", "übervoll, 満員", string.punctuation):
        assert one_line(reason) == reason
    assert one_line("\x1b[2Jgone\r\n") == " [2Jgone  "


@pytest.mark.parametrize("error", [PeerTimeout("p", "slow"), ConfigError("do this")])
def test_the_arguments_are_what_it_was_made_of(error: MycelError) -> None:
    assert type(error)(*error.args).args == error.args
