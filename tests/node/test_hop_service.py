"""What one hop answers to its client and its neighbours, whatever they say."""

from __future__ import annotations

import pytest
import torch
import trio

from mycel.node.hop_service import ATTACH_PATIENCE_S, OPENING_PATIENCE_S, HopLimits
from mycel.protocols import ids
from mycel.protocols.codec import ring_codec, session_codec
from mycel.protocols.hop import MAX_STEP_TOKENS
from mycel.protocols.messages import (
    Attach,
    Generation,
    HopFailed,
    HopOpened,
    HopRefused,
    Message,
    NextToken,
    OpenHop,
    Sampled,
    SamplingParams,
    Step,
)
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import to_wire
from mycel.swarm.recruiting import OPEN_PATIENCE_S
from tests.node.hop_rig import (
    GENERATION,
    N_BLOCKS,
    PROMPT,
    SESSION,
    Rig,
    ended,
    heard,
    inputs,
    outputs,
    push,
    run,
)
from tests.sim.faults import LinkFaults
from tests.sim.toy import HIDDEN, VOCAB, ToyPart, ToySpan

# ---- admission


REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "another swarm": ({"swarm": bytes(32)}, "another swarm"),
    "blocks before ours": ({"start": 1}, "blocks 2:6 only"),
    "blocks after ours": ({"end": 7}, "blocks 2:6 only"),
    "a context that is too long": ({"max_tokens": 4097}, "the model's context is 4096 tokens"),
    "more memory than there is": ({"max_tokens": 1025}, "KV memory is full: 82,000 bytes wanted, 81,920 free"),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_a_session_is_refused_with_its_reason(name: str) -> None:
    changes, reason = REFUSALS[name]

    async def scenario(rig: Rig) -> None:
        stream, answer = await rig.open(rig.opening(**changes))
        assert isinstance(answer, HopRefused)
        assert reason in answer.reason
        assert await ended(stream) == ""
        assert not rig.service.sessions
        assert rig.service.budget.reserved_bytes == 0
        await rig.opened()  # and a sound one is welcome

    run(scenario)


def test_a_hop_that_leaves_refuses_and_finishes_what_it_has() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        rig.service.leaving = True
        _, answer = await rig.open(rig.opening(session=bytes(15) + b"x"))
        assert answer == HopRefused("this node is leaving")
        await push(await rig.attach(), 0, 3)
        await trio.sleep(1)
        assert rig.positions() == [0]

    run(scenario)


def test_sessions_are_limited_in_all_and_for_each_client() -> None:
    async def scenario(rig: Rig) -> None:
        def numbered(n: int) -> OpenHop:
            return rig.opening(session=bytes(15) + bytes([n]))

        first = await rig.opened(numbered(1))
        await rig.opened(numbered(2))
        assert (await rig.open(numbered(3)))[1] == HopRefused("2 sessions of this client are open")
        assert (await rig.open(numbered(4), "stranger"))[1] == HopOpened()
        assert (await rig.open(numbered(5), "stranger"))[1] == HopRefused("3 sessions are open")
        await first.aclose()
        await trio.sleep(1)
        assert (await rig.open(numbered(5), "stranger"))[1] == HopOpened()

    run(scenario, limits=HopLimits(max_sessions=3, max_sessions_per_peer=2))


def test_a_hop_is_no_neighbour_of_itself_unless_it_is_alone() -> None:
    async def scenario(rig: Rig) -> None:
        own = rig.address("hop")
        for changes in ({"previous": own}, {"next": own}):
            assert (await rig.open(rig.opening(**changes)))[1] == HopRefused("a chain visits a peer once")
        control = await rig.opened(rig.opening(0, 8, prompt=PROMPT, generation=GENERATION, previous=own, next=own))
        assert isinstance(await heard(control), Sampled)

    run(scenario, span=ToySpan(0, 8, N_BLOCKS))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": (1, VOCAB, 2)},
        {"prompt": (1,), "generation": Generation(SamplingParams(), (1, VOCAB), 9), "end": 8},
    ],
)
def test_a_token_that_no_vocabulary_has_is_refused(changes: dict[str, object]) -> None:
    async def scenario(rig: Rig) -> None:
        if "generation" in changes:
            changes["prompt"] = changes["generation"].tokens  # type: ignore[attr-defined]
        _, answer = await rig.open(rig.opening(0, **{"end": 6, **changes}))
        assert answer == HopRefused(f"token {VOCAB} of a vocabulary of {VOCAB}")

    run(scenario, span=ToySpan(0, 8, N_BLOCKS))


@pytest.mark.parametrize(
    "frame",
    [
        b"nonsense",
        b"".join(session_codec.encode(HopOpened())),
        b"".join(ring_codec.encode(Attach(SESSION))),
    ],
)
def test_who_does_not_begin_with_an_opening_is_cut_off(frame: bytes) -> None:
    async def scenario(rig: Rig) -> None:
        stream = await rig.world.node("client").open(rig.hop.peer_id, ids.SESSION)
        await stream.send(frame)
        assert await ended(stream) != ""
        await rig.opened()

    run(scenario)


@pytest.mark.parametrize("protocol", [ids.SESSION, ids.RING])
def test_who_says_nothing_is_cut_off_in_time(protocol: str) -> None:
    async def scenario(rig: Rig) -> None:
        stream = await rig.world.node("client").open(rig.hop.peer_id, protocol)
        began = trio.current_time()
        assert await ended(stream) != ""
        assert trio.current_time() - began == pytest.approx(OPENING_PATIENCE_S, abs=1)

    run(scenario)


def test_an_opening_that_makes_no_sense_is_cut_off() -> None:
    async def scenario(rig: Rig) -> None:
        stream = await rig.world.node("client").open(rig.hop.peer_id, ids.SESSION)
        await stream.send(*session_codec.encode(rig.opening(5, 3)))
        assert await ended(stream) != ""

    run(scenario)


# ---- a session's life


def test_inputs_become_outputs() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        link = await rig.attach()
        await push(link, 0, 4)
        await push(link, 4, 1)
        await trio.sleep(1)
        assert rig.received[0] == ("after", Attach(SESSION, 1))
        assert rig.positions() == [0, 4]
        assert torch.equal(torch.cat(rig.hidden), outputs(5))
        assert [len(message.timings) for _, message in rig.received[1:]] == [1, 1]

    run(scenario)


def test_what_was_computed_before_is_skipped_and_a_part_of_it_too() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        link = await rig.attach()
        for position, count in ((0, 3), (0, 3), (1, 1), (2, 4), (0, 6), (0, 7)):
            await push(link, position, count)
        await trio.sleep(1)
        assert rig.positions() == [0, 3, 6]
        assert torch.equal(torch.cat(rig.hidden), outputs(7))

    run(scenario)


def test_a_client_that_opens_its_session_again_ends_the_one_before() -> None:
    async def scenario(rig: Rig) -> None:
        first = await rig.opened()
        await push(await rig.attach(), 0, 3)
        await trio.sleep(1)
        await rig.opened()
        assert await ended(first) == ""
        assert len(rig.service.sessions) == 1
        assert rig.service.budget.reserved_bytes == rig.span.session_bytes(2, 6, 40)
        await push(await rig.attach(), 0, 3)
        await trio.sleep(1)
        assert rig.positions() == [0, 0]

    run(scenario)


def test_another_client_cannot_end_or_take_a_session() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        assert (await rig.open(rig.opening(), "stranger"))[1] == HopRefused("this session is open already")
        await push(await rig.attach(), 0, 3)
        await trio.sleep(1)
        assert rig.positions() == [0]

    run(scenario)


@pytest.mark.parametrize("how", ["aclose", "reset", "crash"])
def test_a_session_ends_with_its_client(how: str) -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await push(link, 0, 3)
        await trio.sleep(1)
        assert rig.service.budget.reserved_bytes > 0
        if how == "crash":
            rig.world.crash("client")
        else:
            await getattr(control, how)()
        await trio.sleep(1)
        assert not rig.service.sessions
        assert rig.service.budget.reserved_bytes == 0
        assert await ended(link) == ""
        assert rig.failures == [], "the next hop sees an end, not a failure"

    run(scenario)


def test_a_client_that_goes_while_a_step_is_computed_is_waited_for_by_the_step_alone() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened(rig.opening(0, 6, prompt=PROMPT))
        await trio.sleep(0.01)
        await control.reset()
        await trio.sleep(20)
        assert not rig.service.sessions
        assert rig.service.budget.reserved_bytes == 0
        assert rig.positions() == [], "nothing goes out for a client that is gone"

    run(scenario, span=ToySpan(0, 6, N_BLOCKS, block_time_s=1.0))


@pytest.mark.parametrize(
    "message", [HopOpened(), HopRefused("x"), HopFailed("p", "x"), Sampled(1, 1, ())], ids=lambda m: type(m).__name__
)
def test_a_client_that_says_anything_but_relink_ends_its_session(message: Message) -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await control.send(*session_codec.encode(message))
        assert await ended(control) == ""
        assert not rig.service.sessions

    run(scenario)


def test_a_client_cannot_link_a_hop_to_itself() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await rig.relink(control, "before", "hop", 1, 2)
        assert await ended(control) == ""
        assert not rig.service.sessions

    run(scenario)


# ---- the ring


def test_a_stranger_may_not_attach() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach("stranger")
        await push(link, 0, 3)
        began = trio.current_time()
        assert await ended(link) != ""
        assert trio.current_time() - began == pytest.approx(ATTACH_PATIENCE_S, abs=1)
        assert rig.positions() == []
        await push(await rig.attach(), 0, 3)
        await trio.sleep(1)
        assert rig.positions() == [0]
        await control.aclose()

    run(scenario)


def test_a_push_may_come_before_the_session() -> None:
    assert ATTACH_PATIENCE_S > OPEN_PATIENCE_S, "a client may still be opening this hop"

    async def scenario(rig: Rig) -> None:
        link = await rig.attach()
        await push(link, 0, 3)
        await trio.sleep(OPEN_PATIENCE_S)
        await rig.opened()
        await trio.sleep(1)
        assert rig.positions() == [0]

    run(scenario)


WRONG_STEPS = {
    "a gap": (inputs(7, 1), "expected 0"),
    "no tokens": ((Step(0, ()), to_wire(torch.zeros(0, HIDDEN))), "without tokens"),
    "too many tokens at all": (inputs(0, 41), "in a session of 40"),
    "too many at once": (
        (Step(0, ()), to_wire(torch.zeros(MAX_STEP_TOKENS + 1, HIDDEN))),
        f"{MAX_STEP_TOKENS} are allowed",
    ),
    "another width": ((Step(0, ()), to_wire(torch.zeros(1, HIDDEN + 1))), "of shape"),
    "another dtype": ((Step(0, ()), to_wire(torch.zeros(1, HIDDEN, dtype=torch.bfloat16))), "of shape"),
    "one dimension": ((Step(0, ()), to_wire(torch.zeros(HIDDEN))), "of shape"),
    "not a number": ((Step(0, ()), to_wire(torch.full((1, HIDDEN), torch.nan))), "not finite"),
    "infinity": ((Step(0, ()), to_wire(torch.full((1, HIDDEN), torch.inf))), "not finite"),
    "no tensor": ((Step(0, ()), None), "one tensor"),
    "a token": ((NextToken(0, 1), None), "one tensor"),
    "attaching twice": ((Attach(SESSION), None), "one tensor"),
}


@pytest.mark.parametrize("name", sorted(WRONG_STEPS))
def test_a_wrong_step_is_told_to_the_client_with_the_name_of_who_sent_it(name: str) -> None:
    (message, tensor), reason = WRONG_STEPS[name]

    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await link.send(*ring_codec.encode(message, [tensor] if tensor is not None else []))
        told = await heard(control)
        assert isinstance(told, HopFailed)
        assert told.peer == rig.world.node("before").peer_id
        assert reason in told.reason
        assert await ended(link) != ""
        # The session is as it was: a sound previous hop goes on from there.
        await push(await rig.attach(), 0, 3)
        await trio.sleep(1)
        assert rig.positions() == [0]
        assert torch.equal(torch.cat(rig.hidden), outputs(3))

    run(scenario)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Step(0, ()), "takes tokens"),
        (NextToken(5, VOCAB), "of a vocabulary of"),
        (NextToken(9, 1), "expected 5"),
        (NextToken(39, 1), "expected 5"),
    ],
)
def test_the_first_hop_takes_the_next_token_and_nothing_else(message: Message, reason: str) -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened(rig.opening(0, 6, prompt=PROMPT))
        link = await rig.attach()
        await link.send(*ring_codec.encode(message))
        told = await heard(control)
        assert isinstance(told, HopFailed)
        assert (told.peer, reason in told.reason) == (rig.world.node("before").peer_id, True)
        await (await rig.attach()).send(*ring_codec.encode(NextToken(5, 1)))
        await trio.sleep(1)
        assert rig.positions() == [0, 5]

    run(scenario, span=ToySpan(0, 6, N_BLOCKS))


def test_bytes_that_are_no_message_are_the_previous_hop_s_fault() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await (await rig.attach()).send(b"nonsense")
        told = await heard(control)
        assert isinstance(told, HopFailed)
        assert told.peer == rig.world.node("before").peer_id

    run(scenario)


def test_a_second_link_of_the_previous_hop_replaces_the_first() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        first = await rig.attach()
        await push(first, 0, 3)
        second = await rig.attach()
        assert await ended(first) == ""
        await push(second, 0, 5)
        await trio.sleep(1)
        assert rig.positions() == [0, 3]

    run(scenario)


@pytest.mark.parametrize("stale_comes", ["before the session", "before the link", "after the link"])
def test_a_link_of_a_chain_that_was_given_up_disturbs_no_later_one(stale_comes: str) -> None:
    """The client tried the same two hops before. What the first of them sent then is still on its way."""

    async def scenario(rig: Rig) -> None:
        async def come_late() -> Stream:
            stale = await rig.attach(link=1)
            await push(stale, 0, 1)
            return stale

        stale = await come_late() if stale_comes == "before the session" else None
        waiting = await rig.attach(link=2)
        await rig.opened(rig.opening(inbound=2))
        if stale_comes == "before the link":
            stale = await come_late()
        await push(waiting, 0, 3)
        await trio.sleep(1)
        stale = stale or await come_late()
        assert await ended(stale) != ""
        await push(waiting, 3, 2)
        await trio.sleep(1)
        assert rig.positions() == [0, 3]

    run(scenario)


def test_the_next_hop_is_told_which_link_it_is() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened(rig.opening(outbound=4))
        await push(await rig.attach(), 0, 1)
        await trio.sleep(1)
        await rig.relink(control, "before", "after", 1, 6)  # the same hop, opened anew
        await trio.sleep(1)
        attached = [message for _, message in rig.received if isinstance(message, Attach)]
        assert attached == [Attach(SESSION, 4), Attach(SESSION, 6)]
        assert rig.positions() == [0, 0]

    run(scenario)


def test_another_previous_hop_replaces_the_one_before() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        old = await rig.attach()
        await push(old, 0, 3)
        await trio.sleep(1)
        await rig.relink(control, "stranger", "after", 2, 1)
        assert await ended(old) == ""
        await push(await rig.attach("stranger", 2), 0, 4)
        await trio.sleep(1)
        assert rig.positions() == [0, 3]
        late = await rig.attach()
        assert await ended(late) != "", "the old one has no more say"

    run(scenario)


def test_a_new_next_hop_gets_everything_from_the_beginning() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        for position in range(4):
            await push(link, position, 1)
        await trio.sleep(1)
        rig.hidden.clear()
        await rig.relink(control, "before", "stranger", 1, 2)
        await push(link, 4, 1)
        await trio.sleep(1)
        assert rig.positions("after") == [0, 1, 2, 3]
        assert rig.positions("stranger") == [0, 1, 2, 3, 4]
        assert torch.equal(torch.cat(rig.hidden), outputs(5))

    run(scenario)


def test_inputs_that_come_while_the_next_hop_is_lost_wait_for_another() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await push(link, 0, 2)
        await trio.sleep(1)
        rig.world.crash("after")
        told = await heard(control)  # although nothing is being sent: what was on its way is lost
        assert isinstance(told, HopFailed)
        assert told.peer == rig.address("after").peer
        await push(link, 2, 2)
        await push(link, 4, 1)
        await trio.sleep(1)
        await rig.relink(control, "before", "stranger", 1, 2)
        await trio.sleep(1)
        assert rig.positions("stranger") == [0, 2, 4]

    run(scenario)


def test_a_next_hop_that_takes_nothing_more_is_let_go_of_when_the_client_says_so() -> None:
    """Sending is stuck on its full window; the new next hop gets all from the beginning, without a hole."""

    async def scenario(rig: Rig) -> None:
        async def hold(stream: Stream) -> None:
            await trio.sleep_forever()

        rig.world.node("after").serve(ids.RING, hold)
        control = await rig.opened(rig.opening(max_tokens=1000))
        link = await rig.attach()

        async def push_all() -> None:
            for position in range(0, 1000, 50):
                await push(link, position, 50)

        rig.world.nursery.start_soon(push_all)
        await trio.sleep(5)
        waits = rig.service.sessions[SESSION].links.main.cursor.pending()
        assert waits is not None
        assert waits.position > 0
        await rig.relink(control, "before", "stranger", 1, 2)
        await trio.sleep(60)
        assert rig.positions("stranger") == list(range(0, 1000, 50))
        assert torch.equal(torch.cat(rig.hidden), outputs(1000))
        assert rig.service.sessions, "nobody was to blame"

    run(scenario, window_bytes=2000)


def test_inputs_that_wait_behind_a_stuck_resend_do_not_overtake_the_next_one() -> None:
    """Linked to a hop that takes nothing, then back: the output that queued up meanwhile must not go out first."""

    async def scenario(rig: Rig) -> None:
        async def hold(stream: Stream) -> None:
            await trio.sleep_forever()

        rig.world.node("stranger").serve(ids.RING, hold)
        control = await rig.opened(rig.opening(max_tokens=1000))
        link = await rig.attach()
        for position in range(0, 500, 50):
            await push(link, position, 50)
        await trio.sleep(5)
        for outbound, name in enumerate(("stranger", "after"), start=2):
            await rig.relink(control, "before", name, 1, outbound)
            await trio.sleep(1)
            if name == "stranger":
                await push(link, 500, 50)
                await trio.sleep(10)
        await trio.sleep(10)
        assert rig.positions() == [*range(0, 500, 50), *range(0, 550, 50)]

    run(scenario, window_bytes=2000)


def test_a_link_that_is_still_being_opened_to_the_old_next_hop_is_let_go_of() -> None:
    async def scenario(rig: Rig) -> None:
        rig.world.link("hop", "after", LinkFaults(latency_s=0.5))
        control = await rig.opened()
        link = await rig.attach()
        await push(link, 0, 2)
        await trio.sleep(1)
        await rig.relink(control, "before", "stranger", 1, 2)
        await trio.sleep(10)
        await push(link, 2, 2)
        await trio.sleep(1)
        assert rig.positions("stranger") == [0, 2]
        assert not [who for who, _ in rig.received if who == "after"], "the old one hears nothing"

    run(scenario)


def test_what_a_replaced_hop_sent_still_becomes_an_output() -> None:
    """Relink comes while its step is being computed: the cache has it, so the output must not be lost."""

    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await push(await rig.attach(), 0, 3)
        await trio.sleep(1)
        await rig.relink(control, "stranger", "after", 2, 1)
        await trio.sleep(20)
        assert rig.positions() == [0]
        await push(await rig.attach("stranger", 2), 0, 4)
        await trio.sleep(20)
        assert rig.positions() == [0, 3]
        assert torch.equal(torch.cat(rig.hidden), outputs(4))

    run(scenario, span=ToySpan(2, 6, N_BLOCKS, block_time_s=1.0))


def test_a_next_hop_that_cannot_be_reached_is_named() -> None:
    async def scenario(rig: Rig) -> None:
        rig.world.crash("after")
        control = await rig.opened()
        await push(await rig.attach(), 0, 2)
        told = await heard(control)
        assert isinstance(told, HopFailed)
        assert told.peer == rig.address("after").peer

    run(scenario)


# ---- first and last


def test_the_last_hop_samples_tells_and_ends() -> None:
    async def scenario(rig: Rig) -> None:
        generation = Generation(SamplingParams(), PROMPT, len(PROMPT) + 3)
        control = await rig.opened(rig.opening(0, 8, prompt=PROMPT, generation=generation))
        told = [await heard(control) for _ in range(3)]
        assert all(isinstance(one, Sampled) for one in told)
        assert [one.position for one in told] == [5, 6, 7]
        assert [one.finish for one in told] == ["", "", "length"]
        await trio.sleep(5)
        assert rig.received == [], "alone, it pushes to nobody"

    run(scenario, span=ToySpan(0, 8, N_BLOCKS))


def test_an_end_token_ends_the_text() -> None:
    part = ToyPart(0, 8, N_BLOCKS)
    first = int(part.logits(part.forward(torch.tensor(PROMPT), part.new_cache())[-1:]).argmax())

    async def scenario(rig: Rig) -> None:
        generation = Generation(SamplingParams(), PROMPT, 20, (first,))
        control = await rig.opened(rig.opening(0, 8, prompt=PROMPT, generation=generation))
        told = await heard(control)
        assert isinstance(told, Sampled)
        assert (told.token, told.finish) == (first, "stop")

    run(scenario, span=ToySpan(0, 8, N_BLOCKS))


def test_a_last_hop_says_its_newest_token_again_to_who_may_have_missed_it() -> None:
    """It takes the place of one that died while the token was on its way to the first hop."""

    async def scenario(rig: Rig) -> None:
        await rig.opened(rig.opening(2, 8, generation=GENERATION))
        await trio.sleep(1)
        assert rig.received == [("after", Attach(SESSION, 1)), ("after", NextToken(len(PROMPT) - 1, PROMPT[-1]))]

    run(scenario, span=ToySpan(2, 8, N_BLOCKS))


# ---- our own failures


class BrokenPart(ToyPart):
    def forward(self, inputs: torch.Tensor, cache: object) -> torch.Tensor:
        raise RuntimeError("the processor is on fire")


class BrokenSpan(ToySpan):
    def part(self, start: int, end: int) -> ToyPart:
        return BrokenPart(start, end, self.n_blocks)


@pytest.mark.parametrize("start", [0, 2])
def test_our_own_failure_ends_the_session_and_blames_nobody(start: int) -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened(rig.opening(start, 6, prompt=PROMPT if start == 0 else ()))
        if start:
            await push(await rig.attach(), 0, 3)
        await ended(control)
        await trio.sleep(1)
        assert not rig.service.sessions
        assert rig.service.budget.reserved_bytes == 0
        assert rig.world.handler_errors, "and it is reported"
        rig.world.handler_errors.clear()

    run(scenario, span=BrokenSpan(start, 6, N_BLOCKS))
