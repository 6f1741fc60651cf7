"""Whether a certificate follows from an outcome: form, place, and the signatures of a quorum of the members.

Ring: pure.
"""

from __future__ import annotations

from itertools import pairwise

from mycel.protocols.errors import VerificationError
from mycel.protocols.rounds import Certificate, Outcome, Vote, outcome_digest, vote_part
from mycel.security.signatures import verify
from mycel.swarm.rounds.statements import Ledger
from mycel.swarm.rounds.terms import GroupTerms


def malformed(outcome: Outcome) -> str:
    """What is wrong with the form of an outcome, or nothing."""
    if len(outcome.offers) != len(outcome.contributors) or len(outcome.results) != len(outcome.sizes):
        return "lists of different lengths"
    if not _ascending(outcome.contributors) or len(set(outcome.offers)) != len(outcome.offers):
        return "contributors out of order"
    if not outcome.members or not _ascending(outcome.members) or len(outcome.missed) != len(outcome.members):
        return "members out of order"
    if set(outcome.members) & set(outcome.convicted) or len(set(outcome.convicted)) != len(outcome.convicted):
        # A group whose members were all convicted keeps them; there is nobody else who could go on.
        return "" if set(outcome.members) <= set(outcome.convicted) else "a convicted member"
    return ""


def check_certificate(certificate: Certificate, previous: Outcome, terms: GroupTerms, ledger: Ledger) -> None:
    """VerificationError unless a quorum of the members that `previous` names signed the outcome after it.

    Votes that `ledger` holds were checked before.
    """
    outcome, signers = certificate.outcome, certificate.signers
    if (outcome.run, outcome.scope, outcome.round) != (previous.run, previous.scope, previous.round + 1):
        raise VerificationError("", f"a certificate of round {outcome.round}, not of {previous.round + 1}")
    if outcome.last != outcome_digest(previous):
        raise VerificationError("", f"the certificate of round {outcome.round} follows another outcome")
    if len(certificate.signatures) != len(signers) or not _ascending(signers):
        raise VerificationError("", "a certificate whose signers and signatures do not match")
    if not set(signers) <= set(previous.members) or len(signers) < terms.quorum(len(previous.members)):
        raise VerificationError("", f"a certificate without a quorum of the {len(previous.members)} members")
    if reason := malformed(outcome):
        raise VerificationError("", f"a certificate of an outcome with {reason}")
    value = outcome_digest(outcome)
    covered = vote_part(outcome, certificate.attempt, "precommit", value)
    for peer, signature in zip(signers, certificate.signatures, strict=True):
        place = (outcome.run, outcome.scope, outcome.round, certificate.attempt)
        is_known = ledger.holds(Vote(*place, "precommit", peer, value, signature))
        if not is_known and not verify(peer, signature, covered):
            raise VerificationError("", f"a certificate with a false signature of {peer[-8:]}")


def _ascending(names: tuple[str, ...]) -> bool:
    return all(a < b for a, b in pairwise(names))
