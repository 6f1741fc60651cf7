"""`mycel up` with faults: real processes, shaped links, a kill, and a verdict; nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

PATIENCE_S = 150.0
SHAPED = ("up", "--nodes", "4", "--rtt", "10ms", "--jitter", "4ms", "--loss", "0.1%", "--bandwidth", "100mbit")


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MYCEL_")}
    places = {"XDG_STATE_HOME": str(home / "state"), "XDG_DATA_HOME": str(home / "data")}
    return subprocess.Popen(
        [sys.executable, "-m", "mycel", *arguments],
        env={**kept, **places, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_under_load_costs_no_request_and_no_token(tmp_path: Path) -> None:
    process = start(tmp_path, *SHAPED, "--kill", "1/10s", "--seed", "3", "--for", "10s", "--load", "4", "--json")
    said, events = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, events
    assert "Traceback" not in events
    verdict = json.loads(said)
    assert verdict["ok"], verdict["reason"]
    assert verdict["done"] >= 4
    assert verdict["failed"] == verdict["cut_short"] == verdict["tokens_different"] == 0
    assert verdict["tokens_compared"] == verdict["tokens"] > 100
    assert verdict["faults"] == {"kill": 1, "stop": 0, "leave": 0}
    # Who took the route over the killed node lost a hop, and went on; the others did not notice.
    n_replaced = len(re.findall(r"client \d: node-\d replaced: .*; next token [\d.]+ s after the kill", events))
    assert verdict["failovers"] == {"kill": n_replaced, "stop": 0, "leave": 0}
    assert (verdict["pauses"]["kill"] or {"count": 0})["count"] == n_replaced
    assert verdict["unexplained"] == []
    assert verdict["first_token"]["p50_s"] > 0.01
    assert re.search(r"node-\d \(\d:\d\) killed", events)


def test_ctrl_c_gives_the_verdict_so_far(tmp_path: Path) -> None:
    process = start(tmp_path, "up", "--nodes", "2", "--kill", "1/8s", "--seed", "0")
    assert process.stderr is not None
    try:
        # The first kill of this seed comes after some seconds of load, and its node is on its way back.
        assert any(" killed" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        said, events = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, events
    rows = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert rows["verdict"].startswith("PASS")
    assert int(rows["requests"].split()[0]) > 0
    assert rows["faults"] == "1 killed"
    assert "Traceback" not in events


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--rtt", "80"), "80ms"),
        (("--kill", "sometimes", "--for", "1s"), "1/20s"),
        (("--kill", "1/s", "--replicas", "1"), "--replicas"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    process = start(tmp_path, "up", *arguments)
    said, events = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, said) == (78, "")
    assert events.count("\n") == 1
    assert events.startswith("error: ")
    assert word in events
