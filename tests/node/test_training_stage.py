"""Stages in a row give the unsplit model's loss and gradients, from kept graphs or again, and serve what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from mycel.node.span import Span
from mycel.node.training import stage as stage_module
from mycel.node.training.bottleneck import border_width
from mycel.node.training.fast_products import TrainedConv1D, TrainedLinear
from mycel.node.training.stage import TorchStage
from mycel.node.training.stage_graphs import Graph, KeptGraphs
from mycel.node.training.stage_layout import stage_layout
from mycel.protocols.errors import ConfigError
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import BorderPart, Recipe
from tests.node.training_walk import (
    FLOAT32,
    N_SEQUENCES,
    N_TOKENS,
    SPANS,
    WORK,
    assert_equals_unsplit,
    assert_serves_what_it_trains,
    by_name,
    load,
    logits_of,
    plan_of,
    same,
    step,
    tokens_of,
    walk,
)
from tests.tiny_models import make_tiny_model

Models = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def _quiet_transformers() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The directory of an architecture's tiny model, made once."""
    made: dict[str, Path] = {}

    def model(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_tiny_model(architecture, tmp_path_factory.mktemp("models") / architecture)
        return made[architecture]

    return model


@pytest.mark.parametrize("n_stages", [1, 2, 3])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_stages_give_the_unsplit_loss_and_gradients(architecture: str, n_stages: int, models: Models) -> None:
    assert_equals_unsplit(models(architecture), n_stages)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("llama-tied", {"hidden_size": 128, "intermediate_size": 352}), ("gpt2", {"n_embd": 128})],
)
def test_stages_of_large_products_give_the_unsplit_gradients(architecture, sizes, tmp_path: Path) -> None:
    """Large enough for the fast products, where this processor has them."""
    directory = make_tiny_model(architecture, tmp_path / "model", **sizes)
    assert_equals_unsplit(directory, 2)
    kept, recomputed = (walk(load(directory, 2, recompute=mode), tokens_of()) for mode in ("never", "always"))
    assert same(kept, recomputed)


# ---- the flat parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_stages", [1, 3])
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"])
def test_the_layout_is_the_file_s_tensors_without_a_gap(architecture: str, n_stages: int, models: Models) -> None:
    stages, file = load(models(architecture), n_stages), load_file(models(architecture) / "model.safetensors")
    for stage in stages:
        for table in (stage.layout.parameters, stage.tensors):
            assert [t.start for t in table] == [0, *(t.end for t in table[:-1])]
            assert table[-1].end == stage.n_elements == stage.params_P.numel()
            assert all((len(t.shape) >= 2) == (t.end <= stage.decay_end) for t in table)
        for name, start, end, shape in stage.tensors:
            assert torch.equal(stage.params_P[start:end].view(shape), file[name]), name
    assert {t.name for stage in stages for t in stage.tensors} == set(file)
    for index, stage in enumerate(stages):
        assert stage_layout(models(architecture), plan_of(n_stages), index, FLOAT32) == stage.layout


def test_a_tied_table_is_at_both_ends_and_once_on_one_stage(models: Models) -> None:
    for architecture in ("llama-tied", "gpt2"):
        first, middle, last = load(models(architecture), 3)
        assert first.tied is not None
        assert last.tied is not None
        assert middle.tied is None
        tables = [stage.params_P[slice(*stage.tied)] for stage in (first, last)]
        assert tables[0].numel() == 260 * 32
        assert torch.equal(*tables)
        (whole,) = load(models(architecture), 1)
        assert whole.tied is None
        assert whole.n_elements == first.n_elements + middle.n_elements + last.n_elements - 260 * 32
    assert [stage.tied for stage in load(models("llama"), 2)] == [None, None]


def test_a_constant_of_the_files_is_carried_along_and_never_changed(models: Models) -> None:
    stages = load(models("deepseek_v3"), 2)
    biases = [
        (stage, tensor) for stage in stages for tensor in stage.tensors if tensor.name.endswith("correction_bias")
    ]
    assert len(biases) == 3
    assert all(tensor.start >= stage.decay_end for stage, tensor in biases)
    grads = walk(stages, tokens_of()).grads
    assert not any(bool(grads[stage.index][tensor.start : tensor.end].any()) for stage, tensor in biases)


def test_a_gradient_is_one_microbatch_s_alone_in_the_same_memory(models: Models) -> None:
    (stage,) = load(models("llama"), 1)
    first = stage.backward(WORK, tokens_of(1), None, None)
    kept = first.grad_P.clone()
    second = stage.backward(WORK, tokens_of(2), None, None)
    assert second.grad_P.data_ptr() == first.grad_P.data_ptr()
    assert not torch.equal(second.grad_P, kept)
    assert torch.equal(stage.backward(WORK, tokens_of(1), None, None).grad_P, kept)
    assert first.grad_BTW is None


def test_the_head_in_portions_gives_the_same(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = load(models("gpt2"), 2)
    whole = walk(stages, tokens_of())
    monkeypatch.setattr(stage_module, "_LOGITS", 5 * 260)
    parts = walk(stages, tokens_of())
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    for a, b in zip(parts.grads, whole.grads, strict=True):
        assert float((a - b).abs().max()) <= 1e-6 * float(b.abs().max())


# ---- kept graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_kept_or_recomputed_is_the_same_to_the_bit(architecture: str, models: Models) -> None:
    directory = models(architecture)
    for n_stages in (2, 3):
        walks = []
        for options in ({"recompute": "never"}, {"recompute": "always"}, {"recompute": "auto"}, {"keep_bytes": 0}):
            stages = load(directory, n_stages, **options)
            walks.append(walk(stages, tokens_of()))
            assert [len(stage._kept) for stage in stages] == [0] * n_stages
        assert all(same(walks[0], other) for other in walks[1:])


def graphs_run(stage: TorchStage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each forward that the stage computes."""
    runs: list[int] = []
    run = stage._run
    monkeypatch.setattr(stage, "_run", lambda *arguments: (runs.append(1), run(*arguments))[1])
    return runs


@pytest.mark.parametrize(("recompute", "n_runs"), [("never", 1), ("auto", 1), ("always", 2)])
def test_a_kept_graph_spares_the_second_forward(
    recompute: str, n_runs: int, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load(models("llama"), 2, recompute=recompute)[0]
    runs = graphs_run(stage, monkeypatch)
    output = stage.forward(WORK, tokens_of(), None)
    assert (stage.kept_bytes > 0) == (recompute == "auto")
    grad = stage.backward(WORK, tokens_of(), None, output).grad_P.clone()
    assert len(runs) == n_runs
    # A backward that is asked for twice is computed again.
    assert torch.equal(stage.backward(WORK, tokens_of(), None, output).grad_P, grad)
    assert len(runs) == n_runs + 1


def test_graphs_are_kept_as_far_as_their_budget_goes_the_oldest_dropped_first(models: Models) -> None:
    stage = load(models("llama"), 2)[0]
    works = [bytes([number]) * 32 for number in range(4)]
    stage.forward(works[0], tokens_of(0), None)
    one = stage.kept_bytes
    # At least the activations that two blocks of this size must save, and less than everything that they compute.
    assert 2 * 24 * 32 * 4 * 4 < one < 2 * 24 * 32 * 4 * 100
    stage.forget(works[0])
    assert stage.kept_bytes == 0
    stage = load(models("llama"), 2, keep_bytes=2 * one + one // 2)[0]
    for number, work in enumerate(works):
        stage.forward(work, tokens_of(number), None)
    assert stage.kept_bytes == 2 * one
    assert list(stage._kept._graphs) == works[2:]
    stage.forget_all()
    assert stage.kept_bytes == 0


def test_a_graph_that_is_larger_than_the_budget_is_not_kept() -> None:
    kept = KeptGraphs(10)
    graph = Graph(torch.zeros(1), None, torch.zeros(1), 0, size_bytes=11)
    kept.put(b"a", graph)
    assert (len(kept), kept.size_bytes) == (0, 0)
    graph.size_bytes = 10
    kept.put(b"a", graph)
    kept.put(b"a", graph)
    assert (len(kept), kept.size_bytes) == (1, 10)


@pytest.mark.parametrize("recompute", ["never", "auto"])
def test_a_graph_of_older_parameters_is_not_used(recompute: str, models: Models) -> None:
    changes: list[Callable[[TorchStage], object]] = [
        lambda stage: stage.params_P.mul_(1.01),
        lambda stage: stage.params_P.detach()[100:].add_(0.01),
        lambda stage: _optimizer_step(stage.params_P),
    ]
    for change in changes:
        stage = load(models("llama"), 2, recompute=recompute)[0]
        output = stage.forward(WORK, tokens_of(), None)
        change(stage)
        actual = stage.backward(WORK, tokens_of(), None, output).grad_P.clone()
        fresh = load(models("llama"), 2, recompute="always")[0]
        stale = fresh.backward(WORK, tokens_of(), None, output).grad_P.clone()
        fresh.params_P.copy_(stage.params_P)
        assert torch.equal(actual, fresh.backward(WORK, tokens_of(), None, output).grad_P)
        assert not torch.equal(actual, stale)


def _optimizer_step(params_P: torch.Tensor) -> None:
    leaf = params_P.detach()[: params_P.numel() // 2]
    leaf.grad = torch.ones_like(leaf)
    torch.optim.AdamW([leaf], lr=0.01, foreach=False).step()


def test_a_graph_of_another_input_is_not_used(models: Models) -> None:
    stages = load(models("llama"), 3, recompute="never")
    output = stages[0].forward(WORK, tokens_of(), None)
    sent = stages[1].forward(WORK, tokens_of(), output)
    other = stages[1].backward(WORK, tokens_of(), 1.5 * output, sent)
    expected = load(models("llama"), 3)[1].backward(WORK, tokens_of(), 1.5 * output, sent)
    assert torch.equal(other.grad_P, expected.grad_P)
    assert torch.equal(other.grad_BTW, expected.grad_BTW)
    stages[0].backward(WORK, tokens_of(1), None, output)
    assert torch.equal(
        stages[0].backward(WORK, tokens_of(1), None, output).grad_P,
        load(models("llama"), 3)[0].backward(WORK, tokens_of(1), None, output).grad_P,
    )


# ---- borders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8", "bfloat16"])
def test_coded_borders_change_the_loss_and_the_gradients_little(codec: str, models: Models) -> None:
    border = BorderPart(codec=codec)
    exact = walk(load(models("llama"), 3), tokens_of())
    coded = walk(load(models("llama"), 3, border), tokens_of(), border)
    assert coded.loss == pytest.approx(exact.loss, rel=5e-3)
    assert coded.loss != exact.loss
    for a, b in zip(coded.grads, exact.grads, strict=True):
        assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.99


@pytest.mark.parametrize(("kind", "factor"), [("linear", 2), ("linear", 4), ("maxout", 2), ("maxout", 8)])
def test_a_bottleneck_trains_with_the_rest(kind: str, factor: int, models: Models) -> None:
    border = BorderPart(codec="int8", bottleneck=kind, factor=factor)
    stages = load(models("llama"), 3, border)
    width = 32 // factor
    assert [stage.output_shape for stage in stages] == [(N_SEQUENCES, N_TOKENS, width)] * 2 + [None]
    assert [stage.input_shape for stage in stages] == [None] + [(N_SEQUENCES, N_TOKENS, width)] * 2
    walked = walk(stages, tokens_of(), border)
    grads = by_name(stages, walked.grads)
    down = ["down.bias", "down.weight"] if kind == "linear" else []
    names = ["after.bias", "after.weight", "before.bias", "before.weight", *down, "up.bias", "up.weight"]
    assert sorted(name for name in grads if name.startswith("mycel.")) == [
        f"mycel.border.{i}.{name}" for i in (0, 1) for name in names
    ]
    assert all(bool(grad.any()) for grad in grads.values())
    first = walked.loss
    for _ in range(8):
        step(stages, walked.grads, 0.05)
        walked = walk(stages, tokens_of(), border)
    assert walked.loss < 0.9 * first


def test_a_bottleneck_begins_the_same_for_all_peers_of_a_run(models: Models) -> None:
    border = BorderPart(bottleneck="linear")
    stages, again = load(models("llama"), 2, border), load(models("llama"), 2, border)
    other = load(models("llama"), 2, border, seed=6)
    plain = load(models("llama"), 2)
    for index in range(2):
        assert torch.equal(stages[index].params_P, again[index].params_P)
        tables = [{t.name: s.params_P[t.start : t.end] for t in s.tensors} for s in (stages[index], other[index])]
        for name, values in tables[0].items():
            drawn = name.startswith("mycel.") and name.endswith(("down.weight", "up.weight"))
            assert torch.equal(values, tables[1][name]) != drawn, name
        assert {t.name for t in plain[index].tensors} < set(tables[0])
        assert stage_layout(models("llama"), plan_of(2), index, border) == stages[index].layout


def test_a_factor_must_divide_the_hidden_size() -> None:
    assert border_width(BorderPart(factor=8), 36) == 36
    with pytest.raises(ConfigError, match="factor 8 does not divide the hidden size 36"):
        border_width(BorderPart(bottleneck="maxout", factor=8), 36)


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("leading", [(90,), (3, 30)])
@pytest.mark.parametrize(("plain", "fast"), [(torch.nn.Linear, TrainedLinear), (Conv1D, TrainedConv1D)])
def test_the_fast_products_give_torch_s_results_and_gradients(plain, fast, leading) -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(130, 170) if plain is torch.nn.Linear else Conv1D(170, 130)
    with torch.no_grad():
        layer.bias.normal_()
        layer.weight.normal_()
    x, back = torch.randn(*leading, 130), torch.randn(170, *leading).movedim(0, -1)
    outcomes = []
    for kind in (plain, fast):
        layer.__class__ = kind
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        output.backward(back)
        outcomes.append((output.detach(), leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
        assert ("_Product" in output.grad_fn.name()) == (kind is fast)
    for a, b in zip(*outcomes, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_frozen_inputs_and_no_bias_are_spared() -> None:
    layer = TrainedLinear(130, 170, bias=False)
    layer(torch.randn(90, 130)).sum().backward()
    assert layer.weight.grad is not None


# ---- serving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_spans_serve_what_the_stages_train(architecture: str, models: Models, tmp_path: Path) -> None:
    assert_serves_what_it_trains(models(architecture), 2, tmp_path / "saved")


def test_serving_in_between_changes_no_gradient_and_costs_no_memory(models: Models) -> None:
    stages = load(models("llama"), 2)
    expected = walk(stages, tokens_of())
    spans = [stage.span() for stage in stages]
    for n_tokens in (300, 1):
        logits_of(spans, torch.zeros(n_tokens, dtype=torch.int64))
    spans[0].part(0, 1).forward(torch.arange(7), spans[0].part(0, 1).new_cache())
    assert same(walk(stages, tokens_of()), expected)
    for stage, span in zip(stages, spans, strict=True):
        memory = stage.params_P.untyped_storage().data_ptr()
        assert isinstance(span, Span)
        assert all(t.untyped_storage().data_ptr() == memory for t in span.tensors if isinstance(t, torch.nn.Parameter))


def test_a_model_with_bottlenecks_is_not_served(models: Models) -> None:
    stage = load(models("llama"), 2, BorderPart(bottleneck="maxout"))[0]
    with pytest.raises(ConfigError, match="not a Hugging Face model"):
        stage.span()
    load(models("llama"), 1, BorderPart(bottleneck="maxout"))[0].span()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_not_a_stage_s_input_is_refused_in_words(models: Models) -> None:
    first, last = load(models("llama"), 2)
    hidden = torch.zeros(N_SEQUENCES, N_TOKENS, 32)
    wrong = tokens_of()
    wrong[1, 3] = 260
    for tokens, given, reason in [
        (tokens_of()[:, :-1], None, "token ids"),
        (tokens_of().to(torch.int32), None, "token ids"),
        (wrong, None, "vocabulary of 260"),
        (-wrong, None, "vocabulary of 260"),
        (tokens_of(), hidden, "an input of None"),
    ]:
        with pytest.raises(ValueError, match=reason):
            first.forward(WORK, tokens, given)
    with pytest.raises(ValueError, match="no such gradient"):
        first.backward(WORK, tokens_of(), None, None)
    with pytest.raises(ValueError, match="no such gradient"):
        last.backward(WORK, tokens_of(), hidden, hidden)
    with pytest.raises(ValueError, match=r"takes an input of \(2, 12, 32\), not None"):
        last.backward(WORK, tokens_of(), None, None)


def test_samples_longer_than_the_model_s_positions_are_refused(models: Models) -> None:
    plan = RunPlan(bytes(32), SPANS[2], 10, 3, N_SEQUENCES, 257)
    with pytest.raises(ConfigError, match="samples of 257 tokens are too long"):
        TorchStage.load(models("llama"), plan, 0, Recipe("test"))
