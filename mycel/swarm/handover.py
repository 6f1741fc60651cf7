"""A planned exit: is a session's state pushed to the successor, or does the successor replay the history?

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.swarm.placement import show_bytes

# Pushed without a question: a few round trips of any link.
SMALL_STATE_BYTES = 256 * 1024
# How long acknowledgements are watched before their rate is believed, and how much they must cover.
MEASURED_S = 0.5
MEASURED_BYTES = 64 * 1024


def plan_handover(state_bytes: int, history_bytes: int, bytes_per_s: float, prefill_s: float) -> tuple[bool, str]:
    """Whether to push `state_bytes` over a link of `bytes_per_s`, and why.

    Otherwise `history_bytes` go over a link of about that rate, and computing them again takes `prefill_s`.
    """
    if state_bytes <= SMALL_STATE_BYTES:
        return True, f"pushing: {show_bytes(state_bytes)} of state is little"
    if bytes_per_s <= 0:
        raise ValueError(f"a link of {bytes_per_s} bytes a second")
    push_s, replay_s = state_bytes / bytes_per_s, history_bytes / bytes_per_s + prefill_s
    figures = (
        f"{show_bytes(state_bytes)} of state take {push_s:.2g} s at {show_bytes(round(min(bytes_per_s, 1e15)))}/s, "
        f"replaying {show_bytes(history_bytes)} of history {replay_s:.2g} s"
    )
    push = push_s <= replay_s
    return push, f"{'pushing' if push else 'replaying'}: {figures}"


@dataclass(slots=True)
class RateMeter:
    """The rate of a link, from acknowledgements: the time from the first to the newest, so that latency is left out."""

    first_s: float | None = None
    first_bytes: int = 0
    newest_s: float = 0.0
    newest_bytes: int = 0

    def acknowledged(self, total_bytes: int, now_s: float) -> None:
        """So many bytes have arrived in all."""
        if self.first_s is None:
            self.first_s, self.first_bytes = now_s, total_bytes
        self.newest_s, self.newest_bytes = now_s, total_bytes

    @property
    def bytes_per_s(self) -> float | None:
        """None until enough was seen to believe it."""
        if self.first_s is None or self.newest_bytes - self.first_bytes < MEASURED_BYTES:
            return None
        return (self.newest_bytes - self.first_bytes) / max(self.newest_s - self.first_s, 1e-6)

    @property
    def is_settled(self) -> bool:
        """Whether the rate is good enough to give up a push for it."""
        return self.bytes_per_s is not None and self.newest_s - (self.first_s or 0.0) >= MEASURED_S
