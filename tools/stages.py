"""Run the named stages of the checks, say how long each took, and close with one line that counts every test.

    python tools/stages.py lint types imports fast fuzz slow

All stages run even when an early one fails, so that one run shows everything; the exit status is 1 if any failed. It
needs nothing but the installed development environment, and works where there is no make.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "--quiet")
NOT_FUZZ = "--ignore=tests/fuzz"

STAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "lint": (
        (PYTHON, "-m", "ruff", "check", "."),
        (PYTHON, "-m", "ruff", "format", "--check", "."),
    ),
    "types": ((PYTHON, "-m", "mypy", "--strict", "mycel"),),
    "imports": ((str(Path(PYTHON).with_name("lint-imports")),),),
    "fast": ((*PYTEST, "-m", "not slow", "-n", "2", "--dist", "worksteal", NOT_FUZZ, "tests"),),
    "fuzz": ((*PYTEST, "tests/fuzz"),),
    # Two at a time, though many start processes of their own: most of their time they wait, and none asserts a speed.
    "slow": ((*PYTEST, "-m", "slow", "-n", "2", "--dist", "worksteal", "--durations=15", NOT_FUZZ, "tests"),),
    "packages": ((*PYTEST, "tests/packaging"),),
}
# libp2p depends on trio-typing, whose stubs of 2022 hide the types that these packages carry today.
HIDDEN_BY_OLD_STUBS = ("outcome", "trio")
# A stage that hangs is a failure with a name, long before whoever runs this loses patience.
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one stage came to: whether it succeeded, and its wall time."""

    stage: str
    ok: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Tally:
    """Tests counted over several runs of pytest."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0


def own_types() -> Path:
    """A folder for MYPYPATH, which goes before any stubs: copies of the packages whose own types are the right ones."""
    folder = ROOT / ".mypy_cache" / "own-types"
    shutil.rmtree(folder, ignore_errors=True)
    for name in HIDDEN_BY_OLD_STUBS:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            shutil.copytree(
                Path(spec.origin).parent, folder / name, ignore=shutil.ignore_patterns("_tests", "__pycache__")
            )
    return folder


def environment(stage: str) -> dict[str, str]:
    """This process's environment, with one torch thread for each process: two cores, and several processes at once."""
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if stage == "types":
        settings["MYPYPATH"] = str(own_types())
    return {**os.environ, **settings}


def run_stage(stage: str, reports: Path) -> Outcome:
    """Run each command of a stage until one fails; pytest leaves its counts in `reports`."""
    print(f"\n== {stage}", flush=True)
    start = time.monotonic()
    ok = True
    settings = environment(stage)
    for command in STAGES[stage]:
        counted = (f"--junit-xml={reports / stage}.xml",) if "pytest" in command else ()
        try:
            done = subprocess.run((*command, *counted), cwd=ROOT, env=settings, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            print(f"error: {stage} took more than {TIMEOUT_S:.0f} s", flush=True)
            ok = False
            break
        ok = done.returncode == 0
        if not ok:
            break
    seconds = time.monotonic() - start
    print(f"== {stage}: {'ok' if ok else 'FAILED'} in {seconds:.1f} s", flush=True)
    return Outcome(stage, ok, seconds)


def count(reports: Path) -> Tally:
    """Add up pytest's own reports."""
    total = failed = skipped = 0
    for report in sorted(reports.glob("*.xml")):
        for suite in ElementTree.parse(report).iter("testsuite"):  # noqa: S314  written by our own pytest just now
            total += int(suite.get("tests", "0"))
            failed += int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
            skipped += int(suite.get("skipped", "0"))
    return Tally(passed=total - failed - skipped, failed=failed, skipped=skipped)


def closing_line(tally: Tally, seconds: float) -> str:
    """The last line, in the words that pytest uses: `1 failed, 812 passed, 3 skipped in 401.2s`."""
    parts = [f"{tally.failed} failed"] if tally.failed else []
    parts.append(f"{tally.passed} passed")
    if tally.skipped:
        parts.append(f"{tally.skipped} skipped")
    return f"{', '.join(parts)} in {seconds:.1f}s"


def main(names: list[str]) -> int:
    """Run the stages in the order given; 0 if all succeeded, 1 if one failed, 2 if one is unknown."""
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        print(f"usage: stages.py STAGE...   where STAGE is one of: {' '.join(STAGES)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mycel-stages-") as folder:
        reports = Path(folder)
        outcomes = [run_stage(name, reports) for name in names]
        tally = count(reports)
    seconds = sum(outcome.seconds for outcome in outcomes)
    failed = [outcome.stage for outcome in outcomes if not outcome.ok]
    print("\n== stages: " + ", ".join(f"{outcome.stage} {outcome.seconds:.1f} s" for outcome in outcomes))
    print(f"== {'FAILED: ' + ', '.join(failed) if failed else 'all stages ok'}")
    if tally != Tally():
        print(f"== {closing_line(tally, seconds)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
