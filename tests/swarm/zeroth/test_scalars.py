"""Slopes by two forward passes, of all parameters, of low-rank additions and of soft prompts; and audits of them."""

from __future__ import annotations

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mycel.protocols.errors import ConfigError
from mycel.swarm.zeroth.byte import VOID, decode, encode
from mycel.swarm.zeroth.defence import Measured, drawn, verdict
from mycel.swarm.zeroth.directions import signs
from mycel.swarm.zeroth.lattice import state_hash, to_float
from mycel.swarm.zeroth.replay import State, replay
from mycel.swarm.zeroth.rule import Rule, in_rate, in_units
from mycel.swarm.zeroth.scalars import Batch, load, measure, start
from mycel.swarm.zeroth.seeds import beacon_of
from mycel.swarm.zeroth.tunables import FullParameters, Lora, SoftPrompt, causal_loss
from tests.swarm.zeroth.logs import PEERS, Log, made_log
from tests.tiny_models import make_tiny_model

SPREAD = in_units(2.0**-12)
SEED = bytes(range(32))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """fresh(architecture) is a model of two blocks that nobody else has touched."""

    @cache
    def made(architecture):
        directory = make_tiny_model(architecture, tmp_path_factory.mktemp(architecture), n_blocks=2)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    return lambda architecture: copy.deepcopy(made(architecture))


def batch(seed=0):
    tokens = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:])


TUNABLES = {
    "full": FullParameters,
    "lora": lambda model: Lora(model, rank=4, targets=("*.q_proj", "*.v_proj", "*.c_attn", "*.query_key_value")),
    "prompt": lambda model: SoftPrompt(model, [1, 2, 3]),
}


@pytest.mark.parametrize("kind", TUNABLES)
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "bloom"])
def test_a_slope_is_the_gradient_along_the_direction(fresh, architecture, kind):
    model = fresh(architecture)
    tunable = TUNABLES[kind](model)
    theta = start(tunable)
    before = tunable.flat.clone()
    found = measure(tunable, theta, SEED, SPREAD, batch())
    assert torch.equal(tunable.flat, before)

    # The same slope by backpropagation through the same parameters.
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    views = list_of_views(tunable, model)
    for view in views:
        view.requires_grad_(True)
    loss_with_gradient(tunable, model, kind, batch()).backward()
    gradients = torch.cat([view.grad.reshape(-1) for view in views])
    slope = float((gradients * torch.from_numpy(signs(SEED, 0, theta.size)).float()).sum())
    assert found.g == pytest.approx(slope, rel=0.02, abs=0.02)
    assert sum(math.prod(shape) for _, shape in tunable.shapes) == theta.size


def list_of_views(tunable, model):
    """The parameters that share the tunable's row, in its order."""
    if isinstance(tunable, SoftPrompt):
        return [tunable._prompt]
    row = tunable.flat
    low, high = row.data_ptr(), row.data_ptr() + 4 * row.numel()
    found = {p.data_ptr(): p for p in model.parameters() if low <= p.data_ptr() < high}
    return [found[address] for address in sorted(found)]


def loss_with_gradient(tunable, model, kind, sample):
    inputs = model.get_input_embeddings()(sample.tokens)
    skipped = 0
    if kind == "prompt":
        inputs = torch.cat((tunable._prompt.expand(len(inputs), -1, -1), inputs), dim=1)
        skipped = tunable._prompt.shape[0]
    logits = model(inputs_embeds=inputs, use_cache=False).logits[:, skipped:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), sample.targets.flatten())


@pytest.mark.parametrize("kind", TUNABLES)
def test_following_the_bytes_lowers_the_loss_and_the_log_alone_gives_the_state(fresh, kind):
    tunable = TUNABLES[kind](fresh("llama"))
    theta = start(tunable)
    rate = {"full": 5e-4, "lora": 2e-3, "prompt": 3e-2}[kind]
    rule = Rule(bytes(32), state_hash(theta), theta.size, in_rate(rate), in_units(1e-3)).checked()
    log, state = Log(rule), State(theta)
    log.append(log.make_join(PEERS[0]))
    log.close_round(state.hash())
    sample = batch()
    before = tunable.loss(sample)
    for _ in range(12):
        directions = log.directions(log.seeds(0, range(2)))
        codes = [encode(measure(tunable, state.theta_P, seed, rule.spread, sample).g) for seed in directions]
        log.append(log.make_entry(PEERS[0], codes))
        state.apply(log.updates())
        log.close_round(state.hash())
        load(tunable, state.theta_P)
    assert tunable.loss(sample) < before - 0.02
    assert replay(theta, Log.read(log.pack())).hash() == state.hash()
    assert np.array_equal(tunable.flat.numpy(), to_float(state.theta_P))


def test_low_rank_additions_begin_as_nothing_and_alike_everywhere(fresh):
    plain = causal_loss(fresh("gpt2"), batch())
    rows = [Lora(fresh("gpt2"), rank=2).flat for _ in range(2)]
    assert torch.equal(*rows)
    assert Lora(fresh("gpt2"), rank=2).loss(batch()) == plain


def test_a_shared_matrix_counts_once(fresh):
    names = [name for name, _ in FullParameters(fresh("llama-tied")).shapes]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_users_hear_what_does_not_fit(fresh):
    with pytest.raises(ConfigError, match="no matrix of this model is called"):
        Lora(fresh("llama"), targets=("*.c_attn",))
    with pytest.raises(ConfigError, match="a rank is"):
        Lora(fresh("llama"), rank=0)
    for tokens in ([], [260]):
        with pytest.raises(ConfigError, match="a soft prompt begins"):
            SoftPrompt(fresh("llama"), tokens)
    with pytest.raises(ConfigError, match="need float32"):
        FullParameters(fresh("llama").to(torch.bfloat16))


def test_the_model_is_put_back_when_a_measurement_fails(fresh):
    tunable = FullParameters(fresh("llama"))
    theta = start(tunable)
    before = tunable.flat.clone()
    with pytest.raises(IndexError):
        measure(tunable, theta, SEED, SPREAD, Batch(torch.tensor([[10**6]]), torch.tensor([[1]])))
    assert torch.equal(tunable.flat, before)


def test_an_exploded_loss_is_void(fresh):
    tunable = FullParameters(fresh("llama"), lambda model, sample: math.inf)
    found = measure(tunable, start(tunable), SEED, SPREAD, batch())
    assert math.isnan(found.g)
    assert found.code == VOID
    assert verdict(VOID, found, 1e-3).ok
    assert not verdict(64, found, 1e-3).ok


# --------------------------------------------------------------------------------------------------------- audits


@pytest.mark.parametrize("g", [1.0, -0.37, 12.0])
def test_one_code_step_is_forgiven_and_two_are_not(g):
    code = encode(g)
    for steps, ok in ((-2, False), (-1, True), (0, True), (1, True), (2, False)):
        assert verdict(code + steps, Measured(decode(code), 2.0, 2.0), 1.0).ok is ok
    assert not verdict(code ^ 0x80, Measured(g, 2.0, 2.0), 1e-3).ok
    assert not verdict(VOID, Measured(g, 2.0, 2.0), 1e-3).ok


def test_what_float32_can_not_tell_is_no_lie():
    # 8 units in the last place of losses of 3, over an epsilon of 1e-3.
    assert verdict(encode(0.006), Measured(0.0045, 3.0, 3.0), 1e-3).ok
    assert verdict(encode(0.0), Measured(-0.0044, 3.0, 3.0), 1e-3).ok
    assert not verdict(encode(0.5), Measured(0.4, 3.0, 3.0), 1e-3).ok


def test_a_measurement_repeated_in_another_order_is_no_lie(fresh):
    tunable = FullParameters(fresh("llama"))
    theta = start(tunable)
    differ = 0
    for number in range(6):
        sample = batch(number)
        said = measure(tunable, theta, SEED, in_units(1e-3), sample)
        again = measure(tunable, theta, SEED, in_units(1e-3), Batch(sample.tokens.flip(0), sample.targets.flip(0)))
        assert verdict(said.code, again, 1e-3).ok
        differ += said.g != again.g
    assert differ


def test_who_is_audited_and_by_whom_follows_from_a_later_beacon():
    log, _ = made_log(6, seed=3)
    closed = log.rounds[3]
    everybody = range(len(log.members))
    every = drawn(log, closed, log.beacon, 1.0, everybody)
    assert [(one.peer, one.sample) for one in every] == [
        (part.peer, sample) for part in closed.parts for sample in range(len(part.codes))
    ]
    assert all(one.auditor != one.peer for one in every)
    assert all(one.code == log.code_of(one.peer, one.round, one.sample) for one in every)
    assert not drawn(log, closed, log.beacon, 1.0, [])
    assert not drawn(log, closed, log.beacon, 0.0, everybody)
    picks = [drawn(log, closed, beacon_of(log.run, bytes([n]) * 32), 0.1, everybody) for n in range(200)]
    share = sum(map(len, picks)) / (200 * len(every))
    assert share == pytest.approx(0.1, abs=0.025)
    assert {one.auditor for pick in picks for one in pick} == set(everybody)
    few = {(one.peer, one.sample) for one in drawn(log, closed, log.beacon, 0.2, everybody)}
    more = {(one.peer, one.sample) for one in drawn(log, closed, log.beacon, 0.6, everybody)}
    assert few <= more
