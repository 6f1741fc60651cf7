"""What I say in a round, and whom I accuse: signed, written down before it is said, never otherwise a second time.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from mycel.protocols.rounds import Claim, Offer, Plan, Proposal, Request, RoundMessage, Vote
from mycel.security.signatures import Signer
from mycel.swarm.rounds.actions import Action, Name, Remember, Say
from mycel.swarm.rounds.statements import Ledger, Signed, kind_of, round_of, sign, slot_of

_S = TypeVar("_S", Request, Offer, Plan, Claim, Proposal, Vote)


class Voice:
    """Collects actions for the node; keeps who was named, and the pairs of statements that prove it to anybody."""

    def __init__(self, signer: Signer, ledger: Ledger) -> None:
        self.signer = signer
        self.me = signer.peer_id
        self.ledger = ledger
        self.named: dict[str, str] = {}
        self.proofs: dict[str, tuple[Signed, Signed]] = {}
        self._actions: list[Action] = []

    def do(self, action: Action) -> None:
        self._actions.append(action)

    def say(self, message: RoundMessage) -> None:
        self._actions.append(Say(message))

    def taken(self) -> list[Action]:
        """All actions since the last call."""
        actions, self._actions = self._actions, []
        return actions

    def utter(self, statement: _S) -> _S:
        """Sign and say. If I have said something in this slot before, that stands and nothing is said."""
        before = self.ledger.find(self.me, slot_of(statement))
        if before is not None:
            return before  # type: ignore[return-value]  # a slot belongs to one kind of statement
        signed = sign(self.signer, statement)
        self.publish(signed)
        return signed

    def publish(self, signed: Signed) -> None:
        """Say what carries my signature. A claim or a request can be made anew, and is the same then."""
        self.ledger.keep(signed)
        if not isinstance(signed, Claim | Request):
            self.do(Remember(signed))
        self.say(signed)

    def name(self, peer: str, reason: str) -> None:
        """Accuse `peer`, once."""
        if peer not in self.named and peer != self.me:
            self.named[peer] = reason
            self.do(Name(peer, reason))

    def forget(self, members: Sequence[str]) -> None:
        """A new round: nobody but a member can be convicted, and only by what everybody can still check."""
        self.proofs = {peer: proof for peer, proof in self.proofs.items() if peer in members}
        self.named = {peer: reason for peer, reason in self.named.items() if peer in self.proofs}

    def contradiction(self, first: Signed, second: Signed) -> None:
        """Its author said both: everybody can check that, so everybody is told."""
        if second.peer in self.proofs or second.peer == self.me:
            return
        self.proofs[second.peer] = (first, second)
        self.name(
            second.peer, f"signed two things where one may be said: {kind_of(second)} of round {round_of(second)}"
        )
        self.say(first)
        self.say(second)
