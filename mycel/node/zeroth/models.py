"""A model on disk as what one-byte updates train of it, and the tuned model back on disk.

Ring: shell (files).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mycel.node.blobs import disk_errors
from mycel.node.weights_load import no_progress_bar
from mycel.protocols.errors import ConfigError
from mycel.swarm.manifest import RECIPE_FILE, SMALL_FILES
from mycel.swarm.zeroth.lattice import Lattice
from mycel.swarm.zeroth.options import ZerothOptions
from mycel.swarm.zeroth.scalars import Tunable, load
from mycel.swarm.zeroth.tunables import FullParameters, Lora, SoftPrompt

__all__ = ["TunedModel", "load_tuned"]

ADAPTER_FILE = "adapter.safetensors"
_PROMPT = b"mycel/zeroth/prompt/1\0"
_ADDED = (".a_RD", ".b_DR")


@dataclass(eq=False)
class TunedModel:
    """`model` is that of transformers in `directory`, `tunable` what of it is trained."""

    directory: Path
    options: ZerothOptions
    model: Any
    tunable: Tunable

    def tensors(self) -> dict[str, Tensor]:
        """The whole model with what was learned, by the names in its files; low-rank additions are added in."""
        merged = {name.replace(".base.", "."): tensor for name, tensor in self.model.state_dict().items()}
        for name, module in self.model.named_modules():
            if hasattr(module, "a_RD"):
                added = module.scale * (module.b_DR.float() @ module.a_RD.float())
                weight = merged[f"{name}.weight"]
                moved = added if isinstance(module.base, nn.Linear) else added.T  # Conv1D has its inputs first
                merged[f"{name}.weight"] = (weight.float() + moved).to(weight.dtype)
        return {name: tensor for name, tensor in merged.items() if not name.endswith(_ADDED)}

    def write(self, theta_P: Lattice, folder: Path, notes: dict[str, str]) -> None:
        """The model tuned so far as a Hugging Face directory, whole or not at all; what was trained alone beside it.

        Raises ConfigError. A folder that is there is left as it is.
        """
        load(self.tunable, theta_P)
        with disk_errors("write", folder):
            if folder.exists():
                return
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
            try:
                self._fill(temporary, notes)
                temporary.chmod(0o755)
                try:
                    temporary.rename(folder)
                except OSError:
                    if not folder.is_dir():  # another node of this machine was quicker
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _fill(self, folder: Path, notes: dict[str, str]) -> None:
        tuned = self.tensors()
        for path in sorted(self.directory.glob("*.safetensors")):
            with safetensors.safe_open(path, "pt") as opened:
                names = list(opened.keys())
                kept = {name: tuned[name] if name in tuned else opened.get_tensor(name) for name in names}
            safetensors.torch.save_file(
                {name: tensor.detach().clone().contiguous() for name, tensor in kept.items()},
                folder / path.name,
                {"format": "pt"},
            )
        index = self.directory / "model.safetensors.index.json"
        for path in [*(self.directory / name for name in sorted(SMALL_FILES - {RECIPE_FILE})), index]:
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        if self.options.parameters != "full":
            safetensors.torch.save_file(self._trained(), folder / ADAPTER_FILE, notes)
        for path in folder.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())

    def _trained(self) -> dict[str, Tensor]:
        found, at = {}, 0
        for name, shape in self.tunable.shapes:
            size = int(torch.Size(shape).numel())
            found[name] = self.tunable.flat[at : at + size].view(shape).clone()
            at += size
        return found


def load_tuned(directory: Path, options: ZerothOptions) -> TunedModel:
    """The model of a directory in float32, with what `options` train of it. Raises ConfigError."""
    from transformers import AutoModelForCausalLM

    try:
        with no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory} holds no model that can be tuned: {str(error).splitlines()[0]}") from None
    makers: dict[str, Callable[[], Tunable]] = {
        "full": lambda: FullParameters(model),
        "lora": lambda: Lora(model, options.rank, options.alpha),
        "prompt": lambda: SoftPrompt(model, _prompt_tokens(model, options.prompt_tokens)),
    }
    return TunedModel(directory, options, model, makers[options.parameters]())


def _prompt_tokens(model: Any, count: int) -> list[int]:
    """The tokens that a soft prompt begins as: drawn, the same for all peers."""
    n_tokens = model.get_input_embeddings().num_embeddings
    drawn = (hashlib.sha256(_PROMPT + number.to_bytes(4, "little")).digest() for number in range(count))
    return [int.from_bytes(digest[:8], "little") % n_tokens for digest in drawn]
