"""Which protocol a stream speaks: libp2p's multistream-select 1.0, both sides, as text in and text out.

libp2p's own does the same in two round trips and without a limit on what the peer may announce. The opener here sends
the header and the protocol together, which every implementation accepts, so a stream costs one round trip.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Container

from mycel.protocols.errors import RemoteProtocolError

_HEADER = "/multistream/1.0.0"
_REFUSED = "na"
_MAX_LINE_BYTES = 1024
_MAX_ATTEMPTS = 8


def _line(text: str) -> bytes:
    body = text.encode() + b"\n"
    if len(body) < 0x80:
        return bytes([len(body)]) + body
    return bytes([len(body) & 0x7F | 0x80, len(body) >> 7]) + body


class _Lines:
    """Cuts bytes into lines: `unsigned varint length | text | newline`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: memoryview) -> None:
        self._buffer += data

    def next(self) -> str | None:
        """The next whole line, or None. Raises RemoteProtocolError for one that is too long or no text."""
        buffer = self._buffer
        if not buffer:
            return None
        size, start = buffer[0], 1
        if size & 0x80:
            if len(buffer) < 2:
                return None
            size, start = size & 0x7F | buffer[1] << 7, 2
        if not 0 < size <= _MAX_LINE_BYTES:
            raise RemoteProtocolError(f"announced {size} bytes for the name of a protocol")
        if len(buffer) < start + size:
            return None
        body = bytes(buffer[start : start + size])
        del buffer[: start + size]
        if not body.endswith(b"\n"):
            raise RemoteProtocolError("the name of a protocol does not end its line")
        try:
            return body[:-1].decode()
        except UnicodeDecodeError:
            raise RemoteProtocolError("the name of a protocol is no text") from None

    def rest(self) -> memoryview:
        """What came after the last line."""
        return memoryview(self._buffer)


class Proposal:
    """The opener's side. `accepted` is None until the peer answered."""

    def __init__(self, protocol: str) -> None:
        self.accepted: bool | None = None
        self.opening = _line(_HEADER) + _line(protocol)
        self._protocol = protocol
        self._lines = _Lines()
        self._n_read = 0

    def feed(self, data: memoryview) -> memoryview:
        """Take what arrived; once `accepted`, returns what belongs to the protocol. May raise RemoteProtocolError."""
        self._lines.feed(data)
        while self.accepted is None and (line := self._lines.next()) is not None:
            self._n_read += 1
            if self._n_read == 1:
                if line != _HEADER:
                    raise RemoteProtocolError("does not speak multistream-select 1.0")
            elif line == self._protocol:
                self.accepted = True
            elif line == _REFUSED:
                self.accepted = False
            else:
                raise RemoteProtocolError("answered with a protocol that nobody proposed")
        return self._lines.rest() if self.accepted else memoryview(b"")


class Choice:
    """The acceptor's side. `protocol` is None until one that is in `offered` was proposed."""

    def __init__(self, offered: Container[str]) -> None:
        self.protocol: str | None = None
        self._offered = offered
        self._lines = _Lines()
        self._n_read = 0

    def feed(self, data: memoryview) -> tuple[bytes, memoryview]:
        """What to answer, and once `protocol` is set what belongs to it. May raise RemoteProtocolError."""
        self._lines.feed(data)
        answer = b""
        while self.protocol is None and (line := self._lines.next()) is not None:
            self._n_read += 1
            if self._n_read == 1:
                if line != _HEADER:
                    raise RemoteProtocolError("does not speak multistream-select 1.0")
                answer += _line(_HEADER)
            elif line in self._offered:
                self.protocol = line
                answer += _line(line)
            elif self._n_read > _MAX_ATTEMPTS:
                raise RemoteProtocolError(f"proposed {_MAX_ATTEMPTS} protocols that are not spoken here")
            else:
                answer += _line(_REFUSED)
        return answer, self._lines.rest() if self.protocol is not None else memoryview(b"")
