"""The command line as a whole."""

from __future__ import annotations

import click
import pytest

from mycel.cli.main import COMMANDS, cli


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_has_a_variable_named_as_people_read_it(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    variables = {option.envvar: option.opts for option in command.params if isinstance(option, click.Option)}
    assert None not in variables
    for variable, names in variables.items():
        assert variable in ("MYCEL_INVITE", "MYCEL_DATA_DIR") or any(
            variable == f"MYCEL_{name}_{text.lstrip('-').replace('-', '_')}".upper() for text in names
        )
