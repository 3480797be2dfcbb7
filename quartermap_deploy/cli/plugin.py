"""`quartermap plugin`: build the TensorRT plugin and its CUDA kernels, check a library, and keep a store of them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from quartermap_deploy.cli.options import (
    add_bundle_argument,
    add_output_options,
    add_plugin_option,
    add_signature_option,
)
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show, signatures_dropped
from quartermap_deploy.cli.values import file_or_folder, words
from quartermap_deploy.errors import TrustError
from quartermap_deploy.plain_text import command, printable
from quartermap_deploy.tables.layout import facts, table

if TYPE_CHECKING:
    from rich.table import Table

    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.carried import CarriedLibrary
    from quartermap_deploy.cli.parsing import Subparsers
    from quartermap_deploy.native.check import PluginReport
    from quartermap_deploy.native.store import How, StoredLibrary


def add_parser(subparsers: Subparsers) -> None:
    """Add the command and its two subcommands."""
    parser = add_command(
        subparsers,
        "plugin",
        lambda options: parser.print_help(),
        summary="build, check or install the TensorRT plugin",
        description="""
            The TensorRT plugin for the selective scan, and the CUDA kernels below it.

            `build` compiles them with CMake and nvcc from the sources that come with this package; `check` says whether
            a built library fits this package and whether a TensorRT of this machine takes it. Neither needs a GPU.

            A library is code. It is loaded from where you put it and from nowhere else: the file named with --plugin or
            in the environment variable QUARTERMAP_PLUGIN, or your own store, ~/.local/share/quartermap/plugins, which
            nobody else may write to. `build` puts libraries there, and `install` one that a bundle carries, after
            showing what it is and asking. `list` shows the store, `remove` takes a library out of it, and `carry` puts
            the library that a bundle's engine was built with into the bundle, for others to install.
            """,
        examples="""
            quartermap plugin build
            quartermap plugin list
            quartermap plugin install bundles/tiny_k3 --require-signature vendor.pub.pem
            """,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="plugin_command")
    _add_build(commands)
    _add_check(commands)
    _add_install(commands)
    _add_list(commands)
    _add_remove(commands)
    _add_carry(commands)


def _add_build(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "build",
        run_build,
        summary="compile the plugin",
        description="""
            Compile the plugin. Needs CMake, a C++ compiler and nvcc (CUDA 12.4 or newer), and nothing of TensorRT. The
            library then serves TensorRT 10.7 to 11.x and TensorRT for RTX from 1.7 on.

            How long it takes: 90 seconds of a core for each architecture, divided among your cores. By default it is
            built for this machine's GPU alone; where there is none, for 8.0 with PTX, which runs on every newer GPU
            once the driver has compiled it, at the first load. `--cuda-architectures all` takes eight times as long,
            and is for a library to hand on. Compiled files are kept in your cache, so that a second build, or one
            that was interrupted, takes seconds.
            """,
        examples="""
            quartermap plugin build
            quartermap plugin build --cuda-architectures 90 --out build
            quartermap plugin build --cuda-architectures all
            quartermap plugin build --kernels-only
            """,
    )
    parser.add_argument(
        "-o",
        "--out",
        type=file_or_folder,
        metavar="DIR",
        help="folder for the library, which then has to be named with --plugin (default: your own store, where engines "
        "find it)",
    )
    parser.add_argument(
        "--cuda-architectures",
        type=words,
        default=(),
        metavar="LIST",
        help="such as 80,90, or all: those from 80 on that nvcc knows, with PTX for newer GPUs (default: this "
        "machine's GPU, else 80 with PTX; docs/plugin.md)",
    )
    parser.add_argument(
        "--kernels-only",
        action="store_true",
        help="the CUDA kernels alone, as PyTorch uses them (default: with the TensorRT plugin)",
    )
    add_output_options(parser)


def _add_check(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "check",
        run_check,
        summary="check a built library",
        description="""
            Load a library, list its creators, and compare names, versions and fields with what this package writes into
            ONNX files. Where TensorRT is installed, its registry loads the library, as it would for an engine. Loading
            runs code of the library: check what you trust.
            """,
        examples="quartermap plugin check build/libquartermap_plugin.so",
    )
    parser.add_argument(
        "library", type=file_or_folder, metavar="LIBRARY", help="what `quartermap plugin build` made"
    )
    add_output_options(parser)


def _add_install(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "install",
        run_install,
        summary="put the plugin that a bundle carries into your own store",
        description="""
            Put the plugin library that a bundle carries into your own store, where the engines that were built with it
            find it. First its hash and its origin are shown, and it is asked whether you trust that: TensorRT will load
            the library, which then runs in your process with all your rights. Nothing of it is run by installing.

            Nothing else takes a library from a bundle. Where nobody can be asked, --yes says that you have decided.
            """,
        examples="""
            quartermap plugin install bundles/tiny_k3
            quartermap plugin install bundles/tiny_k3 --require-signature vendor.pub.pem --yes
            """,
    )
    add_bundle_argument(parser)
    parser.add_argument("--yes", action="store_true", help="install without asking (default: ask)")
    add_signature_option(parser)
    add_output_options(parser)


def _add_list(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "list",
        run_list,
        summary="show your own store of plugins",
        description="Show the libraries in your own store: the hash of each, how it came there, and from where.",
        examples="quartermap plugin list",
    )
    add_output_options(parser, quiet=False)


def _add_remove(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "remove",
        run_remove,
        summary="take a plugin out of your own store",
        description="Take a library out of your own store, named by its hash, or by how that begins.",
        examples="quartermap plugin remove 0f3c9a1b",
    )
    parser.add_argument(
        "sha256",
        metavar="SHA256",
        help="its hash, or the first letters of it, as `quartermap plugin list` shows it",
    )
    add_output_options(parser)


def _add_carry(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "carry",
        run_carry,
        summary="put the plugin that a bundle's engine needs into the bundle",
        description="""
            Put the plugin library that a bundle's engine was built with into the bundle, so that others can install it
            from there (`quartermap plugin install`). Nothing loads it from the bundle. As the bundle changes, its
            signatures go: sign it afterwards.
            """,
        examples="quartermap plugin carry bundles/tiny_k3",
    )
    add_bundle_argument(parser)
    add_plugin_option(parser)
    add_output_options(parser)


def object_folder() -> Path | None:
    """Return this user's own folder of compiled files; None where there can be none, as building needs none."""
    from quartermap_deploy.private_folders import make_private, own_folder

    try:
        cache = own_folder("cache")
        return None if cache is None else make_private(make_private(cache) / "plugin-objects")
    except (OSError, TrustError):
        return None


def run_build(options: argparse.Namespace) -> None:
    """Build the library and check it."""
    from quartermap_deploy.native.build import BuildOptions, build_plugin, plugin_sources, usual_architectures
    from quartermap_deploy.native.check import check_plugin
    from quartermap_deploy.native.store import BUILT, KERNELS, add_library, open_store

    every = options.cuda_architectures == ("all",)
    settings = BuildOptions(
        cuda_architectures=() if every else options.cuda_architectures or usual_architectures(),
        kernels_only=options.kernels_only,
    )
    progress = make_progress(options)

    def built(folder: Path) -> tuple[Path, PluginReport]:
        library = build_plugin(folder, settings, progress=progress, cache=object_folder())
        with progress.step("checking the library"), results_only():
            return library, check_plugin(library)

    if options.out is not None:
        _print(built(options.out)[1], options)
        return
    # Before minutes of compiling: whether the store can be used at all.
    open_store()
    with tempfile.TemporaryDirectory(prefix="quartermap-plugin-") as folder:
        library, report = built(Path(folder))
        how: How = KERNELS if options.kernels_only else BUILT
        kept = add_library(library.read_bytes(), library.name, how, f"the sources in {plugin_sources()}")
    _print(dataclasses.replace(report, path=str(kept.path)), options)


def run_check(options: argparse.Namespace) -> None:
    """Check a library."""
    from quartermap_deploy.native.check import check_plugin

    with results_only():
        report = check_plugin(options.library)
    _print(report, options)


def run_install(options: argparse.Namespace) -> None:
    """Show what a bundle carries, ask, and put it into the store.

    Raises:
        TrustError: if the answer is no, or nobody can be asked.
        QuartermapError: if the bundle carries no plugin, or it cannot be stored.
    """
    from quartermap_deploy.bundle import load_bundle
    from quartermap_deploy.carried import read_carried
    from quartermap_deploy.native.build import PLUGIN_LIBRARY
    from quartermap_deploy.native.store import INSTALLED, add_library

    bundle = load_bundle(options.bundle, signed_by=options.signed_by)
    library, data = read_carried(bundle)
    about = _about(bundle, library, len(data), checked=bool(options.signed_by))
    if not options.yes:
        _ask(about)
    origin = f"the bundle {bundle.path.resolve().name}, {bundle.manifest['model']['name']}"
    kept = add_library(data, PLUGIN_LIBRARY, INSTALLED, origin)
    if options.json:
        print_json(kept.to_dict())
    elif not options.quiet:
        show(facts("installed", {**about, "where": kept.path}))


def _about(bundle: Bundle, library: CarriedLibrary, size: int, *, checked: bool) -> dict[str, object]:
    """What there is to know of a library before it is trusted; most of it is what the bundle says."""
    from quartermap_deploy.signatures import read_signatures

    manifest = bundle.manifest
    signers = ", ".join(signature.key for signature in read_signatures(bundle.path))
    if checked:
        signed = "yes, by the keys that were required"
    else:
        signed = f"not checked (by {signers}, as it says)" if signers else "no"
    wanted = manifest["targets"][library.targets[0]]["plugin"]
    return {
        "library": f"{library.name}, {size:,} bytes",
        "sha256": library.sha256,
        "bundle": bundle.path.resolve(),
        "of the model": f"{manifest['model']['title']} ({manifest['model']['name']})",
        "compiled": manifest["created"],
        "built for": f"TensorRT {wanted.get('tensorrt')}, CUDA {wanted.get('cuda')}, as the bundle says",
        "signed": signed,
    }


def _ask(about: dict[str, object]) -> None:
    """Ask in the terminal whether a library is trusted.

    Raises:
        TrustError: if not, or if there is no terminal.
    """
    lines = [f"  {name:<13} {printable(value, None)}" for name, value in about.items()]
    print("\n".join(["This bundle carries native code:", *lines]), file=sys.stderr)
    if sys.stdin is None or not sys.stdin.isatty():
        raise TrustError(
            "nothing was installed, as there is no terminal to ask in; if you trust where the library comes from, "
            "say so with --yes"
        )
    print(
        "TensorRT will load it, and it will run with all your rights. Do you trust where it comes from? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise TrustError("nothing was installed")


def run_list(options: argparse.Namespace) -> None:
    """Print what is in the store."""
    from quartermap_deploy.native.store import store_folder, stored_libraries

    found = stored_libraries()
    if options.json:
        print_json({"folder": store_folder(), "libraries": [library.to_dict() for library in found]})
    elif not found:
        show(f"There is no plugin in {printable(store_folder())}.")
    else:
        show(_library_table(found))


def _library_table(libraries: list[StoredLibrary]) -> Table:
    from quartermap_deploy.signatures import SHOWN

    rows = [
        (f"{library.sha256[:SHOWN]}…", library.path.name, library.how, library.origin, library.added)
        for library in libraries
    ]
    return table(None, ["sha256", "library", "how it came", "from", "when"], rows)


def run_remove(options: argparse.Namespace) -> None:
    """Take a library out of the store."""
    from quartermap_deploy.native.store import remove_library

    gone = remove_library(options.sha256)
    if options.json:
        print_json(gone.to_dict())
    elif not options.quiet:
        show(facts("removed", {"sha256": gone.sha256, "library": gone.path.name, "was": gone.how}))


def run_carry(options: argparse.Namespace) -> None:
    """Put the library of an engine into its bundle."""
    from quartermap_deploy.carried import carried_libraries
    from quartermap_deploy.carrying import carry_library

    with signatures_dropped(options.bundle):
        bundle = carry_library(options.bundle, options.plugin)
    (library,) = (library for library in carried_libraries(bundle.manifest) if library.targets)
    if options.json:
        print_json(library.to_dict())
    elif not options.quiet:
        install = command("quartermap", "plugin", "install", bundle.path)
        show(
            facts(
                "carried",
                {
                    "library": library.name,
                    "sha256": library.sha256,
                    "in": bundle.path,
                    "installed by": install,
                },
            )
        )


def _print(report: PluginReport, options: argparse.Namespace) -> None:
    if options.json:
        print_json(report.to_dict())
        return
    if options.quiet:
        return
    build, contract = report.build, report.contract
    show(
        facts(
            report.path,
            {
                "plugin": f"{contract['namespace']}::{contract['name']} version {contract['version']}",
                "serves TensorRT": ", ".join(build.get("tensorrt") or ["none"]),
                "CUDA": build.get("cuda"),
                "architectures": build.get("architectures"),
                "fields": ", ".join(f"{field['name']} ({field['type']})" for field in contract["fields"]),
                "contract": "as this package writes it",
                "loaded by": report.registry or report.note,
            },
        )
    )
    if report.creators:
        rows = [
            (creator.name, creator.version, creator.namespace, ", ".join(name for name, _ in creator.fields))
            for creator in report.creators
        ]
        show("", table("creators", ["name", "version", "namespace", "fields"], rows))
