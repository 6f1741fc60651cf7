"""The model inside the package: its files load in every promised way, and its README does not flatter it."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from mycel.node.demo import demo_model_dir
from mycel.protocols.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "tools" / "train_demo_model.py"


@cache
def script() -> ModuleType:
    """The training script as a module: the held-out loss must come from the very split that training used."""
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@cache
def facts() -> dict[str, Any]:
    return dict(json.loads((demo_model_dir() / "training.json").read_text(encoding="utf-8")))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo_model_dir() / "tokenizer.json"))


@cache
def model() -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(demo_model_dir())
    assert isinstance(loaded, LlamaForCausalLM)
    return loaded  # from_pretrained leaves it in eval mode


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_loads_as_a_llama_of_eight_blocks_that_computes_in_float32() -> None:
    assert model().config.num_hidden_layers == 8  # four nodes of the demo serve two blocks each
    assert {p.dtype for p in model().parameters()} == {torch.float32}
    assert model().get_output_embeddings().weight is model().get_input_embeddings().weight


def test_the_weights_are_small_and_finite() -> None:
    path = demo_model_dir() / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no iterator of its own
    assert "lm_head.weight" not in tensors
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_the_held_out_loss_is_the_recorded_one() -> None:
    corpus = script().load_corpus()
    loss = script().text_loss(model(), tokenizer(), corpus.held_out)
    if corpus.sha256 == facts()["corpus_sha256"]:
        assert loss == pytest.approx(facts()["held_out_loss"], abs=1e-3)
    else:
        # Another Python has other help topics, some of the held-out ones trained on: only a loose bound holds.
        assert loss < facts()["held_out_loss"] + 0.5


def test_the_text_it_was_trained_on_is_known_to_it() -> None:
    # Most of the text is the same in every Python; an untrained model or a wrong tokenizer has 8 nats a token.
    corpus = script().load_corpus()
    assert script().text_loss(model(), tokenizer(), [text[:2000] for text in corpus.train[:8]]) < 2.0


def test_the_split_holds_out_a_twentieth_and_shares_no_paragraph() -> None:
    corpus = script().load_corpus()
    held_out = {p for text in corpus.held_out for p in text.split("\n\n")}
    trained = {p for text in corpus.train for p in text.split("\n\n")}
    assert not held_out & trained
    share = sum(map(len, corpus.held_out)) / sum(map(len, corpus.held_out + corpus.train))
    assert 0.03 < share < 0.07
    assert script().load_corpus() == corpus


def test_the_readme_and_the_training_facts_agree() -> None:
    readme = (demo_model_dir() / "README.md").read_text(encoding="utf-8")
    assert f"{facts()['held_out_loss']:.4f} nats a token" in readme
    assert f"--seed {facts()['seed']} --steps {facts()['steps']}" in readme
    assert facts()["corpus_sha256"] in readme
    assert "PSF" in (demo_model_dir() / "LICENSE-PSF.txt").read_text(encoding="utf-8")


@given(st.text())
def test_any_text_round_trips_through_the_tokenizer_alone(text: str) -> None:
    # The end mark itself is one token, which decoding leaves out; nobody writes it by accident.
    text = text.replace("<|endoftext|>", "")
    assert tokenizer().decode(tokenizer().encode(text).ids) == text


def test_both_tokenizer_loaders_agree_and_put_the_end_mark_first() -> None:
    prompt = 'The for statement is used to iterate: "naïve" λ\n\n  x = [1, 2]'
    ids = tokenizer().encode(prompt).ids
    assert ids[0] == model().config.bos_token_id == model().config.eos_token_id == 0
    for load in (AutoTokenizer.from_pretrained, PreTrainedTokenizerFast.from_pretrained):
        fast = load(demo_model_dir())
        assert fast(prompt)["input_ids"] == ids
        assert fast.decode(ids, skip_special_tokens=True) == prompt
        assert fast.eos_token_id == fast.pad_token_id == 0
    assert len(tokenizer().get_vocab()) == model().config.vocab_size


def greedy(prompt: str) -> str:
    ids_BT = torch.tensor([tokenizer().encode(prompt).ids])
    out_BT = model().generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=40,
        do_sample=False,
        temperature=None,
        top_p=None,
        repetition_penalty=1.1,
    )
    return str(tokenizer().decode(out_BT[0].tolist()))


def test_greedy_text_is_the_same_twice_and_is_english() -> None:
    text = greedy(facts()["prompt"])
    assert text == greedy(facts()["prompt"])
    words = text.lower().split()
    # English prose is a third to a half function words; noise of the same vocabulary has hardly any.
    common = {"the", "a", "an", "is", "are", "of", "to", "in", "be", "by", "and", "or", "this", "that", "as", "for"}
    assert sum(word in common for word in words) / len(words) > 0.2
    assert len(words) >= 20


def test_an_installation_without_the_model_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mycel.node.demo.files", lambda _package: tmp_path)
    with pytest.raises(ConfigError, match="lacks its demo model"):
        demo_model_dir()
