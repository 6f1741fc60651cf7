"""Which swarm is meant, where things lie, and how values are written."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mycel.cli import common
from mycel.cli.main import cli
from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from mycel.swarm.invite import Invite, make_invite


def an_invite(seed: int, *, made_at: float | None = None) -> Invite:
    identity = Identity.from_seed(bytes([seed]) * 32)
    here = PeerAddress(identity.peer_id, ("/ip4/127.0.0.1/tcp/4001",))
    now = time.time() if made_at is None else made_at
    return make_invite(identity, bytes(32), f"model-{seed}", [here], now=now, lifetime_s=3600)


@pytest.fixture(autouse=True)
def _own_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("MYCEL_INVITE", raising=False)


def test_without_an_invite_the_user_is_told_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match=r"mycel up.*--invite"):
        common.find_invite(None)


def test_the_last_swarm_is_remembered_for_its_user_alone() -> None:
    common.remember_invite(an_invite(1).text)
    common.remember_invite(an_invite(2).text)
    assert common.find_invite(None) == an_invite(2)
    path = common.invite_file()
    assert path.is_relative_to(common.state_home())
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["invite"], "a temporary file was left"


def test_an_invite_is_forgotten_unless_another_took_its_place() -> None:
    first, second = an_invite(1).text, an_invite(2).text
    common.remember_invite(second)
    common.forget_invite(first)
    assert common.find_invite(None).text == second
    common.forget_invite(second, instead=first)
    assert common.find_invite(None).text == first
    common.forget_invite(first)
    assert not common.invite_file().exists()
    common.forget_invite(second)


def test_the_option_counts_before_the_environment_and_that_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Invite] = []

    @click.command()
    @common.invite_option
    def probe(invite: str | None) -> None:
        seen.append(common.find_invite(invite))

    common.remember_invite(an_invite(1).text)
    assert CliRunner().invoke(probe, []).exit_code == 0
    monkeypatch.setenv("MYCEL_INVITE", an_invite(2).text)
    assert CliRunner().invoke(probe, []).exit_code == 0
    assert CliRunner().invoke(probe, ["--invite", f"mycel join {an_invite(3).text}"]).exit_code == 0
    assert [invite.name for invite in seen] == ["model-1", "model-2", "model-3"]


@pytest.mark.parametrize("command", [["run", "x"], ["chat"], ["status"], ["join"]], ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("garbage", "not an invite"),
        ("mycel1:AAAA", "damaged"),
        (an_invite(1).text[:-3], "damaged"),
        (an_invite(1, made_at=1e9).text, "expired"),
    ],
    ids=["garbled", "short", "cut", "expired"],
)
def test_an_invite_that_is_none_is_one_line_and_78(command: list[str], text: str, says: str) -> None:
    arguments = [*command, text] if command == ["join"] else [*command, "--invite", text]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 78
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        ("1.5 GB", 1_500_000_000),
        ("2GiB", 2**31),
        ("800MB", 8 * 10**8),
        ("77", 77),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert common.size_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "IB", "1e9", "0", "9" * 30])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        common.size_bytes(text)


def test_blocks() -> None:
    assert common.blocks("0:4") == (0, 4)
    for text in ["", "4", "4:", "4:4", "4:3", "-1:3", "1:2:3", "a:b"]:
        with pytest.raises(click.BadParameter):
            common.blocks(text)


def test_a_directory_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    again = common.exclusive(tmp_path / "node", "--data-dir")
    refused = pytest.raises(ConfigError, match=r"another mycel uses .* --data-dir")
    with common.exclusive(tmp_path / "node", "--data-dir"), refused, again:
        pass
    with common.exclusive(tmp_path / "node", "--data-dir"):
        pass


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the directory"):
        common.make_directory(tmp_path / "file" / "node")
