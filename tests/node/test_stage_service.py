"""One stage's door, in virtual time: whatever is lost, said twice or replaced, each gradient is counted once."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
import torch
import trio

from mycel.node.training.stage_port import Backpass
from mycel.node.training.stage_service import MAX_HELD
from mycel.protocols import ids
from mycel.protocols.borders import decode_border, encode_border
from mycel.protocols.codec import pipe_codec
from mycel.protocols.errors import LocalProtocolError, PeerUnreachable
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import to_wire
from mycel.protocols.training import Backward, Drive, Forward, Passed, Way, WorkFailed
from mycel.protocols.wire import WireTensor
from tests.node.pipe_rig import Peer, Rig, Weather, run
from tests.sim.faults import LinkFaults
from tests.sim.toy_stage import VOCAB, ToySamples, toy_plan, toy_reference

ABC = "a0 b0 c0"
BOTH_WAYS = [("a0", False), ("a0", True), ("b0", False), ("b0", True), ("c0", True)]


def calls(rig: Rig, *names: str) -> list[int]:
    """How many passes each has computed."""
    return [sum(rig.peers[name].stage.calls.values()) for name in names]


def kept(peer: Peer) -> int:
    return len(peer.service._cells)


# ---- the whole way, whatever befalls the frames


def test_microbatches_walk_through_three_stages_and_back() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        for number in range(rig.plan.n_microbatches):
            await rig.walk(number, 1, ABC)
        for number in range(rig.plan.n_microbatches):
            await rig.walked(number, 1, ABC)
            assert sorted(rig.said(number, 1)) == BOTH_WAYS
        rig.check_sums()
        assert rig.failures() == []
        for peer in rig.peers.values():
            assert set(peer.stage.calls.values()) == {1}
            assert peer.bell.count == rig.plan.n_microbatches
        losses = rig.peers["c0"].ledger.losses
        assert sum(losses[number] for number in sorted(losses)) == toy_reference(rig.plan, n_steps=1).losses[0]

    run(scenario)


def test_one_stage_alone_is_first_and_last() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.walk(0, 1, "a0")
        await rig.walked(0, 1, "a0")
        assert rig.said(0, 1) == [("a0", True)]
        rig.check_sums(0)

    run(scenario, plan=toy_plan(1))


def test_borders_cross_as_the_codec_says() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        for number in range(rig.plan.n_microbatches):
            await rig.walk(number, 1, ABC)
        for number in range(rig.plan.n_microbatches):
            await rig.walked(number, 1, ABC)

        def crossed(border_BTW: torch.Tensor) -> torch.Tensor:
            return decode_border(encode_border(border_BTW, "int8"), tuple(border_BTW.shape), "int8")

        wanted = toy_reference(rig.plan, n_steps=1, border=crossed).sums[0]
        for name, sum_P in zip(ABC.split(), wanted, strict=True):
            assert torch.equal(rig.peers[name].ledger.sum.sum_P, sum_P)

    run(scenario, codec="int8")


def test_every_frame_said_twice_changes_nothing() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        for number in range(rig.plan.n_microbatches):
            await rig.walk(number, 1, ABC)
        for number in range(rig.plan.n_microbatches):
            await rig.walked(number, 1, ABC)
        await trio.sleep(10)
        rig.check_sums()
        assert calls(rig, "a0", "b0", "c0") == [12, 12, 6]
        # Each report was made once, and doubled on its way to the trainer.
        assert sorted(rig.said(0, 1)) == sorted(BOTH_WAYS * 2)

    run(scenario, weather=Weather(Random(1), twice=1.0))


@pytest.mark.parametrize("seed", range(6))
def test_sums_are_the_same_when_frames_are_lost_doubled_and_late(seed: int) -> None:
    """20 % swallowed, 10 % said again long after, 10 % twice: a trainer that walks again is all that is needed."""

    async def drive(rig: Rig, number: int) -> None:
        dice = Random(f"{seed} {number}")
        turn, has = 0, set[str]()
        while True:
            turn += 1
            names = " ".join(f"{letter}{dice.randrange(2)}" for letter in "abc")
            await rig.forward(rig.message(number, turn, names, " ".join(has & set(names.split()))))
            with trio.move_on_after(0.7):
                await rig.walked(number, turn, names)
                return
            has |= {name for earlier in range(1, turn + 1) for name, _ in rig.said(number, earlier)}
            rig.share()

    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        async with trio.open_nursery() as nursery:
            for number in range(rig.plan.n_microbatches):
                nursery.start_soon(drive, rig, number)
        await trio.sleep(5)
        await resolve(rig)
        rig.check_sums()
        computed = [peer.stage.calls for peer in rig.peers.values()]
        assert max(max(one.values()) for one in computed) <= 2, "once, and once more to take it back"

    weather = Weather(Random(seed), drop=0.2, late=0.1, twice=0.1, late_s=3.0)
    run(scenario, seed=seed, weather=weather)


async def resolve(rig: Rig) -> None:
    """What the step does with numbers that two peers have counted: the one with the smaller id keeps them."""
    for peer in rig.peers.values():
        smaller = 0
        for other in rig.peers.values():
            if other.stage.index == peer.stage.index and other.transport.peer_id < peer.transport.peer_id:
                smaller |= other.ledger.counted
        await peer.service.uncount(smaller & peer.ledger.counted)


def test_the_weather_is_felt() -> None:
    """Without walking again, such weather loses microbatches."""

    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        for number in range(rig.plan.n_microbatches):
            await rig.walk(number, 1, ABC)
        await trio.sleep(30)
        assert rig.peers["a0"].ledger.counted != rig.plan.everything

    run(scenario, weather=Weather(Random(1), drop=0.2))


# ---- walking again


def test_a_walk_that_comes_again_is_answered_from_what_is_kept() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        first_bytes = [rig.peers[name].service.sent_bytes for name in ABC.split()]
        began_s = trio.current_time()
        await rig.walk(0, 2, ABC, has_input=ABC, has_gradient=ABC)
        await rig.walked(0, 2, ABC)
        assert trio.current_time() - began_s < 0.05, "nothing was computed, only sent"
        assert sorted(rig.said(0, 2)) == BOTH_WAYS
        assert calls(rig, "a0", "b0", "c0") == [2, 2, 1]
        bare_bytes = [
            rig.peers[name].service.sent_bytes - was for name, was in zip(ABC.split(), first_bytes, strict=True)
        ]
        assert all(bare < was for bare, was in zip(bare_bytes, first_bytes, strict=True)), "no tensors went along"
        await rig.walk(0, 3, ABC)
        await rig.walked(0, 3, ABC)
        assert calls(rig, "a0", "b0", "c0") == [2, 2, 1], "nor with tensors"
        rig.check_sums(0)

    run(scenario)


def test_a_turn_that_was_overtaken_is_ignored() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        await rig.walk(0, 5, ABC)
        await rig.walked(0, 5, ABC)
        await rig.walk(0, 4, "a0 b1 c0")
        await trio.sleep(5)
        assert rig.said(0, 4) == []
        assert calls(rig, "b1") == [0]

    run(scenario)


@pytest.mark.parametrize("pause_s", [0.08, 5.0])
def test_a_trainer_that_comes_back_may_count_from_the_start(pause_s: float) -> None:
    """Whatever is still under way from before: it hears of no turn that it has not begun."""

    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        await rig.walk(0, 5, ABC)
        await trio.sleep(pause_s)
        await rig.hang_up()
        rig.heard.clear()
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        await trio.sleep(5)
        assert {report.turn for _, report in rig.heard} == {1}
        assert calls(rig, "a0", "b0", "c0") == [2, 2, 1]
        rig.check_sums(0)

    run(scenario)


def test_another_trainer_takes_a_microbatch_over() -> None:
    """The owner died with turn 7; the next one begins with its own first turn."""

    async def scenario(rig: Rig) -> None:
        rig.swarm()
        rig.peers["b0"].stage.backward_s = 1.0
        await rig.drive_all()
        await rig.walk(0, 7, ABC)
        await rig.until(lambda: ("b0", False) in rig.said(0, 7))
        await rig.hang_up()
        rig.trainer = rig.node("other")
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        assert calls(rig, "a0", "b0", "c0") == [2, 2, 1]
        rig.check_sums(0)

    run(scenario)


# ---- replaced


@pytest.mark.parametrize("when_s", [0.03, 0.06, 0.075])
def test_a_peer_that_dies_in_forward_is_replaced(when_s: float) -> None:
    """Before b0 has its input, while it computes, when it sends on."""

    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        began_s = trio.current_time()
        await rig.walk(0, 1, ABC)
        await trio.sleep_until(began_s + when_s)
        rig.world.crash("b0")
        await trio.sleep(1)
        rig.share("b0")
        assert ("b0", True) not in rig.said(0, 1)
        await rig.walk(0, 2, "a0 b1 c0")
        await rig.walked(0, 2, "a0 b1 c0")
        assert calls(rig, "a0", "b1", "c0") == [2, 2, 1]
        rig.check_sums(0)

    run(scenario)


def test_a_peer_that_dies_in_backward_is_replaced() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        rig.peers["b0"].stage.backward_s = 1.0
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.until(lambda: ("c0", True) in rig.said(0, 1))
        await trio.sleep(0.1)
        rig.world.crash("b0")
        rig.share("b0")
        await rig.walk(0, 2, "a0 b1 c0", has_input="a0 c0", has_gradient="c0")
        await rig.walked(0, 2, "a0 b1 c0")
        assert calls(rig, "a0", "b1", "c0") == [2, 2, 1], "c0 answered from what it kept"
        rig.check_sums(0)

    run(scenario)


@pytest.mark.parametrize("lost", ["a", "b", "c"])
def test_what_a_peer_had_counted_when_it_died_is_done_again_by_another_alone(lost: str) -> None:
    """The stages before it are done, and still send the walk on to whoever begins anew."""

    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        rig.world.crash(f"{lost}0")
        rig.share(f"{lost}0")
        await trio.sleep(1)
        before = {name: calls(rig, name) for name in ABC.split()}
        names = ABC.replace(f"{lost}0", f"{lost}1")
        alive = " ".join(set(ABC.split()) - {f"{lost}0"})
        await rig.walk(0, 2, names, has_input=alive, has_gradient=alive)
        await rig.walked(0, 2, names)
        assert {name: calls(rig, name) for name in ABC.split()} == before
        assert calls(rig, f"{lost}1") == [1 if lost == "c" else 2]
        rig.check_sums(0)

    run(scenario)


def test_who_was_counted_on_and_has_lost_it_says_so() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        await rig.walk(0, 2, "a0 b1 c0", has_input="a0 b1 c0")
        await rig.until(lambda: len(rig.failures()) == 1)
        await rig.walk(0, 3, "a1 b0 c0", has_input="a1")
        await rig.until(lambda: len(rig.failures()) == 2)
        assert rig.failures() == [("b1", "b1", "lacks the input"), ("a1", "a1", "lacks the input")]

    run(scenario)


def test_who_was_promised_to_have_the_gradient_and_lacks_it_says_so() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        await rig.walk(0, 1, ABC, has_gradient="b0")
        await rig.until(lambda: bool(rig.failures()))
        assert rig.failures() == [("b0", "b0", "lacks the gradient")]
        await rig.walk(0, 2, ABC)
        await rig.walked(0, 2, ABC)
        rig.check_sums(0)

    run(scenario)


def test_a_neighbour_that_cannot_be_reached_is_named() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        rig.world.crash("b0")
        rig.world.crash("a1")
        await rig.walk(0, 1, ABC)
        await rig.until(lambda: bool(rig.failures()))
        assert rig.failures() == [("a0", "b0", "/memory/3 refuses connections")]
        await rig.walk(0, 2, "a0 b1 c0")
        await rig.walked(0, 2, "a0 b1 c0")
        rig.check_sums(0)

    run(scenario)


def test_the_neighbour_before_may_be_gone_when_the_gradient_is_there() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        rig.peers["b0"].stage.backward_s = 1.0
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.until(lambda: ("c0", True) in rig.said(0, 1))
        rig.world.crash("a0")
        await rig.until(lambda: bool(rig.failures()))
        assert [failure[:2] for failure in rig.failures()] == [("b0", "a0")]
        assert ("b0", True) in rig.said(0, 1)
        rig.share("a0")
        await rig.walk(0, 2, "a1 b0 c0", has_input="b0 c0", has_gradient="b0 c0")
        await rig.walked(0, 2, "a1 b0 c0")
        assert calls(rig, "a1", "b0", "c0") == [2, 2, 1]
        rig.check_sums(0)

    run(scenario)


def test_a_stream_that_broke_is_opened_anew() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        rig.lose_connection("a0", "b0")
        rig.lose_connection("b0", "c0")
        await rig.walk(1, 1, ABC)
        await rig.walked(1, 1, ABC)
        assert rig.failures() == []

    run(scenario)


def test_one_slow_neighbour_holds_up_nobody_else() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        rig.world.link("a0", "b0", LinkFaults(bandwidth_bytes_per_s=20.0))
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await trio.sleep(0.5)
        began_s = trio.current_time()
        await rig.walk(1, 1, "a0 b1 c0")
        await rig.walked(1, 1, "a0 b1 c0")
        assert trio.current_time() - began_s < 0.5
        assert ("b0", False) not in rig.said(0, 1)

    run(scenario)


# ---- versions


def test_what_belongs_to_the_next_step_waits_for_it() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        rig.advance("a0")
        await rig.forward(rig.message(0, 1, ABC, version=1))
        await trio.sleep(5)
        assert rig.said(0, 1, 1) == [("a0", False)]
        rig.advance("b0", "c0")
        await rig.walked(0, 1, ABC, 1)
        assert rig.failures() == []
        assert all(peer.ledger.counted == 1 for peer in rig.peers.values())

    run(scenario)


def test_other_steps_are_refused_with_the_reason() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        rig.advance()
        await rig.forward(rig.message(0, 1, ABC, version=0))
        await rig.forward(rig.message(0, 1, ABC, version=3))
        await rig.until(lambda: len(rig.failures()) == 2)
        assert rig.failures() == [("a0", "a0", "that step is over"), ("a0", "a0", "this peer is at step 1")]
        assert calls(rig, "a0") == [0]

    run(scenario)


def test_so_many_microbatches_are_held_and_of_each_the_newest() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        for number in range(MAX_HELD + 3):
            await rig.forward(rig.message(number, 1, ABC, version=1))
        await rig.forward(rig.message(0, 2, ABC, version=1))
        await rig.forward(rig.message(0, 1, ABC, version=1))
        await rig.until(lambda: len(rig.failures()) == 3)
        assert {reason for _, _, reason in rig.failures()} == {f"full: {MAX_HELD} microbatches wait for the next step"}
        rig.advance()
        await rig.walked(0, 2, ABC, 1)
        assert rig.said(0, 1, 1) == []

    run(scenario, plan=toy_plan(n_microbatches=80))


def test_when_a_step_is_over_nothing_is_kept_or_computed_of_it() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        for number in range(6):
            await rig.walk(number, 1, ABC)
        await trio.sleep(0.1)
        peer = rig.peers["b0"]
        assert kept(peer) > 1
        assert peer.stage.kept
        assert peer.service.queue_s > 0
        rig.advance()
        running = sum(calls(rig, *ABC.split()))
        assert peer.service.queue_s <= 0.02, "the pass that has begun"
        await trio.sleep(5)
        for one in rig.peers.values():
            assert kept(one) == 0
            assert not one.stage.kept
            assert one.ledger.counted == 0
            assert one.service.queue_s == 0
        assert sum(calls(rig, *ABC.split())) == running, "a pass that was waiting is not begun"

    run(scenario)


def test_going_back_to_an_older_version_drops_everything() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        rig.advance()
        await rig.forward(rig.message(0, 1, ABC, version=1))
        await rig.walked(0, 1, ABC, 1)
        for peer in rig.peers.values():
            peer.state._version = 0
            peer.ledger.advance(0)
            peer.service.advance(0)
            assert kept(peer) == 0
        await rig.walk(1, 1, ABC)
        await rig.walked(1, 1, ABC)

    run(scenario)


# ---- limits


def test_a_full_stage_says_so_and_goes_on_with_what_it_has() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        room = rig.peers["b0"].service.cell_bytes
        small = rig.add("b9", 1, memory_bytes=2 * room)
        await rig.drive_all()
        for number in range(4):
            await rig.walk(number, 1, "a0 b9 c0")
        await rig.until(lambda: len(rig.failures()) == 2)
        assert rig.failures() == [("b9", "b9", "full: 2 microbatches are kept")] * 2
        for number in range(2):
            await rig.walked(number, 1, "a0 b9 c0")
        assert kept(small) == 2
        rig.advance()
        await rig.forward(rig.message(5, 1, "a0 b9 c0", version=1))
        await rig.walked(5, 1, "a0 b9 c0", 1)

    run(scenario)


def test_a_gradient_that_explodes_is_our_own_fault_and_not_counted() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        toy = rig.peers["b0"].stage
        honest = toy.backward

        def exploded(*arguments: Any) -> Backpass:
            backpass = honest(*arguments)
            return Backpass(backpass.grad_P * 1e9, backpass.grad_BTW, 0.0)

        toy.backward = exploded  # type: ignore[method-assign]
        await rig.walk(0, 1, ABC)
        await rig.until(lambda: bool(rig.failures()))
        ((who, blamed, reason),) = rig.failures()
        assert (who, blamed) == ("b0", "b0")
        assert "exploded" in reason
        assert rig.events[0][0] == "microbatch.failed"
        assert rig.peers["b0"].ledger.counted == 0
        assert not rig.peers["b0"].ledger.sum.sum_P.any()
        assert ("b0", True) not in rig.said(0, 1)
        toy.backward = honest  # type: ignore[method-assign]
        await rig.walk(0, 2, ABC, has_input="a0 c0", has_gradient="c0")
        await rig.walked(0, 2, ABC)
        rig.check_sums(0)

    run(scenario)


def test_a_gradient_that_breaks_ours_is_not_kept() -> None:
    """It is finite, but no gradient of this stage follows from it: the next walk brings another one."""

    async def scenario(rig: Rig) -> None:
        rig.swarm()
        rig.node("evil")
        await rig.drive_all()
        await rig.walk(0, 1, "a0 b0 evil")
        await rig.until(lambda: ("b0", False) in rig.said(0, 1))
        stream = await neighbour(rig, "evil", "b0")
        back = Backward(rig.plan.run, rig.plan.work(0, 0).id, 1, 1)
        await stream.send(*pipe_codec.encode(back, [to_wire(torch.full((2, 3, 4), 1e9))]))
        await rig.until(lambda: any(blamed == "b0" for _, blamed, _ in rig.failures()))
        await rig.walk(0, 2, ABC)
        await rig.walked(0, 2, ABC)
        rig.check_sums(0)

    run(scenario)


def test_an_activation_that_is_not_finite_is_our_own_fault() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        rig.peers["b0"].state.params_P[:] = float("nan")
        await rig.walk(0, 1, ABC)
        await rig.until(lambda: bool(rig.failures()))
        ((who, blamed, reason),) = rig.failures()
        assert (who, blamed) == ("b0", "b0")
        assert "not finite" in reason
        await rig.walk(0, 2, "a0 b1 c0", has_input="a0")
        await rig.walked(0, 2, "a0 b1 c0")

    run(scenario)


# ---- counted once


def test_what_another_has_counted_is_not_counted_here() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        rig.share()
        await rig.walk(0, 2, "a1 b1 c1")
        await rig.walked(0, 2, "a1 b1 c1")
        assert [rig.peers[name].ledger.counted for name in ("a1", "b1", "c1")] == [0, 0, 0]
        assert calls(rig, "a1", "b1", "c1") == [2, 2, 1]
        rig.check_sums(0)
        # They are gone: the very same walk again, and now it counts; the gradients are there.
        for name in ABC.split():
            rig.world.crash(name)
        rig.share(*ABC.split())
        await rig.walk(0, 3, "a1 b1 c1", has_input="a1 b1 c1", has_gradient="a1 b1")
        await rig.walked(0, 3, "a1 b1 c1")
        rig.check_sums(0)

    run(scenario)


def test_a_gradient_is_taken_back_to_the_bit() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walk(1, 1, ABC)
        await rig.walk(0, 2, "a1 b1 c1")
        await rig.walk(2, 1, "a1 b1 c1")
        for number, turn, names in ((0, 2, "a1 b1 c1"), (1, 1, ABC), (2, 1, "a1 b1 c1")):
            await rig.walked(number, turn, names)
        assert rig.peers["b0"].ledger.counted == 0b011
        assert rig.peers["b1"].ledger.counted == 0b101
        rung = rig.peers["b1"].bell.count
        await resolve(rig)
        rig.check_sums(0, 1, 2)
        keeper = min(("b0", "b1"), key=rig.peer_id)
        loser = "b1" if keeper == "b0" else "b0"
        assert rig.peers[keeper].ledger.counted & 1
        assert not rig.peers[loser].ledger.counted & 1
        assert loser == "b0" or rig.peers["b1"].bell.count == rung + 1
        # The one that keeps it dies: who had taken it back counts it once more.
        rig.world.crash(keeper)
        rig.share(keeper)
        names = " ".join(name if name != keeper else loser for name in ("a0", keeper, "c0"))
        await rig.walk(0, 3, names)
        await rig.walked(0, 3, names)
        assert rig.peers[loser].ledger.counted & 1

    run(scenario)


def test_taking_back_what_is_not_counted_does_nothing() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        await rig.peers["b0"].service.uncount(0b110)
        assert calls(rig, "b0") == [2]
        rig.check_sums(0)
        peer = rig.peers["b0"]
        peer.ledger.counted |= 0b100
        with pytest.raises(LocalProtocolError, match="nothing is kept"):
            await peer.service.uncount(0b100)

    run(scenario)


# ---- the node's own trainer


def test_a_trainer_in_the_same_node_needs_no_stream() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        a0 = rig.peers["a0"]
        heard = list[Passed | WorkFailed]()

        def report(message: Passed | WorkFailed) -> None:
            heard.append(message)
            rig.heard.append(("a0", message))
            rig.news.ring()

        a0.service.drive_locally(report)
        rig.trainer = a0.transport
        for name in ("b0", "c0"):
            await rig.drive(name)
        message = rig.message(0, 1, ABC)
        await a0.service.forward_locally(message, rig.tokens(0))
        await rig.walked(0, 1, ABC)
        assert [one.backward for one in heard if isinstance(one, Passed)] == [False, True]
        rig.check_sums(0)
        again = rig.message(0, 2, ABC, has_input=ABC, has_gradient=ABC)
        await a0.service.forward_locally(again, rig.tokens(0))
        await rig.walked(0, 2, ABC)
        with pytest.raises(LocalProtocolError, match="tokens"):
            await a0.service.forward_locally(rig.message(1, 1, ABC), torch.full((2, 4), VOCAB))
        with pytest.raises(LocalProtocolError, match="does not come here"):
            await a0.service.forward_locally(msgspec.structs.replace(message, stage=1), rig.tokens(0))

    run(scenario)


def test_how_busy_it_is() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        b0 = rig.peers["b0"]
        assert b0.service.sequences_per_s == 0.0
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.walked(0, 1, ABC)
        assert b0.service.sequences_per_s == pytest.approx(2 / 0.03)
        assert rig.peers["c0"].service.sequences_per_s == pytest.approx(2 / 0.02)
        assert b0.service.queue_s == 0.0
        (passed,) = [m for name, m in rig.heard if name == "b0" and isinstance(m, Passed) and m.backward]
        assert (passed.queue_us, passed.compute_us) == (0, 20_000)
        for number in range(1, 6):
            await rig.walk(number, 1, ABC)
        await trio.sleep(0.02)
        assert rig.peers["a0"].service.queue_s == pytest.approx(0.04)
        sent_bytes = b0.service.sent_bytes
        await rig.until(lambda: all(("a0", True) in rig.said(number, 1) for number in range(6)))
        assert b0.service.sent_bytes == pytest.approx(6 * sent_bytes, rel=0.05)

    run(scenario)


def test_when_the_service_ends_its_streams_end() -> None:
    async def scenario(rig: Rig) -> None:
        transport = rig.node("b0")
        async with trio.open_nursery() as nursery:
            peer = rig.add("b0", 1, transport=transport)
            nursery.start_soon(peer.service.run)
            await rig.drive("b0")
            await trio.sleep(1)
            assert "b0" in rig.drives
            nursery.cancel_scope.cancel()
        await trio.sleep(1)
        assert "b0" not in rig.drives

    run(scenario)


# ---- who breaks the rules


Change = Callable[[Rig, Forward], Forward]


def changed(**fields: object) -> Change:
    return lambda _, message: msgspec.structs.replace(message, **fields)


def rewayed(names: str) -> Change:
    return lambda rig, message: msgspec.structs.replace(message, ways=rig.ways(names))


@pytest.mark.parametrize(
    "change",
    [
        changed(run=bytes(32)),
        changed(work=bytes(32)),
        changed(number=1),
        changed(number=4000),
        changed(version=1),
        changed(version=2**31 - 1),
        changed(stage=1),
        changed(stage=63),
        changed(trainer="somebody else"),
        rewayed("a0 b0"),
        rewayed("a0 b0 c0 c1"),
        rewayed("a0 b0 b0"),
        rewayed("a1 b0 c0"),
        rewayed("b0 a0 c0"),
        lambda rig, message: msgspec.structs.replace(message, ways=rig.ways(ABC, has_input="a0")),
    ],
)
def test_a_microbatch_that_is_not_what_it_says_ends_its_stream(change: Change) -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm(2)
        stream = await rig.drive("a0")
        await stream.send(*pipe_codec.encode(change(rig, rig.message(0, 1, ABC)), [rig.wire(0)]))
        await rig.until(lambda: "a0" not in rig.drives)
        assert kept(rig.peers["a0"]) == 0
        assert rig.heard == []

    run(scenario)


def wires(kind: str) -> list[WireTensor]:
    tokens = ToySamples(3).tokens(0, 2).to(torch.int32)
    return {
        "none": list[WireTensor](),
        "two": [to_wire(tokens)] * 2,
        "long": [to_wire(torch.zeros(2, 5, dtype=torch.int32))],
        "many": [to_wire(torch.zeros(3, 4, dtype=torch.int32))],
        "wide": [to_wire(tokens.to(torch.int64))],
        "unknown": [to_wire(torch.full((2, 4), VOCAB, dtype=torch.int32))],
        "negative": [to_wire(torch.full((2, 4), -1, dtype=torch.int32))],
        "huge": [to_wire(torch.zeros(1 << 20, dtype=torch.int32))],
    }[kind]


@pytest.mark.parametrize("kind", ["none", "two", "long", "many", "wide", "unknown", "negative", "huge"])
def test_tokens_that_are_none_end_the_stream(kind: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        stream = await rig.drive("a0")
        await stream.send(*pipe_codec.encode(rig.message(0, 1, ABC), wires(kind)))
        await rig.until(lambda: "a0" not in rig.drives)
        assert kept(rig.peers["a0"]) == 0

    run(scenario)


async def neighbour(rig: Rig, name: str, target: str) -> Stream:
    """A stream as a neighbour has it, from a node that the test plays."""
    node = rig.world.node(target)
    rig.world.node(name).learn(node.peer_id, node.addresses)
    return await rig.world.node(name).open(node.peer_id, ids.PIPE)


async def ended(stream: Stream) -> bool:
    """Whether the other side has broken it off."""
    with trio.fail_after(60):
        try:
            return await stream.receive() is None
        except PeerUnreachable:
            return True


@pytest.mark.parametrize(
    "border_BTW",
    [
        torch.zeros(2, 3, 5),
        torch.zeros(2, 4, 4),
        torch.zeros(6, 4),
        torch.zeros(2, 3, 4, dtype=torch.int8),
        torch.full((2, 3, 4), float("nan")),
        torch.full((2, 3, 4), float("inf")),
    ],
)
def test_a_border_that_is_none_is_its_senders_fault(border_BTW: torch.Tensor) -> None:
    """As an activation and as a gradient."""

    async def scenario(rig: Rig) -> None:
        rig.add("b0", 1)
        rig.node("evil")
        rig.node("mallory")
        await rig.drive("b0")
        before = await neighbour(rig, "evil", "b0")
        message = msgspec.structs.replace(rig.message(0, 1, "evil b0 mallory"), stage=1)
        await before.send(*pipe_codec.encode(message, [rig.wire(0), to_wire(border_BTW)]))
        assert await ended(before)
        await rig.until(lambda: len(rig.failures()) == 1)
        assert rig.failures()[0][:2] == ("b0", "evil")
        good = await neighbour(rig, "evil", "b0")
        message = msgspec.structs.replace(message, turn=2)
        await good.send(*pipe_codec.encode(message, [rig.wire(0), to_wire(torch.zeros(2, 3, 4))]))
        await rig.until(lambda: rig.said(0, 2) == [("b0", False)])
        behind = await neighbour(rig, "mallory", "b0")
        await behind.send(*pipe_codec.encode(Backward(rig.plan.run, message.work, 2, 1), [to_wire(border_BTW)]))
        assert await ended(behind)
        await rig.until(lambda: any(blamed == "mallory" for _, blamed, _ in rig.failures()))
        assert rig.peers["b0"].ledger.counted == 0
        behind = await neighbour(rig, "mallory", "b0")
        gradient = [to_wire(torch.zeros(2, 3, 4))]
        await good.send(*pipe_codec.encode(msgspec.structs.replace(message, turn=3), [rig.wire(0), gradient[0]]))
        await behind.send(*pipe_codec.encode(Backward(rig.plan.run, message.work, 2, 1), gradient))
        await trio.sleep(1)
        assert rig.peers["b0"].ledger.counted == 0, "of another turn"
        await behind.send(*pipe_codec.encode(Backward(rig.plan.run, message.work, 3, 1), gradient))
        await rig.until(lambda: ("b0", True) in rig.said(0, 3))
        assert rig.peers["b0"].ledger.counted == 1

    run(scenario)


def test_a_gradient_from_somebody_else_is_ignored() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        rig.node("mallory")
        rig.peers["c0"].stage.backward_s = 5.0
        await rig.drive_all()
        await rig.walk(0, 1, ABC)
        await rig.until(lambda: ("b0", False) in rig.said(0, 1))
        stream = await neighbour(rig, "mallory", "b0")
        back = Backward(rig.plan.run, rig.plan.work(0, 0).id, 1, 1)
        await stream.send(*pipe_codec.encode(back, [to_wire(torch.zeros(2, 3, 4))]))
        await rig.walked(0, 1, ABC)
        rig.check_sums(0)

    run(scenario)


def test_who_passes_back_without_a_gradient_is_blamed() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        rig.node("evil")
        await rig.drive_all()
        await rig.walk(0, 1, "a0 b0 evil")
        await rig.until(lambda: ("b0", False) in rig.said(0, 1))
        stream = await neighbour(rig, "evil", "b0")
        await stream.send(*pipe_codec.encode(Backward(rig.plan.run, rig.plan.work(0, 0).id, 1, 1)))
        await rig.until(lambda: any(reason == "passed back without a gradient" for _, _, reason in rig.failures()))
        assert kept(rig.peers["b0"]) == 1

    run(scenario)


@pytest.mark.parametrize("what", ["drive", "passed", "backward", "foreign", "garbage", "silence", "stolen"])
def test_what_has_no_place_on_a_stream_ends_it(what: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        rig.node("evil")
        back = Backward(rig.plan.run, rig.plan.work(0, 0).id, 1, 0)
        if what == "drive":  # twice
            stream = await neighbour(rig, "evil", "a0")
            for _ in range(2):
                await stream.send(*pipe_codec.encode(Drive(rig.plan.run)))
        elif what == "backward":  # a trainer has no gradients
            stream = await neighbour(rig, "evil", "a0")
            await stream.send(*pipe_codec.encode(Drive(rig.plan.run)))
            await stream.send(*pipe_codec.encode(back))
        elif what == "stolen":  # a walk that leads through others
            stream = await neighbour(rig, "evil", "b0")
            message = msgspec.structs.replace(rig.message(0, 1, ABC), stage=1)
            await stream.send(*pipe_codec.encode(message, [rig.wire(0), to_wire(torch.zeros(2, 3, 4))]))
        else:
            stream = await neighbour(rig, "evil", "a0")
            frame = {
                "passed": pipe_codec.encode(Passed(bytes(32), 1, 0, True)),
                "foreign": pipe_codec.encode(Drive(bytes(32))),
                "garbage": [b"garbage"],
                "silence": [],
            }[what]
            if frame:
                await stream.send(*frame)
        assert await ended(stream)
        assert rig.heard == []

    run(scenario)


def test_so_many_streams_and_no_more() -> None:
    async def scenario(rig: Rig) -> None:
        rig.swarm()
        rig.node("evil")
        streams = [await neighbour(rig, "evil", "a0") for _ in range(9)]
        assert await ended(streams[8])
        await trio.sleep(60)
        for stream in streams:  # the others said nothing, either
            assert await ended(stream)
        await rig.walk(0, 1, ABC)
        await rig.until(lambda: ("a0", True) in rig.said(0, 1))

    run(scenario)


def test_a_way_that_names_many_peers_opens_few_streams() -> None:
    """Each microbatch's way names another neighbour that nobody has ever met."""

    async def scenario(rig: Rig) -> None:
        rig.swarm()
        await rig.drive("a0")
        for number in range(20):
            message = rig.message(number, 1, ABC)
            unknown = Way(PeerAddress(f"nobody {number}", (f"/memory/{1000 + number}",)))
            ways = (message.ways[0], unknown, message.ways[2])
            await rig.forward(msgspec.structs.replace(message, ways=ways))
        await rig.until(lambda: len(rig.failures()) == 20)
        assert len(rig.peers["a0"].service._pipes._pipes) == 20
        await trio.sleep(70)
        assert not rig.peers["a0"].service._pipes._pipes

    run(scenario, plan=toy_plan(n_microbatches=20))
