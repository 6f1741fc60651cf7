"""Looking at this machine for `mycel doctor`: what is installed, the data directory, ports, networks, multicast.

It looks and changes nothing. What findings mean stands in diagnosis.py.

Ring: shell.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import psutil
import trio

from mycel._version import __version__
from mycel.node import diagnosis
from mycel.node.diagnosis import Check
from mycel.node.endpoints import Endpoint, plain_host, scope_of
from mycel.protocols.errors import AccessDenied, ConfigError
from mycel.security.identity import Identity, load_or_create

_DISTRIBUTIONS = ("torch", "libp2p")
_MDNS_GROUP, _MDNS_PORT = "224.0.0.251", 5353
_MULTICAST_S = 1.0
_MAX_INTERFACES = 4
_PORT_FAILURES = {
    errno.EADDRINUSE: "in use",
    errno.EACCES: "not permitted",
    errno.EADDRNOTAVAIL: "no such address",
    errno.EAFNOSUPPORT: "no such address",
}


def look_at_software() -> Check:
    installed: dict[str, str | None] = {"Mycel": __version__, "Python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return diagnosis.judge_software(installed, _pinned())


def _pinned() -> dict[str, str]:
    """What this Mycel needs exactly, as its own package says; nothing for one that runs from its sources."""
    try:
        required = importlib.metadata.requires("mycel") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    matches = (re.match(r"([A-Za-z0-9._-]+)==([0-9.]+)$", line) for line in required)
    return {match[1]: match[2] for match in matches if match and match[1] in _DISTRIBUTIONS}


def look_at_data(directory: Path) -> tuple[Check, Identity | None]:
    """The data directory and the key in it, and who that key makes us."""
    key = directory / "identity.key"
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        advice = f"Make it writable for this user (chown -R $USER {place}), or choose another with --data-dir."
        return Check("data", "fail", f"cannot write in {place}", advice), None
    try:
        if not key.exists():
            return Check("data", "ok", f"{directory}: no key yet, the first start makes one"), None
        identity = load_or_create(key)
    except AccessDenied as error:
        return Check("data", "fail", str(error), f"chmod 600 {key}, as the user who runs the node."), None
    except (ConfigError, OSError) as error:
        return Check("data", "fail", str(error), "A node with a new key is a new peer: old invites miss it."), None
    return Check("data", "ok", f"{directory}: this node is {identity.peer_id}"), identity


def look_at_disk(directory: Path) -> Check:
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return diagnosis.judge_disk(shutil.disk_usage(place).free, str(place))


def look_at_memory() -> Check:
    memory = psutil.virtual_memory()
    return diagnosis.judge_memory(memory.available, memory.total)


def interface_hosts() -> list[str]:
    """The IP addresses of this machine, those that nobody can dial left out."""
    families = {socket.AF_INET, socket.AF_INET6}
    found = [each for addresses in psutil.net_if_addrs().values() for each in addresses if each.family in families]
    return [host for each in found if scope_of(host := plain_host(each.address)) != "link-local"]


def look_at_port(endpoint: Endpoint, *, running: bool) -> Check:
    """Whether a node could listen there, by trying it for a moment. `running`: a node of this data directory runs."""
    failure = _listen_failure(endpoint)
    holder = _holder(endpoint.port) if failure == "in use" else ""
    return diagnosis.judge_port(endpoint, failure, holder, running=running)


def _listen_failure(endpoint: Endpoint) -> str:
    family = socket.AF_INET6 if endpoint.kind == "ip6" else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name == "posix":  # as a node does; on Windows it would mean to share the port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((endpoint.host, endpoint.port))
            probe.listen(1)
    except OSError as error:
        return _PORT_FAILURES.get(error.errno or 0, (error.strerror or str(error)).lower())
    return ""


def _holder(port: int) -> str:
    """Who listens on a port, as far as this user may know."""
    try:
        found = psutil.net_connections("tcp")
        listening = [
            each for each in found if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
        ]
        pid = next((each.pid for each in listening if each.pid), None)
        if pid is None:
            return "a process of another user" if listening else ""
        return f"{psutil.Process(pid).name()} (process {pid})"
    except (psutil.Error, OSError):
        return ""


async def look_at_neighbours(interfaces: Sequence[str] | None = None) -> Check:
    """Whether multicast comes back to its sender, on `interfaces` (IPv4 addresses), or on all but loopback."""
    if interfaces is None:
        hosts = [host for host in interface_hosts() if ip_address(host).version == 4]
        interfaces = [host for host in hosts if scope_of(host) != "loopback"][:_MAX_INTERFACES]
    failures = {host: await _multicast_failure(host) for host in interfaces}
    if failures and (taken := _mdns_port_failure()):
        failures = dict.fromkeys(failures, taken)
    return diagnosis.judge_neighbours(failures)


async def _multicast_failure(host: str) -> str:
    token = secrets.token_bytes(16)
    try:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            member = socket.inet_aton(_MDNS_GROUP) + socket.inet_aton(host)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)  # it does not leave this machine
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            await sock.bind(("", 0))  # not the port of mDNS: real responders shall not read this
            await sock.sendto(token, (_MDNS_GROUP, sock.getsockname()[1]))
            with trio.move_on_after(_MULTICAST_S):
                while await sock.recv(64) != token:
                    pass
                return ""
            return f"what is sent on {host} does not come back"
    except OSError as error:
        return f"{(error.strerror or str(error)).lower()} on {host}"


def _mdns_port_failure() -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind(("", _MDNS_PORT))
    except OSError:
        return f"another program has UDP port {_MDNS_PORT} for itself"
    return ""
