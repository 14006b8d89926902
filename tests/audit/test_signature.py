"""Signatures: made of a run that passes, verified with the public key, and gone as soon as the run changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with key.pem and public.pem as openssl writes them, an ssh pair, another key and a wrong kind."""
    folder = tmp_path_factory.mktemp("keys")
    mine, other, wrong = (
        Ed25519PrivateKey.generate(),
        Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256R1()),
    )
    pem, plain = s.Encoding.PEM, s.NoEncryption()
    for name, key in (("", mine), ("other-", other), ("wrong-", wrong)):
        (folder / f"{name}key.pem").write_bytes(key.private_bytes(pem, s.PrivateFormat.PKCS8, plain))
        public = key.public_key().public_bytes(pem, s.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}public.pem").write_bytes(public)
    (folder / "ssh").write_bytes(mine.private_bytes(pem, s.PrivateFormat.OpenSSH, plain))
    (folder / "ssh.pub").write_bytes(mine.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH))
    secret = s.BestAvailableEncryption(b"x")
    (folder / "locked.pem").write_bytes(mine.private_bytes(pem, s.PrivateFormat.PKCS8, secret))
    (folder / "none.pem").write_text("nothing")
    return folder


@pytest.mark.parametrize(("private", "public"), [("key.pem", "public.pem"), ("ssh", "ssh.pub"), ("key.pem", "ssh.pub")])
def test_sign_and_verify(private: str, public: str, run: Path, keys: Path, cli) -> None:
    assert "not signed" in cli("audit", run, "--verify", keys / public).out
    done = cli("audit", run, "--sign", keys / private)
    assert (done.code, "signed: " in done.err) == (0, True), done.out
    assert (run / "files.sig").stat().st_size == 64
    done = cli("audit", run, "--verify", keys / public)
    assert done.code == 0 and "the signature holds" in done.out
    done = cli("audit", run)
    assert done.code == 0 and "give --verify PUBLIC_KEY" in done.out
    done = cli("audit", run, "--verify", keys / "other-public.pem")
    assert done.code == 1 and "files.sig: the signature is not one of this key over files.json" in done.out


def test_a_list_that_was_renewed_is_found(run: Path, keys: Path, cli) -> None:
    """Without a signature nobody can tell; with one, everything that follows from the list is bound to it."""
    assert cli("audit", run, "--sign", keys / "key.pem").code == 0
    text = (run / "files.json").read_text()
    (run / "files.json").write_text(text.replace('"sha256": "', '"sha256": "0', 1))
    done = cli("audit", run, "--verify", keys / "public.pem")
    assert done.code == 1 and "the signature is not one of this key" in done.out
    assert "the signature does not hold" in done.out and "A pass means" not in done.out


def test_an_audit_that_fails_says_that_the_signature_holds(run: Path, keys: Path, cli) -> None:
    """A file beside the signed list fails the audit; the list is still the one that was signed."""
    assert "A pass means" in cli("audit", run, "--sign", keys / "key.pem").out
    (run / "notes.txt").write_text("more")
    done = cli("audit", run, "--verify", keys / "public.pem")
    assert done.code == 1 and "the signature holds" in done.out and "A pass means" not in done.out
    assert "signature holds" not in cli("audit", run).out, "nobody looked"


def test_what_changes_a_run_takes_its_signature_away(run: Path, keys: Path, cli, caplog) -> None:
    assert cli("audit", run, "--sign", keys / "key.pem").code == 0
    assert cli("report", run).code == 0
    assert (run / "files.sig").is_file()  # the same pages
    moved = Path(shutil.move(run, run.with_name("renamed")))
    assert cli("report", moved).code == 0
    assert not (moved / "files.sig").exists()
    assert "was signed; it has changed now, so its signature was removed" in caplog.text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--sign", "wrong-key.pem"), "is not an ed25519 key"),
        (("--sign", "locked.pem"), "is not a private key without password"),
        (("--sign", "none.pem"), "is not a private key"),
        (("--sign", "public.pem"), "is not a private key"),
        (("--sign", "absent.pem"), "cannot be read"),
        (("--sign", "."), "is not a file"),
        (("--verify", "key.pem"), "is not a public key"),
        (("--verify", "wrong-public.pem"), "is not an ed25519 key"),
        (("--verify", "none.pem"), "is not a public key"),
    ],
)
def test_keys_that_cannot_be_used(words: tuple[str, str], told: str, run: Path, keys: Path, cli) -> None:
    done = cli("audit", run, words[0], keys / words[1])
    assert (done.code, told in done.err) == (2, True), done.err
    assert not (run / "files.sig").exists()


def test_a_wrong_key_is_told_before_the_audit(run: Path, keys: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.audit.audit.audit", lambda *_: pytest.fail("the audit took its time first"))
    done = cli("audit", run, "--sign", keys / "public.pem")
    assert (done.code, "is not a private key" in done.err) == (2, True), done.err


def test_a_link_in_the_place_of_a_signature_is_told_once(run: Path, keys: Path, cli) -> None:
    (run / "files.sig").symlink_to("files.json")
    for words in ((), ("--verify", keys / "public.pem")):
        done = cli("audit", run, *words)
        told = [line for line in done.out.splitlines() if line.startswith("problem ")]
        assert told == ["problem files.sig: is a link; what it points to cannot be checked"]


def test_a_run_that_fails_is_not_signed(run: Path, keys: Path, cli) -> None:
    (run / "photo.png").write_bytes(b"x")
    done = cli("audit", run, "--sign", keys / "key.pem")
    assert (done.code, "not signed: the audit failed" in done.err) == (1, True)
    assert not (run / "files.sig").exists()


def test_without_the_package(run: Path, keys: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    done = cli("audit", run, "--sign", keys / "key.pem")
    assert (done.code, "pip install 'perdure[sign]'" in done.err) == (2, True)
