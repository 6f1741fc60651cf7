"""The key file and what follows from it: private, whole or not there, and libp2p's peer id."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import AccessDenied, ConfigError
from mycel.security.identity import Identity, load_or_create
from mycel.security.signatures import peer_id_of, public_key_of, verify

ROOT = Path(__file__).resolve().parents[2]
needs_modes = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
needs_no_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything"
)


@needs_modes
def test_a_new_key_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "identity.key"
    before = os.umask(0)
    try:
        load_or_create(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path], "nothing else is left"


def test_the_same_file_is_the_same_peer(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first = load_or_create(path)
    content = path.read_bytes()
    again = load_or_create(path)
    assert (again.peer_id, again.seed) == (first.peer_id, first.seed)
    assert path.read_bytes() == content
    assert load_or_create(tmp_path / "other").peer_id != first.peer_id


@needs_modes
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o610, 0o777])
def test_a_key_that_others_could_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    load_or_create(path)
    path.chmod(mode)
    with pytest.raises(AccessDenied, match=f"has mode {mode:04o}; others could read it: chmod 600"):
        load_or_create(path)
    path.chmod(0o400)
    load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"x", bytes(31), bytes(33), bytes(10_000)])
def test_a_damaged_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is damaged") as caught:
        load_or_create(path)
    assert not isinstance(caught.value, AccessDenied)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the identity key"):
        load_or_create(tmp_path)


def test_a_key_in_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(ConfigError, match="the identity key"):
        load_or_create(tmp_path / "file" / "key")


@needs_no_root
def test_a_folder_that_is_not_ours_to_write_is_a_matter_of_access(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AccessDenied, match="cannot write the identity key"):
        load_or_create(tmp_path / "key")


def test_a_refusal_of_the_system_is_a_matter_of_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(AccessDenied, match=r"cannot write the identity key .*Permission denied"):
        load_or_create(tmp_path / "key")


def test_of_many_that_start_at_once_all_get_the_same_key(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / f"key{number}"
        with ThreadPoolExecutor(8) as pool:
            peers = {one.result().peer_id for one in [pool.submit(load_or_create, path) for _ in range(8)]}
        assert len(peers) == 1
    assert len(list(tmp_path.iterdir())) == 20, "no temporary file is left"


@pytest.mark.parametrize("step", ["os.fsync", "os.link"])
def test_a_crash_leaves_no_half_written_key(tmp_path: Path, step: str) -> None:
    """The process dies while the key is being written: the next start makes a new one."""
    path = tmp_path / "key"
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom mycel.security.identity import load_or_create\n"
        f"{step} = lambda *_: os._exit(9)\nload_or_create(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False)
    assert done.returncode == 9
    assert not path.exists()
    assert all(stat.S_IMODE(left.stat().st_mode) == 0o600 for left in tmp_path.iterdir())
    assert load_or_create(path).peer_id == load_or_create(path).peer_id


def test_a_file_system_without_links_gets_a_key_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    path = tmp_path / "key"
    first = load_or_create(path)
    assert load_or_create(path).peer_id == first.peer_id
    assert list(tmp_path.iterdir()) == [path]


def test_the_secret_is_in_no_repr() -> None:
    identity = Identity.from_seed(bytes(range(32)))
    assert identity.seed == bytes(range(32))
    assert "rivate" not in repr(identity)
    assert identity.seed.hex() not in repr(identity)


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=80))
def test_the_peer_id_says_who_signed(seed: bytes, data: bytes) -> None:
    identity = Identity.from_seed(seed)
    signature = identity.sign(data)
    assert verify(identity.peer_id, signature, data)
    assert not verify(identity.peer_id, signature, data + b"\0")
    assert not verify(identity.peer_id, bytes([signature[0] ^ 1]) + signature[1:], data)
    assert not verify(identity.peer_id, signature[:-1], data)
    assert not verify(identity.peer_id, b"", data)
    other = Identity.from_seed(bytes(31) + bytes([seed[0] ^ 0x55]))
    assert other.peer_id == identity.peer_id or not verify(other.peer_id, signature, data)


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_its_public_key(public_key: bytes) -> None:
    assert public_key_of(peer_id_of(public_key)) == public_key


@given(st.text(max_size=80))
def test_no_other_text_is_a_peer_id(text: str) -> None:
    key = public_key_of(text)
    assert key is None or peer_id_of(key) == text.strip()
    assert not verify(text, bytes(64), b"data")


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "12D3KooW",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # the hash of an RSA key
        "1" * 10_000_000,  # decoding base58 takes quadratic time
        Identity.from_seed(bytes(32)).peer_id[:-1],
        Identity.from_seed(bytes(32)).peer_id + "1",
    ],
)
def test_what_is_no_ed25519_peer_id_verifies_nothing(peer: str) -> None:
    assert public_key_of(peer) is None
    assert not verify(peer, bytes(64), b"data")


def test_the_peer_id_is_libp2p_s() -> None:
    """In a process of its own, as importing libp2p takes a second and changes the process."""
    seeds = [bytes(32), bytes(range(32)), b"\xff" * 32]
    program = (
        "import sys\nfrom libp2p.crypto.ed25519 import Ed25519PrivateKey\nfrom libp2p.peer.id import ID\n"
        "for seed in sys.argv[1:]:\n"
        "    key = Ed25519PrivateKey.from_bytes(bytes.fromhex(seed))\n"
        "    print(ID.from_pubkey(key.get_public_key()).to_base58())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(seed.hex() for seed in seeds)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [Identity.from_seed(seed).peer_id for seed in seeds]
