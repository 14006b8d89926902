"""Signatures over the manifest: who has the private key said that a run was so, and every later change is found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perdure.audit.findings import Audit
from perdure.errors import DataError, UsageError
from perdure.files import write_atomic
from perdure.kept.manifest import MANIFEST, SIGNATURE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_HOW = "make one with `openssl genpkey -algorithm ed25519 -out key.pem` (docs/audit.md)"


def sign(run: Path, key: Path) -> Path:
    """Sign the manifest: ``files.sig`` holds the 64 bytes of an ed25519 signature over the bytes of ``files.json``.

    Raises:
        UsageError: The package cryptography is absent, or the key cannot be used.
        DataError: The run has no manifest.
    """
    private = private_key(key)
    content = _manifest(run)
    write_atomic(run / SIGNATURE, lambda part: part.write_bytes(private.sign(content)))
    return run / SIGNATURE


def audit_signature(run: Path, key: Path | None, found: Audit) -> None:
    """Verify a run's signature with a public key; without a key, only note that there is one.

    Raises:
        UsageError: The package cryptography is absent, or the key cannot be used.
    """
    if (run / SIGNATURE).is_symlink():  # told with all other links
        if key is not None:
            _public_key(key)
        return
    found.signed = (run / SIGNATURE).is_file()
    if key is not None:
        problem = _problem_of(run, key)
        found.signature_holds = problem is None
        if problem:
            found.problems.append(problem)
    elif found.signed:
        found.notes.append("the run is signed; give --verify PUBLIC_KEY to check the signature")
    if found.signed and (run / SIGNATURE).stat().st_size != 64:
        found.tell(SIGNATURE, "is no signature: it must have 64 bytes")


def _problem_of(run: Path, key: Path) -> str | None:
    public = _public_key(key)
    path = run / SIGNATURE
    if not path.is_file():
        return f"the run is not signed: {SIGNATURE} is missing"
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(path.read_bytes(), _manifest(run))
    except InvalidSignature:
        return f"{SIGNATURE}: the signature is not one of this key over {MANIFEST}"
    except DataError as error:
        return error.what
    return None


def _manifest(run: Path) -> bytes:
    if not (run / MANIFEST).is_file():
        raise DataError(f"{run / MANIFEST} does not exist: there is nothing to sign")
    return (run / MANIFEST).read_bytes()


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read an ed25519 key to sign with. UsageError if it cannot be used, or the package cryptography is absent."""
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    content = _read(path)
    load = load_ssh_private_key if b"OPENSSH" in content else load_pem_private_key
    try:
        key = load(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise UsageError(f"{path} is not a private key without password", _HOW) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is not an ed25519 key", _HOW)
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    content = _read(path)
    load = load_ssh_public_key if content.startswith(b"ssh-") else load_pem_public_key
    how = "give the public key: `openssl pkey -in key.pem -pubout -out public.pem`"
    try:
        key = load(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a public key", how) from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} is not an ed25519 key", _HOW)
    return key


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"the key {path} is not a file", _HOW)
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {error.strerror or error}", _HOW) from error


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401  # asked for here, so that one plain line says what is absent
    except ImportError as error:
        raise UsageError("signatures need the package cryptography", "pip install 'perdure[sign]'") from error
