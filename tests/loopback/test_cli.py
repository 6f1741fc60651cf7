"""The commands as a person meets them: real processes, a real network on 127.0.0.1, exit codes, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mycel.node.demo import demo_model_dir
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from mycel.swarm.invite import make_invite

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

END_OF_TEXT = 0  # of the demo model
PROMPT = "The for statement is used to"
LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/0")
PATIENCE_S = 120.0
# How long a node may take to leave once its parent is gone; a shared machine stalls.
ORPHAN_S = 30.0


@dataclass(frozen=True, slots=True)
class Home:
    """A user's directories, and the commands typed in them."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MYCEL_")}
        places = {"XDG_STATE_HOME": str(self.directory / "state"), "XDG_DATA_HOME": str(self.directory / "data")}
        return {**kept, **places, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return subprocess.run(
            [sys.executable, "-m", "mycel", *arguments],
            env=self.environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def open(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that runs until it is told to end."""
        return subprocess.Popen(
            [sys.executable, "-m", "mycel", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def invite(self) -> Path:
        return self.directory / "state" / "mycel" / "invite"


def first_line(process: subprocess.Popen[str]) -> str:
    """What a command says once it is ready; if it ends instead, its last words fail the test."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        _, errors = process.communicate(timeout=PATIENCE_S)
        pytest.fail(f"ended with {process.returncode}: {errors}")
    return line


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    """Its exit code after a signal, and what it had said on stderr."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, errors


def wait_until_gone(pids: Sequence[int]) -> None:
    """Wait for processes that are not our children to end; those that stay are killed and fail the test."""
    left = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            process.wait(ORPHAN_S)
        except psutil.NoSuchProcess:
            continue
        except psutil.TimeoutExpired:
            # Orphans in a container may have nobody to bury them.
            if process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                left.append(pid)
    assert left == [], "orphans were left"


def assert_told(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It ended with `code`, and the last of what it said is one line with these words."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert [word for word in words if word not in last] == [], last
    assert done.stdout == ""


@dataclass(frozen=True, slots=True)
class Up:
    """A running `mycel up` and what it said."""

    home: Home
    process: subprocess.Popen[str]
    said: dict[str, Any]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = Home(tmp_path_factory.mktemp("home"))
    process = home.open("up", "--nodes", "2", "--json")
    try:
        said = json.loads(first_line(process))
        yield Up(home, process, said)
        pids = [node["pid"] for node in said["nodes"]]
        code, errors = end(process)
        assert code == 130, errors
        assert "Traceback" not in errors
        assert [pid for pid in pids if psutil.pid_exists(pid)] == []
        assert not home.invite.exists(), "the invite to a swarm that is no more"
    finally:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------------------------ reading


def test_status_says_who_serves_what(up: Up) -> None:
    done = up.home.run("status", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["coverage"] == [1] * 8
    assert value["complete"]
    assert not value["survives_any_loss"]
    assert value["stream_tokens_per_s"] > 0
    served = {peer["peer"]: peer["blocks"] for peer in value["peers"]}
    assert served == {node["peer"]: node["blocks"] for node in up.said["nodes"]}
    plain = up.home.run("status")
    assert "coverage      11111111" in plain.stdout
    assert plain.stderr == ""


def test_run_gives_the_tokens_of_the_unsplit_model_over_the_whole_route(up: Up) -> None:
    arguments = ("--json", "--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "24")
    done = up.home.run("run", PROMPT, *arguments)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["tokens"] == reference(PROMPT, 24)
    assert [hop["blocks"] for hop in answer["route"]] == [node["blocks"] for node in up.said["nodes"]]
    assert all(hop["compute_ms"] > 0 for hop in answer["route"])
    assert answer["finish"] == ("stop" if answer["tokens"][-1] == END_OF_TEXT else "length")
    assert answer["replaced"] == []
    assert answer["timings"]["first_token_s"] > 0


def reference(prompt: str, n_tokens: int) -> list[int]:
    """Greedy, by transformers, in one process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = str(demo_model_dir())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt").input_ids
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "repetition_penalty": 1.0}
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=n_tokens, attention_mask=torch.ones_like(ids), **greedy)
    return [int(token) for token in made[0, ids.shape[1] :]]


def test_text_goes_to_stdout_and_the_rest_to_stderr(up: Up) -> None:
    arguments = ("run", PROMPT, "--seed", "5", "--max-tokens", "20")
    done = up.home.run(*arguments, "--show-route")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].split() == ["hop", "peer", "blocks", "compute", "ms", "queue", "ms", "network", "ms"]
    spans = ["{}:{}".format(*node["blocks"]) for node in up.said["nodes"]]
    assert [line.split()[2] for line in lines[1:-1]] == spans
    assert lines[-1].startswith("20 tokens, ")
    assert lines[-1].endswith("0 hops replaced")
    again = up.home.run(*arguments)
    assert again.stdout == done.stdout
    assert len(done.stdout) > 20
    assert len(again.stderr.splitlines()) == 1


def test_several_prompts_are_answered_in_their_order(up: Up) -> None:
    prompts = [PROMPT, "A class definition", "-"]
    done = up.home.run("run", *prompts, "--json", "--seed", "2", "--max-tokens", "8", text="When an exception\n")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == [PROMPT, "A class definition", "When an exception"]
    alone = up.home.run("run", "A class definition", "--json", "--seed", "2", "--max-tokens", "8")
    assert json.loads(alone.stdout)["tokens"] == answers[1]["tokens"]


def test_a_stop_text_ends_the_answer(up: Up) -> None:
    whole = up.home.run("run", PROMPT, "--seed", "5", "--max-tokens", "20").stdout
    word = whole.split()[3]
    cut = up.home.run("run", PROMPT, "--seed", "5", "--max-tokens", "20", "--stop", word)
    assert cut.returncode == 0, cut.stderr
    assert cut.stdout.strip() == whole[: whole.index(word)].strip()


def test_a_conversation_is_read_line_by_line(up: Up) -> None:
    done = up.home.run("chat", "--seed", "1", "--max-tokens", "8", text="What is a class?\n\nAnd a module?\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    assert done.stderr == ""


def test_ctrl_c_ends_an_answer_with_130(up: Up) -> None:
    process = up.home.open("run", PROMPT, "--seed", "5", "--max-tokens", "900")
    assert process.stdout is not None
    assert process.stdout.read(1)
    code, errors = end(process)
    assert (code, errors) == (130, "interrupted\n")


def test_a_reader_that_goes_away_ends_an_answer_quietly(up: Up) -> None:
    process = up.home.open("run", PROMPT, "--seed", "5", "--max-tokens", "900")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(PATIENCE_S) == 141
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""


# ------------------------------------------------------------------------------------------------------------- joining


def test_a_node_joins_with_nothing_but_the_invite(up: Up, tmp_path: Path) -> None:
    """It fetches the weights of its blocks from the others, and leaves on Ctrl-C."""
    directory = tmp_path / "node"
    process = up.home.open("join", up.said["invite"], "--data-dir", str(directory), "--max-blocks", "3", *LISTEN)
    try:
        assert first_line(process).startswith("mycel join mycel1:")
        status = json.loads(up.home.run("status", "--json").stdout)
        assert sorted(status["coverage"]) == [1] * 5 + [2] * 3
        second = up.home.run("join", up.said["invite"], "--data-dir", str(directory), *LISTEN)
        assert_told(second, 78, "another mycel uses", "--data-dir")
        code, errors = end(process)
    finally:
        process.kill()
        process.communicate()
    assert code == 130, errors
    assert "can host all 8 blocks" in errors
    assert "the weakest stretch" in errors
    assert "verified" in errors
    assert "Traceback" not in errors
    assert [path.name for path in directory.rglob("*") if path.name.startswith((".", "tmp"))] == []
    left = json.loads(up.home.run("status", "--json").stdout)
    assert left["coverage"] == [1] * 8


# -------------------------------------------------------------------------------------------------------------- ending


def test_a_sigkill_of_up_leaves_no_orphan(tmp_path: Path) -> None:
    home = Home(tmp_path)
    process = home.open("up", "--nodes", "2", "--json")
    try:
        pids = [node["pid"] for node in json.loads(first_line(process))["nodes"]]
    finally:
        process.kill()
        process.communicate()
    wait_until_gone(pids)


def test_ctrl_c_while_up_starts_leaves_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    process = home.open("up", "--nodes", "2")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("starting 2 nodes")
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    code, errors = end(process)
    assert code == 130, errors
    assert "Traceback" not in errors
    wait_until_gone(children)
    assert not home.invite.exists()


def test_up_tells_of_a_node_that_dies(tmp_path: Path) -> None:
    home = Home(tmp_path)
    process = home.open("up", "--nodes", "1", "--json")
    try:
        (node,) = json.loads(first_line(process))["nodes"]
        os.kill(node["pid"], signal.SIGKILL)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1
    assert f"node-1 (pid {node['pid']}) ended with exit code -9" in errors
    assert "node.serving" in errors, "the end of its log"
    assert errors.splitlines()[-1] == "error: all nodes have ended"


def test_the_demo_ends_well(tmp_path: Path) -> None:
    done = Home(tmp_path).run("demo")
    assert done.returncode == 0, done.stderr
    first, second = (PROMPT + text for text in done.stdout.split(PROMPT)[1:])
    assert first == second
    assert "1 hop replaced" in done.stderr
    assert "killed" in done.stderr
    assert "the text is the same" in done.stderr


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the small model, to be damaged."""
    return shutil.copytree(demo_model_dir(), tmp_path / "model")


def nothing_half_written(directory: Path) -> bool:
    return not [path for path in directory.rglob("*") if path.is_file() and path.name not in ("lock", "identity.key")]


def test_no_such_model(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert_told(home.run("start", "--model", str(tmp_path / "none"), *LISTEN), 78, "none")
    assert_told(home.run("up", "--model", str(tmp_path / "none")), 78, "none")
    assert nothing_half_written(tmp_path / "data")


def test_damaged_safetensors(tmp_path: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    home = Home(tmp_path)
    assert_told(home.run("start", "--model", str(model), *LISTEN), 78, "model.safetensors")
    weights.write_bytes(b"\xff" * 1000)
    assert_told(home.run("start", "--model", str(model), *LISTEN), 78, "model.safetensors")
    assert nothing_half_written(tmp_path / "data")


def test_wrong_tokenizer(tmp_path: Path, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["vocab"] = {token: 10 * number for token, number in tokenizer["model"]["vocab"].items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    assert_told(Home(tmp_path).run("start", "--model", str(model), *LISTEN), 78, "tokenizer.json")


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        done = Home(tmp_path).run("start", "--model", str(demo_model_dir()), "--listen", address)
    assert_told(done, 78, "port is in use")


@pytest.mark.parametrize("command", [("run", PROMPT), ("status",), ("chat",)], ids=lambda command: command[0])
def test_no_peers(tmp_path: Path, command: tuple[str, ...]) -> None:
    """An invite to a port where nobody listens (it was free a moment ago)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    identity = Identity.generate()
    here = PeerAddress(identity.peer_id, (f"/ip4/127.0.0.1/tcp/{port}",))
    invite = make_invite(identity, bytes(32), "gone", [here], now=1.6e9, lifetime_s=1e9).text
    done = Home(tmp_path).run(*command, "--invite", invite)
    assert_told(done, 69, "no peer of the invite answers", str(port))
    assert_told(Home(tmp_path).run("join", invite, *LISTEN), 69, "no peer of the invite answers")


def test_not_enough_memory(tmp_path: Path) -> None:
    home, model = Home(tmp_path), str(demo_model_dir())
    assert_told(home.run("start", "--model", model, "--memory", "1MB", *LISTEN), 78, "not enough memory", "1.0 MB")
    asked = home.run("start", "--model", model, "--memory", "1MB", "--blocks", "0:4", *LISTEN)
    assert_told(asked, 78, "not enough memory", "0:4")


def test_not_enough_disk(up: Up, tmp_path: Path) -> None:
    """The whole way, on a disk that says it is full."""
    program = (
        "import shutil, sys\n"
        "real = shutil.disk_usage\n"
        "shutil.disk_usage = lambda path: real(path)._replace(free=10**6)\n"
        "from mycel.cli.main import main\n"
        "main()\n"
    )
    directory = tmp_path / "node"
    done = subprocess.run(
        [sys.executable, "-c", program, "join", up.said["invite"], "--data-dir", str(directory), *LISTEN],
        env=Home(tmp_path).environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert_told(done, 78, "not enough disk")
    assert list(directory.rglob("*.safetensors")) == []


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "node" / "identity.key"
    key.parent.mkdir()
    key.write_bytes(bytes(32))
    key.chmod(0o644)
    done = Home(tmp_path).run("start", "--model", str(demo_model_dir()), "--data-dir", str(key.parent), *LISTEN)
    assert_told(done, 77, "chmod 600")


def test_up_passes_on_why_a_node_did_not_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        done = Home(tmp_path).run("up", "--nodes", "1", "--listen", address)
    assert_told(done, 78, "node-1 did not start", "port is in use", "node-1.log")


def test_more_nodes_than_blocks(tmp_path: Path) -> None:
    assert_told(Home(tmp_path).run("up", "--nodes", "9"), 78, "9 nodes", "8 blocks")
