"""Generated messages of every type, within the limits that their types state."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import get_args

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from mycel.protocols import messages as m
from mycel.protocols import training as t
from mycel.protocols.codec import (
    Codec,
    file_codec,
    handover_codec,
    pipe_codec,
    reach_codec,
    record_codec,
    reduce_codec,
    ring_codec,
    session_codec,
    state_codec,
    train_codec,
)
from mycel.protocols.wire import ITEM_BYTES, TensorHeader, WireTensor

# msgpack has no lone surrogates; everything else that is text may be said.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
counts = st.integers(0, 2**31 - 1)
tokens = st.lists(counts, max_size=12).map(tuple)
addresses = st.builds(m.PeerAddress, names, st.lists(names, max_size=8).map(tuple))
keys = st.binary(min_size=32, max_size=32)
sessions = st.binary(min_size=16, max_size=16)
records = st.builds(
    m.SignedRecord,
    keys,
    names,
    st.integers(0, 2**62),
    st.floats(0, 1e11),
    st.binary(max_size=m.MAX_RECORD_VALUE_BYTES),
    st.binary(min_size=64, max_size=64),
)
sampling = st.builds(
    m.SamplingParams,
    st.just(0.0) | st.floats(m.MIN_TEMPERATURE, 100.0),
    counts,
    st.floats(0.0, 1.0, exclude_min=True),
    st.floats(0.0, 1.0),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**63 - 1),
)
generations = st.builds(m.Generation, sampling, tokens, counts, st.lists(counts, max_size=64).map(tuple))
timings = st.lists(st.builds(m.HopTiming, counts, counts), max_size=20).map(tuple)
stages = st.integers(0, t.MAX_STAGES - 1)
bitmaps = st.binary(max_size=t.MAX_MICROBATCHES // 8)
elements = st.integers(0, 2**40)
slice_counts = st.integers(1, 1 << 22)
losses = st.floats(-1e12, 1e12)
reduced = st.builds(t.Reduced, counts, keys, st.floats(0, 1e38), losses)
ways = st.builds(t.Way, addresses, st.booleans(), st.booleans())

BY_TYPE: Mapping[type[m.Message], SearchStrategy[m.Message]] = {
    m.FindRecords: st.builds(m.FindRecords, addresses, keys, st.booleans()),
    m.Found: st.builds(m.Found, st.lists(records, max_size=4).map(tuple), st.lists(addresses, max_size=6).map(tuple)),
    m.StoreRecord: st.builds(m.StoreRecord, addresses, records),
    m.Stored: st.builds(m.Stored, st.booleans(), text),
    m.OpenHop: st.builds(
        m.OpenHop,
        sessions,
        keys,
        counts,
        counts,
        st.integers(1, 2**24),
        addresses,
        addresses,
        tokens,
        st.none() | generations,
        counts,
        counts,
        st.just("") | names,
    ),
    m.HopOpened: st.builds(m.HopOpened),
    m.HopRefused: st.builds(m.HopRefused, text),
    m.Relink: st.builds(m.Relink, addresses, addresses, counts, counts, st.none() | addresses, counts),
    m.AskProgress: st.builds(m.AskProgress, counts),
    m.Progress: st.builds(m.Progress, counts, counts, counts),
    m.Leaving: st.builds(m.Leaving, st.floats(0, 1e9)),
    m.HandOver: st.builds(m.HandOver, addresses),
    m.HandedOver: st.builds(m.HandedOver, counts, text),
    m.GiveState: st.builds(m.GiveState, sessions, counts, st.integers(0, 2**50)),
    m.StatePart: st.builds(m.StatePart, st.integers(-1, m.MAX_BLOCKS - 1), counts),
    m.StateTaken: st.builds(m.StateTaken, st.integers(0, 2**50), counts),
    m.StateRefused: st.builds(m.StateRefused, text),
    m.DialMe: st.builds(m.DialMe, st.lists(names, max_size=8).map(tuple)),
    m.Dialled: st.builds(
        m.Dialled, st.lists(st.builds(m.DialResult, names, text), max_size=8).map(tuple), text, st.floats(0, 1e11)
    ),
    m.Sampled: st.builds(m.Sampled, counts, counts, timings, st.sampled_from(["", "stop", "length"])),
    m.HopFailed: st.builds(m.HopFailed, names, text),
    m.Attach: st.builds(m.Attach, sessions, counts),
    m.Attached: st.builds(m.Attached, counts),
    m.Step: st.builds(m.Step, counts, timings),
    m.NextToken: st.builds(m.NextToken, counts, counts),
    m.GetManifest: st.builds(m.GetManifest, keys),
    m.ManifestBytes: st.builds(m.ManifestBytes, st.binary(max_size=300)),
    m.GetFile: st.builds(m.GetFile, keys, keys, st.integers(0, 2**50), st.integers(1, m.MAX_FILE_CHUNK_BYTES)),
    m.FileChunk: st.builds(m.FileChunk, st.binary(max_size=300)),
    m.NotHere: st.builds(m.NotHere, text),
    t.StageStatus: st.builds(
        t.StageStatus,
        keys,
        st.integers(0, 2**62),
        stages,
        st.sampled_from(get_args(t.StageState)),
        counts,
        st.just(b"") | keys,
        bitmaps,
        st.lists(reduced, max_size=2).map(tuple),
        st.booleans(),
        st.floats(0, 1e9),
        st.floats(0, 1e9),
        counts,
        counts,
        st.integers(0, 2**60),
        st.integers(-1, t.MAX_STAGES - 1),
        st.lists(names, max_size=8).map(tuple),
    ),
    t.Drive: st.builds(t.Drive, keys),
    t.Forward: st.builds(
        t.Forward,
        keys,
        keys,
        counts,
        st.integers(0, t.MAX_MICROBATCHES - 1),
        counts,
        stages,
        names,
        st.lists(ways, min_size=1, max_size=6).map(tuple),
    ),
    t.Backward: st.builds(t.Backward, keys, keys, counts, stages),
    t.Passed: st.builds(t.Passed, keys, counts, stages, st.booleans(), counts, counts),
    t.WorkFailed: st.builds(t.WorkFailed, keys, counts, stages, names, text),
    t.GetPartial: st.builds(t.GetPartial, keys, stages, counts, bitmaps, elements, slice_counts),
    t.GetSum: st.builds(t.GetSum, keys, stages, counts, elements, slice_counts, st.booleans()),
    t.Slice: st.builds(t.Slice, elements, losses, st.floats(0.0, 1.0)),
    t.PinState: st.builds(t.PinState, keys, stages, counts),
    t.StateOffer: st.builds(
        t.StateOffer,
        counts,
        st.integers(0, t.MAX_STATE_CHUNKS * m.MAX_FILE_CHUNK_BYTES),
        keys,
        st.binary(max_size=300),
    ),
    t.GetStateChunk: st.builds(t.GetStateChunk, keys, stages, counts, st.integers(0, t.MAX_STATE_CHUNKS - 1)),
    t.StateChunk: st.builds(t.StateChunk, st.binary(max_size=300)),
    t.NotNow: st.builds(t.NotNow, text),
}


def types_of(union: UnionType | type[m.Message]) -> tuple[type[m.Message], ...]:
    """A protocol of one message is no union."""
    return get_args(union) or (union,)


PROTOCOLS: tuple[tuple[Codec, tuple[type[m.Message], ...]], ...] = (
    (record_codec, types_of(m.RecordMessage)),
    (session_codec, types_of(m.SessionMessage)),
    (ring_codec, types_of(m.RingMessage)),
    (handover_codec, types_of(m.HandoverMessage)),
    (reach_codec, types_of(m.ReachMessage)),
    (file_codec, types_of(m.FileMessage)),
    (train_codec, types_of(t.StageStatus)),
    (pipe_codec, types_of(t.PipeMessage)),
    (reduce_codec, types_of(t.ReduceMessage)),
    (state_codec, types_of(t.StateMessage)),
)
# (codec, message) of any protocol.
said = st.one_of([st.tuples(st.just(codec), BY_TYPE[kind]) for codec, kinds in PROTOCOLS for kind in kinds])


@st.composite
def wire_tensors(draw: st.DrawFn) -> WireTensor:
    """Small tensors of every dtype, empty and 0-dimensional ones among them."""
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    header = TensorHeader(dtype, tuple(draw(st.lists(st.integers(0, 5), max_size=4))))
    return WireTensor(header, memoryview(draw(st.binary(min_size=header.check(), max_size=header.check()))))
