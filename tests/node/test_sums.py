"""Sums of gradients asked and answered: exactly what was asked for, later if it is about to be there, or why not."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import trio

from mycel.node.training import sums
from mycel.node.training.ledger import Ledger
from mycel.node.training.sum_table import FinalSum, SumTable, digest, sum_of_squares
from mycel.node.training.sums import SumClient, SumService
from mycel.protocols.codec import reduce_codec
from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ids import REDUCE
from mycel.protocols.tensors import to_wire
from mycel.protocols.training import GetPartial, GetSum, NotNow, Reduced, Slice
from mycel.swarm.training.bell import Bell
from tests.sim.compute import SimCompute
from tests.sim.world import World, run_world

RUN = bytes(range(32))
N = 100


def final(version: int, values_P: torch.Tensor, own_tied: torch.Tensor | None = None, scale: float = 0.0) -> FinalSum:
    reduced = Reduced(version, digest(values_P), sum_of_squares(values_P, None), 7.0 + version)
    return FinalSum(values_P, own_tied, reduced, scale)


def values(seed: int, count: int = N) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


# ---- the table


def test_a_table_is_written_in_any_order_and_says_what_is_there():
    table, whole_P = SumTable(N, None, version=3), values(1)
    for low, high in ((10, 30), (50, 60), (0, 10), (25, 55)):
        table.write(low, whole_P[low:high])
    assert table.covered == ((0, 60),)
    part = table.slice(3, 5, 60, tied=False)
    assert part is not None
    assert torch.equal(part, whole_P[5:60])
    assert table.slice(3, 5, 61, tied=False) is None
    assert table.slice(3, 5, 60, tied=True) is None
    assert table.slice(2, 5, 60, tied=False) is None


def test_what_is_there_is_never_written_again():
    table, first_P = SumTable(N, None), values(1)
    table.write(0, first_P[:50])
    table.write(20, values(2)[:60])
    part = table.slice(0, 0, 50, tied=False)
    assert part is not None
    assert torch.equal(part, first_P[:50])


def test_the_last_two_sums_are_kept_and_said():
    table = SumTable(N, None)
    for version in range(4):
        table.write(0, values(version))
        table.finish(final(version, values(version)))
        assert [one.version for one in table.reduced] == list(range(max(0, version - 1), version + 1))
        table.made(version, 0.5)
        table.advance(version + 1)
        assert table.finals[version].scale == 0.5
        assert [one.version for one in table.reduced] == list(range(max(0, version - 1), version + 1))
    table.write(0, values(9)[:5])
    assert [one.version for one in table.reduced] == [3], "one less while another comes together"
    table.restart(7)
    assert (table.version, table.reduced, table.covered) == (7, (), ())


def test_the_untied_sum_stays_to_be_had():
    table = SumTable(N, (80, 100))
    own_tied, applied_P = values(5, 20), values(4)
    table.finish(final(0, applied_P, own_tied))
    untied, tied = table.slice(0, 70, 90, tied=False), table.slice(0, 70, 90, tied=True)
    assert untied is not None
    assert tied is not None
    assert torch.equal(tied, applied_P[70:90])
    assert torch.equal(untied, torch.cat([applied_P[70:80], own_tied[:10]]))
    assert torch.equal(table.slice(0, 0, 80, tied=False), applied_P[:80])


def test_squares_are_summed_in_one_order_and_without_the_table_of_the_other_end():
    many_P = values(3, 100_000)
    expected = math.fsum((many_P.double() ** 2).tolist())
    assert sum_of_squares(many_P, None) == pytest.approx(expected, rel=1e-13)
    assert sum_of_squares(torch.tensor([1.0, 2.0, 5.0]), (2, 3)) == 5.0
    assert sum_of_squares(torch.tensor([5.0, 1.0, 2.0]), (0, 1)) == 5.0
    threads, first = torch.get_num_threads(), sum_of_squares(many_P, None)
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert sum_of_squares(many_P, None) == first
    finally:
        torch.set_num_threads(threads)


# ---- over a network


class Rig:
    """Peers "a", "b" ... that answer, and one that asks."""

    def __init__(self, world: World, *names: str, tied: tuple[int, int] | None = None) -> None:
        self.world = world
        self.asker = world.add_node("asker")
        self.client = SumClient(self.asker, RUN)
        self.services: dict[str, SumService] = {}
        for name in names:
            transport, ledger, bell = world.add_node(name), Ledger(N, version=3), Bell()
            table = SumTable(N, tied, version=3)
            self.services[name] = SumService(transport, RUN, 1, ledger, table, SimCompute(world, name), bell)
            self.services[name].start()
            self.asker.learn(transport.peer_id, transport.addresses)

    def peer(self, name: str) -> str:
        return self.world.node(name).peer_id

    def count(self, name: str, *counted: int) -> None:
        for number in counted:
            assert self.services[name].ledger.count(3, number, values(number), float(number))

    def n_streams(self) -> int:
        opened = {entry[4] for entry in self.world.log if entry[1] == "frame" and entry[4].startswith(REDUCE)}
        return len(opened)


def test_partial_sums_are_exact_and_of_just_the_numbers_that_were_named():
    async def scenario(world: World) -> None:
        rig = Rig(world, "a", "b")
        rig.count("a", 0, 2)
        rig.count("b", 1)
        sources = ((rig.peer("a"), 0b101), (rig.peer("b"), 0b010))
        total_N, losses = await rig.client.fetch_partials(sources, 1, 3, 20, 90)
        reference = Ledger(N)
        for number in range(3):
            reference.count(0, number, values(number), 0.0)
        assert torch.equal(total_N, reference.sum.sum_P[20:90])
        assert sorted(losses) == [1.0, 2.0]
        for stage, version, counted, reason in (
            (1, 3, 0b001, "has not counted just these of step 3"),
            (1, 2, 0b101, "has not counted just these of step 2, and is at step 3"),
            (0, 3, 0b101, "this peer is at stage 1"),
        ):
            with pytest.raises(PeerRefused, match=reason):
                await rig.client.fetch_partial(rig.peer("a"), stage, version, counted, 0, 5)
        assert rig.client.sent_bytes > 0
        assert rig.services["a"].sent_bytes > 70 * 8

    run_world(1, scenario)


def test_a_sum_comes_in_pieces_over_one_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "PIECE_ELEMENTS", 16)

    async def scenario(world: World) -> None:
        rig = Rig(world, "a")
        table, whole_P = rig.services["a"].table, values(1)
        table.finish(final(3, whole_P, scale=0.25))
        given = await rig.client.fetch_sum([rig.peer("a")], 1, 3, 5, N, tied=True)
        assert torch.equal(given.values_N, whole_P[5:])
        assert (given.loss, given.scale) == (10.0, 0.25)
        assert rig.n_streams() == 1
        await rig.client.forget([rig.peer("a")])
        await trio.sleep(1.0)
        assert rig.services["a"]._streams == {}

    run_world(2, scenario)


def test_a_question_waits_a_little_for_a_sum_that_is_about_to_be_there():
    async def scenario(world: World) -> None:
        rig = Rig(world, "a")
        service, whole_P = rig.services["a"], values(1)

        def come() -> None:
            service.table.write(0, whole_P)
            service.bell.ring()

        world.agenda.after(2.0, come)
        given = await rig.client.fetch_sum([rig.peer("a")], 1, 3, 0, 10, tied=False)
        assert torch.equal(given.values_N, whole_P[:10])
        began_s = trio.current_time()
        with pytest.raises(PeerRefused, match="has not that sum of step 4, and is at step 3"):
            await rig.client.fetch_sum([rig.peer("a")], 1, 4, 0, 10, tied=False)
        assert trio.current_time() - began_s == pytest.approx(sums.SUM_PATIENCE_S, abs=0.1)
        began_s = trio.current_time()
        with pytest.raises(PeerRefused, match="has not that sum of step 1"):
            await rig.client.fetch_sum([rig.peer("a")], 1, 1, 0, 10, tied=False)
        assert trio.current_time() - began_s < 0.1, "what is over is not waited for"

    run_world(3, scenario)


def test_another_holder_goes_on_where_one_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "PIECE_ELEMENTS", 10)

    async def scenario(world: World) -> None:
        rig = Rig(world, "a", "b", "c")
        whole_P = values(1)
        rig.services["a"].table.write(0, whole_P[:50])
        rig.services["b"].table.finish(final(3, whole_P))
        world.crash("c")
        holders = [rig.peer(name) for name in "cab"]
        given = await rig.client.fetch_sum(holders, 1, 3, 0, N, tied=False)
        assert torch.equal(given.values_N, whole_P)
        with pytest.raises(PeerUnreachable):
            await rig.client.fetch_sum([rig.peer("c")], 1, 3, 0, N, tied=False)
        with pytest.raises(PeerRefused, match="nobody has the sum of step 3"):
            await rig.client.fetch_sum([], 1, 3, 0, N, tied=False)

    run_world(4, scenario)


def test_a_kept_stream_that_ended_is_replaced_without_a_word():
    async def scenario(world: World) -> None:
        rig = Rig(world, "a")
        rig.services["a"].table.write(0, values(1))
        for _ in range(2):
            await rig.client.fetch_sum([rig.peer("a")], 1, 3, 0, 10, tied=False)
            await trio.sleep(2 * sums.IDLE_S)
        assert rig.n_streams() == 2
        world.crash("a")
        world.restart("a")
        await trio.sleep(1.0)
        with pytest.raises(PeerError):
            await rig.client.fetch_sum([rig.peer("a")], 1, 3, 0, 10, tied=False)

    run_world(5, scenario)


def test_one_who_dies_ends_the_others_questions_and_is_named():
    async def scenario(world: World) -> None:
        rig = Rig(world, "a", "b")
        rig.count("a", 0)
        await rig.client.fetch_partial(rig.peer("b"), 1, 3, 0, 0, 10)
        world.stop("b")
        world.agenda.after(1.0, lambda: world.crash("b"))
        with pytest.raises(PeerUnreachable) as failure:
            await rig.client.fetch_partials(((rig.peer("a"), 1), (rig.peer("b"), 2)), 1, 3, 0, 10)
        assert failure.value.peer == rig.peer("b")

    run_world(6, scenario)


HOSTILE = {
    "another dtype": (Slice(0), [torch.zeros(10, dtype=torch.float16)], "a sum of"),
    "another size": (Slice(0), [torch.zeros(11)], "a sum of"),
    "not a number": (Slice(0), [torch.full((10,), torch.nan)], "no gradients"),
    "endless": (Slice(0), [torch.full((10,), -torch.inf)], "no gradients"),
    "too large": (Slice(0), [torch.full((10,), 1e9)], "no gradients"),
    "another place": (Slice(5), [torch.zeros(10)], "Slice is no answer to GetSum"),
    "nothing": (Slice(0), [], "Slice is no answer"),
    "too much": (Slice(0), [torch.zeros(10)] * 2, "Slice is no answer"),
    "a refusal with something": (NotNow("x"), [torch.zeros(10)], "NotNow is no answer"),
    "a question": (GetSum(RUN, 1, 3, 0, 10, False), [], "GetSum is no answer"),
}


@pytest.mark.parametrize("kind", [*HOSTILE, "partial: another dtype", "partial: too large", "garbage", "silence"])
def test_what_is_no_answer_is_refused_and_its_sender_named(kind: str):
    async def scenario(world: World) -> None:
        asker, liar = world.add_node("asker"), world.add_node("liar")
        asker.learn(liar.peer_id, liar.addresses)
        client = SumClient(asker, RUN)

        async def lie(stream) -> None:
            await stream.receive()
            if kind == "silence":
                await trio.sleep_forever()
            if kind == "garbage":
                await stream.send(b"\x07\x00\x00\x00garbage")
            elif kind.startswith("partial"):
                tensor = torch.zeros(10) if "dtype" in kind else torch.full((10,), 1 << 60)
                await stream.send(*reduce_codec.encode(Slice(0), [to_wire(tensor)]))
            else:
                answer, tensors, _ = HOSTILE[kind]
                await stream.send(*reduce_codec.encode(answer, [to_wire(tensor) for tensor in tensors]))
            await stream.receive()

        liar.serve(REDUCE, lie)
        expected = PeerTimeout if kind == "silence" else RemoteProtocolError
        ask = partial(client.fetch_sum, [liar.peer_id], 1, 3, 0, 10, tied=True)
        if kind.startswith("partial"):
            ask = partial(client.fetch_partial, liar.peer_id, 1, 3, 0b1, 0, 10)
        with pytest.raises(expected) as failure:
            await ask()
        if kind in HOSTILE:
            assert HOSTILE[kind][2] in failure.value.reason
        assert failure.value.peer == liar.peer_id

    run_world(7, scenario)


def test_hostile_questions_end_their_stream_and_too_many_streams_are_not_served():
    async def scenario(world: World) -> None:
        rig = Rig(world, "a")
        rig.services["a"].table.write(0, values(1))
        for bad in (
            GetSum(RUN, 1, 3, 50, 51, False),
            GetSum(RUN, 1, 3, 0, sums.PIECE_ELEMENTS + 1, False),
            GetPartial(RUN, 1, 3, b"\x01", 99, 2),
            Slice(0),
        ):
            stream = await rig.asker.open(rig.peer("a"), REDUCE)
            await stream.send(*reduce_codec.encode(bad))
            with pytest.raises(PeerUnreachable):
                await stream.receive()
        streams = [await rig.asker.open(rig.peer("a"), REDUCE) for _ in range(sums.STREAMS_PER_PEER + 1)]
        await trio.sleep(0.1)
        assert await streams.pop().receive() is None
        question = GetSum(RUN, 1, 3, 0, 10, False)
        for stream in streams:
            await stream.send(*reduce_codec.encode(question))
            assert await stream.receive() is not None

    run_world(8, scenario)


def test_who_asks_and_does_not_read_is_left():
    async def scenario(world: World) -> None:
        rig = Rig(world, "a")
        rig.services["a"].table.write(0, values(1))
        world.options = type(world.options)(window_bytes=512)
        stream = await rig.asker.open(rig.peer("a"), REDUCE)
        for _ in range(5):
            await stream.send(*reduce_codec.encode(GetSum(RUN, 1, 3, 0, N, False)))
        await trio.sleep(2 * sums.REPLY_PATIENCE_S)
        assert rig.services["a"]._streams == {}

    run_world(9, scenario)
