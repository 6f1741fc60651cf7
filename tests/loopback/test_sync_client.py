"""The plain Python API over a real swarm: iterators, text, closing early, errors as themselves, threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import mycel
from mycel import ConfigError, PeerUnreachable, RouteUnavailable, SamplingParams
from mycel.node.sync_client import SyncModel
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from mycel.swarm.invite import make_invite
from tests.conformance.transport_rig import eventually
from tests.loopback.generating import PROMPT, bounded, reference
from tests.loopback.node_process import Nodes

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

TTL_S = 3.0
KV_TOKENS = 4000


@pytest.fixture(scope="module")
def nodes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with Nodes(tmp_path_factory.mktemp("nodes"), llama) as started:
        started.start((0, 2), (2, 4), ttl_s=TTL_S, kv_tokens=KV_TOKENS)
        yield started


@pytest.fixture(scope="module")
def model(nodes: Nodes) -> Iterator[SyncModel]:
    with mycel.connect(nodes.invite) as connected:
        yield connected


def test_pieces_text_and_tokens(model: SyncModel, nodes: Nodes, llama: Path) -> None:
    generation = model.generate(PROMPT, max_new_tokens=20)
    pieces = list(generation)
    assert [piece.token for piece in pieces] == reference(llama, PROMPT, 20)
    assert [piece.finish for piece in pieces] == [""] * 19 + ["length"]
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    text = "".join(piece.text for piece in pieces)
    assert text == tokenizer.decode([piece.token for piece in pieces])
    prompt = "A swarm of small machines"
    by_tokens = model.generate(tokenizer.encode(prompt).ids, max_new_tokens=20)
    assert model.generate(prompt, max_new_tokens=20).text() == by_tokens.text() != text
    assert [hop.peer.peer for hop in generation.trace.hops] == [node.peer for node in nodes.nodes]
    assert list(generation) == [], "it is over, and stays so"


def test_sampling_and_several_prompts(model: SyncModel) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=7)
    prompts = ["a", "abc", list(PROMPT)]
    texts = model.complete(prompts, max_new_tokens=12, sampling=sampling)
    assert texts == [model.generate(prompt, max_new_tokens=12, sampling=sampling).text() for prompt in prompts]


def test_the_estimate(model: SyncModel) -> None:
    estimate = model.estimate()
    assert estimate.stream_tokens_per_s > 0
    assert estimate.coverage == (1, 1, 1, 1)


def test_closing_early_frees_the_session(model: SyncModel, nodes: Nodes) -> None:
    """How many sessions there were is not known: an attempt that finds one of the nodes still full opens another."""

    def n_told(what: str) -> int:
        return len(nodes.nodes[0].events(f"session.{what}"))

    def all_ended() -> bool:
        return n_told("closed") == n_told("opened") >= opened + 2

    opened = n_told("opened")
    with model.generate(PROMPT, max_new_tokens=KV_TOKENS - len(PROMPT)) as generation:
        next(generation)
    with model.generate(PROMPT, max_new_tokens=KV_TOKENS - len(PROMPT)) as generation:  # all of the memory, again
        next(generation)
        generation.close()
        assert list(generation) == []
    bounded(partial(eventually, all_ended))  # the node says so in its own time


def test_errors_come_as_themselves(model: SyncModel, nodes: Nodes) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        model.generate("")
    with pytest.raises(ConfigError, match="do not fit"):
        model.generate([1] * 5000).text()
    with pytest.raises(RouteUnavailable, match="KV memory is full"):
        model.generate([1] * 4050, max_new_tokens=1, patience_s=0.2).text()
    with pytest.raises(ConfigError, match="do not fit"):
        model.complete(["a", [1] * 5000])
    with pytest.raises(ConfigError):
        mycel.connect("mycel1:nonsense")
    assert model.generate(PROMPT, max_new_tokens=1).text() != "", "none of this harms the connection"


def test_nobody_at_home() -> None:
    gone = Identity.generate()
    address = PeerAddress(gone.peer_id, ("/ip4/127.0.0.1/tcp/1",))
    invite = make_invite(gone, bytes(32), "gone", [address], now=time.time(), lifetime_s=60.0)
    n_threads = threading.active_count()
    with pytest.raises(PeerUnreachable, match="no peer of the invite answers"):
        mycel.connect(invite.text)
    assert threading.active_count() <= n_threads


def test_several_threads_at_once(model: SyncModel, llama: Path) -> None:
    prompts = [PROMPT[:n] for n in range(1, 7)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = threads.map(lambda prompt: list(model.generate(prompt, max_new_tokens=16)), prompts)
        got = [[piece.token for piece in pieces] for pieces in answers]
    assert got == [reference(llama, prompt, 16) for prompt in prompts]


def test_two_models_in_one_process(nodes: Nodes, llama: Path) -> None:
    with mycel.connect(nodes.invite) as first, mycel.connect(nodes.invite) as second:
        assert first.generate(PROMPT, max_new_tokens=4).text() == second.generate(PROMPT, max_new_tokens=4).text()


def test_a_thread_that_waits_hears_of_the_end(nodes: Nodes) -> None:
    """Another thread closes the generation, or the whole model, while one waits for its next piece."""
    with mycel.connect(nodes.invite) as model, ThreadPoolExecutor(1) as thread:
        generation = model.generate(PROMPT, max_new_tokens=3000)
        waiting = thread.submit(list, generation)
        generation.close()
        assert len(waiting.result()) < 3000
        waiting = thread.submit(list, model.generate(PROMPT, max_new_tokens=3000))
        model.close()
        with pytest.raises(ConfigError, match="was closed"):
            waiting.result()


def test_closed_is_closed(nodes: Nodes) -> None:
    model = mycel.connect(nodes.invite)
    generation = model.generate(PROMPT, max_new_tokens=500)
    next(generation)
    model.close()
    model.close()
    with pytest.raises(ConfigError, match="was closed"):
        model.generate(PROMPT)
    with pytest.raises(ConfigError, match="was closed"):
        list(generation)
    generation.close()
