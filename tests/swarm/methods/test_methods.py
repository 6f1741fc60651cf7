"""Each method on a quadratic whose answers can be worked out, and against the formulas of its paper."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.make import make_method
from mycel.swarm.methods.method import Method
from mycel.swarm.methods.options import DilocoOptions, parse_options
from mycel.swarm.methods.streaming import fragments

LAYOUT = Layout(((16, 8), (8,), (32, 4), (4,), (3,)))
P = LAYOUT.n_elements
TABLES: tuple[dict[str, object], ...] = (
    {"name": "data-parallel", "rate": 0.05},
    {"name": "data-parallel", "rate": 0.02, "delay": 2},
    {"name": "data-parallel", "rate": 0.05, "optimizer": "sgd"},
    {"name": "data-parallel", "rate": 0.2, "optimizer": "sgd", "momentum": 0.0},
    {"name": "diloco", "inner_steps": 5},
    {"name": "diloco", "inner_steps": 5, "braking": 0.5},
    {"name": "streaming", "inner_steps": 6, "fragments": 3, "delay": 1},
    {"name": "streaming", "inner_steps": 6, "fragments": 2, "delay": 5},
    {"name": "eager", "inner_steps": 5},
    {"name": "sparseloco", "inner_steps": 5},
    {"name": "demo", "rate": 0.02},
)


def draw(seed: int, n: int = P) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def train(table: dict[str, object], steps: int, goals_NP: Tensor, inner_rate: float = 0.1) -> list[Method]:
    """Peers that each pull towards a goal of their own; a round's result is the plain mean."""
    methods = [make_method(table, LAYOUT, torch.zeros(P)) for _ in goals_NP]
    first = methods[0]
    local_NP = torch.stack([method.restart() for method in methods])
    due: list[tuple[int, int, Tensor]] = []
    for step in range(1, steps + 1):
        gradient_NP = local_NP - goals_NP
        if first.sends == "parameters":
            local_NP -= inner_rate * gradient_NP
        if step % first.inner_steps == 0:
            number = step // first.inner_steps
            source_NP = local_NP if first.sends == "parameters" else gradient_NP
            offered = [m.contribution(number, x) for m, x in zip(methods, source_NP, strict=True)]
            due.append((step + first.delay, number, torch.stack(offered).mean(0)))
        while due and due[0][0] <= step:
            _, number, result_S = due.pop(0)
            for index, method in enumerate(methods):
                method.apply(number, result_S, len(methods))
                local_NP[index] = method.merge(number, local_NP[index])
    return methods


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_peers_find_the_middle_of_their_goals_and_hold_the_same_bits(table: dict[str, object]) -> None:
    goals_NP = torch.stack([draw(seed) for seed in (1, 2, 3)])
    methods = train(table, 300, goals_NP)
    distance = float((methods[0].state.theta_P - goals_NP.mean(0)).norm() / goals_NP.mean(0).norm())
    assert distance < 0.1
    assert len({method.state.digest() for method in methods}) == 1


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_scopes_cover_every_element_once_a_cycle(table: dict[str, object]) -> None:
    method = make_method(table, LAYOUT, torch.zeros(P))
    seen = torch.zeros(P)
    for number in range(method.n_scopes):
        scope = method.scope(number)
        assert scope == method.scope(number + method.n_scopes)
        assert method.layout(number).n_elements == sum(part.stop - part.start for part in scope)
        for part in scope:
            seen[part] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_a_false_result_changes_nothing(table: dict[str, object]) -> None:
    method = make_method(table, LAYOUT, draw(0))
    before = method.state.digest()
    size = method.layout(0).n_elements
    for result in (torch.full((size,), torch.nan), torch.full((size,), 1e30), torch.zeros(size + 1)):
        with pytest.raises(RemoteProtocolError):
            method.apply(0, result, 1)
    assert method.state.digest() == before


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_a_peer_that_loads_the_state_goes_on_with_the_others(table: dict[str, object]) -> None:
    old = make_method(table, LAYOUT, draw(0))
    for number in range(3):
        old.contribution(number, draw(number + 10))
        old.apply(number, draw(number, old.layout(number).n_elements), 4)
    new = make_method(table, LAYOUT, torch.zeros(P))
    new.state.load(old.state.snapshot())
    assert torch.equal(new.restart(), old.state.theta_P)
    for method in (old, new):
        method.apply(3, draw(99, old.layout(3).n_elements), 4)
    assert old.state.digest() == new.state.digest()


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_what_comes_in_stays_as_it_was(table: dict[str, object]) -> None:
    start, local, result = draw(0), draw(1), draw(2)
    method = make_method(table, LAYOUT, start)
    result = result[: method.layout(1).n_elements].clone()
    offered = method.contribution(1, local)
    offered_before = offered.clone()
    method.apply(1, result, 2)
    merged = method.merge(1, local)
    merged += 1.0  # the peer trains on in place
    assert torch.equal(start, draw(0))
    assert torch.equal(local, draw(1))
    assert torch.equal(result, draw(2)[: len(result)])
    assert torch.equal(offered, offered_before)
    assert not torch.equal(merged, method.merge(1, local))


def test_what_was_learned_in_a_round_that_came_to_nothing_is_in_the_next_one() -> None:
    method = make_method({"name": "diloco"}, LAYOUT, torch.zeros(P))
    method.contribution(1, draw(1))  # nothing is applied
    assert torch.equal(method.contribution(2, draw(1) + draw(2)), -(draw(1) + draw(2)))


def test_streaming_with_one_fragment_and_no_delay_is_diloco() -> None:
    goals_NP = torch.stack([draw(1), draw(2)])
    table = {"name": "streaming", "inner_steps": 5, "fragments": 1, "delay": 0, "mix": 0.0, "rate": 0.7}
    streamed = train(table, 40, goals_NP)[0]
    whole = train({"name": "diloco", "inner_steps": 5}, 40, goals_NP)[0]
    assert torch.equal(streamed.state.theta_P, whole.state.theta_P)


def test_streaming_mixes_inside_its_fragment_alone() -> None:
    method = make_method({"name": "streaming", "fragments": 2, "mix": 0.25}, LAYOUT, draw(0))
    merged = method.merge(1, draw(1))
    inside = torch.zeros(P, dtype=torch.bool)
    for part in method.scope(1):
        inside[part] = True
    expected = torch.where(inside, draw(1) * 0.25 + draw(0) * 0.75, draw(1))
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_fragments_are_of_about_equal_size_and_strided(n: int) -> None:
    layout = Layout(((128, 64), *(((192, 64), (192,), (64, 64), (256, 64), (64, 256)) * 2), (128, 64)))
    parts = fragments(layout, n)
    assert len(parts) == n
    assert max(part.layout.n_elements for part in parts) <= 1.03 * layout.n_elements / n
    for index, part in enumerate(parts):
        assert len(part.scope) == 4
        starts = [piece.start / layout.n_elements for piece in part.scope]
        assert starts == pytest.approx([(index + stride * n) / (4 * n) for stride in range(4)], abs=0.01)


def test_fewer_rows_than_fragments() -> None:
    assert [part.scope for part in fragments(Layout(((2, 3),)), 5)] == [(slice(0, 3),), (slice(3, 6),)]


def test_eager_is_the_papers_rule() -> None:
    """theta_m <- Nesterov(theta_m, own_t / n + (mean - own / n) of the round before), each with its own momentum."""
    goals_NP = torch.stack([draw(seed).double() for seed in (1, 2, 3)])
    n, steps, rate, momentum, inner_rate = 3, 4, 0.5, 0.8, 0.2
    theta_NP, moment_NP, before_NP = (torch.zeros(n, P, dtype=torch.float64) for _ in range(3))
    table = {"name": "eager", "inner_steps": steps, "rate": rate, "momentum": momentum, "own": 1 / n}
    methods = [make_method(table, LAYOUT, torch.zeros(P)) for _ in range(n)]

    def phase(start_NP: Tensor) -> Tensor:
        for _ in range(steps):
            start_NP = start_NP - inner_rate * (start_NP - goals_NP)
        return start_NP

    # The first phase: no result has come in, and our peers go on from where they are; so does the reference.
    local_NP = phase(torch.zeros(n, P, dtype=torch.float64))
    own_NP, start_NP = theta_NP - local_NP, local_NP
    offered_NP = torch.stack([m.contribution(0, x.float()) for m, x in zip(methods, local_NP, strict=True)])
    for number in range(1, 9):
        before_NP, local_NP = own_NP, phase(start_NP)
        own_NP = start_NP - local_NP
        # The paper's rule from here on; its first step, which ours takes now, is the own part of round 0.
        gradients = [before_NP / n] if number == 1 else []
        gradients.append((own_NP - before_NP) / n + before_NP.mean(0))
        if number == 1:
            gradients = [(own_NP / n) + before_NP.mean(0)]
        for gradient_NP in gradients:
            moment_NP = momentum * moment_NP + gradient_NP
            theta_NP = theta_NP - rate * (gradient_NP + momentum * moment_NP)
        start_NP = theta_NP
        result = offered_NP.mean(0)
        offered_NP = torch.stack([m.contribution(number, x.float()) for m, x in zip(methods, local_NP, strict=True)])
        for index, method in enumerate(methods):
            method.apply(number - 1, result, n)
            ours = method.merge(number - 1, local_NP[index].float())
            torch.testing.assert_close(ours.double(), start_NP[index], rtol=1e-4, atol=1e-4)


def test_an_eager_peer_that_takes_its_own_part_for_most_of_the_mean_bears_the_delay() -> None:
    """Where phases train to their end, the error grows with weights of 1 / n at DiLoCo's rate; ours shrinks it."""
    goals_NP = torch.stack([draw(seed) for seed in (1, 2, 3, 4)])
    distances = []
    for differing in ({"rate": 0.7, "own": 1 / len(goals_NP)}, {}):
        method = train({"name": "eager", "inner_steps": 2, **differing}, 80, goals_NP, inner_rate=0.9)[0]
        distances.append(float((method.state.theta_P - goals_NP.mean(0)).norm()))
    start = float(goals_NP.mean(0).norm())
    assert distances[0] > 10 * start
    assert distances[1] < 0.01 * start


def test_an_eager_peer_keeps_what_it_learned_until_a_late_result_came() -> None:
    method = make_method({"name": "eager", "inner_steps": 5}, LAYOUT, torch.zeros(P))
    method.contribution(0, draw(0))
    method.apply(0, torch.zeros(P), 2)
    in_time = method.merge(0, draw(0))
    late = make_method({"name": "eager", "inner_steps": 5}, LAYOUT, torch.zeros(P))
    late.contribution(0, draw(0))
    late.apply(0, torch.zeros(P), 2)
    torch.testing.assert_close(late.merge(0, draw(0) + draw(1)), in_time + draw(1))


def test_demo_steps_by_signs() -> None:
    method = make_method({"name": "demo", "rate": 0.25}, LAYOUT, torch.zeros(P))
    method.apply(0, torch.tensor([-1e-6, 0.0, 1e5]).repeat(P // 3 + 1)[:P], 4)
    assert method.state.theta_P[:3].tolist() == [0.25, 0.0, -0.25]


def test_weight_decay_is_for_matrices_alone() -> None:
    table = {"name": "data-parallel", "optimizer": "sgd", "momentum": 0.0, "rate": 0.5, "weight_decay": 0.2}
    method = make_method(table, LAYOUT, torch.ones(P))
    method.apply(0, torch.zeros(P), 1)
    for part, shape in LAYOUT.pieces():
        assert method.state.theta_P[part].unique().tolist() == pytest.approx([0.9 if len(shape) == 2 else 1.0])


def test_the_schedule_is_a_factor_of_the_shared_rate() -> None:
    table = {"name": "demo", "rate": 0.5}
    method = make_method(table, LAYOUT, torch.zeros(P), schedule=lambda version: 1.0 / (version + 1))
    for number in range(2):
        method.apply(number, torch.ones(P), 1)
    assert method.state.theta_P.unique().tolist() == [-0.75]


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({}, "name"),
        ({"name": "fedavg"}, "fedavg"),
        ({"name": "diloco", "inner_steps": 0}, "inner_steps"),
        ({"name": "diloco", "inner_steps": True}, "inner_steps"),
        ({"name": "diloco", "momentum": 1.0}, "momentum"),
        ({"name": "diloco", "rate": float("nan")}, "rate"),
        ({"name": "diloco", "rate": float("inf")}, "rate"),
        ({"name": "diloco", "delay": 1}, "delay"),
        ({"name": "streaming", "inner_steps": 3, "fragments": 4}, "fragments"),
        ({"name": "streaming", "inner_steps": 8, "delay": 8}, "delay"),
        ({"name": "demo", "codec": ""}, "codec"),
    ],
    ids=str,
)
def test_a_bad_table_is_refused_in_one_line(table: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(table)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_fractions_too() -> None:
    assert parse_options({"name": "diloco", "rate": 1}) == DilocoOptions(rate=1.0)


def test_parameters_and_layout_must_agree() -> None:
    with pytest.raises(ValueError, match="layout"):
        make_method({"name": "diloco"}, LAYOUT, torch.zeros(P + 1))


def golden(seed: int) -> Tensor:
    """Parameters from SHA-256 and no generator of torch's, so that they are the same in every release."""
    data = b"".join(hashlib.sha256(f"{seed}/{block}".encode()).digest() for block in range((P * 2 + 31) // 32))
    halves = torch.frombuffer(bytearray(data[: 2 * P]), dtype=torch.int16)
    return halves.to(torch.float32) / 65536.0


# Computed once, with one thread on x86-64: another processor that gives other bits would split the swarm.
GOLDEN = (
    "c375ed92a9516ac3",
    "330f5e3d0690fae4",
    "eb6b86ac579deaa7",
    "8f63bafb5ce85342",
    "6c537ce176f6f2c9",
    "47fdadc0032e392b",
    "93912675d925a1fe",
    "9a5ec80ef73a436c",
    "d718db96ceede2a1",
    "361a154180dc93aa",
    "369a007eea6de913",
)


@pytest.mark.parametrize(("table", "digest"), list(zip(TABLES, GOLDEN, strict=True)), ids=str)
def test_the_bits_of_each_method_are_written_down(table: dict[str, object], digest: str) -> None:
    method = make_method(table, LAYOUT, golden(0))
    for number in range(6):
        method.apply(number, golden(number + 1)[: method.layout(number).n_elements].clone(), 3)
    assert method.state.digest().hex()[:16] == digest
