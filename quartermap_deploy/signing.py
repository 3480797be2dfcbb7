"""`sign_bundle` and `new_key`: sign a bundle, and make the keys for it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quartermap_deploy.bundle import MANIFEST, load_bundle
from quartermap_deploy.errors import BundleError, TrustError
from quartermap_deploy.files import write_whole
from quartermap_deploy.plain_text import printable
from quartermap_deploy.signatures import (
    FORMAT,
    MOST_SIGNATURES,
    SIGNATURES,
    Signature,
    key_id,
    message_of,
    read_key_file,
    read_signatures,
    require_cryptography,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Passphrase = Callable[[], bytes]
"""Says the passphrase of a key, when it is asked."""


@dataclass(frozen=True)
class KeyPair:
    """Keys that were written.

    Attributes:
        private: file of the private key, which its owner alone may read.
        public: file of the public key.
        key: the id of both.
        encrypted: whether the private key needs a passphrase.
    """

    private: Path
    public: Path
    key: str
    encrypted: bool


@dataclass(frozen=True)
class Signed:
    """What signing left behind.

    Attributes:
        path: the bundle.
        key: id of the key that signed it.
        signers: ids of all keys whose signatures lie in the bundle; the others were not checked.
    """

    path: Path
    key: str
    signers: tuple[str, ...]


def public_path(private: Path) -> Path:
    """Where the public key of a new pair is written: beside the private one, `release.pub.pem` for `release.pem`."""
    return private.with_name(f"{private.name.removesuffix('.pem')}.pub.pem")


def new_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> KeyPair:
    """Make a pair of keys, and write both. No file is ever replaced.

    Args:
        path: where the private key goes, in PEM (PKCS 8), with permissions for its owner alone.
        passphrase: encrypts it; None writes it as it is.

    Raises:
        MissingDependencyError: if the library for signatures is absent.
        TrustError: if one of the files is there already, or cannot be written.
    """
    require_cryptography("making a key needs")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, public = Path(path), public_path(Path(path))
    key = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        if not passphrase:
            raise TrustError("the passphrase is empty; give one, or leave it out")
        encryption = serialization.BestAvailableEncryption(passphrase)
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    open_key = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _write_new(private, secret, 0o600)
    try:
        _write_new(public, open_key, 0o644)
    except BaseException:
        private.unlink(missing_ok=True)
        raise
    return KeyPair(private, public, key_id(key.public_key()), passphrase is not None)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is not there yet.

    Raises:
        TrustError: if it is, or cannot be written.
    """
    try:
        # Whatever is there, a link too, is an error; and nobody else can open it before the permissions are set.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    except FileExistsError:
        raise TrustError(
            f"{printable(path)} is there already, and no key is ever replaced; choose another name"
        ) from None
    except OSError as error:
        raise TrustError(f"{printable(path)} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink()
        if isinstance(error, OSError):
            raise TrustError(f"{printable(path)} cannot be written: {error.strerror}") from error
        raise


def sign_bundle(
    path: str | os.PathLike[str], key: str | os.PathLike[str], passphrase: Passphrase | None = None
) -> Signed:
    """Sign a bundle, after its files were checked. Signatures by other keys stay, an older one by this key goes.

    Args:
        path: the bundle.
        key: PEM file of the private key.
        passphrase: is asked if the key is encrypted.

    Raises:
        MissingDependencyError: if the library for signatures is absent.
        TrustError: if the key cannot be used, or what lies in the place of signatures is none.
        BundleError: if it is no bundle, or is damaged. Then nothing is signed.
        WriteError: if the signature cannot be written.
    """
    folder, private = Path(path), read_private_key(Path(key), passphrase)
    manifest = load_bundle(folder).manifest
    data = (folder / MANIFEST).read_bytes()
    if json.loads(data) != manifest:
        raise BundleError(
            f"the manifest of {printable(folder)} was changed while it was read; nothing was signed"
        )
    own = Signature(key_id(private.public_key()), private.sign(message_of(data)))
    kept = [signature for signature in read_signatures(folder) if signature.key != own.key]
    if len(kept) >= MOST_SIGNATURES:
        raise TrustError(
            f"the bundle {printable(folder)} has {len(kept)} signatures already, as many as it may"
        )
    signatures = [*kept, own]
    values = {"format": FORMAT, "signatures": [signature.to_dict() for signature in signatures]}
    write_whole(folder / SIGNATURES, (json.dumps(values, indent=2) + "\n").encode())
    return Signed(folder, own.key, tuple(signature.key for signature in signatures))


def read_private_key(path: Path, passphrase: Passphrase | None = None) -> Ed25519PrivateKey:
    """The private key in a PEM file.

    Args:
        path: the file.
        passphrase: is asked if it is encrypted.

    Raises:
        MissingDependencyError: if the library for signatures is absent.
        TrustError: if it is no private key of Ed25519, or the passphrase is missing or wrong.
    """
    require_cryptography("signing needs")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = read_key_file(path)
    if b"-----BEGIN PUBLIC KEY-----" in data and b"PRIVATE KEY" not in data:
        raise TrustError(f"{printable(path)} is a public key; signing needs the private one")
    secret = None
    if b"ENCRYPTED" in data:
        if passphrase is None:
            raise TrustError(f"the key {printable(path)} is encrypted, and nobody says its passphrase")
        secret = passphrase()
    try:
        key = load_pem_private_key(data, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = "its passphrase is another, or it is damaged" if secret is not None else printable(error)
        raise TrustError(f"the key {printable(path)} cannot be used: {what}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(
            f"the key {printable(path)} is none of Ed25519; make one with `quartermap sign --new-key FILE`"
        )
    return key
