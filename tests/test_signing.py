"""Signatures: who signed a bundle is checked on the very bytes that are believed, before anything else is read."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy_bundles
from command_line import Outcome, call
from deploy_bundles import change_manifest

import quartermap_deploy as qm
from quartermap_deploy import bundle as bundles
from quartermap_deploy.errors import BundleError, MissingDependencyError, TrustError
from quartermap_deploy.signatures import (
    MEANING,
    SIGNATURES,
    Signature,
    check_signatures,
    key_id,
    read_public_keys,
    read_signatures,
)
from quartermap_deploy.signing import new_key, public_path, read_private_key, sign_bundle

pytest.importorskip("cryptography")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundles.classifier(), tmp_path / "bundle"))


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Public keys by name; the private ones lie beside them."""
    return {name: new_key(tmp_path / f"{name}.pem").public for name in ("ours", "theirs")}


def sign(bundle: Path, public: Path) -> None:
    sign_bundle(bundle, public.with_name(public.name.replace(".pub.pem", ".pem")))


def refused(bundle: Path, *required: Path) -> str:
    """What the command line says, which refuses the bundle with one message."""
    options = [word for key in required for word in ("--require-signature", key)]
    outcome = call("inspect", bundle, *options)
    assert outcome.code == 2 and outcome.out == "", outcome
    assert len(outcome.messages) == 1, outcome.err
    return outcome.err


# Signing --------------------------------------------------------------------------------------------------------


def test_a_bundle_that_is_signed_is_taken(bundle: Path, keys: dict[str, Path]) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    outcome = call("sign", bundle, "--key", keys["ours"].with_name("ours.pem"), "--json")
    assert outcome.code == 0, outcome.err
    (key,) = read_public_keys(keys["ours"])
    assert outcome.json["key"] == key_id(key) and outcome.json["signers"] == [key_id(key)]
    after = {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert after.pop(SIGNATURES) and after == before, "nothing but the file of signatures is new"
    qm.load_bundle(bundle)
    qm.load_bundle(bundle, signed_by=[keys["ours"]])
    shown = call("inspect", bundle)
    assert shown.code == 0 and key_id(key)[:16] in shown.out and "as it says" in shown.out


def test_the_signature_is_that_of_the_prefix_and_the_exact_manifest(
    bundle: Path, keys: dict[str, Path]
) -> None:
    """Written down here once more: who checks it without this package has to know it."""
    sign(bundle, keys["ours"])
    (signature,), (key,) = read_signatures(bundle), read_public_keys(keys["ours"])
    data = (bundle / "manifest.json").read_bytes()
    key.verify(signature.value, b"quartermap-deploy: the manifest of a bundle, signed as format 1\n" + data)
    assert MEANING.startswith(b"quartermap-deploy: ")
    values = json.loads((bundle / SIGNATURES).read_text())
    assert values["format"] == 1 and set(values["signatures"][0]) == {"algorithm", "key", "signature"}
    # A signature of the manifest alone, as another program might have made it, is none of a bundle.
    private = read_private_key(keys["ours"].with_name("ours.pem"))
    write(bundle, Signature(key_id(key), private.sign(data)))
    assert "is not what was signed" in refused(bundle, keys["ours"])


def write(bundle: Path, *signatures: Signature) -> None:
    values = {"format": 1, "signatures": [signature.to_dict() for signature in signatures]}
    (bundle / SIGNATURES).write_text(json.dumps(values))


def test_several_people_sign(bundle: Path, keys: dict[str, Path]) -> None:
    sign(bundle, keys["ours"])
    assert "not by the key" in refused(bundle, keys["theirs"])
    assert "not by the key" in refused(bundle, keys["ours"], keys["theirs"])
    sign(bundle, keys["theirs"])
    sign(bundle, keys["ours"])  # again, which takes the place of the first one
    assert len(read_signatures(bundle)) == 2
    qm.load_bundle(bundle, signed_by=list(keys.values()))
    # Of several keys in one file one suffices, as for a key that takes the place of another.
    both = bundle.parent / "both.pem"
    both.write_bytes(b"".join(path.read_bytes() for path in keys.values()))
    write(bundle, *(s for s in read_signatures(bundle) if s.key == key_id(read_public_keys(keys["ours"])[0])))
    qm.load_bundle(bundle, signed_by=[both])


def test_a_damaged_bundle_is_not_signed(bundle: Path, keys: dict[str, Path]) -> None:
    (bundle / "model.onnx").write_bytes(b"x" * (bundle / "model.onnx").stat().st_size)
    with pytest.raises(BundleError, match="does not match"):
        sign(bundle, keys["ours"])
    outcome = call("sign", bundle, "--key", keys["ours"].with_name("ours.pem"))
    assert outcome.code == 2 and not (bundle / SIGNATURES).exists()


# Attacks --------------------------------------------------------------------------------------------------------


def test_what_was_altered_is_refused(bundle: Path, keys: dict[str, Path]) -> None:
    ours = keys["ours"]
    assert "has no signature" in refused(bundle, ours)
    sign(bundle, ours)
    good = (bundle / "manifest.json").read_bytes()
    # Not one byte may change, though it may mean the same.
    for data in (good + b"\n", good.replace(b'"task"', b'"t\\u0061sk"'), good[:-2] + b',"x":1}\n'):
        (bundle / "manifest.json").write_bytes(data)
        assert "is not what was signed" in refused(bundle, ours)
    # A model and its hash in the manifest, as who replaces the model writes it.
    (bundle / "manifest.json").write_bytes(good)
    (bundle / "model.onnx").write_bytes(b"another model")
    change_manifest(bundle)
    assert "is not what was signed" in refused(bundle, ours)
    # The model alone: the signed manifest has another hash.
    (bundle / "manifest.json").write_bytes(good)
    said = refused(bundle, ours)
    assert "model.onnx" in said and "does not match" in said
    # The manifest and signature of another bundle of the same signer.
    shutil.rmtree(bundle)
    shutil.copytree(toy_bundles.change(), bundle)
    (bundle / "manifest.json").write_bytes(good)
    assert call("inspect", bundle, "--require-signature", ours).code == 2


def test_the_id_of_a_key_proves_nothing(bundle: Path, keys: dict[str, Path]) -> None:
    """Somebody signs with a key of his own and writes ours beside it, or puts our signature of another bundle there."""
    sign(bundle, keys["theirs"])
    (ours,) = read_public_keys(keys["ours"])
    (own,) = read_signatures(bundle)
    write(bundle, Signature(key_id(ours), own.value))
    assert "is not what was signed" in refused(bundle, keys["ours"])
    other = Path(shutil.copytree(toy_bundles.change(), bundle.parent / "other"))
    sign(other, keys["ours"])
    shutil.copy(other / SIGNATURES, bundle / SIGNATURES)
    assert "is not what was signed" in refused(bundle, keys["ours"])


DAMAGED = {
    "empty": b"",
    "no JSON": b"\xff\xfe",
    "a list": b"[]",
    "nested": b"[" * 60_000,
    "number": b'{"format": ' + b"1" * 6000 + b"}",
    "format": b'{"format": 2, "signatures": []}',
    "not a list": b'{"format": 1, "signatures": 5}',
    "many": b'{"format": 1, "signatures": [' + b",".join([b"{}"] * 17) + b"]}",
    "no object": b'{"format": 1, "signatures": ["a"]}',
    "algorithm": b'{"format": 1, "signatures": [{"algorithm": "none", "key": "", "signature": ""}]}',
    "key": b'{"format": 1, "signatures": [{"algorithm": "ed25519", "key": "\\u001b[2J", "signature": ""}]}',
    "short": b'{"format": 1, "signatures": [{"algorithm": "ed25519", "key": "%s", "signature": "AAAA"}]}'
    % (b"0" * 64),
    "base64": b'{"format": 1, "signatures": [{"algorithm": "ed25519", "key": "%s", "signature": "*"}]}'
    % (b"0" * 64),
    "huge": b" " * (1 << 17),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_holds_no_signatures_is_refused(name: str, bundle: Path, keys: dict[str, Path]) -> None:
    (bundle / SIGNATURES).write_bytes(DAMAGED[name])
    said = refused(bundle, keys["ours"])
    assert "manifest.sig" in said and "\x1b" not in said and len(said) < 1000
    # Who requires none does not depend on it.
    qm.load_bundle(bundle)


def test_signatures_that_lie_elsewhere_are_none(bundle: Path, keys: dict[str, Path]) -> None:
    sign(bundle, keys["ours"])
    (bundle / SIGNATURES).rename(bundle.parent / "elsewhere")
    (bundle / SIGNATURES).symlink_to(bundle.parent / "elsewhere")
    assert "it is a link" in refused(bundle, keys["ours"])
    (bundle / SIGNATURES).unlink()
    os.mkfifo(bundle / SIGNATURES)
    assert "no plain file" in refused(bundle, keys["ours"])
    (bundle / SIGNATURES).rmdir() if (bundle / SIGNATURES).is_dir() else (bundle / SIGNATURES).unlink()
    (bundle / SIGNATURES).mkdir()
    assert "cannot be read" in refused(bundle, keys["ours"])


def test_nothing_is_read_before_the_signature(
    bundle: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is read once: what is checked is what is believed; and before that no other file is opened."""
    sign(bundle, keys["ours"])
    manifest = bundle / "manifest.json"
    read: list[str] = []
    plain = bundles.read_bytes

    def watched(path: Path, largest: int) -> bytes:
        if path.parent == bundle:
            read.append(path.name)
        data = plain(path, largest)
        if path == manifest:
            # Who can write there exchanges it right after it was read.
            manifest.write_bytes(data.replace(b"digit 3", b"digit 8"))
        return data

    monkeypatch.setattr(bundles, "read_bytes", watched)
    loaded = qm.load_bundle(bundle, signed_by=[keys["ours"]])
    assert (
        read.count("manifest.json") == 1
        and "digit 3" in loaded.labels
        and loaded.labels.count("digit 8") == 1
    )
    read.clear()
    opened: list[str] = []
    monkeypatch.setattr(bundles, "_verify", lambda *given: opened.append("files"))
    monkeypatch.setattr(bundles, "check_manifest", lambda values: opened.append("values"))
    with pytest.raises(TrustError, match="is not what was signed"):
        qm.load_bundle(bundle, signed_by=[keys["ours"]])
    assert read == ["manifest.json"] and not opened


# Keys -----------------------------------------------------------------------------------------------------------


def test_private_keys_are_for_their_owner_and_are_never_replaced(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        outcome = call("sign", "--new-key", tmp_path / "release.pem", "--json")
    finally:
        os.umask(umask)
    assert outcome.code == 0 and outcome.json["encrypted"] is False
    private, public = Path(outcome.json["private"]), Path(outcome.json["public"])
    assert private.stat().st_mode & 0o777 == 0o600 and public.name == "release.pub.pem"
    before = private.read_bytes(), public.read_bytes()
    outcome = call("sign", "--new-key", private)
    assert outcome.code == 2 and "is there already" in outcome.err
    # Nor the public one, nor what a link leads to; and no half of a pair is left behind.
    private.unlink()
    assert call("sign", "--new-key", private).code == 2 and not private.exists()
    assert public.read_bytes() == before[1]
    (tmp_path / "link.pem").symlink_to(tmp_path / "target")
    assert call("sign", "--new-key", tmp_path / "link.pem").code == 2
    assert not (tmp_path / "target").exists() and not public_path(tmp_path / "link.pem").exists()
    assert call("sign", "--new-key", tmp_path / "missing" / "a.pem").code == 2


def test_encrypted_keys(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("correct horse\nsecond line\n")
    made = call("sign", "--new-key", tmp_path / "k.pem", "--passphrase-file", secret, "--json")
    assert made.code == 0 and made.json["encrypted"] is True
    assert b"ENCRYPTED" in (tmp_path / "k.pem").read_bytes()
    words = ("sign", bundle, "--key", tmp_path / "k.pem")
    monkeypatch.delenv("QUARTERMAP_PASSPHRASE", raising=False)
    outcome = call(*words)
    assert outcome.code == 2 and "there is no terminal to ask in" in outcome.err
    monkeypatch.setenv("QUARTERMAP_PASSPHRASE", "wrong")
    outcome = call(*words)
    assert outcome.code == 2 and "its passphrase is another" in outcome.err and "wrong" not in outcome.err
    monkeypatch.setenv("QUARTERMAP_PASSPHRASE", "correct horse")
    assert call(*words).code == 0
    monkeypatch.delenv("QUARTERMAP_PASSPHRASE")
    assert call(*words, "--passphrase-file", secret).code == 0
    qm.load_bundle(bundle, signed_by=[tmp_path / "k.pub.pem"])
    secret.write_text("\n")
    assert call(*words, "--passphrase-file", secret).code == 2
    with pytest.raises(TrustError, match="nobody says its passphrase"):
        sign_bundle(bundle, tmp_path / "k.pem")


def test_a_passphrase_is_typed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.delenv("QUARTERMAP_PASSPHRASE", raising=False)
    typed = iter(["one", "another", "one", "one"])
    monkeypatch.setattr(getpass, "getpass", lambda prompt: next(typed))
    words = ("sign", "--new-key", tmp_path / "k.pem", "--encrypt")
    assert call(*words).code == 2 and not (tmp_path / "k.pem").exists()
    assert call(*words).code == 0
    assert key_id(read_private_key(tmp_path / "k.pem", lambda: b"one").public_key())


def test_other_files_are_no_keys(bundle: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import x25519

    other = x25519.X25519PrivateKey.generate()
    (tmp_path / "x.pem").write_bytes(
        other.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (tmp_path / "x.pub.pem").write_bytes(
        other.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    (tmp_path / "text").write_text("no key at all")
    (tmp_path / "broken").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    (tmp_path / "large").write_bytes(b" " * (1 << 17))
    for name, said in (
        ("x.pub.pem", "none of Ed25519"),
        ("text", "no public keys"),
        ("broken", "cannot be read"),
        ("large", "more than"),
        ("ours.pem", "is a private key"),
        ("missing", "No such file"),
        (".", "cannot be read"),
    ):
        assert said in refused(bundle, tmp_path / name), name
    for name, said in (
        ("x.pem", "none of Ed25519"),
        ("text", "cannot be used"),
        ("ours.pub.pem", "is a public key"),
    ):
        outcome = call("sign", bundle, "--key", tmp_path / name)
        assert outcome.code == 2 and said in outcome.err, name


# The commands ---------------------------------------------------------------------------------------------------


def _commands(bundle: Path, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    return {
        "inspect": ("inspect", bundle),
        "validate": ("validate", bundle),
        "bench": ("bench", bundle, "--repeats", 1),
        "predict": ("predict", bundle, tmp_path / "digit.png"),
        "eval": ("eval", bundle),
        "triton": ("deploy", "triton", bundle, "-o", tmp_path / "repository"),
        "kserve": ("deploy", "kserve", bundle, "-o", tmp_path / "s.yaml", "--storage-uri", "s3://a/b"),
        "serve": ("serve", bundle, "--port", 0, "--grpc-port", 0),
        "install": ("plugin", "install", bundle, "--yes"),
    }


@pytest.mark.parametrize("name", [*_commands(Path(), Path())])
def test_every_command_that_runs_a_bundle_can_require_it(
    name: str, bundle: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "digit.png")
    words = (*_commands(bundle, tmp_path)[name], "--require-signature", keys["ours"])
    outcome = call(*words)
    assert outcome.code == 2 and "has no signature" in outcome.err and outcome.out == ""
    assert outcome.err.count("quartermap: error: ") == 1
    sign(bundle, keys["ours"])
    if name not in ("serve", "install"):  # the one would serve, the other finds no plugin in it
        outcome = call(*words)
        assert outcome.code == 0, outcome.err


def test_bundles_that_engines_come_from_must_be_signed_too(
    bundle: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    sign(bundle, keys["ours"])
    other = shutil.copytree(toy_bundles.classifier(), tmp_path / "other")
    words = ("deploy", "triton", bundle, "-o", tmp_path / "repository", "--engines-from", other)
    outcome = call(*words, "--require-signature", keys["ours"])
    assert outcome.code == 2 and "other has no signature" in outcome.err


def test_what_is_no_bundle_is_not_signed(keys: dict[str, Path]) -> None:
    outcome = call("eval", "vmamba_digits", "--require-signature", keys["ours"])
    assert outcome.code == 2 and "is no bundle, and nothing else is signed" in outcome.err


def test_a_bundle_that_is_replaced_loses_its_signatures(
    bundle: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    sign(bundle, keys["ours"])
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nname = "nothing"\n')
    assert call("compile", recipe, "--out", bundle, "--force").code == 2
    qm.load_bundle(bundle, signed_by=[keys["ours"]])
    with bundles.new_bundle(bundle, force=True) as draft:
        for path in toy_bundles.classifier().iterdir():
            shutil.copy(path, draft)
    assert not (bundle / SIGNATURES).exists()


def test_that_signatures_went_is_said(
    bundle: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quartermap_deploy.cli.results import signatures_dropped

    sign(bundle, keys["ours"])
    with signatures_dropped(bundle):
        pass
    assert capsys.readouterr().err == ""
    with signatures_dropped(bundle):
        (bundle / SIGNATURES).unlink()
    assert "sign it again with: quartermap sign" in capsys.readouterr().err


def test_the_options_go_together(bundle: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    private = keys["ours"].with_name("ours.pem")
    wrong: tuple[tuple[Any, ...], ...] = (
        ("sign", bundle),
        ("sign", "--key", private),
        ("sign", bundle, "--new-key", tmp_path / "n.pem"),
        ("sign", bundle, "--key", private, "--new-key", tmp_path / "n.pem"),
        ("sign", bundle, "--key", private, "--encrypt"),
    )
    for words in wrong:
        outcome: Outcome = call(*words)
        assert outcome.code == 2 and len(outcome.messages) == 1, words
    assert not (tmp_path / "n.pem").exists() and not (bundle / SIGNATURES).exists()


def test_without_the_library_the_command_that_brings_it_is_named(
    bundle: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def missing(name: str, *given: Any, **more: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return plain(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r"cryptography.*quartermap-deploy\[sign\]"):
        check_signatures(bundle, b"", [keys["ours"]])
    with pytest.raises(MissingDependencyError, match=r"cryptography.*quartermap-deploy\[sign\]"):
        new_key(bundle.parent / "new.pem")
    # Nobody else needs it.
    qm.load_bundle(bundle)
