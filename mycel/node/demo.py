"""Where the small model inside the package lies; how it was made stands in the README beside it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mycel.protocols.errors import ConfigError


def demo_model_dir() -> Path:
    """The Hugging Face model directory shipped with Mycel, for commands that are given no other model.

    Errors: ConfigError when this installation lacks it (left out by a packager, or run from inside an archive).
    """
    path = Path(str(files("mycel.node"))) / "demo_model"
    if not (path / "config.json").is_file():
        raise ConfigError(f"this installation of Mycel lacks its demo model ({path}); name another with --model")
    return path
