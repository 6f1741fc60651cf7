"""What we ship, shipped: the wheel of the tree and the wheel of the sdist, each installed alone and run.

An empty environment holds mycel's wheel and nothing else of its own; what mycel needs is borrowed from the environment
that runs the tests, through one line of a .pth file, so that nobody downloads torch a third time. Nothing here uses the
network or the source tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from mycel import __version__

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("cli", "node", "swarm", "dht", "security", "protocols")
ORIGINS = ("tree", "sdist")
# What a newcomer types first; each has to end well, and to say something that contains these words.
COMMANDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--version",), __version__),
    (("--help",), "Usage"),
    (("demo",), ""),
)
COMMAND_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with one wheel in it."""

    folder: Path
    elsewhere: Path  # an empty working directory, so that nothing is found by accident

    def program(self, name: str) -> str:
        return str(self.folder / ("Scripts" if os.name == "nt" else "bin") / name)

    def run(self, *command: str) -> str:
        """Standard output and error of a command that has to succeed."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        home = {"HOME": str(self.elsewhere), "XDG_CACHE_HOME": str(self.elsewhere), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [self.program(command[0]), *command[1:]],
            cwd=self.elsewhere,
            env={**kept, **home},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def build(kind: str, source: Path, target: Path) -> Path:
    """Build one archive with the hatchling that is installed here; its path."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(target), str(source)]
    done = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheels(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return {
        "tree": build("wheel", ROOT, tmp_path_factory.mktemp("tree")),
        "sdist": build("wheel", source, tmp_path_factory.mktemp("from-sdist")),
    }


@pytest.fixture(scope="module", params=ORIGINS)
def installed(
    request: pytest.FixtureRequest, wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    folder = tmp_path_factory.mktemp(f"environment-{request.param}")
    venv.create(folder, clear=True, with_pip=False, symlinks=os.name != "nt")
    environment = Installed(folder, tmp_path_factory.mktemp("elsewhere"))
    pip = [sys.executable, "-m", "pip", "--python", environment.program("python"), "--disable-pip-version-check"]
    wheel = str(wheels[request.param])
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", wheel], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # A path in a .pth file goes behind the environment's own, and a .pth found there (the editable mycel) is ignored.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (own / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed), "utf-8")
    return environment


def files_of(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, less its own inventory."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def test_both_wheels_hold_the_same_bytes(wheels: dict[str, Path]) -> None:
    tree, from_sdist = files_of(wheels["tree"]), files_of(wheels["sdist"])
    assert sorted(tree) == sorted(from_sdist)
    assert [name for name in tree if tree[name] != from_sdist[name]] == []


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheels: dict[str, Path]) -> None:
    """Every file of mycel/, the model among them, and no room at the top level, where it would overwrite another's."""
    names = set(files_of(wheels["tree"]))
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mycel").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    metadata = f"mycel-{__version__}.dist-info"
    assert {name for name in names if not name.startswith(f"{metadata}/")} == sources
    assert any(name.startswith("mycel/node/demo_model/") and name.endswith(".safetensors") for name in names)
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE", f"{metadata}/entry_points.txt"} <= names


def test_the_sdist_holds_the_rooms_once(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    top = {Path(member.name).parts[1] for member in members}
    assert top.isdisjoint(ROOMS)
    assert {"mycel", "tests", "tools", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "constraints.txt"} <= top
    assert not any(member.issym() or member.islnk() for member in members)


def test_mycel_comes_from_the_wheel(installed: Installed) -> None:
    where = installed.run("python", "-I", "-c", "import mycel; print(mycel.__file__)").strip()
    assert Path(where).is_relative_to(installed.folder)


@pytest.mark.parametrize(("arguments", "says"), COMMANDS, ids=[" ".join(arguments) for arguments, _ in COMMANDS])
def test_a_command_runs(installed: Installed, arguments: tuple[str, ...], says: str) -> None:
    assert says in installed.run("mycel", *arguments)


def test_python_m_mycel_is_the_same_program(installed: Installed) -> None:
    assert installed.run("python", "-I", "-m", "mycel", "--version") == installed.run("mycel", "--version")
