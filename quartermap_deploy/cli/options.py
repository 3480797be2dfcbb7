"""Options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.values import file_or_folder
from quartermap_deploy.errors import TrustError

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle


def add_output_options(parser: argparse.ArgumentParser, *, quiet: bool = True) -> None:
    """Add --json, --verbose and, to commands that take a while, --quiet."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables (default: tables for people)"
    )
    add_verbose_option(parser)
    if quiet:
        parser.add_argument(
            "-q",
            "--quiet",
            action="store_true",
            help="show no progress and no tables; warnings, errors and --json remain (default: show them)",
        )


def add_verbose_option(parser: argparse.ArgumentParser) -> None:
    """Add --verbose."""
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="with an error, also show where in the code it came from (default: its message alone)",
    )


def add_bundle_argument(parser: argparse.ArgumentParser) -> None:
    """Add the bundle that a command is about."""
    parser.add_argument(
        "bundle", type=file_or_folder, metavar="BUNDLE", help="folder that `quartermap compile` wrote"
    )


def add_plugin_option(options: Any, dest: str = "plugin", default: object = None) -> None:
    """Add the plugin library, to a parser or a group of one.

    Args:
        options: where to.
        dest: the attribute that it sets.
        default: of the attribute.
    """
    options.add_argument(
        "--plugin",
        dest=dest,
        type=file_or_folder,
        metavar="FILE",
        default=default,
        help="plugin library of engines (default: the environment variable QUARTERMAP_PLUGIN, or your own "
        "store, which `quartermap plugin build` fills; never one of a bundle or a recipe)",
    )


def add_like_option(options: Any) -> None:
    """Add the bundle that a file which another tool changed is like, to a parser or a group of one."""
    options.add_argument(
        "--like",
        type=file_or_folder,
        metavar="BUNDLE",
        help="run FILE.onnx, which another tool made of this bundle's model.onnx, with all else as in the bundle: "
        "preprocessing, classes, golden inputs; nothing is written into it (default: what is named is a bundle)",
    )


def open_bundle(path: Path, like: Path | None, signed_by: Sequence[Path]) -> Bundle:
    """Open what a command names: a bundle, or, with --like, a file that another tool changed.

    Args:
        path: the folder, or the file.
        like: what --like says.
        signed_by: what --require-signature says.

    Raises:
        TrustError: if a file is to be signed, or if the bundle is not signed as it must be.
        BundleError: if it cannot be opened.
        InputError: if the file's inputs or outputs are others than the bundle's.
    """
    from quartermap_deploy.bundle import load_bundle
    from quartermap_deploy.like import load_like

    if like is None:
        return load_bundle(path, signed_by=signed_by)
    if signed_by:
        raise TrustError(
            f"{path} is not what was signed: a signature is of a bundle's own files; leave out --require-signature, or "
            "run the bundle itself"
        )
    return load_like(path, like)


def add_signature_option(options: Any, what: str = "the bundle") -> None:
    """Add who must have signed a bundle, to a parser or a group of one.

    Args:
        options: where to.
        what: has to be signed.
    """
    options.add_argument(
        "--require-signature",
        dest="signed_by",
        type=file_or_folder,
        action="append",
        default=[],
        metavar="KEY",
        help=f"PEM file of a public key by which {what} must be signed (`quartermap sign`), which is checked before "
        "anything of it is believed; may be given several times, and then all must have signed (default: none)",
    )


def add_factory_option(options: Any, when: str) -> None:
    """Add what makes a module of the user's, to a parser or a group of one.

    Args:
        options: where to.
        when: for what it is needed.
    """
    options.add_argument(
        "--factory",
        metavar="MODULE:NAME",
        help=f"{when}, what makes the module: package.module:name or path/to/model.py:Net (default: none, as nothing "
        "that a bundle names is ever run)",
    )


def add_run_module_option(options: Any) -> None:
    """Add the consent to run what a recipe file names."""
    options.add_argument(
        "--run-module",
        action="store_true",
        help="run the module that a recipe file names in [module], as you trust who wrote it (default: refuse)",
    )
