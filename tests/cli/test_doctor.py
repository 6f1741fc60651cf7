"""`mycel doctor` as it is typed: its lines, its exit codes, which invite it means, and that it changes nothing."""

from __future__ import annotations

import json
import time
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from click import unstyle
from click.testing import CliRunner, Result

from mycel.cli import doctor as command
from mycel.cli.common import exclusive, remember_invite
from mycel.cli.doctor import doctor, lines
from mycel.node.diagnosis import Check
from mycel.node.doctor import Question
from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from mycel.swarm.invite import make_invite

LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("MYCEL_INVITE", raising=False)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(doctor, arguments)


def invite(age_s: float = 0.0) -> str:
    identity = Identity.generate()
    nobody = PeerAddress(identity.peer_id, ("/ip4/127.0.0.1/tcp/1",))
    return make_invite(identity, bytes(32), "demo", [nobody], now=time.time() - age_s, lifetime_s=3600).text


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str, found: tuple[Check, ...] = ()) -> tuple[Question, Result]:
    """What the doctor is asked, by a command whose findings are made up."""
    questions: list[Question] = []

    async def examine(question: Question, tell: object, wait: object) -> list[Check]:
        questions.append(question)
        return list(found)

    monkeypatch.setattr("mycel.node.doctor.examine", examine)
    result = run(*arguments)
    (question,) = questions
    return question, result


def test_advice_stands_beneath_its_finding_and_peers_control_no_terminal() -> None:
    found, advice = map(unstyle, lines(Check("port", "fail", "port 1 is in use", "End it.")))
    assert found == "✗ port        port 1 is in use"
    assert advice == "              End it."
    assert list(map(unstyle, lines(Check("clock", "ok", "0.0 s from 1 peer")))) == ["✓ clock       0.0 s from 1 peer"]
    hostile = "".join(lines(Check("swarm", "skip", "\x1b[2Jgone", "\x1b]0;x")))
    assert "\x1b[2J" not in hostile
    assert "\x1b]0" not in hostile


@pytest.mark.parametrize(("encoding", "mark"), [("utf-8", "✗"), ("ascii", "X"), ("cp1252", "X")])
def test_marks_are_told_apart_on_any_terminal(encoding: str, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", TextIOWrapper(BytesIO(), encoding=encoding))
    assert unstyle(lines(Check("port", "fail", "x"))[0]).startswith(mark)


def test_colours_are_for_terminals() -> None:
    assert "\x1b[" not in run(*LOOPBACK).output
    assert "\x1b[3" in CliRunner().invoke(doctor, LOOPBACK, color=True).stdout


def test_without_a_swarm_it_looks_at_this_machine() -> None:
    result = run(*LOOPBACK)
    assert "! invite      no swarm is known here" in result.stdout
    assert "- swarm       not looked at: without an invite" in result.stdout
    assert (result.exit_code, "Traceback" in result.output) == (0, False), result.output


def test_an_invite_that_expired_is_a_failure() -> None:
    result = run(*LOOPBACK, invite(age_s=7200))
    assert "✗ invite      this invite to demo expired 1 hour ago" in result.stdout
    closing, advice = result.stdout.splitlines()[-2:]
    assert closing == "Most probable cause: this invite to demo expired 1 hour ago."
    assert advice.startswith("What to do: Ask for a new one. It is ")
    assert result.exit_code == 1


def test_it_leaves_nothing_behind(home: Path) -> None:
    run(*LOOPBACK)
    assert list(home.iterdir()) == []


def test_json_is_one_object_on_stdout() -> None:
    result = run(*LOOPBACK, "--json", "mycel1:nonsense")
    value = json.loads(result.stdout)
    assert set(value) == {"checks", "conclusion"}
    (found,) = [check for check in value["checks"] if check["name"] == "invite"]
    assert found["mark"] == "fail"
    assert "damaged" in found["found"]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ((Check("a", "ok", ""), Check("b", "warn", "x", "y"), Check("c", "skip", "z")), 0),
        ((Check("reach", "fail", "x", "y"),), 1),
        ((Check("peer", "fail", "x", "y"), Check("swarm", "fail", "x", "y")), 69),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, found: tuple[Check, ...], code: int) -> None:
    _, result = asked(monkeypatch, found=found)
    assert result.exit_code == code


def test_what_it_is_asked_about(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    question, _ = asked(monkeypatch)
    assert question == Question(
        data_dir=home / "data" / "mycel", listen=("/ip4/0.0.0.0/tcp/0",), no_invite="no swarm is known here"
    )
    remember_invite("mycel1:remembered")
    question, _ = asked(monkeypatch, "--port", "4001", "--announce", "/ip4/203.0.113.7/tcp/80", "--data-dir", "x")
    assert question.invite is not None
    assert question.invite.strip() == "mycel1:remembered"
    assert (question.listen, question.announce) == (("/ip4/0.0.0.0/tcp/4001",), ("/ip4/203.0.113.7/tcp/80",))
    assert (question.data_dir, question.wanted, question.running) == (Path("x"), True, False)
    question, _ = asked(monkeypatch, "mycel1:gi", "ven")
    assert question.invite == "mycel1:given"
    monkeypatch.setenv("MYCEL_INVITE", "mycel1:environment")
    question, _ = asked(monkeypatch)
    assert question.invite == "mycel1:environment"


def test_a_node_that_runs_is_noticed_by_its_lock(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    with exclusive(home, "--data-dir"):
        assert asked(monkeypatch, "--data-dir", str(home))[0].running
    assert not asked(monkeypatch, "--data-dir", str(home))[0].running


def test_wrong_usage_is_told_in_one_line() -> None:
    assert run("--port", "1", *LOOPBACK).exit_code == 2
    result = run("--announce", "203.0.113.7:4001")
    assert isinstance(result.exception, ConfigError)
    assert "not an address to announce" in str(result.exception)


def test_waiting_is_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    command._wait("dialling 2 addresses", 15.0)
    assert capsys.readouterr().err == "... dialling 2 addresses, 15 s at most\n"
