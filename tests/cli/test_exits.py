"""Every error has its exit code and one line, and the command line starts fast."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner, Result

from mycel import __version__
from mycel.cli import exits
from mycel.cli.main import COMMANDS, Commands, cli
from mycel.protocols import errors

PEER = "12D3KooWExample"


def ends_with(error: BaseException, *arguments: str) -> Result:
    """A command line of our kind whose only command raises `error`."""

    class OneCommand(Commands):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            @click.command()
            def fail() -> None:
                raise error

            return fail

    @click.group(cls=OneCommand)
    @click.option("--debug", is_flag=True)
    def program(debug: bool) -> None:
        pass

    return CliRunner().invoke(program, [*arguments, "fail"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.ConfigError("no such model"), 78, "error: no such model"),
        (errors.AccessDenied("not yours"), 77, "error: not yours"),
        (errors.RouteUnavailable(((2, 4),)), 69, "error: no live peer serves blocks 2:4"),
        (errors.PeerUnreachable(PEER, "gone"), 69, "error: gone (peer WExample)"),
        (errors.PeerTimeout("", "no token for 60 s"), 75, "error: no token for 60 s"),
        (errors.PeerRefused(PEER, "full"), 77, "error: full (peer WExample)"),
        (errors.RemoteProtocolError("nonsense", PEER), 76, "error: nonsense (peer WExample)"),
        (errors.VerificationError(PEER, "lied"), 76, "error: lied (peer WExample)"),
        (exits.NodeFailedError("node-1 did not start", 75), 75, "error: node-1 did not start"),
        (exits.CommandFailedError("not the same"), 1, "error: not the same"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ExceptionGroup("tasks", [ExceptionGroup("", [errors.ConfigError("inner")])]), 78, "error: inner"),
        (BaseExceptionGroup("tasks", [KeyboardInterrupt(), OSError()]), 130, "interrupted"),
        (errors.ConfigError("of a peer:\n\x1b[31mred\a"), 78, "error: of a peer: ?[31mred?"),
    ],
)
def test_an_error_is_one_line_and_a_code(error: BaseException, code: int, line: str) -> None:
    result = ends_with(error)
    assert (result.exit_code, result.stderr, result.stdout) == (code, line + "\n", "")


def test_a_reader_that_went_away_is_no_news() -> None:
    result = ends_with(BrokenPipeError())
    assert (result.exit_code, result.output) == (141, "")


def test_a_bug_is_told_in_one_line_unless_asked_for_more() -> None:
    brief = ends_with(KeyError("position"))
    assert brief.exit_code == 70
    assert brief.stderr.count("\n") == 1
    assert "KeyError" in brief.stderr
    assert "--debug" in brief.stderr
    debugged = ends_with(KeyError("position"), "--debug")
    assert debugged.exit_code == 70
    assert "Traceback" in debugged.stderr


def test_debug_can_be_asked_for_in_the_environment() -> None:
    assert "Traceback" not in CliRunner().invoke(cli, ["run", "x", "--invite", "x"]).stderr
    result = CliRunner().invoke(cli, ["run", "x", "--invite", "x"], env={"MYCEL_DEBUG": "1"})
    assert result.exit_code == 78
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["run"],
        ["run", ""],
        ["run", "x", "--max-tokens", "0"],
        ["run", "x", "--top-p", "0"],
        ["run", "x", "--temperature", "-1"],
        ["run", "x", "--seed", "x"],
        ["start"],
        ["start", "--model", ".", "--blocks", "3:1"],
        ["start", "--model", ".", "--blocks", "3"],
        ["start", "--model", ".", "--memory", "much"],
        ["start", "--model", ".", "--memory", "0GB"],
        ["start", "--model", ".", "--listen", "/ip4/127.0.0.1/tcp/0", "--port", "5"],
        ["start", "--model", ".", "--port", "70000"],
        ["start", "--model", ".", "--dtype", "int3"],
        ["join"],
        ["up", "--nodes", "0"],
        ["status", "--timeout", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_says_what_is_right(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids="".join)
def test_help_says_what_a_command_is_for(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    usage, _, rest = result.stdout.partition("\n\n")
    assert usage.startswith("Usage: ")
    assert len(rest.split("Options:")[0].split()) > 10, "no word for a newcomer"
    # Whatever can be typed is explained: an option's line does not end with its name.
    command_object = cli if not command else cli.get_command(click.Context(cli), command[0])
    assert command_object is not None
    visible = [p for p in command_object.params if isinstance(p, click.Option) and not p.hidden]
    assert [option.name for option in visible if not option.help] == []


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert [name for name in COMMANDS if f"\n  {name} " not in result.stdout] == []


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(cli, ["--version"]).stdout == f"mycel {__version__}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"], ["start", "--help"], ["run", "x"]])
def test_nothing_heavy_is_imported_for_what_needs_no_model(arguments: list[str], tmp_path: object) -> None:
    program = (
        "import sys\n"
        "from mycel.cli.main import main\n"
        f"sys.argv = ['mycel', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    print(sorted({'torch', 'transformers', 'libp2p'} & set(sys.modules)))\n"
    )
    environment = {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
