"""The modules of a model without its weights, and how they are cut to a span.

The one generic way: build the whole causal language model on the meta device (no memory), load only the span's tensors,
then shorten the base model's list of blocks, and take out what other spans do. Blocks keep their own index and
configuration, so whatever depends on the depth stays right; the base model gets a configuration of the shortened list.

Ring: algorithms.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mycel.node.architectures import ARCHITECTURES, Architecture
from mycel.protocols.errors import ConfigError

__all__ = ["Passed", "check_structure", "cut", "empty_model", "meta_tensors"]

# What transformers' own code raises on a configuration or structure it does not expect; never a ConfigError.
_FOREIGN = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError, ArithmeticError)

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")


class _Zero(nn.Module):
    """Stands for an embedding that an earlier span has added already."""

    def forward(self, *_args: object, **_kwargs: object) -> Tensor:
        return torch.zeros(())


class _Counted(nn.Identity):
    """Stands for the final norm and counts its uses."""

    def __init__(self) -> None:
        super().__init__()
        self.uses = 0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch calls it by this name
        self.uses += 1
        return input


class Passed(nn.Module):
    """Stands for the base model when only the head is wanted: returns its input as the last hidden state."""

    class Output:
        """What a base model returns, as far as a head looks: the hidden state first, and nothing else known."""

        def __init__(self, hidden: Tensor) -> None:
            self.last_hidden_state = hidden

        def __getitem__(self, index: int) -> Tensor:
            return (self.last_hidden_state,)[index]

        def __getattr__(self, name: str) -> None:
            return None

    def forward(self, *_args: object, inputs_embeds: Tensor, **_kwargs: object) -> Passed.Output:
        return Passed.Output(inputs_embeds)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole causal language model with every tensor on the meta device, in evaluation mode.

    Raises ConfigError if no such model can be made of the configuration.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    # Extra outputs cost memory and time at every step, and no hop sends them.
    for field in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, field, False):
            setattr(config, field, False)
    try:
        with no_init_weights(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except _FOREIGN as error:
        raise ConfigError(f"the configuration is not valid for {config.model_type}: {_one_line(error)}") from None
    # `requires_grad` stays: the trainer needs it. Dropout must not run.
    model.eval()
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def base_of(model: PreTrainedModel) -> Any:
    """The model below the head."""
    return getattr(model, model.base_model_prefix)


def _blocks_name(base: nn.Module, n_blocks: int) -> str:
    found = [
        name for name, child in base.named_children() if isinstance(child, nn.ModuleList) and len(child) == n_blocks
    ]
    if len(found) != 1:
        raise ConfigError(f"the base model has {len(found)} lists of {n_blocks} blocks where one is needed")
    return found[0]


def cut(model: PreTrainedModel, start: int, end: int) -> None:
    """Leaves of `model` what the span [start, end) does, in place. Weights may be loaded already, by their full names.

    The first span keeps the embedding, the last one the final norm and the head. Raises ConfigError if the model does
    not have the structure that this needs.
    """
    base = base_of(model)
    n_blocks = model.config.num_hidden_layers
    blocks = _blocks_name(base, n_blocks)
    setattr(base, blocks, nn.ModuleList(list(getattr(base, blocks))[start:end]))
    base.config = _cut_config(base.config, start, end)
    if start > 0:
        _without_embedding(base)
    if end < n_blocks:
        _without_norm(base)
        _replace(model, model.get_output_embeddings(), nn.Identity())
    _restore_buffers(model)


def part_of(base: Any, start: int, end: int, *, keep_norm: bool) -> Any:
    """A base model of `base`'s blocks [start, end), counted from its first, over the same modules and weights.

    The embedding stays with block 0, and the final norm only if `keep_norm`.
    """
    part = copy.copy(base)
    part._modules = dict(base._modules)
    blocks = _blocks_name(base, base.config.num_hidden_layers)
    setattr(part, blocks, nn.ModuleList(list(getattr(base, blocks))[start:end]))
    part.config = _cut_config(base.config, start, end)
    if start > 0:
        _without_embedding(part)
    if not keep_norm:
        _without_norm(part)
    return part


def _without_embedding(base: Any) -> None:
    embedding = base.get_input_embeddings()
    if not isinstance(embedding, nn.Identity):
        _replace(base, embedding, nn.Identity())
    for name, kind in (ARCHITECTURES.get(base.config.model_type, Architecture()).first_only or {}).items():
        setattr(base, name, {"zero": _Zero(), "same": nn.Identity(), "one": 1.0}[kind])


def _without_norm(base: Any) -> None:
    norms = [name for name in _FINAL_NORMS if isinstance(getattr(base, name, None), nn.Module)]
    if len(norms) != 1:
        raise ConfigError("the base model has no final norm under a known name")
    setattr(base, norms[0], nn.Identity())


def _cut_config(config: PreTrainedConfig, start: int, end: int) -> PreTrainedConfig:
    """A copy that describes blocks [start, end) as a whole model: base models look their blocks up by place in it."""
    cut_config = copy.copy(config)
    layer_types = getattr(config, "layer_types", None)
    cut_config.num_hidden_layers = end - start
    if layer_types is not None:
        cut_config.layer_types = list(layer_types[start:end])
    return cut_config


def _replace(parent: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for name, child in parent.named_children():
        if child is old:
            setattr(parent, name, new)
            return
    raise ConfigError("the embedding or the head is not a direct part of the model")


def _restore_buffers(model: PreTrainedModel) -> None:
    """Gives buffers that no checkpoint holds (rotary frequencies, scales) their values, by the model's own initialiser.

    The initialiser leaves loaded weights alone: transformers marks them when it assigns them. Raises ConfigError for a
    buffer that it does not set.
    """
    for module in model.modules():
        names = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name in module._non_persistent_buffers_set
        ]
        for name in names:
            buffer = torch.empty_like(module.get_buffer(name), device="cpu")
            module._buffers[name] = buffer.fill_(_unset(buffer.dtype))
        if names:
            with torch.no_grad():
                model._init_weights(module)
        for name in names:
            buffer = module.get_buffer(name)
            unset = buffer.isnan() if buffer.is_floating_point() else buffer == _unset(buffer.dtype)
            if buffer.dtype != torch.bool and bool(unset.any()):
                raise ConfigError(f"buffer {name!r} of {type(module).__name__} has no value that can be derived")


def _unset(dtype: torch.dtype) -> float:
    """A value that no initialiser writes, where the dtype has one."""
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def meta_tensors(model: nn.Module) -> list[str]:
    """Names of parameters and buffers that still have no value."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.is_meta]


def check_structure(config: PreTrainedConfig) -> None:
    """Whether a model outside the tested table can be cut the generic way; it needs no weights.

    A base model without blocks and norm must return its input unchanged: then everything that it does lies in the
    embedding, the blocks, the norm or the head. Raises ConfigError, one line, that says why not.
    """
    name = config.model_type
    try:
        model = empty_model(config, torch.float32)
        _check_interface(model)
        cut(model, 1 if config.num_hidden_layers > 1 else 0, config.num_hidden_layers)
        probe_TD = torch.linspace(-2.0, 3.0, 3 * config.hidden_size).view(3, config.hidden_size)
        output_TD = _without_blocks(model, probe_TD)
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be split: {error}") from None
    except _FOREIGN as error:
        detail = _one_line(error)
        raise ConfigError(
            f"{name} cannot be split: it is more than embedding, blocks, norm and head ({detail})"
        ) from None
    if output_TD.shape != probe_TD.shape or not torch.equal(output_TD, probe_TD):
        raise ConfigError(f"{name} cannot be split: its base model changes the hidden state outside of its blocks")


def _check_interface(model: PreTrainedModel) -> None:
    if getattr(model, "_is_stateful", False):
        raise ConfigError("its blocks keep a recurrent state that cannot be rolled back or replayed")
    base = base_of(model)
    if base is model:
        raise ConfigError("it has no base model below its head")
    missing = {"input_ids", "inputs_embeds", "past_key_values"} - set(inspect.signature(base.forward).parameters)
    if missing:
        raise ConfigError(f"its base model takes no {min(missing)}")


def _without_blocks(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """What the base model, as a middle span of no blocks, makes of a hidden state."""
    base = base_of(model)
    norms: list[_Counted] = []
    for name, child in list(base.named_children()):
        if isinstance(child, nn.ModuleList):
            setattr(base, name, nn.ModuleList())
        elif name in _FINAL_NORMS:
            setattr(base, name, norm := _Counted())
            norms.append(norm)
    base.config = copy.copy(base.config)
    base.config.num_hidden_layers = 0
    with torch.inference_mode():
        output: Tensor = base(inputs_embeds=hidden_TD.unsqueeze(0), use_cache=False)[0]
    # Some models also use their (weightless) final norm before the first block, where it would hide here.
    if [norm.uses for norm in norms] != [1]:
        raise ConfigError("its base model does not end with one final norm")
    return output.squeeze(0)
