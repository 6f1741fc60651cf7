"""Microbatches over real streams and real compute threads, int8 borders and all: the sums of one process."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import torch
import trio

from mycel.node.compute import DeviceCompute
from mycel.node.events import no_events
from mycel.node.libp2p_transport import open_transport
from mycel.node.training.ledger import Ledger
from mycel.node.training.stage_service import StageService
from mycel.protocols import ids
from mycel.protocols.borders import decode_border, encode_border
from mycel.protocols.codec import pipe_codec
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Stream, Transport
from mycel.protocols.tensors import to_wire
from mycel.protocols.training import Drive, Forward, Passed, Way
from mycel.security.identity import Identity
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.members import Members
from tests.sim.toy_stage import VOCAB, ToySamples, ToyStage, ToyState, toy_plan, toy_reference

pytestmark = pytest.mark.loopback
PLAN = toy_plan(3, n_microbatches=24)


def crossed(border_BTW: torch.Tensor) -> torch.Tensor:
    return decode_border(encode_border(border_BTW, "int8"), tuple(border_BTW.shape), "int8")


def serve(node: Transport, index: int) -> tuple[Ledger, StageService]:
    stage = ToyStage(PLAN, index, ToyState(PLAN, index))
    ledger, members = Ledger(stage.n_elements), Members(node.peer_id, PLAN.run)
    service = StageService(node, PLAN, stage, ledger, members, DeviceCompute(), "int8", VOCAB, no_events, Bell())
    service.start()
    return ledger, service


def test_the_sums_over_real_streams() -> None:
    trio.run(walk_all)


async def walk_all() -> None:
    heard: list[Passed] = []
    all_done = trio.Event()

    async def listen(stream: Stream) -> None:
        while (frame := await stream.receive()) is not None:
            message = pipe_codec.decode_only(frame)
            assert isinstance(message, Passed), message
            heard.append(message)
            if sum(passed.backward for passed in heard) == PLAN.n_microbatches * PLAN.n_stages:
                all_done.set()

    ledgers, services = [], []
    with trio.fail_after(60):
        async with AsyncExitStack() as stack:
            trainer, *nodes = [await stack.enter_async_context(open_transport(Identity.generate())) for _ in range(4)]
            ways = tuple(Way(PeerAddress(node.peer_id, node.addresses)) for node in nodes)
            async with trio.open_nursery() as nursery:
                streams = []
                for index, node in enumerate(nodes):
                    ledger, service = serve(node, index)
                    nursery.start_soon(service.run)
                    ledgers.append(ledger)
                    services.append(service)
                    trainer.learn(node.peer_id, node.addresses)
                    streams.append(await trainer.open(node.peer_id, ids.PIPE))
                    await streams[-1].send(*pipe_codec.encode(Drive(PLAN.run)))
                    nursery.start_soon(listen, streams[-1])
                for number in range(PLAN.n_microbatches):
                    work = PLAN.work(0, number)
                    tokens = to_wire(ToySamples().tokens(work.first, work.count).to(torch.int32))
                    message = Forward(PLAN.run, work.id, 0, number, 1, 0, trainer.peer_id, ways)
                    await streams[0].send(*pipe_codec.encode(message, [tokens]))
                await all_done.wait()
                nursery.cancel_scope.cancel()
    wanted = toy_reference(PLAN, n_steps=1, border=crossed)
    for ledger, sum_P in zip(ledgers, wanted.sums[0], strict=True):
        assert ledger.counted == PLAN.everything
        assert torch.equal(ledger.sum.sum_P, sum_P)
    assert sum(sorted(ledgers[-1].losses.values())) == pytest.approx(wanted.losses[0])
    assert all(service.sequences_per_s > 0 for service in services)
    assert services[0].sent_bytes > PLAN.n_microbatches * 100
