"""Swarms to decide about: made by hand, and drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from mycel.swarm.view import PeerView, View

NAMES = ("a", "b", "c", "d", "e")


def peer(name: str, start: int, end: int, **fields) -> PeerView:
    """A peer that is alone on its machine: 1 ms a block, 1 ms a step, KV memory for 1000 tokens."""
    usual = {
        "addresses": (f"/ip4/127.0.0.1/tcp/{1000 + ord(name[0])}",),
        "state": "serving",
        "block_time_s": 0.001,
        "overhead_s": 0.001,
        "queue_s": 0.0,
        "kv_free_tokens": 1000,
        "sessions": 0,
        "rtts": (),
        "seq": 1,
        "expires_at": 100.0,
    }
    return PeerView(peer=name, start=start, end=end, **{**usual, **fields})


def view_of(n_blocks: int, *peers: PeerView) -> View:
    return View(n_blocks, {p.peer: p for p in peers})


def spans(n_blocks: int) -> st.SearchStrategy[tuple[int, int]]:
    """Any span, long ones more often: those are the ones that leave a choice."""
    ends = st.tuples(st.integers(0, n_blocks - 1), st.integers(1, n_blocks)).filter(lambda span: span[0] < span[1])
    return st.one_of(ends, st.just((0, n_blocks)), ends.map(lambda span: (span[0] // 2, (span[1] + n_blocks) // 2)))


@st.composite
def views(draw, *, max_blocks: int = 6, max_peers: int = 4, metric: bool = False) -> View:
    """Any small swarm. With `metric`, everybody announced everybody's distance, and the triangle inequality holds."""
    n_blocks = draw(st.integers(1, max_blocks))
    names = NAMES[: draw(st.integers(0, max_peers))]
    times = st.sampled_from([0.0, 0.001, 0.002, 0.005, 0.02, 0.3])
    places = {name: draw(st.tuples(times, times)) for name in names}
    found = []
    for name in names:
        start, end = draw(spans(n_blocks))
        others = [other for other in names if other != name]
        if metric:
            x, y = places[name]
            rtts = [(o, 0.001 + abs(x - places[o][0]) + abs(y - places[o][1])) for o in others]
        else:
            rtts = [(o, draw(times)) for o in others if draw(st.booleans())]
        found.append(
            peer(
                name,
                start,
                end,
                state=draw(st.sampled_from(["serving", "serving", "serving", "leaving"])),
                block_time_s=draw(times),
                overhead_s=draw(times),
                queue_s=draw(times),
                kv_free_tokens=draw(st.sampled_from([0, 100, 100, 100])),
                rtts=tuple(rtts),
            )
        )
    return view_of(n_blocks, *found)
