"""A chain of spans gives the unsplit model's logits, for every architecture and every cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mycel.node.fast_linear import FastLinear
from mycel.node.model_info import inspect_model, span_bytes
from mycel.node.span import Span, SpanCache
from mycel.protocols.errors import ConfigError
from tests.tiny_models import MORE_TINY_ARCHITECTURES, TINY_ARCHITECTURES, make_tiny_model

N_BLOCKS = 4
N_TOKENS = 24
# Chunks of the prefill (some shorter than the window of 6 tokens, some longer, one of a single token), then decode.
CHUNKS = (5, 9, 1, 2) + (1,) * 7
CUTS = ((0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (0, 1, 2, 3, 4))
ALL = [*TINY_ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_TINY_ARCHITECTURES)]
# What follows from the cut itself is shown on a few of each kind in the fast part, and on all in the slow one.
FEW = ("llama", "gemma3", "bloom", "mixtral")
FEW_FAST = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW))
    for name in (*TINY_ARCHITECTURES, *MORE_TINY_ARCHITECTURES)
]

WINDOWED = ("qwen2-window", "mistral", "gemma2", "gemma3", "phi3", "starcoder2")

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
            directory = tmp_path_factory.mktemp("models") / architecture
            made[architecture] = make_tiny_model(architecture, directory, n_blocks=N_BLOCKS)
        return made[architecture]

    return model


def _token_ids() -> Tensor:
    return torch.randint(0, 256, (N_TOKENS,), generator=torch.Generator().manual_seed(1))


def _unsplit_logits(directory: Path, ids: Tensor, **kwargs: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs).eval()
    with torch.inference_mode():
        logits: Tensor = model(ids.unsqueeze(0), use_cache=False).logits[0]
    return logits


def _chain(directory: Path, cuts: Sequence[int], **kwargs: Any) -> list[Span]:
    return [Span.load(directory, start, end, **kwargs) for start, end in pairwise(cuts)]


def _step(spans: Sequence[Span], caches: Sequence[SpanCache], ids: Tensor) -> Tensor:
    state = ids
    for span, cache in zip(spans, caches, strict=True):
        state = span.forward(state, cache)
    return spans[-1].logits(state)


def _chunked_logits(spans: Sequence[Span], ids: Tensor, chunks: Sequence[int] = CHUNKS) -> Tensor:
    caches = [span.new_cache() for span in spans]
    return torch.cat([_step(spans, caches, chunk) for chunk in torch.split(ids, list(chunks))])


@pytest.mark.parametrize("architecture", ALL)
def test_every_cut_gives_the_unsplit_logits(architecture: str, models: Models) -> None:
    directory, ids = models(architecture), _token_ids()
    expected_TV = _unsplit_logits(directory, ids)
    assert expected_TV.std() > 0.5
    for cuts in CUTS:
        actual_TV = _chunked_logits(_chain(directory, cuts), ids)
        assert (actual_TV - expected_TV).abs().max() < 1e-4, cuts


@pytest.mark.parametrize("architecture", FEW_FAST)
def test_every_block_changes_the_logits(architecture: str, models: Models) -> None:
    """The control of the test above: with a block left out, or passed twice, the logits are far from the model's."""
    directory, ids = models(architecture), _token_ids()
    expected_TV = _unsplit_logits(directory, ids)
    for wrong in ((0, 1, 1, 2), (0, 2, 3, 4), (0, 1, 2, 3, 3, 4)):
        spans = [Span.load(directory, start, end) for start, end in _pairs(wrong)]
        assert (_chunked_logits(spans, ids) - expected_TV).abs().max() > 1e-2


def _pairs(wrong: Sequence[int]) -> list[tuple[int, int]]:
    """Spans of a chain that is wrong on purpose: a repeated boundary runs the block before it again."""
    pairs = {
        (0, 1, 1, 2): [(0, 2), (3, 4)],
        (0, 2, 3, 4): [(0, 1), (2, 4)],
        (0, 1, 2, 3, 3, 4): [(0, 3), (2, 3), (3, 4)],
    }
    return pairs[tuple(wrong)]


@pytest.mark.parametrize("architecture", FEW_FAST)
def test_parts_of_a_span_over_the_same_weights_give_the_unsplit_logits(architecture: str, models: Models) -> None:
    whole, ids = Span.load(models(architecture), 0, N_BLOCKS), _token_ids()
    expected_TV = _chunked_logits([whole], ids)
    tail = Span.load(models(architecture), 2, N_BLOCKS)
    for chain in (
        [whole.part(0, 1), whole.part(1, 3), whole.part(3, 4)],
        [whole.part(0, 2), tail.part(2, 3), tail.part(3, 4)],
        [whole],
    ):
        assert (_chunked_logits(chain, ids) - expected_TV).abs().max() < 1e-4
    with pytest.raises(ValueError, match="are not within"):
        tail.part(1, 3)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_the_window_is_shorter_than_the_test(architecture: str, models: Models) -> None:
    """The control of the windowed models: without its window such a model's logits differ."""
    directory, ids = models(architecture), _token_ids()
    unwindowed_TV = _unsplit_logits(directory, ids, sliding_window=4096)
    difference_T = (_chunked_logits(_chain(directory, (0, 2, 4)), ids) - unwindowed_TV).abs().amax(dim=1)
    assert difference_T[6:].max() > 1e-2
    assert difference_T[:6].max() < 1e-4


def test_experts_are_split_too(models: Models) -> None:
    """Expert tensors are fused while loading: the checkpoint's names are not those of the modules."""
    info = inspect_model(models("mixtral"))
    assert any(".experts.0.w1." in entry.name for entry in info.tensors["block.2"])
    span = Span.load(models("mixtral"), 2, 3)
    assert span.nbytes == pytest.approx(span_bytes(info, 2, 3), rel=0.02)


def test_a_sharded_checkpoint_is_read_from_its_index(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path / "model", max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    expected_TV = _unsplit_logits(directory, _token_ids())
    assert (_chunked_logits(_chain(directory, (0, 2, 4)), _token_ids()) - expected_TV).abs().max() < 1e-4


def test_weights_are_views_of_the_files(models: Models) -> None:
    """Weights in the files' dtype lie in memory as they lie in the file."""
    span = Span.load(models("llama"), 1, 3)
    addresses = sorted((p.data_ptr(), p.nbytes) for p in span.tensors if p.dim() and isinstance(p, torch.nn.Parameter))
    entries = [e for i in (1, 2) for e in inspect_model(models("llama")).tensors[f"block.{i}"]]
    offsets = sorted(entry.offset for entry in entries)
    assert [address - addresses[0][0] for address, _ in addresses] == [offset - offsets[0] for offset in offsets]


def test_another_dtype_is_cast_while_loading(models: Models, tmp_path: Path) -> None:
    ids = _token_ids()
    directory = make_tiny_model("llama", tmp_path / "bf16", dtype="bfloat16")
    assert inspect_model(directory).dtype == "bfloat16"
    as_stored = Span.load(directory, 0, N_BLOCKS)
    assert as_stored.forward(ids, as_stored.new_cache()).dtype == torch.bfloat16
    spans = _chain(directory, (0, 2, 4), dtype=torch.float32)
    assert (_chunked_logits(spans, ids) - _unsplit_logits(directory, ids)).abs().max() < 1e-4
    assert spans[0].nbytes > 1.9 * Span.load(directory, 0, 2).nbytes


def test_tied_embeddings_are_held_at_both_ends_and_once_by_the_whole(models: Models) -> None:
    info = inspect_model(models("llama-tied"))
    assert info.tied_embeddings
    first, last, whole = (Span.load(models("llama-tied"), *bounds) for bounds in ((0, 2), (2, 4), (0, 4)))
    assert (first.nbytes, last.nbytes) == pytest.approx((span_bytes(info, 0, 2), span_bytes(info, 2, 4)), abs=200)
    assert whole.nbytes == pytest.approx(first.nbytes + last.nbytes - info.embed_bytes, abs=200)
    # GPT-2's last span needs the token table for its head, but not the position table.
    info = inspect_model(models("gpt2"))
    assert span_bytes(info, 3, 4) < info.embed_bytes + info.block_bytes[3] + info.head_bytes
    assert Span.load(models("gpt2"), 3, 4).nbytes == pytest.approx(span_bytes(info, 3, 4), abs=200)


@pytest.mark.parametrize("architecture", FEW_FAST)
def test_a_cache_holds_what_the_model_info_says(architecture: str, models: Models) -> None:
    span = Span.load(models(architecture), 1, 3)
    cache = span.new_cache()
    assert (cache.length, cache.nbytes) == (0, 0)
    span.forward(torch.zeros(64, span.info.hidden_size), cache)
    assert cache.length == 64
    # 64 tokens in buffers for half as many again, in pages of 64.
    assert cache.nbytes == 128 * sum(span.info.kv_bytes_per_token[1:3])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "bloom"])
def test_a_rolled_back_session_goes_on_as_if_nothing_had_happened(architecture: str, models: Models) -> None:
    spans, ids = _chain(models(architecture), (0, 2, 4)), _token_ids()
    expected_TV = _chunked_logits(spans, ids)
    caches = [span.new_cache() for span in spans]
    _step(spans, caches, ids[:10])
    for token in (3, 1, 4, 1, 5):
        _step(spans, caches, torch.tensor([token]))
    for cache in caches:
        cache.crop(10)
        assert cache.length == 10
    assert (_step(spans, caches, ids[10:]) - expected_TV[10:]).abs().max() < 1e-4


def test_a_rollback_past_what_a_window_has_kept_is_refused(models: Models) -> None:
    span = Span.load(models("mistral"), 0, 2)
    cache = span.new_cache()
    for _ in range(5):
        span.forward(torch.arange(50), cache)
    assert cache.nbytes < 2 * 250 * sum(span.info.kv_bytes_per_token[:2])
    for length in (251, -1, 20):
        with pytest.raises(ValueError, match="cannot roll back"):
            cache.crop(length)
    assert cache.length == 250
    cache.crop(240)
    assert cache.length == 240


def test_long_sessions_outgrow_buffers_and_windows_exactly(models: Models) -> None:
    """200 single steps: full-attention buffers grow twice, windowed ones drop old tokens several times."""
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(2))
    for architecture in ("llama", "gemma3", "starcoder2"):
        actual_TV = _chunked_logits(_chain(models(architecture), (0, 3, 4)), ids, (3,) + (1,) * 197)
        assert (actual_TV - _unsplit_logits(models(architecture), ids)).abs().max() < 1e-4


def test_a_failed_step_leaves_the_cache_as_it_was(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, ids = _chain(models("llama"), (0, 4)), _token_ids()
    caches = [spans[0].new_cache()]
    _step(spans, caches, ids[:10])
    with monkeypatch.context() as patch:
        patch.setattr(FastLinear, "forward", _raise)
        patch.setattr(torch.nn.Linear, "forward", _raise_in_third_block())
        with pytest.raises(RuntimeError, match="out of memory"):
            _step(spans, caches, ids[10:14])
    assert caches[0].length == 10
    assert (_step(spans, caches, ids[10:]) - _unsplit_logits(models("llama"), ids)[10:]).abs().max() < 1e-4


def _raise(*_args: object) -> Tensor:
    raise RuntimeError("out of memory")


def _raise_in_third_block() -> Callable[..., Tensor]:
    calls = iter(range(1000))

    def forward(layer: torch.nn.Linear, input_TD: Tensor) -> Tensor:
        return _raise() if next(calls) > 16 else torch.nn.functional.linear(input_TD, layer.weight, layer.bias)

    return forward


def test_sessions_do_not_share_anything(models: Models) -> None:
    span, ids = Span.load(models("qwen3"), 0, 4), _token_ids()
    caches = [span.new_cache() for _ in range(3)]
    expected_TV = span.logits(span.forward(ids, span.new_cache()))
    for chunk in (slice(0, 7), slice(7, 8), slice(8, 24)):
        for shift, cache in enumerate(caches):
            actual_TV = span.logits(span.forward((ids[chunk] + shift) % 256, cache))
            if shift == 0:
                assert (actual_TV - expected_TV[chunk]).abs().max() < 1e-4


def test_wrong_inputs_are_refused_in_words(models: Models) -> None:
    first, last = _chain(models("llama"), (0, 2, 4))
    with pytest.raises(ValueError, match=r"takes token ids \[T\] of int64, not \[3\] of float32"):
        first.forward(torch.zeros(3), first.new_cache())
    with pytest.raises(ValueError, match=r"takes hidden states \[T, 32\], not \[3, 31\]"):
        last.forward(torch.zeros(3, 31), last.new_cache())
    with pytest.raises(ValueError, match=r"blocks \[0, 2\) have no head"):
        first.logits(torch.zeros(1, 32))
    for start, end in ((2, 2), (-1, 2), (3, 5)):
        with pytest.raises(ValueError, match="is not a span of 4 blocks"):
            Span.load(models("llama"), start, end)


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path / "model")
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(ConfigError, match=r"has shape .* but the configuration says"):
        Span.load(directory, 0, 2)


def test_a_configuration_of_no_model_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_model("gpt_neox", tmp_path / "model")
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 5'))
    with pytest.raises(ConfigError, match="not valid for gpt_neox") as caught:
        Span.load(directory, 0, 2)
    assert "\n" not in str(caught.value)


def test_the_fast_linear_layer_computes_the_same() -> None:
    layer = FastLinear(700, 800)
    with torch.inference_mode():
        for shape in ((1, 1, 700), (1, 37, 700), (5, 700)):
            input_TD = torch.randn(shape)
            assert torch.allclose(
                layer(input_TD), torch.nn.functional.linear(input_TD, layer.weight, layer.bias), atol=1e-4
            )
    layer(torch.randn(3, 700)).sum().backward()
    assert layer.weight.grad is not None
