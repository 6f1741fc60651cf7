"""The rings of the house as an import-linter contract: which modules are in a ring, and what the ring may not import.

A module says where it stands with a line of its docstring: "Ring: pure", "Ring: algorithms" or "Ring: shell". So a new
file is covered from its first line, and this file is the one place that says what a ring means. It knows nothing of the
rooms; those are the layers in pyproject.toml.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

from importlinter import fields
from importlinter.contracts.forbidden import ForbiddenContract

_RING_LINE = re.compile(r"^Ring: (pure|algorithms|shell)\b", re.MULTILINE)

_CLOCK_AND_CHANCE = ("datetime", "random", "secrets", "time", "uuid", "zoneinfo")
_ASYNC = ("anyio", "asyncio", "concurrent", "multiprocessing", "queue", "sched", "threading", "trio")
_INPUT_AND_OUTPUT = (
    "click",
    "fcntl",
    "getpass",
    "glob",
    "http",
    "huggingface_hub",
    "logging",
    "mmap",
    "os",
    "pathlib",
    "platform",
    "psutil",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "socketserver",
    "sqlite3",
    "ssl",
    "subprocess",
    "tempfile",
    "urllib",
    "zeroconf",
)
_NETWORK_LIBRARIES = ("hivemind", "libp2p", "multiaddr")
_READS_FILES = ("jinja2", "safetensors", "tokenizers")

_EFFECTS = (*_CLOCK_AND_CHANCE, *_ASYNC, *_INPUT_AND_OUTPUT, *_NETWORK_LIBRARIES, *_READS_FILES)
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "pure": (*_EFFECTS, "torch", "transformers"),
    # transformers is here for its model and cache classes, which are torch modules; what loads files says "shell".
    "algorithms": _EFFECTS,
}


def stated_ring(source: str) -> str | None:
    """The ring that a module's docstring states, or None."""
    found = _RING_LINE.search(ast.get_docstring(ast.parse(source)) or "")
    return found[1] if found else None


def module_name(file: Path, package: Path) -> str:
    """The full name of a module: mycel/dht/keys.py is mycel.dht.keys, and a package is named for its folder."""
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_in(ring: str, package: Path) -> list[str]:
    """The names of the modules under `package` that state `ring`, sorted."""
    files = sorted(package.rglob("*.py"))
    return [module_name(file, package) for file in files if stated_ring(file.read_text("utf-8")) == ring]


class RingContract(ForbiddenContract):
    """import-linter's "forbidden", direct and through others, for all modules that state the ring."""

    type_name = "ring"
    ring = fields.StringField()

    def __init__(self, name: str, session_options: dict[str, Any], contract_options: dict[str, Any]) -> None:
        ring = contract_options["ring"]
        package = importlib.util.find_spec("mycel")
        assert package is not None, "import-linter puts the working directory on the path first"
        assert package.submodule_search_locations is not None, "mycel is a package"
        options = {
            **contract_options,
            "source_modules": modules_in(ring, Path(package.submodule_search_locations[0])),
            "forbidden_modules": list(FORBIDDEN[ring]),
        }
        super().__init__(name, session_options, options)
