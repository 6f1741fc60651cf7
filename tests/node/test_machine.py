"""What `mycel doctor` sees of this machine: the key and its mode, ports, addresses."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mycel.node import machine
from mycel.node.endpoints import Endpoint, scope_of
from mycel.security.identity import load_or_create


def test_what_runs_here_is_what_is_needed() -> None:
    assert machine.look_at_software().mark == "ok"


def test_a_directory_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    check, identity = machine.look_at_data(tmp_path / "a" / "b")
    assert (check.mark, identity, list(tmp_path.iterdir())) == ("ok", None, [])
    assert machine.look_at_disk(tmp_path / "a" / "b").name == "disk"


def test_the_key_says_who_this_node_is(tmp_path: Path) -> None:
    made = load_or_create(tmp_path / "identity.key")
    check, identity = machine.look_at_data(tmp_path)
    assert identity == made or (identity is not None and identity.peer_id == made.peer_id)
    assert made.peer_id in check.found


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_key_that_others_can_read_is_a_failure_with_its_cure(tmp_path: Path) -> None:
    load_or_create(tmp_path / "identity.key")
    (tmp_path / "identity.key").chmod(0o644)
    check, _ = machine.look_at_data(tmp_path)
    assert (check.mark, check.advice.startswith("chmod 600 ")) == ("fail", True)
    assert "mode 0644" in check.found


def test_a_damaged_key_is_a_failure(tmp_path: Path) -> None:
    load_or_create(tmp_path / "identity.key")
    (tmp_path / "identity.key").write_bytes(b"x")
    check, identity = machine.look_at_data(tmp_path)
    assert (check.mark, identity, "damaged" in check.found) == ("fail", None, True)


def test_a_directory_that_is_a_file_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert machine.look_at_data(tmp_path / "data")[0].mark == "fail"


def test_a_port_is_free_until_somebody_listens_and_then_it_is_said_who() -> None:
    assert machine.look_at_port(Endpoint("ip4", "127.0.0.1", 0), running=False).mark == "ok"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        endpoint = Endpoint("ip4", "127.0.0.1", sock.getsockname()[1])
        check = machine.look_at_port(endpoint, running=False)
        assert (check.mark, f"(process {os.getpid()})" in check.found) == ("fail", True)
        assert machine.look_at_port(endpoint, running=True).mark == "ok"
    assert machine.look_at_port(endpoint, running=False).mark == "ok"


def test_an_address_that_this_machine_does_not_have() -> None:
    check = machine.look_at_port(Endpoint("ip4", "192.0.2.77", 0), running=False)
    assert (check.mark, check.found) == ("fail", "this machine has no address 192.0.2.77")


def test_interfaces_are_listed_without_those_that_nobody_can_dial() -> None:
    hosts = machine.interface_hosts()
    assert "127.0.0.1" in hosts
    assert all(scope_of(host) != "link-local" for host in hosts)
