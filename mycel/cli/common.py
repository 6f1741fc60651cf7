"""What the commands share: where things lie, which swarm is meant, how values are written, and how to speak.

Ring: shell.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mycel.cli.exits import printable
from mycel.protocols.errors import AccessDenied, ConfigError

if TYPE_CHECKING:
    from mycel.swarm.invite import Invite
    from mycel.swarm.training.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

# ---------------------------------------------------------------------------------------------------------- speaking


def say(text: str) -> None:
    """Progress and tables: to stderr."""
    click.echo(printable(text), err=True)


def write(text: str) -> None:
    """A model's text or a result, to stdout, at once. A terminal gets nothing from a peer that it would obey."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------------------------- places


def data_home() -> Path:
    """Where keys and downloaded models are kept."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "mycel"


def state_home() -> Path:
    """Where what is only true for now is kept: the present swarm's invite, and the logs of `mycel up`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mycel"


def make_directory(path: Path) -> Path:
    """`path`, made if it was not there, for its owner alone. Raises ConfigError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except PermissionError as error:
        raise AccessDenied(f"cannot make the directory {path}: {error.strerror}") from None
    except OSError as error:
        raise ConfigError(f"cannot make the directory {path}: {error.strerror}") from None
    return path


@contextlib.contextmanager
def exclusive(directory: Path, option: str) -> Iterator[None]:
    """Hold `directory` for this process: two nodes with one key would be one peer in two places.

    The lock ends with the process, however it ends. Raises ConfigError if another process has it.
    """
    path = make_directory(directory) / "lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise AccessDenied(f"cannot write in {directory}: {error.strerror}") from None
    with file:
        try:
            _lock(file.fileno())
        except OSError:
            raise ConfigError(f"another mycel uses {directory}: give this one its own with {option}") from None
        yield


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ------------------------------------------------------------------------------------------------------------- invites


def invite_file() -> Path:
    return state_home() / "invite"


def remember_invite(text: str) -> None:
    """Let later commands of this user find the swarm. Whole or not at all, and for this user's eyes alone."""
    path = invite_file()
    make_directory(path.parent)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".invite-")  # mode 0600
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
        Path(temporary).replace(path)
    except OSError as error:
        raise AccessDenied(f"cannot write {path}: {error.strerror}") from None


def forget_invite(text: str, instead: str | None = None) -> None:
    """This invite leads nowhere any more; one that was remembered since stays, else `instead` takes its place."""
    try:
        remembered = invite_file().read_text("ascii", "replace").strip()
        if remembered == text and instead is not None:
            remember_invite(instead)
        elif remembered == text:
            invite_file().unlink()
    except (OSError, ConfigError):
        return  # what cannot be read or written now misleads nobody but this user, and only until it expires


def find_invite(given: str | None) -> Invite:
    """The swarm that a command is about: --invite (or MYCEL_INVITE), else the last one of this user on this machine.

    Raises ConfigError if there is none, or if it is damaged or expired.
    """
    import time

    from mycel.swarm.invite import parse_invite

    if given is None:
        try:
            given = invite_file().read_text("ascii", "replace")
        except FileNotFoundError:
            raise ConfigError("no swarm is known here: start one with `mycel up`, or name one with --invite") from None
        except OSError as error:
            raise AccessDenied(f"cannot read {invite_file()}: {error.strerror}") from None
    return parse_invite(given, time.time())


# ------------------------------------------------------------------------------------------------------------- recipes


def read_recipe(path: Path) -> Recipe:
    """The recipe of a training run, all of it checked. Raises ConfigError, one line."""
    from mycel.swarm.training.recipe import parse_recipe

    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {path}") from None
    except OSError as error:
        raise AccessDenied(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no recipe: it is not UTF-8 text") from None
    return parse_recipe(text, str(path))


# ------------------------------------------------------------------------------------------------------------- options


def blocks(value: str) -> tuple[int, int]:
    """A half-open range of blocks, written A:B."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", value)
    if match is None or int(match[1]) >= int(match[2]):
        raise click.BadParameter(f"{value!r} is not a range of blocks: write A:B for the blocks from A up to but not B")
    return int(match[1]), int(match[2])


class Number(click.FloatRange):
    """A number in a range, which "nan" is not: no comparison keeps it out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isnan(number := super().convert(value, param, ctx)):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


def size_bytes(value: str) -> int:
    """A number of bytes, written 800MB, 8GB or 8GiB."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]?I?)B?", value.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a size: write 800MB, 8GB or 8GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def invite_option(command: F) -> F:
    return click.option(
        "--invite",
        envvar="MYCEL_INVITE",
        metavar="INVITE",
        help="The swarm to ask, as `mycel start` printed it. [default: the last one used on this machine]",
    )(command)


def timeout_option(command: F) -> F:
    return click.option(
        "--timeout",
        type=Number(0.1, 86400),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait without progress.",
    )(command)


def data_dir_option(command: F) -> F:
    return click.option(
        "--data-dir",
        envvar="MYCEL_DATA_DIR",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Where the key and downloaded files are kept. [default: ~/.local/share/mycel]",
    )(command)


def cache_dir(data_dir: Path | None) -> Path:
    """Where downloaded files lie, a node's and a client's alike."""
    return (data_dir or data_home()) / "cache"


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
