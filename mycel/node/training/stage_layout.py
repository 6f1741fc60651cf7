"""How a stage's parameters lie in one flat tensor, the same for all its peers: matrices by name, then vectors by name.

Matrices (and everything else of two or more dimensions) come first, because weight decay is theirs alone. Parameters
have the names of the unsplit transformers model, or "mycel.border..." in a learned bottleneck. Files name some tensors
otherwise (experts are fused in modules and apart in files), but every one of theirs is a range of the flat tensor too.

Legend: P all parameters of a stage.

Ring: shell (reads a model directory; no weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mycel.node.architectures import unit_of
from mycel.node.model_info import ModelInfo, inspect_model, load_config
from mycel.node.structure import cut, empty_model
from mycel.node.training.bottleneck import StageEnds
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import BorderPart

__all__ = ["StageLayout", "StageTensor", "cut_to_stage", "flatten", "layout_of", "stage_layout"]


class StageTensor(NamedTuple):
    """Elements [start, end) of the flat tensor are `name`, row by row."""

    name: str
    start: int
    end: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageLayout:
    """`parameters` in order without a gap; the first `decay_end` elements are those of matrices.

    `tensors` are the same elements as `save_pretrained` names and shapes them. `tied` is the token table where the
    first and the last stage both hold it (under one name).
    """

    parameters: tuple[StageTensor, ...]
    tensors: tuple[StageTensor, ...]
    decay_end: int
    tied: tuple[int, int] | None

    @property
    def n_elements(self) -> int:
        return self.parameters[-1].end


def stage_layout(directory: Path, plan: RunPlan, index: int, border: BorderPart) -> StageLayout:
    """The layout of any stage of a run, without its weights: what a stage's snapshot means to one who writes it down.

    Raises ConfigError as `TorchStage.load` does.
    """
    info = inspect_model(directory)
    model = empty_model(load_config(directory), torch.float32)
    named = cut_to_stage(model, info, *plan.spans[index])
    with torch.device("meta"):
        named |= StageEnds(border, info.hidden_size, index, plan.n_stages).named_parameters()
    return layout_of(named, model, info, plan, index)


def cut_to_stage(model: PreTrainedModel, info: ModelInfo, start: int, end: int) -> dict[str, Tensor]:
    """Cuts `model` in place; what is left of the tensors in its files, by their names before. A tied table is one.

    That includes the few that are no parameters (biases of a router, set by other means than gradients): they stay as
    they are, and are carried along for the sake of whoever writes or fetches the stage.
    """
    if info.tied_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    elif model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        # A configuration may say "tied" while the checkpoint has both.
        model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    # Of two names for one table the first stays, which is the embedding's.
    names = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    cut(model, start, end)
    left = (tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point())
    return {names[id(tensor)]: tensor for tensor in left}


def layout_of(
    named: Mapping[str, Tensor], model: PreTrainedModel, info: ModelInfo, plan: RunPlan, index: int
) -> StageLayout:
    """The layout of a stage's parameters, of which `cut_to_stage` left `model`."""
    parameters: list[StageTensor] = []
    start = decay_end = 0
    decays = {name: tensor.dim() >= 2 and isinstance(tensor, nn.Parameter) for name, tensor in named.items()}
    for name in sorted(named, key=lambda name: (not decays[name], name)):
        shape = tuple(named[name].shape)
        parameters.append(StageTensor(name, start, start + prod(shape), shape))
        start = parameters[-1].end
        decay_end = start if decays[name] else decay_end
    tied = None
    if info.tied_embeddings and plan.n_stages > 1 and index in (0, plan.n_stages - 1):
        table = model.get_input_embeddings() if index == 0 else model.get_output_embeddings()
        tied = next((first, end) for name, first, end, _ in parameters if named[name] is table.weight)
    return StageLayout(tuple(parameters), tuple(_file_tensors(model, parameters)), decay_end, tied)


def _file_tensors(model: PreTrainedModel, parameters: Sequence[StageTensor]) -> list[StageTensor]:
    """The same elements under the names of files. One block at a time: the probes take eight bytes an element."""
    # The loader leaves what the last unit needed; without it, it is what all files of the architecture need.
    vars(model).pop("_weight_conversions", None)
    units = sorted(((unit_of(p.name) or "", p) for p in parameters), key=lambda pair: (pair[0], pair[1].start))
    tensors: list[StageTensor] = []
    for _, group in groupby(units, key=lambda pair: pair[0]):
        tensors += _unit_tensors(model, [parameter for _, parameter in group])
    return sorted(tensors, key=lambda tensor: tensor.start)


def _unit_tensors(model: PreTrainedModel, parameters: Sequence[StageTensor]) -> Sequence[StageTensor]:
    shapes = {p.name: torch.empty(p.shape, device="meta") for p in parameters}
    converted: dict[str, Tensor] = revert_weight_conversion(model, shapes)
    if {name: tensor.shape for name, tensor in converted.items()} == {n: t.shape for n, t in shapes.items()}:
        return parameters
    # Each element is its own place: what comes out of the conversion says where it came from.
    places = {p.name: torch.arange(p.start, p.end).view(p.shape) for p in parameters}
    tensors: list[StageTensor] = []
    for name, tensor in revert_weight_conversion(model, places).items():
        first = int(tensor.reshape(-1)[0])
        if not torch.equal(tensor.reshape(-1), torch.arange(first, first + tensor.numel())):
            # Transposed, or spread: transformers also loads what is written by the names of its modules.
            return parameters
        tensors.append(StageTensor(name, first, first + tensor.numel(), tuple(tensor.shape)))
    return tensors


def flatten(named: Mapping[str, Tensor], layout: StageLayout) -> tuple[Tensor, Tensor]:
    """Moves the parameters into one flat tensor, and their gradients into another: (params_P, grad_P), both alive."""
    params_P = torch.empty(layout.n_elements, dtype=torch.float32)
    grad_P = torch.zeros_like(params_P)
    for name, start, end, shape in layout.parameters:
        tensor = named[name]
        params_P[start:end].copy_(tensor.detach().reshape(-1))
        tensor.data = params_P[start:end].view(shape)
        if isinstance(tensor, nn.Parameter):
            # Autograd adds in place to a gradient that is there.
            tensor.requires_grad_().grad = grad_P[start:end].view(shape)
    return params_P, grad_P
