"""The options of a node, as typed: what they make of it, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mycel.cli.start import start
from mycel.protocols.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("203.0.113.7:4001", "not an address to announce"),
        ("/ip4/203.0.113.7/tcp/0", "nobody can dial port 0"),
        ("/ip4/0.0.0.0/tcp/4001", "not the address of one machine"),
    ],
)
def test_what_cannot_be_announced_is_refused_at_once(address: str, says: str, tmp_path: Path) -> None:
    arguments = ["--model", str(tmp_path), "--data-dir", str(tmp_path / "data"), "--announce", address]
    result = CliRunner().invoke(start, arguments)
    assert isinstance(result.exception, ConfigError)
    assert says in str(result.exception)
    assert not (tmp_path / "data").exists()
