"""The architecture, read from the source: what may be imported where, what may be called nowhere, which links exist.

import-linter holds the rooms and the rings (the last tests here break each contract once, to show that it bites); this
file holds what a graph of imports cannot see.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.rings import FORBIDDEN, module_name, stated_ring

ROOT = Path(__file__).resolve().parent.parent
MYCEL = ROOT / "mycel"
ROOMS = ("cli", "node", "swarm", "dht", "security", "protocols")
LIBP2P_ADAPTER = "mycel.node.libp2p_transport"
# A process of its own, for a library that is written for another event loop.
DHT_PROCESS = "mycel.node.hivemind_engine.dht_process"

# These decide, so they are pure; add a module here to keep its "Ring: pure" line from ever being weakened.
MUST_BE_PURE = (
    "mycel.protocols.errors",
    "mycel.protocols.ids",
    "mycel.protocols.messages",
    "mycel.protocols.codec",
    "mycel.protocols.wire",
    "mycel.protocols.ports",
    "mycel.protocols.hop",
    "mycel.security.envelope",
    "mycel.dht.keys",
    "mycel.dht.records",
    "mycel.dht.store",
    "mycel.dht.routing_table",
    "mycel.dht.lookup",
    "mycel.swarm.manifest",
    "mycel.swarm.view",
    "mycel.swarm.routing",
    "mycel.swarm.placement",
    "mycel.swarm.throughput",
    "mycel.swarm.rebalance",
    "mycel.swarm.claims",
    "mycel.swarm.moves",
    "mycel.swarm.estimate",
    "mycel.swarm.failures",
    "mycel.swarm.handover",
    "mycel.swarm.liveness",
    "mycel.swarm.chaos",
    "mycel.swarm.invite",
    "mycel.swarm.training.actions",
    "mycel.swarm.training.members",
    "mycel.swarm.training.moving",
    "mycel.swarm.training.numbers",
    "mycel.swarm.training.order",
    "mycel.swarm.training.plan",
    "mycel.swarm.training.progress",
    "mycel.swarm.training.recipe",
    "mycel.swarm.training.schedule",
    "mycel.swarm.training.stages",
    "mycel.swarm.training.step",
    "mycel.swarm.training.walks",
    "mycel.swarm.training.wiring",
    "mycel.protocols.training",
    "mycel.swarm.zeroth.byte",
    "mycel.swarm.zeroth.chain",
    "mycel.swarm.zeroth.choose",
    "mycel.swarm.zeroth.compact",
    "mycel.swarm.zeroth.course",
    "mycel.swarm.zeroth.defence",
    "mycel.swarm.zeroth.directions",
    "mycel.swarm.zeroth.lattice",
    "mycel.swarm.zeroth.lines",
    "mycel.swarm.zeroth.log",
    "mycel.swarm.zeroth.options",
    "mycel.swarm.zeroth.replay",
    "mycel.swarm.zeroth.rule",
    "mycel.swarm.zeroth.run_log",
    "mycel.swarm.zeroth.seeds",
    "mycel.swarm.zeroth.shortcut",
)
# Where most decisions live, a module has to say where it stands; in node and cli the shell is the rule.
ROOMS_THAT_STATE_RINGS = ("protocols", "security", "dht", "swarm")
# Loading any of these from bytes runs what the bytes say.
UNPICKLERS = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve", "_pickle"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
PICKLING_CALLS = {"torch.load", "torch.save", "torch.package", "numpy.load", "numpy.save", "np.load", "np.save"}
EFFECTS_WITHOUT_IMPORT = {"open", "input", "print", "breakpoint"}
# The one configuration, and the command line, which hands an environment to the processes that it starts.
READS_ENVIRONMENT = ("mycel.cli.", "mycel.node.config")

SOURCES = {module_name(file, MYCEL): file for file in sorted(MYCEL.rglob("*.py"))}
TESTS = {module_name(file, ROOT / "tests"): file for file in sorted((ROOT / "tests").rglob("*.py"))}
TREES = {name: ast.parse(file.read_text("utf-8"), str(file)) for name, file in SOURCES.items()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything imported, wherever in the file: `from a import b` is "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`torch.load` for the expression torch.load; "" for anything that is not a plain dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The tree less its `if TYPE_CHECKING:` blocks, which name types and run never."""

    class Remover(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if dotted(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    copy = ast.parse(ast.unparse(tree))
    Remover().visit(copy)
    return copy


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "mycel" and parts[1] in ROOMS else None


def in_package(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# --------------------------------------------------------------------------------- what each rule finds in one module


def unsafe_loading(tree: ast.Module) -> list[str]:
    found = [name for name in imported(tree) if in_package(name, UNPICKLERS) or name in PICKLING_CALLS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in RUNS_TEXT:
            found.append(f"{dotted(node.func)}() in line {node.lineno}")
        elif isinstance(node, ast.Attribute) and dotted(node) in PICKLING_CALLS:
            found.append(f"{dotted(node)} in line {node.lineno}")
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if refused else [f"{node.arg} in line {node.value.lineno}"]
    return found


def second_event_loop(tree: ast.Module) -> list[str]:
    return [name for name in imported(tree) if in_package(name, ("asyncio", "anyio", "uvloop"))]


def effects(tree: ast.Module) -> list[str]:
    """What a decision may not do though it imports nothing for it: await, open, print."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith):
            found.append(f"{type(node).__name__} in line {node.lineno}")
        elif isinstance(node, ast.Call) and dotted(node.func) in EFFECTS_WITHOUT_IMPORT:
            found.append(f"{dotted(node.func)}() in line {node.lineno}")
    return found


def environment_reads(tree: ast.Module) -> list[str]:
    names = {"os.environ", "os.getenv", "os.putenv"}
    calls = [dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [name for name in (*imported(tree), *calls) if name in names]


def imports_upwards(module: str, tree: ast.Module) -> list[str]:
    room = room_of(module)
    if room is None:
        return []
    above = {f"mycel.{name}" for name in ROOMS[: ROOMS.index(room)]}
    return [name for name in imported(tree) if in_package(name, above)]


def imports_through_links(tree: ast.Module) -> list[str]:
    return [name for name in imported(tree) if name.split(".")[0] in ROOMS]


# ------------------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize("room", ROOMS)
def test_the_top_level_links_to_each_room(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink(), f"{room} should be a link to mycel/{room}"
    assert link.readlink() == Path("mycel") / room
    assert (link / "__init__.py").is_file()


def test_mycel_has_the_six_rooms_and_no_other() -> None:
    packages = {path.parent.name for path in MYCEL.glob("*/__init__.py")}
    assert packages == set(ROOMS)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_nothing_unpickles_or_runs_text(module: str) -> None:
    assert unsafe_loading(TREES[module]) == []


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {DHT_PROCESS}))
def test_trio_is_the_only_event_loop(module: str) -> None:
    assert second_event_loop(TREES[module]) == []


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_import_goes_up_the_house_even_for_typing(module: str) -> None:
    assert imports_upwards(module, TREES[module]) == []


@pytest.mark.parametrize("name", sorted({**SOURCES, **TESTS}))
def test_nothing_imports_through_a_link(name: str) -> None:
    file = {**SOURCES, **TESTS}[name]
    assert imports_through_links(ast.parse(file.read_text("utf-8"))) == []


def test_libp2p_is_imported_by_its_adapter_alone() -> None:
    importers = {module for module, tree in TREES.items() if any(in_package(n, ("libp2p",)) for n in imported(tree))}
    assert [module for module in sorted(importers) if not in_package(module, (LIBP2P_ADAPTER,))] == []


@pytest.mark.parametrize("module", [name for name in sorted(SOURCES) if stated_ring(SOURCES[name].read_text("utf-8"))])
def test_a_module_keeps_to_the_ring_that_it_states(module: str) -> None:
    ring = stated_ring(SOURCES[module].read_text("utf-8"))
    if ring == "shell":
        return
    runs = without_type_checking(TREES[module])
    assert [name for name in imported(runs) if in_package(name, FORBIDDEN[ring])] == []
    assert effects(runs) == []


@pytest.mark.parametrize("module", [name for name in MUST_BE_PURE if name in SOURCES])
def test_what_decides_is_pure(module: str) -> None:
    assert stated_ring(SOURCES[module].read_text("utf-8")) == "pure"


def test_the_rooms_that_decide_state_their_rings() -> None:
    silent = [
        name
        for name, file in SOURCES.items()
        if room_of(name) in ROOMS_THAT_STATE_RINGS
        and file.name != "__init__.py"
        and stated_ring(file.read_text("utf-8")) is None
    ]
    assert silent == []


@pytest.mark.parametrize("module", [name for name in sorted(SOURCES) if not name.startswith(READS_ENVIRONMENT)])
def test_the_environment_is_read_in_one_place(module: str) -> None:
    assert environment_reads(TREES[module]) == []


@pytest.mark.parametrize("name", sorted(TESTS))
def test_no_test_sleeps_in_real_time(name: str) -> None:
    tree = ast.parse(TESTS[name].read_text("utf-8"))
    assert [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) == "time.sleep"
    ] == []


def test_the_command_line_starts_without_torch_and_libp2p() -> None:
    """Each takes a second to import, and `mycel --help` needs neither."""
    program = "import sys, mycel.cli.main; print(sorted({'torch', 'transformers', 'libp2p'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- the rules do bite


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (unsafe_loading, "import pickle"),
        (unsafe_loading, "from pickle import loads"),
        (unsafe_loading, "def f(text):\n    return eval(text)"),
        (unsafe_loading, "import torch\nmodel = torch.load('x')"),
        (unsafe_loading, "from torch import load"),
        (unsafe_loading, "f(trust_remote_code=True)"),
        (second_event_loop, "def f():\n    import asyncio.events"),
        (effects, "async def f(x):\n    await x"),
        (effects, "def f():\n    return open('x')"),
        (environment_reads, "import os\nx = os.environ['X']"),
        (environment_reads, "from os import environ"),
        (imports_through_links, "from node.config import Config"),
        (lambda tree: imports_upwards("mycel.dht.keys", tree), "from mycel.swarm.view import View"),
    ],
)
def test_a_breach_is_found(rule: Callable[[ast.Module], list[str]], source: str) -> None:
    assert rule(ast.parse(source)) != []


def test_the_model_method_eval_is_no_breach() -> None:
    assert unsafe_loading(ast.parse("model.eval()\nre.compile('x')\nf(trust_remote_code=False)")) == []


@pytest.mark.parametrize(
    ("breach", "contract"),
    [
        ({"mycel/protocols/late.py": '"""Ring: shell."""\nimport mycel.swarm.late2\n'}, "The house"),
        ({"mycel/dht/late.py": '"""Decide.\n\nRing: pure.\n"""\nimport mycel.dht.late2\n'}, "Ring pure"),
        ({"mycel/swarm/late.py": '"""Sum.\n\nRing: algorithms.\n"""\nimport time\n'}, "Ring algorithms"),
        ({"mycel/swarm/late.py": '"""Ring: shell."""\nimport libp2p.host\n'}, "libp2p is known"),
        ({"mycel/attic/__init__.py": '"""A seventh room."""\n'}, "The house"),
    ],
)
def test_import_linter_finds_a_breach(tmp_path: Path, breach: dict[str, str], contract: str) -> None:
    """A small house of its own under the real contracts, with one file that breaks one of them."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    sound = {
        "mycel/__init__.py": "",
        **{f"mycel/{room}/__init__.py": "" for room in ROOMS},
        "mycel/_version.py": "",
        "mycel/__main__.py": "",
        "mycel/dht/late2.py": '"""Ring: shell."""\nimport time\n',
        "mycel/swarm/late2.py": '"""Ring: algorithms."""\nimport torch\n',
        "mycel/protocols/said.py": '"""Ring: pure."""\nimport struct\n',
        "mycel/node/libp2p_transport/__init__.py": "",
        "mycel/node/libp2p_transport/host.py": "import libp2p\n",
    }
    lint = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    for name, source in sound.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, "utf-8")
    before = subprocess.run(lint, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert before.returncode == 0, before.stdout + before.stderr

    for name, source in breach.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, "utf-8")
    after = subprocess.run(lint, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert after.returncode == 1, after.stdout + after.stderr
    broken = [line for line in after.stdout.splitlines() if " BROKEN" in line]
    assert len(broken) == 1, after.stdout
    assert broken[0].startswith(contract)
