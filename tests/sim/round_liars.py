"""Peers that lie in a round: each changes what a correct machine says, for each listener as it likes, and signs it."""

from __future__ import annotations

import hashlib
import random

import msgspec

from mycel.protocols.rounds import (
    NOTHING,
    Certificate,
    Claim,
    Held,
    Joining,
    Offer,
    Plan,
    Proposal,
    Request,
    RoundMessage,
    Vote,
)
from mycel.swarm.rounds.statements import sign
from tests.sim.round_net import HashSigner, Net


def _other(seed: bytes) -> bytes:
    return hashlib.sha256(b"a lie about " + seed).digest()


class Liar:
    """Says what `habit` names. `circle` are its friends: they claim the same falsehoods."""

    def __init__(self, net: Net, peer: str, habit: str) -> None:
        self.net, self.peer, self.habit = net, peer, habit
        self.signer = HashSigner(peer)
        self.told_two: set[str] = set()

    def __call__(self, target: str, message: RoundMessage) -> list[RoundMessage]:
        if self.net.nodes[target].liar is not None:
            return [message]
        half = int(target[1:]) % 2 == 0
        said: list[RoundMessage] = getattr(self, "_" + self.habit)(target, message, half)
        return said

    def _silent(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        return [message] if isinstance(message, Joining) else []

    def _two_votes(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        if isinstance(message, Vote) and message.peer == self.peer and half:
            value = NOTHING if message.value != NOTHING else _other(message.value)
            return [sign(self.signer, msgspec.structs.replace(message, value=value))]
        return [message]

    def _two_proposals(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        """Proposes and plans something else to half of the others, and votes for everything."""
        if isinstance(message, Plan) and message.peer == self.peer and half:
            return [sign(self.signer, msgspec.structs.replace(message, offers=message.offers[1:]))]
        if isinstance(message, Proposal) and message.peer == self.peer and half:
            outcome = message.outcome
            missed = tuple(count + 1 for count in outcome.missed)
            changed = msgspec.structs.replace(outcome, missed=missed)
            return [sign(self.signer, msgspec.structs.replace(message, outcome=changed))]
        return [message]

    def _false_results(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        """Claims sums that nobody could compute, the same as its friends, and proposes them."""
        if isinstance(message, Claim) and message.peer == self.peer and message.kind == "sum":
            return [self._lie(message)]
        if isinstance(message, Proposal) and message.peer == self.peer:
            outcome = message.outcome
            results = tuple(_other(value) for value in outcome.results)
            changed = msgspec.structs.replace(outcome, results=results)
            return [sign(self.signer, msgspec.structs.replace(message, outcome=changed))]
        return [message]

    def _false_to_some(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        if isinstance(message, Claim) and message.peer == self.peer and half:
            return [self._lie(message)]
        return [message]

    def _false_grams(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        if isinstance(message, Claim) and message.peer == self.peer and message.kind == "gram":
            return [self._lie(message)]
        return [message]

    def _lie(self, claim: Claim) -> Claim:
        if claim.kind == "gram":
            data = bytes(255 - byte for byte in claim.data)
            changed = msgspec.structs.replace(claim, data=data, value=hashlib.sha256(data).digest())
        else:
            changed = msgspec.structs.replace(claim, value=_other(claim.plan + bytes([claim.shard])))
        return sign(self.signer, changed)

    def _two_offers(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        if isinstance(message, Offer) and message.peer == self.peer:
            other = sign(self.signer, msgspec.structs.replace(message, weight=message.weight + 1))
            return [other] if half else [message]
        return [message]

    def _withholding(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        """Says to hold everything, and gives its own bodies to nobody (see Net.withheld)."""
        machine = self.net.nodes[self.peer].machine
        if isinstance(message, Held) and machine is not None:
            return [msgspec.structs.replace(message, offers=tuple(sorted(machine.offers)))]
        return [message]

    def _forging(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        """Speaks for others, and says that there is a certificate."""
        machine = self.net.nodes[self.peer].machine
        victim = self.net.rng.choice(sorted(self.net.nodes))
        if machine is None or isinstance(message, Joining):
            return [message]
        place = (machine.outcome.run, machine.outcome.scope, machine.round)
        lies: list[RoundMessage] = [message]
        if isinstance(message, Vote):
            lies.append(msgspec.structs.replace(message, peer=victim))
            lies.append(sign(self.signer, Request(*place, victim, "leave", bytes(64))))
        if isinstance(message, Proposal):
            signers = machine.members
            lies.append(Certificate(message.outcome, 0, signers, (bytes(64),) * len(signers)))
            outcome = msgspec.structs.replace(message.outcome, members=(self.peer,), missed=(0,))
            leave = tuple(Request(*place, peer, "leave", bytes(64)) for peer in signers if peer != self.peer)
            lies[0] = sign(self.signer, msgspec.structs.replace(message, outcome=outcome, requests=leave))
        return lies

    def _censoring(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        """Plans its own offer alone, or nothing."""
        if isinstance(message, Plan) and message.peer == self.peer:
            return [sign(self.signer, msgspec.structs.replace(message, offers=message.offers[:1]))]
        return [message]

    def _noisy(self, target: str, message: RoundMessage, half: bool) -> list[RoundMessage]:
        """Votes far ahead, and for whatever there is."""
        if isinstance(message, Vote) and message.peer == self.peer:
            attempt = self.net.rng.randrange(1000)
            return [message, sign(self.signer, msgspec.structs.replace(message, attempt=attempt))]
        return [message]


HABITS = (
    "silent", "two_votes", "two_proposals", "false_results", "false_to_some", "false_grams", "two_offers",
    "withholding", "forging", "censoring", "noisy",
)  # fmt: skip
PROVABLE = frozenset({"two_votes", "false_results", "false_to_some", "two_offers"})


def corrupt(net: Net, rng: random.Random, count: int, habits: tuple[str, ...] = HABITS) -> dict[str, str]:
    """Make `count` peers liars."""
    chosen = {peer: rng.choice(habits) for peer in rng.sample(sorted(net.nodes), count)}
    for peer, habit in chosen.items():
        net.nodes[peer].liar = Liar(net, peer, habit)
    net.withheld = lambda giver, taker, body: chosen.get(giver) == "withholding"
    return chosen
