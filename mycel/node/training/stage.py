"""A stage of a Hugging Face causal model that trains, and serves what it has trained from the same memory.

Cut as for inference (`mycel.node.span`), in float32, with all parameters in one flat tensor. Every forward runs with
gradients recorded, kept or not: so a graph that was kept and one computed again are the same operations. Dropout is off
in both (the model stays in evaluation mode), since a microbatch may be computed twice, by two peers, and must be one.

Legend: B sequences, T target tokens of each, W width at a border, D hidden, R rows (B * T), V vocabulary, P parameters.

Ring: shell (`load` reads a model directory; the rest is torch alone).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from mycel.node.model_info import inspect_model, load_config
from mycel.node.span import Span, load_weights
from mycel.node.structure import meta_tensors
from mycel.node.training.bottleneck import StageEnds, border_width
from mycel.node.training.fast_products import use_fast_products
from mycel.node.training.stage_graphs import Graph, KeptGraphs, saved_bytes
from mycel.node.training.stage_layout import StageLayout, StageTensor, cut_to_stage, flatten, layout_of
from mycel.node.training.stage_port import Backpass
from mycel.node.weights_load import release_free_memory
from mycel.protocols.errors import ConfigError
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import Recipe

__all__ = ["TorchStage"]

KEEP_BYTES = 1 << 30
# So many logits at a time (64 MiB): those of a whole microbatch of a large vocabulary would outweigh the stage.
_LOGITS = 1 << 24


class TorchStage:
    """Stage `index` of a run; a `TrainingStage`. Make one with `load`. All calls on the compute thread.

    `params_P` is written to in place, by torch and between two calls; everything sees it: gradients, and the span.
    """

    def __init__(
        self,
        span: Span,
        ends: StageEnds,
        layout: StageLayout,
        flat: tuple[Tensor, Tensor],
        plan: RunPlan,
        index: int,
        recipe: Recipe,
    ) -> None:
        self.index = index
        self.layout = layout
        self.params_P, self._grad_P = flat
        self._span = span
        self._ends = ends
        self._plan = plan
        self._recipe = recipe
        self._width = border_width(recipe.border, span.info.hidden_size)
        self._kept = KeptGraphs({"always": 0, "never": None, "auto": KEEP_BYTES}[recipe.recompute])

    @classmethod
    def load(
        cls, directory: Path, plan: RunPlan, index: int, recipe: Recipe, *, keep_bytes: int = KEEP_BYTES
    ) -> TorchStage:
        """Stage `index` of `plan` with the weights in `directory`; only its own are read.

        `recipe` says what crosses the borders, the seed and when to recompute; with "auto", graphs of `keep_bytes` in
        all are kept. Raises ConfigError (one line) as `Span.load` does, and for sizes that do not fit the model.
        """
        start, end = plan.spans[index]
        info, config = inspect_model(directory), load_config(directory)
        if plan.n_tokens > info.max_positions:
            raise ConfigError(f"samples of {plan.n_tokens} tokens are too long: {info.name} has {info.max_positions}")
        border_width(recipe.border, info.hidden_size)
        model = load_weights(directory, info, config, (start, end), torch.float32)
        named = cut_to_stage(model, info, start, end)
        if missing := meta_tensors(model):
            raise ConfigError(f"{directory} is incomplete: its checkpoint has no tensor for {missing[0]!r}")
        ends = StageEnds(recipe.border, info.hidden_size, index, plan.n_stages)
        ends.initialise(recipe.seed)
        named |= ends.named_parameters()
        layout = layout_of(named, model, info, plan, index)
        flat = flatten(named, layout)
        use_fast_products(model, *(end for end in (ends.up, ends.down) if end is not None))
        release_free_memory()
        stage = cls(Span(info, start, end, model, config), ends, layout, flat, plan, index, recipe)
        if recipe.recompute == "auto":
            stage._kept.budget_bytes = keep_bytes
        return stage

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def n_elements(self) -> int:
        return self.layout.n_elements

    @property
    def tensors(self) -> tuple[StageTensor, ...]:
        """(name, start, end, shape) of all of `params_P`, in order, as `save_pretrained` names and shapes them."""
        return self.layout.tensors

    @property
    def decay_end(self) -> int:
        """Weight decay is for the elements before it."""
        return self.layout.decay_end

    @property
    def tied(self) -> tuple[int, int] | None:
        return self.layout.tied

    @property
    def vocab_size(self) -> int:
        """Token ids from here on are refused."""
        return self._span.info.vocab_size

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        return None if self._is_first else (self._plan.n_sequences, self._plan.n_tokens, self._width)

    @property
    def output_shape(self) -> tuple[int, int, int] | None:
        return None if self._is_last else (self._plan.n_sequences, self._plan.n_tokens, self._width)

    @property
    def kept_bytes(self) -> int:
        """Memory of the graphs that are kept now, as far as it was measured ("auto" alone measures)."""
        return self._kept.size_bytes

    @property
    def _is_first(self) -> bool:
        return self.index == 0

    @property
    def _is_last(self) -> bool:
        return self.index == self._plan.n_stages - 1

    def span(self) -> Span:
        """The same blocks over the same memory for inference: a step of the optimizer shows at once.

        Raises ConfigError for a run with learned bottlenecks.
        """
        if self._recipe.has_bottlenecks:
            raise ConfigError("a model with learned bottlenecks is not a Hugging Face model: it cannot be served")
        return self._span

    def cost_s(self, *, backward: bool) -> float:
        return 0.0

    # ---- what it does ------------------------------------------------------------------------------------------------

    def forward(self, work: bytes, tokens_BT1: Tensor, input_BTW: Tensor | None) -> Tensor:
        """As `TrainingStage` says. Raises ValueError for inputs that are not this stage's."""
        assert not self._is_last, "the last stage has nobody to send an output to"
        self._check(tokens_BT1, input_BTW)
        if self._recipe.recompute != "auto":
            graph = self._run(tokens_BT1, input_BTW)
        else:
            with saved_bytes(self.params_P) as saved:
                graph = self._run(tokens_BT1, input_BTW)
            graph.size_bytes = saved.total
        if self._recipe.recompute != "always":
            self._kept.put(work, graph)
        return graph.output_BTW.detach()

    def backward(self, work: bytes, tokens_BT1: Tensor, input_BTW: Tensor | None, grad_BTW: Tensor | None) -> Backpass:
        """As `TrainingStage` says. Raises ValueError for inputs that are not this stage's."""
        self._check(tokens_BT1, input_BTW)
        if self._is_last != (grad_BTW is None) or (grad_BTW is not None and grad_BTW.shape != self.output_shape):
            raise ValueError(f"stage {self.index} takes no such gradient")
        self._grad_P.zero_()
        graph = self._kept.take(work)
        if graph is None or not graph.fits(tokens_BT1, input_BTW, self.params_P._version):
            graph = self._run(tokens_BT1, input_BTW)
        loss = 0.0
        if grad_BTW is None:
            loss, grad_BTW = self._loss(graph.output_BTW, tokens_BT1[:, 1:])
        torch.autograd.backward(graph.output_BTW, grad_BTW)
        return Backpass(self._grad_P, None if graph.input_BTW is None else graph.input_BTW.grad, loss)

    def forget(self, work: bytes) -> None:
        self._kept.take(work)

    def forget_all(self) -> None:
        """Needed only after `params_P` was written to past torch, which a kept graph cannot notice."""
        self._kept.clear()

    def _run(self, tokens_BT1: Tensor, input_BTW: Tensor | None) -> Graph:
        with torch.enable_grad():
            leaf_BTW = None if input_BTW is None else input_BTW.detach().requires_grad_()
            inputs = tokens_BT1[:, :-1] if leaf_BTW is None else leaf_BTW
            if self._ends.up is not None:
                inputs = self._ends.up(inputs)
            output_BTW = self._span.hidden(inputs)
            if self._ends.down is not None:
                output_BTW = self._ends.down(output_BTW)
        return Graph(tokens_BT1, leaf_BTW, output_BTW, self.params_P._version)

    def _loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[float, Tensor]:
        """The sum of the cross entropies, and the gradient for `hidden_BTD`; the head's own go to the parameters."""
        hidden_RD, targets_R = hidden_BTD.detach().flatten(0, 1), targets_BT.flatten()
        grad_RD, loss = torch.empty_like(hidden_RD), 0.0
        n_rows = max(1, _LOGITS // self.vocab_size)
        for first in range(0, targets_R.shape[0], n_rows):
            part_RD = hidden_RD[first : first + n_rows].detach().requires_grad_()
            with torch.enable_grad():
                logits_RV = self._span.head(part_RD.unsqueeze(0)).squeeze(0).float()
                total = functional.cross_entropy(logits_RV, targets_R[first : first + n_rows], reduction="sum")
                torch.autograd.backward(total / self._plan.step_tokens)
            assert part_RD.grad is not None
            grad_RD[first : first + n_rows] = part_RD.grad
            loss += float(total.detach())
        return loss, grad_RD.view_as(hidden_BTD)

    def _check(self, tokens_BT1: Tensor, input_BTW: Tensor | None) -> None:
        expected = (self._plan.n_sequences, self._plan.n_tokens + 1)
        if tokens_BT1.shape != expected or tokens_BT1.dtype != torch.int64:
            raise ValueError(f"token ids of {list(expected)} int64 are needed, not {list(tokens_BT1.shape)}")
        if not 0 <= int(tokens_BT1.min()) <= int(tokens_BT1.max()) < self.vocab_size:
            raise ValueError(f"a token is outside of the vocabulary of {self.vocab_size}")
        shape = None if input_BTW is None else tuple(input_BTW.shape)
        if shape != self.input_shape:
            raise ValueError(f"stage {self.index} takes an input of {self.input_shape}, not {shape}")
