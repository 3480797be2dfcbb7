"""`quartermap sign`: sign a bundle, or make the keys for that."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quartermap_deploy.cli.options import add_output_options
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.results import print_json, show
from quartermap_deploy.cli.values import file_or_folder
from quartermap_deploy.errors import InputError, TrustError
from quartermap_deploy.plain_text import printable
from quartermap_deploy.tables.layout import facts

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers

PASSPHRASE_VARIABLE = "QUARTERMAP_PASSPHRASE"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "sign",
        run,
        summary="sign a bundle, or make the keys for that",
        description="""
            Sign a bundle by Ed25519, so that others can tell that it is yours: --require-signature of serve, deploy,
            validate, predict, eval, bench, inspect and `plugin install` takes the public key and refuses every bundle
            that was not signed with the private one, before anything of it is believed.

            The signature is over the manifest, which has the hash of every other file, and lies beside it, in
            manifest.sig. Before signing all files are compared with the manifest. Signatures by other keys stay:
            several people may sign one bundle. What changes a bundle, such as `quartermap rebuild`, drops its
            signatures.

            --new-key makes a pair of keys: FILE, which its owner alone may read, and beside it the public one, FILE
            with .pub.pem in the place of .pem. No file is ever replaced. The private key is encrypted where a
            passphrase is given; a passphrase comes from --passphrase-file, from the environment variable
            QUARTERMAP_PASSPHRASE, or is asked for in a terminal.
            """,
        examples="""
            quartermap sign --new-key release.pem
            quartermap sign bundles/digits_k3 --key release.pem
            quartermap serve bundles/digits_k3 --require-signature release.pub.pem
            """,
    )
    parser.add_argument(
        "bundle",
        type=file_or_folder,
        nargs="?",
        metavar="BUNDLE",
        help="folder that `quartermap compile` wrote",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--key", type=file_or_folder, metavar="PRIVATE.pem", help="the private key to sign the bundle with"
    )
    action.add_argument(
        "--new-key",
        type=file_or_folder,
        metavar="FILE",
        help="make a pair of keys instead, the private one in this file",
    )
    parser.add_argument(
        "--encrypt",
        action="store_true",
        help="with --new-key, ask for a passphrase, if none is given otherwise (default: encrypt where one is given)",
    )
    parser.add_argument(
        "--passphrase-file",
        type=file_or_folder,
        metavar="FILE",
        help="file with the passphrase of the private key on its first line (default: the environment variable "
        "QUARTERMAP_PASSPHRASE, or what is typed in a terminal)",
    )
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Sign, or make keys, and say what was written.

    Raises:
        InputError: if the options do not go together.
        QuartermapError: if the bundle cannot be signed, or the keys cannot be made.
    """
    if options.new_key is not None:
        if options.bundle is not None:
            raise InputError("--new-key makes keys and signs nothing; sign with --key afterwards")
        make_key(options)
        return
    if options.bundle is None:
        raise InputError("there is no bundle to sign; name its folder")
    if options.encrypt:
        raise InputError("--encrypt is for --new-key; how a key is kept is decided when it is made")
    from quartermap_deploy.signing import sign_bundle

    signed = sign_bundle(options.bundle, options.key, lambda: _passphrase(options, options.key))
    values = {"bundle": signed.path, "key": signed.key, "signers": list(signed.signers)}
    if options.json:
        print_json(values)
    elif not options.quiet:
        others = [key for key in signed.signers if key != signed.key]
        kept = {"also signed by": f"{', '.join(others)} (not checked)"} if others else {}
        show(facts("signed", {"bundle": signed.path, "by the key": signed.key, **kept}))


def make_key(options: argparse.Namespace) -> None:
    """Make a pair of keys, and say where they are."""
    from quartermap_deploy.signing import new_key

    passphrase = _given_passphrase(options)
    if passphrase is None and options.encrypt:
        passphrase = _typed(f"Passphrase for {printable(options.new_key)}: ")
        if passphrase != _typed("The same again: "):
            raise TrustError("the two passphrases differ; nothing was written")
    made = new_key(options.new_key, passphrase)
    if options.json:
        print_json(
            {"private": made.private, "public": made.public, "key": made.key, "encrypted": made.encrypted}
        )
    elif not options.quiet:
        kept = "encrypted" if made.encrypted else "not encrypted"
        show(
            facts(
                "new keys",
                {
                    "private": f"{printable(made.private)}, {kept}; keep it to yourself",
                    "public": f"{printable(made.public)}, for --require-signature",
                    "id": made.key,
                },
            )
        )


def _passphrase(options: argparse.Namespace, key: Path) -> bytes:
    """The passphrase of an encrypted key."""
    given = _given_passphrase(options)
    return _typed(f"Passphrase of {printable(key)}: ") if given is None else given


def _given_passphrase(options: argparse.Namespace) -> bytes | None:
    """The passphrase of the file that was named, or of the environment; None if there is none."""
    if options.passphrase_file is None:
        value = os.environ.get(PASSPHRASE_VARIABLE)
        return os.fsencode(value) if value else None
    from quartermap_deploy.signatures import read_key_file

    first = read_key_file(options.passphrase_file).split(b"\n", 1)[0].removesuffix(b"\r")
    if not first:
        raise TrustError(
            f"the first line of {printable(options.passphrase_file)} is empty; expected a passphrase"
        )
    return first


def _typed(prompt: str) -> bytes:
    """What is typed in the terminal, unseen."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise TrustError(
            "a passphrase is needed, and there is no terminal to ask in; give --passphrase-file, or set the "
            f"environment variable {PASSPHRASE_VARIABLE}"
        )
    try:
        return os.fsencode(getpass.getpass(prompt))
    except EOFError:
        raise TrustError("no passphrase was typed") from None
