"""A recipe becomes a run: the directory of its initial model, with the recipe in it, made once.

    DATA/runs/<name>-<digest>/config.json, tokenizer..., *.safetensors (float32), recipe.toml

The digest is of the recipe and of all that goes in, so the same recipe finds its run again, and a changed one founds
another. What is shared of it, and how, is not known here.

Ring: shell (reads and writes directories).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from mycel.node.blobs import atomic_write, disk_errors
from mycel.node.demo import demo_model_dir
from mycel.node.hub import download_snapshot, is_repository
from mycel.node.model_info import TensorEntry, inspect_model, load_config
from mycel.node.model_manifest import build_manifest
from mycel.node.training.checkpoint_layout import NOTE_FILE
from mycel.node.training.dataset import TokenDataset, open_dataset
from mycel.node.training.token_file import Progress, alone
from mycel.node.weights_load import WeightFiles, no_progress_bar
from mycel.node.weights_map import read_json
from mycel.protocols.errors import ConfigError
from mycel.swarm.manifest import RECIPE_FILE, SMALL_FILES
from mycel.swarm.training.plan import RunPlan, make_plan
from mycel.swarm.training.recipe import Recipe, canonical, parse_recipe, published

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["FoundedRun", "found_run", "plan_of", "read_recipe", "recipe_of", "refuse_bottlenecks"]

# Counts up when the same recipe and model would give another directory.
_VERSION = b"mycel run v1"


@dataclass(frozen=True, slots=True)
class FoundedRun:
    """`recipe` is the one that travels, `local` the one that says where the text lies, relative to `base`."""

    recipe: Recipe
    local: Recipe
    base: Path
    directory: Path
    dataset: TokenDataset


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises ConfigError, one line."""
    try:
        with disk_errors("read", path):
            text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not valid UTF-8") from None
    return parse_recipe(text, str(path))


def recipe_of(directory: Path) -> Recipe | None:
    """The recipe of the run that a model directory belongs to, or None if it belongs to none.

    It names no text of this machine, whatever its founder wrote: what is read here, this machine's user says.
    """
    path = directory / RECIPE_FILE
    if not path.is_file():
        return None
    recipe = read_recipe(path)
    return published(recipe, recipe.data.fingerprint)


def refuse_bottlenecks(directory: Path) -> None:
    """ConfigError for the checkpoint of a run with learned bottlenecks: its weights alone are another model."""
    path = (directory / NOTE_FILE).with_name(RECIPE_FILE)
    is_ours = (directory / NOTE_FILE).is_file() and path.is_file()
    if is_ours and read_recipe(path).has_bottlenecks:
        raise ConfigError(
            f"{directory} is a checkpoint of a run with learned bottlenecks between its stages: no Hugging Face model, "
            "good for going on with that run alone"
        )


def plan_of(recipe: Recipe, run: bytes, directory: Path) -> RunPlan:
    """The plan that all peers of a run make, of its recipe and its model's configuration and headers alone.

    A stage costs what its matrices weigh: of experts, those that a token meets. Raises ConfigError.
    """
    info, share = inspect_model(directory), _experts_share(load_config(directory))
    costs = [_cost(info.tensors[f"block.{index}"], share) for index in range(info.n_blocks)]
    head = info.tensors["embed"] if info.tied_embeddings else info.tensors["head"]
    return make_plan(recipe, run, costs, head_cost=max(entry.size_bytes for entry in head))


def _experts_share(config: PreTrainedConfig) -> float:
    """The part of a block's experts that computes a token."""
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    n_experts = next((count for count in counts if isinstance(count, int) and count > 0), 1)
    met = getattr(config, "num_experts_per_tok", None)
    return min(met / n_experts, 1.0) if isinstance(met, int) and met > 0 else 1.0


def _cost(entries: tuple[TensorEntry, ...], experts_share: float) -> int:
    return sum(round(entry.size_bytes * (experts_share if ".experts." in entry.name else 1.0)) for entry in entries)


# ---- founding


def found_run(recipe_path: Path, data_dir: Path, on_progress: Progress | None = None) -> FoundedRun:
    """The run of a recipe, made now unless it is there: model directory and samples. Blocks; minutes for large models.

    Whoever founds it again from the same recipe, text and model on this machine gets the same directory, byte by byte.
    Raises ConfigError, one line, for whatever in the recipe does not fit the model or the text.
    """
    local, base = read_recipe(recipe_path), recipe_path.parent
    model = _model_directory(local, base)
    _check_model(local, model, str(recipe_path))
    cache_dir = data_dir / "cache"
    dataset = open_dataset(local, model, base, cache_dir, on_progress)
    recipe = published(local, dataset.fingerprint())
    name = f"{recipe.name}-{_digest(recipe, model, cache_dir)[:12]}"
    directory = data_dir / "runs" / name
    if not directory.is_dir():
        _make(directory, recipe, model)
    return FoundedRun(recipe, local, base, directory, dataset)


def _model_directory(recipe: Recipe, base: Path) -> Path:
    path = recipe.model.path
    if path == "demo":
        return demo_model_dir()
    directory = base / Path(path).expanduser()
    if not directory.exists() and is_repository(path):
        return download_snapshot(path).directory
    return directory


def _check_model(recipe: Recipe, model: Path, name: str) -> None:
    refuse_bottlenecks(model)
    config = load_config(model)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < recipe.data.sequence:
        raise ConfigError(f"{name}: data.sequence: the model has {positions} positions, not {recipe.data.sequence}")
    if recipe.stages > config.num_hidden_layers:
        raise ConfigError(
            f"{name}: stages: {recipe.stages} are more than the model's {config.num_hidden_layers} blocks"
        )
    if recipe.border.bottleneck != "none" and config.hidden_size % recipe.border.factor:
        raise ConfigError(f"{name}: border.factor: {recipe.border.factor} does not divide {config.hidden_size}")


def _digest(recipe: Recipe, model: Path, cache_dir: Path) -> str:
    """Of everything that the directory is made of."""
    digest = hashlib.sha256(_VERSION + canonical(recipe).encode())
    for file in _small_files(model):
        with disk_errors("read", file):
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    if recipe.model.start == "weights":
        digest.update(build_manifest(model, cache_dir)[0].chunks)
    return digest.hexdigest()


def _small_files(model: Path) -> list[Path]:
    return [model / name for name in sorted(SMALL_FILES - {RECIPE_FILE}) if (model / name).is_file()]


def _make(directory: Path, recipe: Recipe, model: Path) -> None:
    """The directory, whole or not at all; who comes second to make it finds it there."""
    runs, prefix = directory.parent, f".{directory.name}."
    with disk_errors("write", runs):
        runs.mkdir(parents=True, exist_ok=True)
    with alone(runs, directory.name) as sure:
        if directory.is_dir():
            return
        for left in runs.glob(f"{prefix}*.tmp") if sure else ():  # by processes that are no more
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=runs))
        try:
            with disk_errors("write", temporary):
                _fill(temporary, recipe, model)
            inspect_model(temporary)  # what peers would refuse is said now
            _publish(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _fill(target: Path, recipe: Recipe, model: Path) -> None:
    if recipe.model.start == "weights":
        _convert_weights(model, target)
    else:
        _draw_weights(model, target, recipe.seed)
    for file in _small_files(model):
        shutil.copyfile(file, target / file.name)
    config = {key: value for key, value in read_json(model / "config.json").items() if key != "torch_dtype"}
    atomic_write(target / "config.json", _json({**config, "dtype": "float32"}))
    atomic_write(target / RECIPE_FILE, canonical(recipe).encode())
    for path in target.iterdir():
        with path.open("r+b") as opened:
            os.fsync(opened.fileno())


def _publish(temporary: Path, directory: Path) -> None:
    with disk_errors("write", directory):
        temporary.chmod(0o755)
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise


def _draw_weights(model: Path, target: Path, seed: int) -> None:
    """Weights as the model's own code begins training, from `seed`; safetensors under the names of checkpoints."""
    from transformers import AutoModelForCausalLM

    with _seeded(seed):
        drawn = AutoModelForCausalLM.from_config(load_config(model), dtype=torch.float32)
    with no_progress_bar():
        drawn.save_pretrained(target)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _convert_weights(model: Path, target: Path) -> None:
    """The checkpoint's weights in float32, a file for each unit, so that one unit at a time is in memory."""
    info, files = inspect_model(model), WeightFiles()
    weight_map: dict[str, str] = {}
    for unit, entries in info.tensors.items():
        tensors = {entry.name: _float32(files.mapped(entry)) for entry in entries}
        safetensors.torch.save_file(tensors, target / f"{unit}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sorted(tensors), f"{unit}.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    atomic_write(target / "model.safetensors.index.json", _json(index))


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
