"""A stage's state from several peers at once: one copy for all, liars and silent ones named and left."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
import trio

from mycel.node.training.state_fetch import FetchedState, fetch_state
from mycel.node.training.state_service import BUSY_S, MAX_STREAMS, PIN_PATIENCE_S, STREAMS_PER_PEER, StateService
from mycel.protocols.codec import state_codec
from mycel.protocols.errors import PeerRefused, PeerUnreachable
from mycel.protocols.ids import STATE
from mycel.protocols.messages import MAX_FILE_CHUNK_BYTES
from mycel.protocols.ports import Stream
from mycel.protocols.training import GetStateChunk, NotNow, PinState, StateChunk, StateMessage, StateOffer
from tests.sim.compute import SimCompute
from tests.sim.state_rig import N_ELEMENTS, RUN, SIZE_BYTES, STAGE, FlatToy, Rig, scenario
from tests.sim.transport import SimTransport


async def say(stream: Stream, request: StateMessage) -> StateMessage | None:
    await stream.send(*state_codec.encode(request))
    frame = await stream.receive()
    return None if frame is None else state_codec.decode_only(frame)


def altered(
    change: Callable[[StateMessage], StateMessage | None], state: FlatToy
) -> Callable[[Stream], Awaitable[None]]:
    """A donor that changes its answers; None: it stays silent from then on."""
    data = state.snapshot()
    parts = [data[at : at + MAX_FILE_CHUNK_BYTES] for at in range(0, len(data), MAX_FILE_CHUNK_BYTES)]
    hashes = b"".join(hashlib.sha256(part).digest() for part in parts)

    async def serve(stream: Stream) -> None:
        while (frame := await stream.receive()) is not None:
            request = state_codec.decode_only(frame)
            honest: StateMessage
            if isinstance(request, PinState):
                honest = StateOffer(request.version, len(data), state.params_digest(), hashes)
            else:
                assert isinstance(request, GetStateChunk)
                honest = StateChunk(bytes(parts[request.index]))
            answer = change(honest)
            if answer is None:
                await trio.sleep_forever()
            await stream.send(*state_codec.encode(answer))

    return serve


# ---- what the service promises


def test_the_state_comes_from_all_peers_and_is_copied_once_in_each() -> None:
    async def body(rig: Rig) -> None:
        for name in "abc":
            await rig.donor(name)
        fetched = await rig.fetch("a", "b", "c")
        assert fetched.data == rig.states["a"].snapshot()
        assert (fetched.version, fetched.digest) == (7, rig.states["a"].params_digest())
        assert sorted(rig.given(fetched)) == ["a", "b", "c"], "everybody gave"
        assert max(rig.given(fetched).values()) <= 3 * MAX_FILE_CHUNK_BYTES, "and nobody much more than its share"
        again = await rig.fetch("a", "b", "c")
        assert again.data == fetched.data
        assert [rig.states[name].snapshots for name in "bc"] == [1, 1]
        assert rig.failed() == {}

    scenario(body)


def test_four_newcomers_at_once_cost_a_donor_one_copy_and_share_the_donors() -> None:
    async def body(rig: Rig) -> None:
        donors = [f"d{i}" for i in range(4)]
        for name in donors:
            await rig.donor(name)
        newcomers = [rig.add(f"n{i}") for i in range(4)]
        came: list[FetchedState] = []

        async def join(transport: SimTransport) -> None:
            fits = SIZE_BYTES.__eq__
            came.append(await fetch_state(transport, RUN, STAGE, rig.donors(*donors), rig.event, fits=fits))

        async with trio.open_nursery() as nursery:
            for transport in newcomers:
                nursery.start_soon(join, transport)
        assert all(fetched.data == came[0].data for fetched in came)
        assert [rig.states[name].snapshots for name in donors] == [1] * 4
        sent = [rig.services[name].sent_bytes for name in donors]
        assert max(sent) < 2 * min(sent), "no donor gives nearly everything"

    scenario(body)


def test_a_later_version_is_copied_between_two_steps() -> None:
    async def body(rig: Rig) -> None:
        service = await rig.donor("a", version=7)
        state = rig.states["a"]

        async def step() -> None:
            await trio.sleep(3.0)
            for version in (8, 9, 10):
                state.version = version
                state.params_P = state.params_P + np.float32(1.0)
                await service.after_step(version)
                await trio.sleep(0.3)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step)
            fetched = await rig.fetch("a", version=9)
        assert fetched.version == 9
        assert state.version == 10
        assert np.allclose(np.frombuffer(fetched.data, np.float32)[:N_ELEMENTS], state.params_P - 1.0)
        assert state.snapshots == 1, "nobody asked for the others"

    scenario(body)


def test_what_is_over_or_never_comes_or_belongs_to_others_is_refused() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a", version=7)
        peer = rig.world.node("a").peer_id
        stream = await rig.world.node("me").open(peer, STATE)
        assert await say(stream, PinState(RUN, STAGE, 6)) == NotNow("this peer is at step 7")
        assert await say(stream, PinState(bytes(32), STAGE, 7)) == NotNow("this peer is of another run")
        assert await say(stream, PinState(RUN, STAGE + 1, 7)) == NotNow("this peer is of another stage")
        began = trio.current_time()
        assert await say(stream, PinState(RUN, STAGE, 8)) == NotNow("step 8 was not reached within 15 s")
        assert trio.current_time() - began == pytest.approx(PIN_PATIENCE_S, abs=0.1)
        assert isinstance(await say(stream, GetStateChunk(RUN, STAGE, 7, 0)), NotNow), "nothing is held unasked"
        assert isinstance(await say(stream, PinState(RUN, STAGE, 7)), StateOffer)
        assert isinstance(await say(stream, GetStateChunk(RUN, STAGE, 7, 7)), NotNow), "there are seven chunks"
        assert rig.states["a"].snapshots == 1

    scenario(body)


def test_a_copy_is_let_go_of_when_nobody_fetches_and_two_are_held_at_most() -> None:
    async def body(rig: Rig) -> None:
        service = await rig.donor("a", version=7)
        state = rig.states["a"]
        stream = await rig.world.node("me").open(rig.world.node("a").peer_id, STATE)

        async def step() -> StateMessage | None:
            state.version += 1
            await service.after_step(state.version)
            return await say(stream, PinState(RUN, STAGE, state.version))

        assert isinstance(await step(), StateOffer)
        assert isinstance(await step(), StateOffer)
        assert await step() == NotNow("as many states as may be held are being fetched")
        await trio.sleep(BUSY_S)
        assert isinstance(await say(stream, GetStateChunk(RUN, STAGE, 9, 0)), StateChunk)
        assert isinstance(await say(stream, PinState(RUN, STAGE, 10)), StateOffer), "8 gives way"
        assert service.held == (9, 10)
        await stream.aclose()
        await trio.sleep(1.0)
        stream = await rig.world.node("me").open(rig.world.node("a").peer_id, STATE)
        assert isinstance(await step(), StateOffer), "at once: nobody who asked for 9 or 10 is there any more"
        assert service.held == (10, 11)
        await trio.sleep(57.0)
        assert service.held == (10, 11)
        await trio.sleep(2.5)
        assert service.held == (11,)
        await trio.sleep(1.5)
        assert service.held == ()

    scenario(body)


def test_what_is_held_of_steps_that_were_taken_back_is_dropped() -> None:
    async def body(rig: Rig) -> None:
        service = await rig.donor("a", version=7)
        stream = await rig.world.node("me").open(rig.world.node("a").peer_id, STATE)
        for version in (8, 9):
            rig.states["a"].version = version
            assert isinstance(await say(stream, PinState(RUN, STAGE, version)), StateOffer), "also just before ..."
            await service.after_step(version)
        assert service.held == (8, 9), "... the hook of the same step"
        rig.states["a"].version = 8
        await service.after_step(8)
        assert service.held == ()
        assert isinstance(await say(stream, PinState(RUN, STAGE, 8)), StateOffer)
        service.forget()
        assert service.held == ()
        assert await say(stream, PinState(RUN, STAGE, 8)) == NotNow("the state is being replaced")
        await service.after_step(8)
        assert isinstance(await say(stream, PinState(RUN, STAGE, 8)), StateOffer)

    scenario(body)


def test_streams_are_bounded_and_a_silent_one_ends() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a")
        peer = rig.world.node("a").peer_id
        streams = [await rig.world.node("me").open(peer, STATE) for _ in range(STREAMS_PER_PEER + 1)]
        assert await streams[-1].receive() is None, "refused before any answer"
        for number in range(MAX_STREAMS // STREAMS_PER_PEER):
            other = rig.add(f"m{number}")
            for _ in range(STREAMS_PER_PEER):
                await other.open(peer, STATE)
        assert await (await rig.add("late").open(peer, STATE)).receive() is None
        await trio.sleep(61.0)
        with pytest.raises(PeerUnreachable):
            await streams[0].receive()
        assert isinstance(await say(await rig.world.node("me").open(peer, STATE), PinState(RUN, STAGE, 7)), StateOffer)

    scenario(body)


def test_what_is_no_question_ends_the_stream_and_a_service_that_ends_lets_go() -> None:
    async def body(rig: Rig) -> None:
        transport = rig.add("a")
        service = StateService(transport, RUN, STAGE, FlatToy(0, 7), SimCompute(rig.world, "a"), rig.event)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            stream = await rig.world.node("me").open(transport.peer_id, STATE)
            for nonsense in (state_codec.encode(StateChunk(b"?")), [b"\x00" * 40]):
                with pytest.raises(PeerUnreachable):
                    await say_raw(await rig.world.node("me").open(transport.peer_id, STATE), nonsense)
            assert isinstance(await say(stream, PinState(RUN, STAGE, 7)), StateOffer)
            nursery.cancel_scope.cancel()
        assert service.held == ()
        assert await (await rig.world.node("me").open(transport.peer_id, STATE)).receive() is None

    async def say_raw(stream: Stream, parts: list[bytes | memoryview]) -> None:
        await stream.send(*parts)
        await stream.receive()

    scenario(body)


@pytest.mark.parametrize("seed", range(5))
def test_messages_in_any_order_end_a_stream_at_worst(seed: int) -> None:
    """A handler that raised anything but a PeerError would fail the scenario."""

    async def body(rig: Rig) -> None:
        service = await rig.donor("a")
        rng, peer = rig.world.rng, rig.world.node("a").peer_id
        for _ in range(12):
            stream = await rig.world.node("me").open(peer, STATE)
            with contextlib.suppress(PeerUnreachable), trio.move_on_after(20.0):
                for _ in range(rng.randrange(1, 6)):
                    run, stage = rng.choice([RUN, bytes(32)]), rng.choice([STAGE, 0])
                    version = rng.choice([0, 7, 8, 2**31 - 1])
                    message: StateMessage = rng.choice(
                        [
                            PinState(run, stage, version),
                            GetStateChunk(run, stage, version, rng.choice([0, 6, 7, 2**18 - 1])),
                            StateChunk(b"x"),
                            StateOffer(7, 0, RUN, b""),
                            NotNow(""),
                        ]
                    )
                    await stream.send(*state_codec.encode(message))
                if rng.random() < 0.5:
                    await stream.reset()
                else:
                    await stream.receive()
            await stream.aclose()
        assert set(service.held) <= {7}

    scenario(body, seed)


# ---- what the fetcher survives


def test_a_wrong_chunk_is_never_kept_and_its_giver_is_named() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a")
        rig.liar("b", altered(spoil, FlatToy(0, 7)))
        fetched = await rig.fetch("a", "b")
        assert fetched.data == rig.states["a"].snapshot()
        assert list(rig.given(fetched)) == ["a"]
        assert "wrong bytes" in rig.failed()["b"]

    def spoil(answer: StateMessage) -> StateMessage:
        return StateChunk(answer.data[:-1] + b"!") if isinstance(answer, StateChunk) else answer

    scenario(body)


def test_nobody_waits_for_a_donor_that_never_answers() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a")
        await rig.donor("c")
        rig.liar("b", altered(lambda _: None, FlatToy(0, 7)))
        began = trio.current_time()
        fetched = await rig.fetch("a", "b", "c")
        assert sorted(rig.given(fetched)) == ["a", "c"]
        assert trio.current_time() - began < 6.0
        assert "in time" in rig.failed()["b"]

    scenario(body)


def test_a_donor_that_falls_silent_between_chunks_is_left_and_named() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a")
        rig.liar("b", altered(lambda answer: answer if isinstance(answer, StateOffer) else None, FlatToy(0, 7)))
        began = trio.current_time()
        fetched = await rig.fetch("a", "b")
        assert list(rig.given(fetched)) == ["a"]
        assert trio.current_time() - began < 10.0
        assert "too slow" in rig.failed()["b"]

    scenario(body)


def test_a_donor_that_dies_in_the_middle_costs_nothing_but_time() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a")
        await rig.donor("b")

        async def kill() -> None:
            await trio.sleep(0.8)
            rig.world.crash("b")

        rig.world.nursery.start_soon(kill)
        fetched = await rig.fetch("a", "b")
        assert fetched.data == rig.states["a"].snapshot()
        assert rig.given(fetched)["a"] > 4 * MAX_FILE_CHUNK_BYTES
        assert "b" in rig.failed()

    scenario(body)


def test_a_donor_whose_connection_broke_is_tried_again() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a")

        async def cut() -> None:
            await trio.sleep(1.0)
            rig.world.partition(["me"], ["a"])
            await trio.sleep(7.0)
            rig.world.heal()

        rig.world.nursery.start_soon(cut)
        fetched = await rig.fetch("a")
        assert fetched.data == rig.states["a"].snapshot()
        assert rig.states["a"].snapshots == 2, "one by the service, one by this test"
        assert rig.failed() != {}

    scenario(body)


def test_most_peers_decide_and_the_statuses_where_they_are_even() -> None:
    async def body(rig: Rig) -> None:
        for name, seed in (("a", 0), ("b", 0), ("c", 5)):
            await rig.donor(name, seed=seed)
        fetched = await rig.fetch("a", "b", "c", expected=rig.states["c"].params_digest())
        assert fetched.data == rig.states["a"].snapshot()
        assert rig.failed()["c"] == "offers another state after 7 steps than most"
        for right, wrong in ("ac", "ca"):
            even = await rig.fetch("a", "c", expected=rig.states[right].params_digest())
            assert even.data == rig.states[right].snapshot() != rig.states[wrong].snapshot()

    scenario(body)


def test_too_few_that_agree_are_refused() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a", version=7)
        await rig.donor("b", version=9)
        await rig.donor("c", version=9)
        with pytest.raises(PeerRefused, match="1 of 3 peers offer the state of stage 3 after 7 steps"):
            await rig.fetch("a", "b", "c", least=2)
        assert (await rig.fetch("a", "b", "c")).version == 7

    scenario(body)


def test_nothing_to_fetch_from() -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(PeerRefused, match="no peer that has the state of stage 3 is known"):
            await rig.fetch()
        rig.add("b")
        with pytest.raises(PeerRefused, match="0 of 1 peers offer the state of stage 3 after 7 steps; the last: "):
            await rig.fetch("b")
        await rig.donor("a")

        async def kill() -> None:
            await trio.sleep(0.8)
            rig.world.crash("a")

        rig.world.nursery.start_soon(kill)
        with pytest.raises(PeerRefused, match="nobody is left to send the state of stage 3"):
            await rig.fetch("a")

    scenario(body)


HOSTILE = {
    "a size that does not fit": lambda offer: replace_offer(offer, size_bytes=SIZE_BYTES + 1),
    "a size beyond all memory": lambda offer: replace_offer(offer, size_bytes=1 << 38),
    "no hashes": lambda offer: replace_offer(offer, chunks=b""),
    "too many hashes": lambda offer: replace_offer(offer, chunks=bytes(32 * 4096)),
    "another version": lambda offer: replace_offer(offer, version=8),
    "no offer at all": lambda _: StateChunk(bytes(1000)),
}


def replace_offer(offer: StateMessage, **changes: object) -> StateOffer:
    assert isinstance(offer, StateOffer)
    fields = {name: getattr(offer, name) for name in ("version", "size_bytes", "params", "chunks")}
    return StateOffer(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_offers_are_refused_and_take_no_memory(what: str) -> None:
    async def body(rig: Rig) -> None:
        rig.liar("b", altered(HOSTILE[what], FlatToy(0, 7)))
        with pytest.raises(PeerRefused, match="0 of 1 peers offer"):
            await rig.fetch("b")
        await rig.donor("a")
        assert list(rig.given(await rig.fetch("a", "b"))) == ["a"]
        assert "b" in rig.failed()

    scenario(body)


def test_chunks_of_another_size_are_a_breach() -> None:
    async def body(rig: Rig) -> None:
        await rig.donor("a")
        rig.liar("b", altered(cut, FlatToy(0, 7)))
        assert list(rig.given(await rig.fetch("a", "b"))) == ["a"]
        assert rig.failed()["b"] == "sent no chunk of 1048576 bytes"

    def cut(answer: StateMessage) -> StateMessage:
        return StateChunk(answer.data[:-1]) if isinstance(answer, StateChunk) else answer

    scenario(body)


def test_a_fetch_can_be_cancelled_at_any_time() -> None:
    async def body(rig: Rig) -> None:
        rig.link = replace(rig.link, bandwidth_bytes_per_s=2e6)
        for name in "ab":
            await rig.donor(name)
        for patience_s in np.arange(0.0, 1.5, 0.09):
            with trio.move_on_after(float(patience_s)) as scope:
                await rig.fetch("a", "b")
            assert scope.cancelled_caught
        assert sorted(rig.given(await rig.fetch("a", "b"))) == ["a", "b"]

    scenario(body)
