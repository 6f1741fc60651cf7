"""Averaging tensors as a library, over real connections: what comes out, who may join, and what the user is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from mycel.node.averaging import Averaged, AverageOptions, Averager, SyncAverager
from mycel.protocols.errors import ConfigError, PeerTimeout

pytestmark = pytest.mark.loopback

HERE = ("/ip4/127.0.0.1/tcp/0",)


def tensors_of(number: int, n_rows: int = 300) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "weight": torch.randn(n_rows, 200, generator=generator),
        "bias": torch.randn(200, generator=generator).to(torch.float64),
        "scale": torch.full((), float(number)),
    }


def mean_of(*numbers: int, n_rows: int = 300) -> dict[str, Tensor]:
    all_of_them = [tensors_of(number, n_rows) for number in numbers]
    return {name: sum(t[name].float() for t in all_of_them) / len(numbers) for name in all_of_them[0]}


# Weights are whole numbers of 2^-20 that add up to one: of three, two are off by a third of that, one by two thirds, on
# whomever it falls. No entry of these tensors is beyond 5: the mean is off by 20/3 of 2^-20 at most, and by rounding.
EXACT = 7 * 2.0**-20


def check(done: Averaged, wanted: dict[str, Tensor], tolerance: float = EXACT) -> None:
    like = tensors_of(0)
    assert list(done.tensors) == sorted(wanted)
    for name, tensor in done.tensors.items():
        assert tensor.dtype == like[name].dtype
        torch.testing.assert_close(tensor.float(), wanted[name], atol=tolerance, rtol=0)


async def group_of(stack: AsyncExitStack, n_peers: int, n_rows: int = 300, **options: Any) -> list[Averager]:
    """All of them members."""
    like = tensors_of(0, n_rows)
    # Who is a little late on a busy machine counts all the same.
    chosen = AverageOptions(min_members=n_peers, quorum=1.0, **options)
    averagers = [await stack.enter_async_context(Averager.create(like, options=chosen, listen=HERE))]
    for _ in range(n_peers - 1):
        joining = Averager.join(averagers[0].invite, like, listen=HERE)
        averagers.append(await stack.enter_async_context(joining))
    for averager in averagers:
        await averager.joined(n_peers)
    return averagers


async def average_all(averagers: list[Averager], n_rows: int = 300) -> list[Averaged]:
    done: dict[int, Averaged] = {}

    async def one(number: int) -> None:
        done[number] = await averagers[number].average(tensors_of(number, n_rows))

    async with trio.open_nursery() as nursery:
        for number in range(len(averagers)):
            nursery.start_soon(one, number)
    return [done[number] for number in range(len(averagers))]


def run(scenario: Callable[[AsyncExitStack], Any]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with AsyncExitStack() as stack:
                await scenario(stack)

    trio.run(main)


def test_three_peers_average_twice() -> None:
    async def scenario(stack: AsyncExitStack) -> None:
        averagers = await group_of(stack, 3)
        for _ in range(2):
            done = await average_all(averagers)
            for averaged in done:
                check(averaged, mean_of(0, 1, 2))
                assert (averaged.contributors, averaged.members) == (3, 3)
                assert all(torch.equal(averaged.tensors[name], done[0].tensors[name]) for name in averaged.tensors)

    run(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"aggregators": 3, "open": True}, {"rule": "median"}, {"codec": "int8"}], ids=str)
def test_other_terms(options: dict[str, Any]) -> None:
    async def scenario(stack: AsyncExitStack) -> None:
        done = await average_all(await group_of(stack, 3, **options))
        wanted = mean_of(0, 1, 2)
        if "rule" in options:
            three = [tensors_of(number) for number in range(3)]
            wanted = {name: torch.stack([t[name].float() for t in three]).median(0).values for name in wanted}
        for averaged in done:
            check(averaged, wanted, 0.06 if "codec" in options else EXACT)
            assert all(torch.equal(averaged.tensors[name], done[0].tensors[name]) for name in averaged.tensors)

    run(scenario)


def test_weights_count() -> None:
    async def scenario(stack: AsyncExitStack) -> None:
        one, two = await group_of(stack, 2)
        done: list[Averaged] = []

        async def average(averager: Averager, number: int, weight: int) -> None:
            done.append(await averager.average({**tensors_of(number)}, weight=weight))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(average, one, 0, 1)
            nursery.start_soon(average, two, 3, 2)
        for averaged in done:
            assert averaged.tensors["scale"].item() == pytest.approx(2.0, abs=1e-4)

    run(scenario)


def test_who_averages_alone_is_told_so() -> None:
    async def scenario(stack: AsyncExitStack) -> None:
        [alone] = await group_of(stack, 1)
        check(await alone.average(tensors_of(1)), mean_of(1))
        like = tensors_of(0)
        lonely = await stack.enter_async_context(Averager.create(like, listen=HERE))
        with pytest.raises(PeerTimeout, match="the group has 1 members"):
            await lonely.average(like, timeout_s=0.2)

    run(scenario)


def test_tensors_have_to_be_the_same() -> None:
    async def scenario(stack: AsyncExitStack) -> None:
        [founder] = await group_of(stack, 1)
        good = tensors_of(0)
        others = {
            r"'weight' is float32 \[300, 200\] in the group, and float32 \[4, 4\] here": {
                **good,
                "weight": torch.ones(4, 4),
            },
            "'bias' is float64 .200. in the group, and float32": {**good, "bias": good["bias"].float()},
            "averages a tensor 'scale', which is missing": {"weight": good["weight"], "bias": good["bias"]},
            "does not average a tensor 'more'": {**good, "more": torch.ones(1)},
        }
        for message, tensors in others.items():
            with pytest.raises(ConfigError, match=message):
                await stack.enter_async_context(Averager.join(founder.invite, tensors, listen=HERE))
            with pytest.raises(ConfigError, match=message):
                await founder.average(tensors)
        with pytest.raises(ConfigError, match="a weight is a whole number"):
            await founder.average(good, weight=0)
        for wrong in ({}, {"ids": torch.ones(3, dtype=torch.int64)}, {"none": torch.ones(0)}):
            with pytest.raises(ConfigError, match="no group that averages"):
                await stack.enter_async_context(Averager.create(wrong, listen=HERE))
        with pytest.raises(ConfigError):
            await stack.enter_async_context(Averager.create(good, options=AverageOptions(rule="guess"), listen=HERE))
        with pytest.raises(ConfigError, match="invite"):
            await stack.enter_async_context(Averager.join("hello", good, listen=HERE))

    run(scenario)


def test_who_is_gone_in_the_middle_of_an_average_is_not_waited_for() -> None:
    async def scenario(stack: AsyncExitStack) -> None:
        like, options = tensors_of(0), AverageOptions(min_members=3, quorum=0.6)
        stayers = [await stack.enter_async_context(Averager.create(like, options=options, listen=HERE))]
        stayers.append(await stack.enter_async_context(Averager.join(stayers[0].invite, like, listen=HERE)))
        done: list[Averaged] = []

        async def average(number: int) -> None:
            done.append(await stayers[number].average(tensors_of(number)))

        async with trio.open_nursery() as nursery, Averager.join(stayers[0].invite, like, listen=HERE) as third:
            for averager in (*stayers, third):
                await averager.joined(3)
            nursery.start_soon(average, 0)
            nursery.start_soon(average, 1)
            # Both have offered: the round waits for the third alone, which has 30 s.
            while not all("offered" in averager._group.times for averager in stayers):
                await trio.lowlevel.checkpoint()
            assert not done
        for averaged in done:
            check(averaged, mean_of(0, 1))
            assert (averaged.contributors, averaged.members) == (2, 3)

    run(scenario)


def test_a_folder_is_enough_to_come_back(tmp_path: Path) -> None:
    async def scenario(stack: AsyncExitStack) -> None:
        like, options = tensors_of(0), AverageOptions(quorum=1.0)
        one = await stack.enter_async_context(Averager.create(like, options=options, listen=HERE))
        async with Averager.join(one.invite, like, listen=HERE, folder=tmp_path) as two:
            await two.joined(2)
            first = await average_all([one, two])
            invite = two.invite
        async with Averager.create(like, listen=HERE, folder=tmp_path) as two:
            assert two.invite != invite  # another port
            again = await average_all([one, two])
            for averaged in again:
                check(averaged, mean_of(0, 1))
                assert (averaged.contributors, averaged.members) == (2, 2)
                assert averaged.round > first[0].round
        other = await stack.enter_async_context(Averager.create(like, listen=HERE))
        with pytest.raises(ConfigError, match="of another group than the invite"):
            await stack.enter_async_context(Averager.join(other.invite, like, listen=HERE, folder=tmp_path))
        small = tensors_of(0, n_rows=3)
        with pytest.raises(ConfigError, match="'weight' is"):
            await stack.enter_async_context(Averager.create(small, listen=HERE, folder=tmp_path))

    run(scenario)


def test_without_trio() -> None:
    like = tensors_of(0)
    with (
        SyncAverager.create(like, listen=HERE) as one,
        SyncAverager.join(one.invite, like, listen=HERE) as two,
    ):
        one.joined(2)
        done: list[Averaged] = []
        thread = threading.Thread(target=lambda: done.append(one.average(tensors_of(0))))
        thread.start()
        done.append(two.average(tensors_of(1)))
        thread.join()
        for averaged in done:
            check(averaged, mean_of(0, 1))
        assert two.members == 2
    with pytest.raises(ConfigError, match="closed"):
        one.average(like)
    with pytest.raises(ConfigError):
        SyncAverager.join("hello", like)
