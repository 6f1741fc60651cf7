"""Every message that Mycel puts on a wire, as frozen typed structs: what is said, not when or to whom.

Limits stand in the types: bytes from outside become one of these in `codec.decode`, or a RemoteProtocolError.
Positions are token indices; spans are half-open block ranges [start, end); times are seconds.

Ring: pure.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

PeerId = Annotated[str, Meta(min_length=1, max_length=128)]
Multiaddr = Annotated[str, Meta(min_length=1, max_length=256)]
Reason = Annotated[str, Meta(max_length=400)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=1_048_576)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
UnixTime = Annotated[float, Meta(ge=0.0, le=1e11)]

MAX_RECORD_VALUE_BYTES = 4096
MAX_FILE_CHUNK_BYTES = 1 << 20
MAX_BLOCKS = 4096
MIN_TEMPERATURE = 1e-6  # logits divided by less leave the range of floats


class Message(Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: an immutable, tagged msgpack array."""


class PeerAddress(Struct, frozen=True, array_like=True):
    """A peer and where it can be dialled (multiaddrs without the peer id)."""

    peer: PeerId
    addresses: Annotated[tuple[Multiaddr, ...], Meta(max_length=8)] = ()


# ---- records ---------------------------------------------------------------------------------------------------


class SignedRecord(Struct, frozen=True, array_like=True):
    """A DHT value: `value` written by `writer` under `key`; the highest `seq` wins; gone at `expires_at`."""

    key: Key
    writer: PeerId
    seq: Annotated[int, Meta(ge=0, le=2**62)]
    expires_at: UnixTime
    value: Annotated[bytes, Meta(max_length=MAX_RECORD_VALUE_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class FindRecords(Message, frozen=True):
    """Ask for the records under `key` and for the peers that the answerer knows to be closest to it."""

    sender: PeerAddress
    key: Key
    want_records: bool = True


class Found(Message, frozen=True):
    records: Annotated[tuple[SignedRecord, ...], Meta(max_length=256)]
    closer: Annotated[tuple[PeerAddress, ...], Meta(max_length=32)]


class StoreRecord(Message, frozen=True):
    sender: PeerAddress
    record: SignedRecord


class Stored(Message, frozen=True):
    accepted: bool
    reason: Reason = ""


# ---- inference session: client <-> hop, on a stream of its own ------------------------------------------------------


class SamplingParams(Struct, frozen=True, array_like=True):
    """How the last hop chooses a token; temperature 0 is greedy. The choice depends on seed and position alone."""

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=1e-3, le=1e3)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0

    def __post_init__(self) -> None:
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"a temperature below {MIN_TEMPERATURE} is not distinct from 0, which is greedy")


class Generation(Struct, frozen=True, array_like=True):
    """What the last hop must know: how to sample, where to stop, and every token so far (`tokens`, prompt included).

    It emits the token of each position from len(tokens) up to but excluding `max_position`.
    """

    sampling: SamplingParams
    tokens: TokenIds
    max_position: Count
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)] = ()


class OpenHop(Message, frozen=True):
    """Client -> hop: take blocks [start, end) of a session of at most `max_tokens` tokens.

    `previous` alone may attach and push inputs; outputs go to `next`. The ring is closed: the first hop's previous is
    the last hop, which sends it each sampled token. `prompt` is given to the first hop alone (every token so far) and
    `generation` to the last hop alone. Hops are opened side by side: whoever is pushed to before it knows the session
    waits a while for it. A client that opens a session anew ends the one of that id before.

    `inbound` and `outbound` are the client's numbers for the links from `previous` and to `next`. A link that replaces
    another has a higher number, also between the same peers: what is still on its way from a chain that was given up
    must not be taken for what the present one sends.

    `giver` is a peer that may hand the session's state over to this hop ("": nobody). A hop with a giver takes no
    inputs before the giver has said what it gives, or is gone.
    """

    session: SessionId
    swarm: Key
    start: Count
    end: Count
    max_tokens: Annotated[int, Meta(ge=1, le=2**24)]
    previous: PeerAddress
    next: PeerAddress
    prompt: TokenIds = ()
    generation: Generation | None = None
    inbound: Count = 0
    outbound: Count = 0
    giver: Annotated[str, Meta(max_length=128)] = ""


class HopOpened(Message, frozen=True):
    """Hop -> client: the KV memory is reserved."""


class HopRefused(Message, frozen=True):
    """Hop -> client: not now (full, leaving, not serving these blocks)."""

    reason: Reason


class Relink(Message, frozen=True):
    """Client -> hop, when its neighbours change: the neighbours and links as they are from now on.

    If `inbound` is another link than before, whoever is attached must go. If `outbound` is, the hop opens a link to
    `next` and sends what that peer lacks of its output history.

    With `spare` the hop also sends everything to that peer, over link `spare_link` and beside its link to `next`: so a
    successor is filled while the one before goes on. A later Relink whose `outbound` is that number makes the spare
    link the link to `next`, as it stands; one without `spare` gives it up.
    """

    previous: PeerAddress
    next: PeerAddress
    inbound: Count
    outbound: Count
    spare: PeerAddress | None = None
    spare_link: Count = 0


class AskProgress(Message, frozen=True):
    """Client -> hop: how far are you? Answered at once, or with `position` as soon as the inputs before it are there.

    Of several unanswered questions of one session only the newest with a position is kept.
    """

    position: Count = 0


class Progress(Message, frozen=True):
    """Hop -> client: the next input expected, and the end of what the present outbound link has been given.

    Both are positions. `busy_us` is how long the step that is being computed has been computed or waited for the
    processor, 0 if there is none; it counts as received.
    """

    received: Count
    given: Count
    busy_us: Count = 0


class HopTiming(Struct, frozen=True, array_like=True):
    """What one hop spent on one step, in microseconds."""

    queue_us: Count
    compute_us: Count


class Sampled(Message, frozen=True):
    """Last hop -> client: the token at `position`; `timings` of the hops in ring order. `finish` ends the session."""

    position: Count
    token: TokenId
    timings: Annotated[tuple[HopTiming, ...], Meta(max_length=256)]
    finish: Annotated[str, Meta(max_length=16)] = ""


class HopFailed(Message, frozen=True):
    """Hop -> client: `peer`, a neighbour, cannot be reached or broke the rules; the session here waits for Relink."""

    peer: PeerId
    reason: Reason


class Leaving(Message, frozen=True):
    """Hop -> client: this node leaves. It goes on as before until it is replaced, for at most `within_s`."""

    within_s: Seconds


class HandOver(Message, frozen=True):
    """Client -> leaving hop: give the session's state to `taker`, whose hop is open and names this one as its giver."""

    taker: PeerAddress


class HandedOver(Message, frozen=True):
    """Leaving hop -> client: the taker has the state of positions [0, position).

    0 if it was not given, because replaying is quicker or because it went wrong: `reason` says which, with the figures.
    """

    position: Count
    reason: Reason


# ---- handing a session over: leaving hop -> its successor, on a stream of its own ------------------------------------


class GiveState(Message, frozen=True):
    """Giver -> taker, first: the state of `session` before `position` follows, in parts of `size_bytes` together.

    Position 0 says that nothing follows: the taker gets the history from its neighbour.
    """

    session: SessionId
    position: Count
    size_bytes: Annotated[int, Meta(ge=0, le=2**50)] = 0


class StatePart(Message, frozen=True):
    """Giver -> taker: attached tensors that begin at token `position`.

    `block` >= 0: keys [H, T, D] and values [H, T, D] of that block of the model. `block` -1: hidden states [T, D] that
    the hop put out. Each row is given once, in order of position for each block.
    """

    block: Annotated[int, Meta(ge=-1, lt=MAX_BLOCKS)]
    position: Count


class StateTaken(Message, frozen=True):
    """Taker -> giver: so many bytes of tensors have arrived and fit; `position` is set once all of the state is in."""

    size_bytes: Annotated[int, Meta(ge=0, le=2**50)]
    position: Count = 0


class StateRefused(Message, frozen=True):
    """Taker -> giver, or giver -> taker: no more of it (the state does not fit; it is quicker to replay)."""

    reason: Reason


# ---- the ring: hop -> next hop, one stream per session and link -----------------------------------------------------


class Attach(Message, frozen=True):
    """First message on a ring stream: the frames that follow belong to `session` and come over the link `link`."""

    session: SessionId
    link: Count = 0


class Attached(Message, frozen=True):
    """Receiver -> sender, the answer to Attach and all that is said that way: the first position that is lacking."""

    position: Count


class Step(Message, frozen=True):
    """Hidden states (one attached tensor [T, D]) of positions [position, position + T)."""

    position: Count
    timings: Annotated[tuple[HopTiming, ...], Meta(max_length=256)]


class NextToken(Message, frozen=True):
    """Last hop -> first hop: the token sampled for `position`."""

    position: Count
    token: TokenId


# ---- files: manifest, tokenizer and weights from peers ---------------------------------------------------------------


class GetManifest(Message, frozen=True):
    swarm: Key


class ManifestBytes(Message, frozen=True):
    """The manifest, whose SHA-256 is the swarm id; its founder's signature is in it."""

    manifest: Annotated[bytes, Meta(max_length=8 * 1024 * 1024)]


class GetFile(Message, frozen=True):
    """Bytes [offset, offset + size_bytes) of a blob.

    `digest` is its SHA-256, or for a unit of weights the SHA-256 of its chunks' hashes.
    """

    swarm: Key
    digest: Key
    offset: Annotated[int, Meta(ge=0, le=2**50)]
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_FILE_CHUNK_BYTES)]


class FileChunk(Message, frozen=True):
    data: Annotated[bytes, Meta(max_length=MAX_FILE_CHUNK_BYTES)]


class NotHere(Message, frozen=True):
    reason: Reason


# ---- reachability: "can you dial me?" --------------------------------------------------------------------------------


class DialMe(Message, frozen=True):
    """Ask a peer to dial these addresses of ours; it dials only those on the host that it sees us come from."""

    addresses: Annotated[tuple[Multiaddr, ...], Meta(max_length=8)]


class DialResult(Struct, frozen=True, array_like=True):
    """What came of dialling one address: "" if we were found there, else why not."""

    address: Multiaddr
    failure: Reason = ""


class Dialled(Message, frozen=True):
    """What came of each address; `observed`: where we were seen to come from; `unix_time_s`: the peer's clock."""

    results: Annotated[tuple[DialResult, ...], Meta(max_length=8)]
    observed: Annotated[str, Meta(max_length=256)]
    unix_time_s: UnixTime


RecordMessage = FindRecords | Found | StoreRecord | Stored
SessionMessage = (
    OpenHop
    | HopOpened
    | HopRefused
    | Relink
    | AskProgress
    | Progress
    | Sampled
    | HopFailed
    | Leaving
    | HandOver
    | HandedOver
)
RingMessage = Attach | Attached | Step | NextToken
HandoverMessage = GiveState | StatePart | StateTaken | StateRefused
ReachMessage = DialMe | Dialled
FileMessage = GetManifest | ManifestBytes | GetFile | FileChunk | NotHere
AnyMessage = RecordMessage | SessionMessage | RingMessage | HandoverMessage | ReachMessage | FileMessage
