"""An imitation of a Hugging Face hub on 127.0.0.1: its API, its redirects to a CDN, byte ranges, and ways to fail."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/Tiny-1B"


@dataclass
class Hub:
    """One repository with one commit. Faults are those of the CDN, which serves safetensors files."""

    directory: Path
    token: str = ""
    ignores_ranges: bool = False
    shifted: bool = False
    wrong_byte: int = 0
    # statuses that the next requests for a safetensors file get, and the bytes after which the next answers break off
    statuses: list[int] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    endpoint: str = ""
    cdn: str = ""
    # what was asked: (method, path, range), and bytes that went out for each safetensors file
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    cdn_saw_token: bool = False

    def answer(self, request: _Request) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append((request.command, path, request.headers.get("Range", "")))
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            request.give(401, b"", {"X-Error-Code": "GatedRepo"})
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            request.give(200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            request.give(200, json.dumps([self._entry(file) for file in sorted(self.directory.iterdir())]).encode())
        elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/({COMMIT}|main)/([A-Za-z0-9._-]+)", path):
            self._resolve(request, self.directory / match[2])
        else:
            request.give(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _entry(self, file: Path) -> dict[str, object]:
        data = file.read_bytes()
        entry: dict[str, object] = {"type": "file", "path": file.name, "size": len(data), "oid": _etag(data)}
        if file.suffix == ".safetensors":
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "sha256": oid, "size": len(data), "pointerSize": 134}
        return entry

    def _resolve(self, request: _Request, file: Path) -> None:
        if not file.is_file():
            request.give(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        facts = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(data)}"', "X-Linked-Size": str(len(data))}
        if file.suffix == ".safetensors":
            facts["X-Linked-ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            request.give(302, b"", {**facts, "Location": f"{self.cdn}/{file.name}"})
        else:
            request.give(200, data, facts)

    def deliver(self, request: _Request) -> None:
        """The CDN: another origin, which must not see the token."""
        file = self.directory / Path(unquote(request.path)).name
        self.cdn_saw_token |= "Authorization" in request.headers
        wanted = request.headers.get("Range", "")
        self.asked.append((request.command, file.name, wanted))
        if self.statuses:
            request.give(self.statuses.pop(0), b"", {"Retry-After": "0"})
            return
        data = bytearray(file.read_bytes())
        data[-1] ^= self.wrong_byte
        match = None if self.ignores_ranges else re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if match is None:
            self._send(request, file, 200, bytes(data), {})
            return
        first, last = int(match[1]), int(match[2])
        if first >= len(data):
            request.give(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        first += self.shifted
        part = bytes(data[first : last + 1])
        self._send(request, file, 206, part, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})

    def _send(self, request: _Request, file: Path, status: int, data: bytes, facts: dict[str, str]) -> None:
        keep = self.breaks.pop(0) if self.breaks else len(data)
        self.sent[file.name] = self.sent.get(file.name, 0) + min(keep, len(data))
        request.give(status, data, facts, keep)


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: staticmethod[[_Request], None]

    def do_GET(self) -> None:
        type(self).answer(self)

    do_HEAD = do_GET  # noqa: N815  # named by http.server

    def give(self, status: int, data: bytes, facts: dict[str, str] | None = None, keep: int | None = None) -> None:
        """Send `data`, or only the first `keep` bytes of it and hang up."""
        self.send_response(status)
        for name, value in (facts or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:keep])
        if keep is not None and keep < len(data):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may hang up in the middle of an answer; anything else is told as usual."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def _serving(answer: object) -> Iterator[str]:
    handler = type("Handler", (_Request,), {"answer": staticmethod(answer)})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving_hub(directory: Path) -> Iterator[Hub]:
    """A hub with `directory` as its one repository."""
    hub = Hub(directory)
    with ExitStack() as stack:
        hub.endpoint = stack.enter_context(_serving(hub.answer))
        hub.cdn = stack.enter_context(_serving(hub.deliver))
        yield hub


def use_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do to a process that starts with them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
