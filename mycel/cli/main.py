"""The command `mycel`: which commands there are, and how each of them ends: errors become exit codes here alone.

Commands are imported when they are called or listed, and import torch and libp2p later still.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module

import click

from mycel._version import __version__
from mycel.cli.exits import BROKEN_PIPE, INTERNAL, exit_code, one_line

COMMANDS = ("demo", "up", "run", "chat", "status", "start", "join", "train", "finetune", "replay", "doctor")


class Commands(click.Group):
    """The commands of `mycel.cli`, each in the module of its name, in the order in which a newcomer meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"mycel.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        for option in command.params:
            if isinstance(option, click.Option) and option.envvar is None:
                # click would take the name of the parameter (DIRECTORY, AS_JSON) where people read --dir and --json.
                shown = max(option.opts, key=len).lstrip("-").replace("-", "_")
                option.envvar = f"MYCEL_{cmd_name}_{shown}".upper()
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; click ends it for wrong usage, and this function for everything else."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except click.Abort:
            raise KeyboardInterrupt from None
        except BaseException as error:  # noqa: BLE001  the root of the program: told, and turned into its exit code
            ctx.exit(end_with(error, debug=bool(ctx.params.get("debug"))))


def end_with(error: BaseException, *, debug: bool = False) -> int:
    """Tell the user what went wrong, in one line on stderr, and give the exit code."""
    if isinstance(error, BaseExceptionGroup):
        from mycel.node.background import cause_of

        error = cause_of(error)
    if isinstance(error, SystemExit):
        raise error
    code = exit_code(error)
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if code == BROKEN_PIPE:
        _forget_stdout()
    elif code is None:
        shown = one_line(f"{type(error).__name__}: {error}")[:300]
        click.echo(f"internal error ({shown}): please report it; `mycel --debug ...` shows where", err=True)
        code = INTERNAL
    elif isinstance(error, KeyboardInterrupt):
        click.echo("interrupted", err=True)
    else:
        click.echo(f"error: {one_line(str(error))}", err=True)
    return code


def _forget_stdout() -> None:
    """Nobody reads any more: let the flush at the end of Python go nowhere instead of complaining."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # not a file: a test's buffer
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option can be set by the environment, too: MYCEL_<COMMAND>_<OPTION>, as in MYCEL_RUN_MAX_TOKENS=50.",
)
@click.version_option(__version__, prog_name="mycel", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, envvar="MYCEL_DEBUG", help="Show a traceback with every error.")
def cli(debug: bool) -> None:
    """Large language models on a network of small machines.

    Peers share the blocks of a model and run it together. On one machine, to look around:

    \b
      mycel demo                  a network of four processes answers a prompt, and loses a node
      mycel up --nodes 4          such a network, until Ctrl-C; then, in another terminal:
      mycel run "your prompt"

    With several machines:

    \b
      mycel start --model DIR     on the first; it prints the line for the others:
      mycel join mycel1:...       on each of them

    To train one:

    \b
      mycel train RECIPE          on this machine; `mycel start --train RECIPE` and `mycel join` on several
    """
    del debug  # read by Commands.invoke, where errors end


def main() -> None:
    """The program's entry point."""
    for stream in (sys.stdout, sys.stderr):
        # A model may write what the terminal's encoding cannot say.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    cli(prog_name="mycel")
