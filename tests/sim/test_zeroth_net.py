"""One byte per update between peers, in virtual time: one state, late joiners by each way, liars, crashes."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from mycel.node.zeroth.files import LOG_FILE
from mycel.swarm.rounds.statements import make_offer
from mycel.swarm.zeroth.chain import BadLine, ForgedLine
from mycel.swarm.zeroth.course import Course, Step
from mycel.swarm.zeroth.defence import Measured
from mycel.swarm.zeroth.lattice import from_float
from mycel.swarm.zeroth.options import ZerothOptions
from mycel.swarm.zeroth.run_log import LoggedRound, read_head, replay_rounds
from tests.sim.zeroth_rig import N_ELEMENTS, TARGET, ZerothSwarm, zeroth_world

OPTIONS = ZerothOptions(updates=16, rate=3.0, epsilon=1e-3, audits=0.1)
POOLED = ZerothOptions(updates=16, rate=3.0, epsilon=1e-3, pool=8, epoch=4, audits=0.0)
START = float((TARGET.astype(np.float64) ** 2).mean())


def theta0() -> np.ndarray:
    return from_float(np.zeros(N_ELEMENTS, np.float32))


def replayed(swarm: ZerothSwarm, name: str) -> bytes:
    return replayed_bytes((swarm.folder / name / "log" / LOG_FILE).read_bytes())


def replayed_bytes(data: bytes) -> bytes:
    head, size = read_head(data)
    return replay_rounds(head, data[size:], theta0()).digest()


async def begin(swarm: ZerothSwarm, names: str) -> None:
    for name in names:
        swarm.start(name)
    await swarm.when(lambda: all(len(swarm.peers[name].group.members) == len(names) for name in names))


def test_peers_share_one_state_and_learn(tmp_path: Path) -> None:
    async def body(swarm: ZerothSwarm) -> None:
        await begin(swarm, "abcd")
        await swarm.until(swarm.peers["a"].course.number + 12, *"abcd")

    swarm = zeroth_world(tmp_path, body, OPTIONS)
    assert swarm.error("a") < 0.5 * START
    assert max(len(done.step.members) for done in swarm.applied["d"]) == 4
    number = swarm.peers["a"].course.number
    assert replayed(swarm, "a") == swarm.states[number]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "options", "speeds"),
    [("snapshot", POOLED, (1e9, 1e-6)), ("log", OPTIONS, (1e4, 1e-12)), ("sums", POOLED, (1e4, 1e-9))],
)
def test_a_late_joiner_takes_the_cheapest_way_to_the_same_state(
    tmp_path: Path, way: str, options: ZerothOptions, speeds: tuple[float, float]
) -> None:
    async def body(swarm: ZerothSwarm) -> None:
        await begin(swarm, "abcd")
        await swarm.until(12, *"abcd")
        swarm.start("e", speeds=speeds)
        await swarm.when(lambda: swarm.peers["e"].group.is_member)
        await swarm.until(swarm.peers["e"].course.number + 3, *"abcde")

    swarm = zeroth_world(tmp_path, body, options, n_elements=1 << 14)
    [(name, chosen)] = swarm.events("state.way")
    assert (name, chosen["way"]) == ("e", way), chosen
    assert "where the" in str(chosen["reason"])
    assert swarm.applied["e"]
    assert {done.step.number: done.digest for done in swarm.applied["e"]}.items() <= swarm.states.items()


def test_a_liar_is_banned_and_named_and_the_honest_learn(tmp_path: Path) -> None:
    def liar(found: Measured) -> int:
        return replace(found, g=-20.0 * found.g).code

    async def body(swarm: ZerothSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        swarm.start("d", sending=liar)
        await swarm.when(lambda: all(len(peer.group.members) == 4 for peer in swarm.peers.values()))
        await swarm.when(lambda: all(len(swarm.peers[name].group.members) == 3 for name in "abc"))
        await swarm.until(swarm.peers["a"].course.number + 12, *"abc")

    swarm = zeroth_world(tmp_path, body, OPTIONS)
    liar_id = swarm.world.node("d").peer_id
    assert {fields["peer"] for _, fields in swarm.events("update.false")} == {liar_id}
    assert {fields["peer"] for _, fields in swarm.events("peer.named")} == {liar_id}
    assert all(len(swarm.peers[name].course.banned) == 1 for name in "abc")
    assert swarm.error("a") < 0.5 * START
    assert replayed(swarm, "a") == swarm.peers["a"].course.digest()


@pytest.mark.slow
def test_a_crashed_peer_goes_on_from_its_disk(tmp_path: Path) -> None:
    async def body(swarm: ZerothSwarm) -> None:
        await begin(swarm, "abcd")
        await swarm.until(5, *"abcd")
        swarm.world.crash("b")
        await swarm.until(swarm.peers["a"].course.number + 2, "a")
        again = swarm.start("b")
        assert again.course.number >= 5
        await swarm.when(lambda: len(swarm.applied["a"][-1].step.members) == 4)
        await swarm.until(swarm.peers["a"].course.number + 2, *"abcd")

    swarm = zeroth_world(tmp_path, body, OPTIONS)
    assert not swarm.events("state.way")
    assert replayed(swarm, "b") == swarm.peers["b"].course.digest()


def test_whatever_byte_of_a_log_is_flipped_its_line_is_named(tmp_path: Path) -> None:
    async def body(swarm: ZerothSwarm) -> None:
        await begin(swarm, "abc")
        await swarm.until(6, *"abc")

    swarm = zeroth_world(tmp_path, body, OPTIONS)
    data = (tmp_path / "a" / "log" / LOG_FILE).read_bytes()
    _, size = read_head(data)
    rng = np.random.default_rng(3)
    for at in rng.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        with pytest.raises((BadLine, ForgedLine)) as caught:
            replayed_bytes(bytes(damaged))
        assert caught.value.line == line_of(data, size, int(at))
    assert replayed(swarm, "a") == swarm.states[swarm.peers["a"].course.number]


def line_of(data: bytes, head_size: int, at: int) -> int:
    """The line that a byte of a log is in, found by the lengths that its format states."""
    line, start = 2, head_size
    if at < head_size:
        return 1
    while True:
        if data[start] == 2:
            n = int.from_bytes(data[start + 7 : start + 9], "little")
            end = start + 9 + n + 1 + 32 * data[start + 9 + n] + 64
        else:
            end = start + 5 + int.from_bytes(data[start + 1 : start + 5], "little")
        if at < end:
            return line
        line, start = line + 1, end


def test_offers_of_nonsense_count_for_nothing_and_the_log_still_holds_them(tmp_path: Path) -> None:
    """Bodies, scalars in no form, another state: all certified, none of it applied, and a third party can replay it."""

    def nonsense(swarm: ZerothSwarm, number: int) -> None:
        group, signer = swarm.peers["d"].group, swarm.world.node("d").identity
        outcome = group._driver.machine.outcome
        empty = {"bodies": (sha256(b"").digest(),), "sizes": (0,)}
        kinds: list[dict[str, object]] = [
            {"state": bytes(32), "scalars": bytes(16), "weight": 16},
            {"state": group.state, "scalars": bytes(300), "weight": 2},
            {"state": group.state, "scalars": bytes(16), "weight": 16, **empty},
        ]
        fields = dict(kinds[number % 3])
        group._driver.offer(make_offer(signer, outcome, fields.pop("state"), **fields))  # type: ignore[arg-type]

    async def body(swarm: ZerothSwarm) -> None:
        for name in "abcd":
            swarm.start(name, measures=name != "d")
        group = swarm.peers["d"].group
        while swarm.peers["a"].course.number < 14:
            if group.is_member and group._driver.machine.my_offer is None and not group.is_over:
                nonsense(swarm, group.round)
            await swarm.moved.after(swarm.moved.count)

    swarm = zeroth_world(tmp_path, body, OPTIONS)
    data = (tmp_path / "a" / "log" / LOG_FILE).read_bytes()
    head, size = read_head(data)
    seen: set[tuple[bool, int]] = set()

    def note(course: Course, logged: LoggedRound, step: Step) -> None:
        before = {offer.state for offer in logged.offers if offer.peer != swarm.world.node("d").peer_id}
        for offer in logged.offers:
            if offer.peer == swarm.world.node("d").peer_id:
                seen.add((offer.state in before, len(offer.bodies)))
                assert offer.peer not in [author.peer for author in step.members]

    course = replay_rounds(head, data[size:], theta0(), on_step=note)
    assert course.digest() == swarm.peers["a"].course.digest()
    assert seen == {(True, 0), (True, 1)}  # what was made from another state is not even certified
    assert max(done.step.n_updates for done in swarm.applied["a"]) == 48
