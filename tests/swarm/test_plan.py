"""The plan of a run: fixed portions of work with ids of their own, owners by hash, stages of about equal cost."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import ConfigError
from mycel.swarm.training.plan import RunPlan, make_plan, shards
from mycel.swarm.training.recipe import DataPart, Recipe, StepPart

RUN = bytes(range(32))
RECIPE = Recipe(
    name="r",
    data=DataPart(kind="python-topics", sequence=64),
    step=StepPart(tokens=10_000, batch_tokens=2048, microbatch=4),
    stages=3,
)


def test_the_plan_of_a_recipe():
    plan = make_plan(RECIPE, RUN, [10] * 8, head_cost=15)
    assert plan == RunPlan(RUN, ((0, 3), (3, 6), (6, 8)), 5, 8, 4, 64)
    assert (plan.n_stages, plan.step_tokens, plan.everything) == (3, 2048, 0xFF)


def test_the_head_weighs_on_the_last_stage_and_the_embedding_on_the_first():
    two = msgspec.structs.replace(RECIPE, stages=2)
    assert make_plan(two, RUN, [10] * 8).spans == ((0, 4), (4, 8))
    assert make_plan(two, RUN, [10] * 8, head_cost=40).spans == ((0, 6), (6, 8))
    assert make_plan(two, RUN, [10] * 8, embed_cost=40).spans == ((0, 2), (2, 8))
    assert make_plan(two, RUN, [10, 10, 10, 50]).spans == ((0, 3), (3, 4))


def test_more_stages_than_blocks_are_refused():
    assert make_plan(RECIPE, RUN, [10] * 3).spans == ((0, 1), (1, 2), (2, 3))
    with pytest.raises(ConfigError, match="stages: 3 are more than the model's 2 blocks"):
        make_plan(RECIPE, RUN, [10] * 2)


def test_work_never_overlaps_and_leaves_nothing_out():
    plan = make_plan(RECIPE, RUN, [10] * 8)
    works = [plan.work(version, number) for version in range(5) for number in range(plan.n_microbatches)]
    taken = [sample for work in works for sample in range(work.first, work.first + work.count)]
    assert taken == list(range(5 * plan.n_microbatches * plan.n_sequences))
    assert len({work.id for work in works}) == len(works)


def test_another_run_has_other_work():
    assert make_plan(RECIPE, RUN, [1] * 3).work(0, 0).id != make_plan(RECIPE, bytes(32), [1] * 3).work(0, 0).id


def test_the_last_step_of_the_longest_run_still_has_an_id():
    plan = RunPlan(RUN, ((0, 1),), 1 << 30, 8192, 4096, 2)
    assert plan.work((1 << 30) - 1, 8191).first < 1 << 63


@given(trainers=st.sets(st.text("abcdef", min_size=1, max_size=6), min_size=2, max_size=8), data=st.data())
def test_who_leaves_moves_no_share_but_its_own(trainers, data):
    plan = make_plan(RECIPE, RUN, [10] * 8)
    gone = data.draw(st.sampled_from(sorted(trainers)))
    for number in range(plan.n_microbatches):
        work = plan.work(0, number)
        owner = plan.owner(work, trainers)
        assert owner in trainers
        assert owner == gone or plan.owner(work, trainers - {gone}) == owner


@given(n_elements=st.integers(0, 1000), n=st.integers(1, 12))
def test_shards_cover_all_elements_once_and_evenly(n_elements, n):
    found = shards(n_elements, [f"p{i:02}" for i in range(n)])
    assert [i for start, end in found.values() for i in range(start, end)] == list(range(n_elements))
    sizes = [end - start for start, end in found.values()]
    assert all(sizes)
    assert not sizes or n_elements < n or max(sizes) - min(sizes) <= 1
