"""Signatures of bundles: Ed25519, over the exact bytes of the manifest, which has the hash of every other file.

`manifest.sig` lies in the bundle beside the manifest, which does not list it:

    {"format": 1, "signatures": [{"algorithm": "ed25519", "key": "<id>", "signature": "<base64>"}]}

The id of a key is the SHA-256 of its 32 public bytes. It says which key to try and proves nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import MissingDependencyError, TrustError
from quartermap_deploy.files import read_regular
from quartermap_deploy.plain_text import command, printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

FORMAT = 1
SIGNATURES = "manifest.sig"
ALGORITHM = "ed25519"
MEANING = b"quartermap-deploy: the manifest of a bundle, signed as format 1\n"
"""What is signed before the manifest, so that a signature means nothing anywhere else."""
LARGEST = 1 << 16
"""Bytes of a file of signatures or of a key."""
MOST_SIGNATURES = 16
SHOWN = 16
"""Letters of the id of a key in messages."""
_PUBLIC_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class Signature:
    """A signature, as a file says.

    Attributes:
        key: id of the key that made it.
        value: 64 bytes.
    """

    key: str
    value: bytes

    def to_dict(self) -> dict[str, str]:
        """Return plain values for JSON."""
        return {"algorithm": ALGORITHM, "key": self.key, "signature": base64.b64encode(self.value).decode()}


def message_of(manifest: bytes) -> bytes:
    """What is signed for a manifest."""
    return MEANING + manifest


def key_id(key: Ed25519PublicKey) -> str:
    """The id of a key: the SHA-256 of its 32 bytes, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def require_cryptography(purpose: str) -> None:
    """Check that the library for signatures is there.

    Args:
        purpose: what needs it, with its verb.

    Raises:
        MissingDependencyError: if not, with the command that brings it.
    """
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError.for_extra(purpose, "cryptography", "sign") from error


# Reading --------------------------------------------------------------------------------------------------------


def read_signatures(folder: Path) -> tuple[Signature, ...]:
    """The signatures in a bundle, none of them checked; nothing where it has none.

    Raises:
        TrustError: if the file of signatures is a link, too large, or something else.
    """
    path = folder / SIGNATURES
    if not os.path.lexists(path):
        return ()
    try:
        found = json.loads(read_regular(path, LARGEST, follow=False))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, expected {FORMAT}")
        entries = found["signatures"]
        if not isinstance(entries, list) or len(entries) > MOST_SIGNATURES:
            raise ValueError(f"expected a list of up to {MOST_SIGNATURES} signatures")
        return tuple(map(_signature, entries))
    except OSError as error:
        raise TrustError(f"the signatures {printable(path)} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrustError(
            f"{printable(path)} holds no signatures of this project ({printable(error)}); take it out, or have the "
            "bundle signed again"
        ) from error


def _signature(entry: Any) -> Signature:
    """A signature from plain values.

    Raises:
        ValueError, KeyError, TypeError: if they are none.
    """
    if entry["algorithm"] != ALGORITHM:
        raise ValueError(f"algorithm {entry['algorithm']!r}, expected {ALGORITHM}")
    if not isinstance(entry["key"], str) or not re.fullmatch(r"[0-9a-f]{64}", entry["key"]):
        raise ValueError("the id of a key has 64 letters from 0 to f")
    value = base64.b64decode(entry["signature"], validate=True)
    if len(value) != 64:
        raise ValueError(f"a signature has 64 bytes, found {len(value)}")
    return Signature(entry["key"], value)


def read_public_keys(path: Path) -> tuple[Ed25519PublicKey, ...]:
    """The public keys in a PEM file.

    Raises:
        MissingDependencyError: if the library for signatures is absent.
        TrustError: if the file cannot be read, has no public key of Ed25519, or has others too.
    """
    require_cryptography("checking signatures needs")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = read_key_file(path)
    if b"PRIVATE KEY" in data:
        raise TrustError(
            f"{printable(path)} is a private key; give the public one, and keep this one to yourself"
        )
    blocks = _PUBLIC_KEY.findall(data)
    if not 1 <= len(blocks) <= MOST_SIGNATURES:
        raise TrustError(
            f"{printable(path)} holds {len(blocks) or 'no'} public keys; expected a PEM file with one, as `quartermap "
            "sign --new-key` writes it"
        )
    found = []
    for block in blocks:
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise TrustError(
                f"a public key in {printable(path)} cannot be read: {printable(error)}"
            ) from error
        if not isinstance(key, Ed25519PublicKey):
            raise TrustError(
                f"a public key in {printable(path)} is none of Ed25519, the only kind that signs bundles"
            )
        found.append(key)
    return tuple(found)


def read_key_file(path: Path) -> bytes:
    """The bytes of a file that holds keys.

    Raises:
        TrustError: if it cannot be read.
    """
    try:
        return read_regular(path, LARGEST)
    except OSError as error:
        raise TrustError(f"the key {printable(path)} cannot be read: {error.strerror}") from error


# Checking -------------------------------------------------------------------------------------------------------


def check_signatures(
    folder: Path, manifest: bytes, required: Sequence[str | os.PathLike[str]]
) -> tuple[str, ...]:
    """Check that a manifest was signed by everybody who is required; returns the ids of the keys that did.

    Args:
        folder: the bundle, for its signatures and for messages.
        manifest: the bytes of its manifest, the very ones that are believed afterwards.
        required: PEM files of public keys. Each of them must have signed; of several keys in one file one suffices.

    Raises:
        MissingDependencyError: if the library for signatures is absent.
        TrustError: if a key cannot be read, or somebody did not sign this manifest.
    """
    keys = {Path(path): read_public_keys(Path(path)) for path in required}
    signatures = read_signatures(folder)
    return tuple(_signer(folder, manifest, path, own, signatures) for path, own in keys.items())


def _signer(
    folder: Path,
    manifest: bytes,
    path: Path,
    keys: Sequence[Ed25519PublicKey],
    signatures: Sequence[Signature],
) -> str:
    """The id of the key, one of those of a file, that signed a manifest.

    Raises:
        TrustError: if none did.
    """
    from cryptography.exceptions import InvalidSignature

    known = {key_id(key): key for key in keys}
    theirs = [signature for signature in signatures if signature.key in known]
    for signature in theirs:
        try:
            known[signature.key].verify(signature.value, message_of(manifest))
        except InvalidSignature:
            continue
        return signature.key
    bundle = f"the bundle {printable(folder)}"
    if theirs:
        raise TrustError(
            f"{bundle} is not what was signed with the key {theirs[0].key[:SHOWN]}… of {printable(path)}: its "
            "manifest or the signature was altered. Get it again from where it comes from"
        )
    ids = " or ".join(f"{name[:SHOWN]}…" for name in known)
    if not signatures:
        line = command("quartermap", "sign", folder, "--key", "PRIVATE.pem")
        raise TrustError(
            f"{bundle} has no signature, and one by the key {ids} of {printable(path)} is required. Who holds it signs "
            f"the bundle with: {line}"
        )
    signers = ", ".join(f"{signature.key[:SHOWN]}…" for signature in signatures)
    raise TrustError(
        f"{bundle} is signed by {signers}, as it says, and not by the key {ids} of {printable(path)}, which is required"
    )
