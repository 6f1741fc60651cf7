"""Rings of real processes give the tokens of one process, greedy and sampled, alone and side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mycel.node.client import Model
from mycel.protocols.messages import SamplingParams
from tests.loopback.generating import LONG_PROMPT, PROMPT, generate, reference, with_model
from tests.loopback.node_process import Nodes
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.loopback

RINGS = {1: [(0, 4)], 2: [(0, 2), (2, 4)], 4: [(0, 1), (1, 2), (2, 3), (3, 4)]}
Rings = dict[int, Nodes]


@pytest.fixture(scope="module")
def rings(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rings]:
    """A swarm of one node, one of two and one of four."""
    with ExitStack() as stack:
        started = {n: stack.enter_context(Nodes(tmp_path_factory.mktemp(f"ring{n}"), llama)) for n in RINGS}
        for n, nodes in started.items():
            nodes.start(*RINGS[n])
        yield started


def test_two_processes_give_the_tokens_of_one(llama: Path, tmp_path: Path) -> None:
    """The one loopback test of the fast part."""
    with Nodes(tmp_path, llama) as nodes:
        nodes.start((0, 2), (2, 4))
        run = with_model(nodes.invite, lambda model: generate(model, PROMPT, 20))
        assert run.tokens == reference(llama, PROMPT, 20)
        assert run.peers == [node.peer for node in nodes.nodes]
        assert run.spans == [(0, 2), (2, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("n_hops", RINGS)
@pytest.mark.parametrize(("prompt", "n_new"), [(PROMPT, 60), (PROMPT[:1], 10), (LONG_PROMPT[:700], 10)])
def test_greedy_tokens(rings: Rings, llama: Path, n_hops: int, prompt: tuple[int, ...], n_new: int) -> None:
    run = with_model(rings[n_hops].invite, lambda model: generate(model, prompt, n_new))
    assert run.tokens == reference(llama, prompt, n_new)
    assert run.finish == "length"
    assert run.spans == RINGS[n_hops]
    assert run.peers == [node.peer for node in rings[n_hops].nodes]
    assert run.trace.replaced == []
    assert all(hop.compute_ms > 0 for hop in run.trace.report())


SAMPLINGS = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.9, top_k=20, seed=2),
    SamplingParams(temperature=1.3, top_p=0.8, seed=3),
    SamplingParams(temperature=1.5, min_p=0.05, seed=4),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.3, seed=2**63 - 1),
    SamplingParams(repetition_penalty=1.5),
]


@pytest.mark.slow
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_ring(rings: Rings) -> None:
    async def sampled(model: Model) -> list[list[int]]:
        return [(await generate(model, PROMPT, 30, sampling=sampling)).tokens for sampling in SAMPLINGS]

    alone = with_model(rings[1].invite, sampled)
    assert all(len(tokens) == 30 for tokens in alone)
    assert len({tuple(tokens) for tokens in alone}) == len(SAMPLINGS), "the parameters do nothing"
    assert with_model(rings[2].invite, sampled) == alone
    assert with_model(rings[4].invite, sampled) == alone


@pytest.mark.slow
@pytest.mark.parametrize("n_hops", RINGS)
def test_prompts_side_by_side_are_answered_as_one_by_one(rings: Rings, llama: Path, n_hops: int) -> None:
    prompts = [PROMPT[:n] for n in (1, 2, 7, 19, len(PROMPT))] + [LONG_PROMPT[:300]]

    async def both(model: Model) -> tuple[list[str], list[str], Tokenizer]:
        together = await model.complete(prompts, max_new_tokens=16)
        return together, [(await generate(model, prompt, 16)).text for prompt in prompts], model.codec.tokenizer

    together, one_by_one, tokenizer = with_model(rings[n_hops].invite, both)
    assert together == one_by_one
    assert together == [tokenizer.decode(reference(llama, prompt, 16)) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gemma3"])
def test_other_architectures(architecture: str, forking: None, tmp_path: Path) -> None:
    directory = make_tiny_tokenizer(make_tiny_model(architecture, tmp_path / "model"))
    with Nodes(tmp_path, directory) as nodes:
        nodes.start((0, 1), (1, 4))
        run = with_model(nodes.invite, lambda model: generate(model, PROMPT, 40))
    assert run.tokens == reference(directory, PROMPT, 40)
    assert run.spans == [(0, 1), (1, 4)]
