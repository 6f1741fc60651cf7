"""Whether the second engine can run here, and where its daemon is; found without importing hivemind.

Ring: shell.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

EXTRA = "pip install 'mycel[hivemind]'"


def p2pd_path() -> Path | None:
    """The Go libp2p daemon inside the installed hivemind package, or None without that package."""
    spec = importlib.util.find_spec("hivemind")  # of a top-level package: looks, and runs nothing of it
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) / "hivemind_cli" / "p2pd" if places else None


def engine_available() -> str:
    """Why the engine cannot run here, in a few words for a person, or "" if it can."""
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        return f"its daemon is built for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    path = p2pd_path()
    if path is None:
        return f"hivemind is not installed: {EXTRA}"
    if not os.access(path, os.X_OK):
        return f"the installed hivemind has no daemon that can be run at {path}: {EXTRA}"
    return ""
