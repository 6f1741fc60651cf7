"""Invites: short, forgiving in the pasting, and one clear line for everything that is wrong with one."""

from __future__ import annotations

import base64
import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from mycel.swarm.invite import Invite, make_invite, parse_invite

NOW = 1_750_000_000.0
ISSUER = Identity.from_seed(bytes(32))
OTHER = Identity.from_seed(bytes([1]) * 32)
SWARM = hashlib.sha256(b"swarm").digest()
BOOTSTRAP = (
    PeerAddress(ISSUER.peer_id, ("/ip4/192.168.100.200/tcp/40001",)),
    PeerAddress(OTHER.peer_id, ("/ip4/203.0.113.77/tcp/40002",)),
)


def invite(lifetime_s: float = 3600.0, now: float = NOW) -> Invite:
    return make_invite(ISSUER, SWARM, "Llama-3.2-1B", BOOTSTRAP, now=now, lifetime_s=lifetime_s)


def reseal(signed: bytes) -> str:
    """The text of an invite whose checksum is right, whatever else is wrong."""
    checksum = hashlib.sha256(signed).digest()[:4]
    return "mycel1:" + base64.urlsafe_b64encode(checksum + signed).decode().rstrip("=")


def signed_part(text: str) -> bytes:
    encoded = text.removeprefix("mycel1:")
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))[4:]


def test_an_invite_says_what_was_put_in_and_is_short() -> None:
    made = invite()
    assert parse_invite(made.text, NOW + 1) == made
    assert (made.swarm, made.name, made.issuer) == (SWARM, "Llama-3.2-1B", ISSUER.peer_id)
    assert made.bootstrap == BOOTSTRAP
    assert (made.issued_at, made.expires_at) == (NOW, NOW + 3600)
    assert len(made.text) < 400


@pytest.mark.parametrize(
    "dress",
    [
        "  {}\n",
        "mycel join {}",
        "$ mycel join '{}'",
        'mycel join "{}"  ',
        "Join us:\n\n    mycel join {}\n",
    ],
)
def test_what_surrounds_a_pasted_invite_does_not_matter(dress: str) -> None:
    made = invite()
    assert parse_invite(dress.format(made.text), NOW) == made


def test_an_invite_may_be_broken_over_lines() -> None:
    made = invite()
    broken = "\n  ".join(made.text[at : at + 60] for at in range(0, len(made.text), 60))
    assert parse_invite(broken, NOW) == made


@pytest.mark.parametrize("text", ["", "hello", "mycel join", "/ip4/127.0.0.1/tcp/1", "mycel:abc", "MYCEL1:abc"])
def test_what_is_no_invite_is_told_so(text: str) -> None:
    with pytest.raises(ConfigError, match="not an invite"):
        parse_invite(text, NOW)


def test_an_invite_of_a_later_kind_asks_for_a_newer_mycel() -> None:
    with pytest.raises(ConfigError, match="install a newer one"):
        parse_invite("mycel2:AAAA", NOW)


@given(st.data())
def test_a_slip_in_copying_is_called_damage(data: st.DataObject) -> None:
    text = invite().text
    at = data.draw(st.integers(len("mycel1:"), len(text) - 2))
    swap = data.draw(st.sampled_from("ABCxyz019-_").filter(lambda letter: letter != text[at]))
    changed = data.draw(st.sampled_from([text[:at], text[:at] + swap + text[at + 1 :], text[:at] + text[at + 1 :]]))
    with pytest.raises(ConfigError, match="damaged"):
        parse_invite(changed, NOW)


@given(st.text(max_size=200) | st.binary(max_size=300).map(reseal))
def test_any_text_is_an_invite_or_one_line_of_config_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_invite("mycel1:" + text.removeprefix("mycel1:"), NOW)
    assert "\n" not in str(caught.value)


def test_a_changed_body_with_a_good_checksum_has_a_bad_signature() -> None:
    signed = signed_part(invite().text)
    forged = signed.replace(b"40001", b"40009")
    assert forged != signed
    with pytest.raises(ConfigError, match="changed after it was signed"):
        parse_invite(reseal(forged), NOW)


def test_a_body_signed_by_someone_else_is_refused() -> None:
    signed = signed_part(invite().text)
    body = signed[64:]
    with pytest.raises(ConfigError, match="changed after it was signed"):
        parse_invite(reseal(OTHER.sign(b"mycel invite v1\0" + body) + body), NOW)
    # and the issuer's signature over the same bytes for another purpose is worth nothing
    with pytest.raises(ConfigError, match="changed after it was signed"):
        parse_invite(reseal(ISSUER.sign(body) + body), NOW)


@pytest.mark.parametrize("where", [0, 5])
def test_a_signed_body_of_the_wrong_shape_is_not_valid(where: int) -> None:
    fields = msgspec.msgpack.decode(signed_part(invite().text)[64:])
    fields[where] = 7 if where == 0 else [[b"short", ["/ip4/1.2.3.4/tcp/1"]]]
    body = msgspec.msgpack.encode(fields)
    with pytest.raises(ConfigError, match="not valid"):
        parse_invite(reseal(ISSUER.sign(b"mycel invite v1\0" + body) + body), NOW)


@pytest.mark.parametrize(
    ("later_s", "words"),
    [(0, "0 seconds ago"), (61, "1 minute ago"), (7200, "2 hours ago"), (3 * 86400 + 5, "3 days ago")],
)
def test_an_expired_invite_says_when_it_expired(later_s: float, words: str) -> None:
    made = invite(lifetime_s=60)
    parse_invite(made.text, NOW + 59)
    with pytest.raises(ConfigError, match=f"Llama-3.2-1B expired {words}"):
        parse_invite(made.text, NOW + 60 + later_s)


def test_an_invite_from_the_future_points_at_the_clock() -> None:
    text = invite(now=NOW + 3 * 86400).text
    with pytest.raises(ConfigError, match=r"3 days in the future.*clock"):
        parse_invite(text, NOW)
    assert parse_invite(invite(now=NOW + 600).text, NOW).issued_at == NOW + 600


def test_an_invite_that_nobody_could_use_is_not_made() -> None:
    with pytest.raises(LocalProtocolError):
        make_invite(ISSUER, SWARM, "x", (), now=NOW, lifetime_s=60)
    with pytest.raises(LocalProtocolError):
        make_invite(ISSUER, SWARM, "x", (PeerAddress(ISSUER.peer_id),), now=NOW, lifetime_s=60)
    with pytest.raises(LocalProtocolError):
        make_invite(ISSUER, SWARM, "two\nlines", BOOTSTRAP, now=NOW, lifetime_s=60)
    with pytest.raises(LocalProtocolError):
        make_invite(ISSUER, SWARM, "x", (PeerAddress("QmNotEd25519", ("/ip4/1.2.3.4/tcp/1",)),), now=NOW, lifetime_s=60)
