"""`quartermap native`: build the CPU library of the scan, check it, and list what there is of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.options import add_output_options
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import file_or_folder, words
from quartermap_deploy.errors import InputError
from quartermap_deploy.plain_text import printable
from quartermap_deploy.tables.layout import facts, table

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers
    from quartermap_deploy.native.cpu_library import CpuLibrary


def add_parser(subparsers: Subparsers) -> None:
    """Add the command and its subcommands."""
    parser = add_command(
        subparsers,
        "native",
        lambda options: parser.print_help(),
        summary="build or check the CPU library, which makes scans faster",
        description="""
            The CPU library: the selective scan for x86-64 (AVX-512, AVX2, or neither) and ARM (NEON), as operators of
            ONNX Runtime. It makes models faster and is never needed: every bundle runs in plain ONNX Runtime too.

            `build` compiles it in seconds with a C++17 compiler and nothing else; `check` says which library is used
            here, or whether a certain one fits; `list` shows what was built. A library is looked for in the environment
            variable QUARTERMAP_NATIVE, in the installed wheel, and in your own cache, which `build` fills and nobody
            else may write to. Looking for one never builds one. QUARTERMAP_NATIVE=0 turns it off.
            """,
        examples="""
            quartermap native build
            quartermap native check
            QUARTERMAP_NATIVE=0 quartermap bench bundles/vmamba_digits
            """,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="native_command")
    _add_build(commands)
    _add_check(commands)
    _add_list(commands)


def _add_build(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "build",
        run_build,
        summary="compile the CPU library",
        description="""
            Compile the library. Needs GCC or Clang with C++17 (GCC 12 and Clang 14 were tried): the one that the
            environment variable CXX names, or the first of c++, g++ and clang++. What was built before, from the same
            sources by the same compiler, is not built again. The library runs on every processor of this kind, and
            takes the widest vectors that it finds there.

            --cuda builds the CUDA library, with nvcc: the scans of maps as an operator of ONNX Runtime's CUDA provider,
            which sessions take from your own cache, or from the path that the environment variable
            QUARTERMAP_NATIVE_CUDA names. It is built and checked without a GPU.
            """,
        examples="""
            quartermap native build
            CXX=clang++ quartermap native build
            quartermap native build --cuda                    # for sessions with --device cuda
            quartermap native build --out lib              # to ship it with a program of yours: docs/native.md
            """,
    )
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="build the CUDA library in its place: the operator for ONNX Runtime's CUDA provider, which needs nvcc and "
        "CMake, and minutes (default: the CPU library)",
    )
    parser.add_argument(
        "--cuda-architectures",
        type=words,
        default=(),
        metavar="80,90",
        help="of --cuda, the GPUs (default: all that the kernels and nvcc know)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=file_or_folder,
        metavar="DIR",
        help="folder for the library, which then has to be named in QUARTERMAP_NATIVE (default: your own cache, where "
        "it is found)",
    )
    add_output_options(parser)


def _add_check(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "check",
        run_check,
        summary="say which CPU library is used, or whether one fits",
        description="""
            Without LIBRARY, say which library is used here, and what was passed over and why; with it, whether that one
            fits this release, this platform and this processor. Loading a library runs code of it: check what you
            trust. Exits with 2 if none fits, or if QUARTERMAP_NATIVE names one that does not.
            """,
        examples="""
            quartermap native check
            quartermap native check lib/libquartermap_cpu.so --json
            """,
    )
    parser.add_argument(
        "library",
        type=file_or_folder,
        nargs="?",
        metavar="LIBRARY",
        help="a library that `quartermap native build` made (default: the one that is found)",
    )
    add_output_options(parser)


def _add_list(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "list",
        run_list,
        summary="show the CPU libraries that were built here",
        description="""
            Show the libraries in your own cache, the newest first. Those of other sources than this installation's stay
            there for other installations, and are not loaded. The folder may be removed at any time.
            """,
        examples="quartermap native list",
    )
    add_output_options(parser, quiet=False)


def run_build(options: argparse.Namespace) -> None:
    """Build the library and check it.

    Raises:
        InputError: if an option of the CUDA library is given without --cuda.
    """
    from quartermap_deploy.native.cpu_build import build_cpu_library
    from quartermap_deploy.native.cpu_library import load_cpu_library

    progress = make_progress(options)
    if options.cuda:
        _build_cuda(options)
        return
    if options.cuda_architectures:
        raise InputError("--cuda-architectures is of the CUDA library; add --cuda, or leave it out")
    path = build_cpu_library(options.out, progress=progress)
    with progress.step("checking the library"), results_only():
        library = load_cpu_library(path, "built here")
    _print(library, options, ())


def _build_cuda(options: argparse.Namespace) -> None:
    """Build the CUDA library and check it, as far as that is done without a GPU."""
    from quartermap_deploy.native.cuda_library import build_cuda_library, load_cuda_library

    progress = make_progress(options)
    path = build_cuda_library(options.out, options.cuda_architectures, progress=progress)
    with progress.step("checking the library"), results_only():
        library = load_cuda_library(path)
    rows = {"library": library.path, "CUDA": library.cuda, "architectures": library.architectures}
    if options.json:
        print_json(rows)
    elif not options.quiet:
        show(facts(None, rows))


def run_check(options: argparse.Namespace) -> None:
    """Check a library, or say which is found.

    Raises:
        PluginError: if none fits.
    """
    from quartermap_deploy.native.cpu_library import (
        find_cpu_library,
        load_cpu_library,
        named_and_passed_over,
    )
    from quartermap_deploy.native.errors import PluginError

    if options.library is not None:
        with results_only():
            library = load_cpu_library(options.library)
        _print(library, options, ())
        return
    found = find_cpu_library()
    if found.library is not None:
        wrong = named_and_passed_over(found)
        _print(found.library, options, found.refused, with_refused=not wrong)
        if wrong:
            raise PluginError(str(found.warning))
        return
    if options.json:
        print_json(found.to_dict())
    reasons = [reason for _, reason in found.refused] or [found.summary]
    raise PluginError("\n".join(["no CPU library is used here:", *reasons]))


def run_list(options: argparse.Namespace) -> None:
    """Print what is in the cache."""
    from quartermap_deploy.native.cpu_build import built_folder, every_built

    folder, found = built_folder(), every_built()
    if options.json:
        print_json({"folder": folder, "libraries": [library.to_dict() for library in found]})
    elif not found:
        show(f"There is no library in {printable(folder)}; `quartermap native build` makes one.")
    else:
        rows = [
            (
                library.path.parent.name,
                "this installation's" if library.fits else "other",
                "whole" if library.whole else "damaged, or of an earlier release",
                library.built,
            )
            for library in found
        ]
        show(table(f"in {folder}", ["folder", "sources", "state", "when"], rows))


def _print(
    library: CpuLibrary,
    options: argparse.Namespace,
    refused: tuple[tuple[str, str], ...],
    *,
    with_refused: bool = True,
) -> None:
    """Print what a library says about itself, and, in JSON always, what was passed over."""
    if options.json:
        # The same keys whether a library was named or found.
        from quartermap_deploy.native.cpu_library import CpuSearch, summary

        print_json(CpuSearch(library, refused, summary(library)).to_dict())
        return
    if options.quiet:
        return
    contract = library.contract
    rows: dict[str, Any] = {
        "library": library.path,
        "comes from": library.origin,
        "release": contract["release"],
        "operators": ", ".join(contract["operators"]),
        "element types": ", ".join(contract["element_types"]),
        "compiled by": f"{contract['compiler']}, for {contract['processor']}",
        "instruction sets": ", ".join(contract["instruction_sets"]),
        "used here": library.instruction_set,
    }
    show(facts(None, rows))
    if refused and with_refused:
        show("", table("passed over", ["what", "why"], refused))
