"""`mycel doctor`: why a node cannot be reached or finds no peers, and what to do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from mycel.cli.common import data_dir_option, data_home, exclusive, invite_file, say, write
from mycel.cli.exits import FAILURE, NO_ROUTE, printable
from mycel.protocols.errors import AccessDenied, ConfigError

if TYPE_CHECKING:
    from mycel.node.diagnosis import Check
    from mycel.node.doctor import Question

_MARKS = {"ok": "✓", "warn": "!", "fail": "✗", "skip": "-"}
_PLAIN_MARKS = {"ok": "+", "warn": "!", "fail": "X", "skip": "-"}  # for a terminal that does not have those
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": None}
_NAME_WIDTH = 11


@click.command()
@click.argument("invite", nargs=-1)
@click.option("--listen", multiple=True, metavar="ADDRESS", help="Where the node listens or shall listen; as for join.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="The port that it listens on.")
@click.option("--announce", multiple=True, metavar="ADDRESS", help="An address that others are told; as for join.")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(ctx: click.Context, /, *, invite: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Find out why a node cannot be reached, or finds no peers.

    Looks at this machine, then at the swarm of INVITE (else at the last one used here), has its peers dial back, and
    says what to do. Give --port, --listen and --announce as to `mycel join`. Starts and changes nothing.
    """
    if options["listen"] and options["port"] is not None:
        raise click.UsageError("--listen names a port already: leave out --port", ctx)
    question = _question("".join(invite) or os.environ.get("MYCEL_INVITE") or None, **options)
    from mycel.node.diagnosis import cause, conclusion, swarm_is_reached
    from mycel.node.doctor import examine

    checks = trio.run(examine, question, _ignore if as_json else _show, _wait)
    _forget_waiting()
    if as_json:
        write(json.dumps(as_dict(checks, conclusion(checks))) + "\n")
    else:
        first = cause(checks)
        advice = f"What to do: {printable(first.advice)}\n" if first else ""
        write(f"\n{printable(conclusion(checks))}\n{advice}")
    failed = any(check.mark == "fail" for check in checks)
    ctx.exit(NO_ROUTE if not swarm_is_reached(checks) else FAILURE if failed else 0)


def _question(
    invite: str | None, *, listen: tuple[str, ...], port: int | None, announce: tuple[str, ...], data_dir: Path | None
) -> Question:
    from mycel.node.doctor import Question
    from mycel.node.endpoints import checked_announce

    directory = data_dir or data_home()
    no_invite = ""
    if invite is None:
        try:
            invite = invite_file().read_text("ascii", "replace")
        except FileNotFoundError:
            no_invite = "no swarm is known here"
        except OSError as error:
            no_invite = f"cannot read {invite_file()}: {error.strerror}"
    return Question(
        data_dir=directory,
        listen=listen or (f"/ip4/0.0.0.0/tcp/{port or 0}",),
        announce=checked_announce(announce),
        invite=invite,
        no_invite=no_invite,
        running=_is_running(directory),
        wanted=bool(listen or port or announce),
    )


def _is_running(directory: Path) -> bool:
    """Whether a node holds the lock of its data directory."""
    if not (directory / "lock").exists():
        return False
    try:
        with exclusive(directory, "--data-dir"):
            return False
    except AccessDenied:
        return False  # told by the check of the data directory
    except ConfigError:
        return True


def _show(check: Check) -> None:
    _forget_waiting()
    for line in lines(check):
        click.echo(line)  # which leaves the colours out where they are not for


def _ignore(check: Check) -> None:
    """Told at the end, all together."""


def lines(check: Check) -> list[str]:
    """A finding for people, the advice indented beneath it."""
    try:
        "".join(_MARKS.values()).encode(sys.stdout.encoding or "ascii")
        mark = _MARKS[check.mark]
    except UnicodeEncodeError:
        mark = _PLAIN_MARKS[check.mark]
    found = [f"{click.style(mark, fg=_COLOURS[check.mark])} {check.name.ljust(_NAME_WIDTH)} {printable(check.found)}"]
    return [*found, f"{' ' * (_NAME_WIDTH + 3)}{printable(check.advice)}"] if check.advice else found


def as_dict(checks: Sequence[Check], said: str) -> dict[str, Any]:
    """The findings for programs."""
    return {
        "checks": [
            {"name": check.name, "mark": check.mark, "found": check.found, "advice": check.advice} for check in checks
        ],
        "conclusion": said,
    }


def _wait(what: str, at_most_s: float) -> None:
    """Say what is waited for: on a terminal in a line that the next one replaces."""
    text = f"... {what}, {at_most_s:.0f} s at most"
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[2K{printable(text)}", nl=False, err=True)
    else:
        say(text)


def _forget_waiting() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[2K", nl=False, err=True)
