"""`mycel replay`: compute a run of one-byte updates again from its log, and say where it was forged if it was.

Ring: shell.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from mycel.cli.common import say, write
from mycel.cli.exits import CommandFailedError
from mycel.protocols.errors import AccessDenied, ConfigError

_LOG = "zeroth.log"


@click.command()
@click.argument("place", type=click.Path(path_type=Path, exists=True), metavar="DIR_OR_FILE")
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="The model that the run began with. [default: the one that a run's DIR holds]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay(place: Path, model: Path | None, as_json: bool) -> None:
    """Compute a tuned model's state again from the bytes that its peers signed.

    DIR_OR_FILE is a log, or the directory of a `mycel finetune`. Checks every signature and certificate on the way, and
    prints the SHA-256 of the state that they lead to: that which the peers had. A line that was forged or damaged is
    named, and the exit code is 1.
    """
    from mycel.node.zeroth.replaying import replay_file

    path = _log_of(place)
    directory = model or _model_of(place)
    try:
        found = replay_file(path, directory)
    except OSError as error:
        raise AccessDenied(f"cannot read {path}: {error.strerror}") from None
    if found.wrong:
        raise CommandFailedError(f"{path}: {found.wrong}")
    say(f"run {found.run}")
    say(f"{found.n_rounds} rounds, {found.n_updates} updates of {found.n_elements:,} parameters: all lines are right")
    if as_json:
        summary = {
            "run": found.run,
            "state": found.state,
            "rounds": found.n_rounds,
            "updates": found.n_updates,
            "log": str(path),
        }
        write(json.dumps(summary) + "\n")
    else:
        write(found.state + "\n")


def _log_of(place: Path) -> Path:
    """The longest log below a directory."""
    if place.is_file():
        return place
    logs = sorted(place.rglob(_LOG), key=lambda path: path.stat().st_size)
    if not logs:
        raise ConfigError(f"{place} holds no log of a run ({_LOG})")
    return logs[-1]


def _model_of(place: Path) -> Path:
    """The directory of the model that a run began with: its founder has made one."""
    if place.is_dir():
        found = sorted(
            path.parent for path in place.glob("*/runs/*/recipe.toml") if any(path.parent.glob("*.safetensors"))
        )
        if found:
            return found[0]
    raise ConfigError(f"which model did the run of {place} begin with? Say --model DIR")
