"""`quartermap plugin`: build the TensorRT plugin and its CUDA kernels, and check a built library."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quartermap_deploy.cli.common import (
    add_command,
    add_output_options,
    file_or_folder,
    make_progress,
    print_json,
    results_only,
    show,
    words,
)
from quartermap_deploy.native.build import DEFAULT_OUTPUT
from quartermap_deploy.tables.layout import facts, table

if TYPE_CHECKING:
    from quartermap_deploy.cli.common import Subparsers
    from quartermap_deploy.native.check import PluginReport


def add_parser(subparsers: Subparsers) -> None:
    """Add the command and its two subcommands."""
    parser = add_command(
        subparsers,
        "plugin",
        lambda options: parser.print_help(),
        summary="build or check the TensorRT plugin",
        description="""
            The TensorRT plugin for the selective scan, and the CUDA kernels below it.

            `build` compiles them with CMake and nvcc from the sources that come with this package; `check` says whether
            a built library fits this package and whether a TensorRT of this machine takes it. Neither needs a GPU.
            """,
        examples="""
            quartermap plugin build --tensorrt-include TensorRT-10.13/include
            quartermap plugin check plugin/libquartermap_plugin.so
            """,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="plugin_command")
    _add_build(commands)
    _add_check(commands)


def _add_build(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "build",
        run_build,
        summary="compile the plugin",
        description="""
            Compile the plugin. Needs CMake, a C++ compiler, nvcc (CUDA 12.4 or newer) and TensorRT's headers, 10.7 to
            11.x; the library then serves the TensorRT releases of that major version.
            """,
        examples="""
            quartermap plugin build --tensorrt-include TensorRT-10.13/include
            quartermap plugin build --cuda-architectures 90 --output plugin
            quartermap plugin build --kernels-only
            """,
    )
    parser.add_argument(
        "--output",
        type=file_or_folder,
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help="folder for the library (default: %(default)s)",
    )
    parser.add_argument(
        "--tensorrt-include",
        type=file_or_folder,
        metavar="DIR",
        help="folder with NvInferRuntime.h (default: TENSORRT_ROOT and the usual places)",
    )
    parser.add_argument(
        "--cuda-architectures",
        type=words,
        default=(),
        metavar="LIST",
        help="such as 80,90 (default: all from 80 on that nvcc knows, and PTX for newer GPUs; docs/plugin.md)",
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
            ONNX files. Where TensorRT is installed, its registry loads the library, as it would for an engine.
            """,
        examples="quartermap plugin check plugin/libquartermap_plugin.so",
    )
    parser.add_argument(
        "library", type=file_or_folder, metavar="LIBRARY", help="what `quartermap plugin build` made"
    )
    add_output_options(parser)


def run_build(options: argparse.Namespace) -> None:
    """Build the library and check it."""
    from quartermap_deploy.native.build import BuildOptions, build_plugin
    from quartermap_deploy.native.check import check_plugin

    settings = BuildOptions(
        tensorrt_include=options.tensorrt_include,
        cuda_architectures=options.cuda_architectures,
        kernels_only=options.kernels_only,
    )
    progress = make_progress(options)
    library = build_plugin(options.output, settings, progress=progress)
    with progress.step("checking the library"), results_only():
        report = check_plugin(library)
    _print(report, options)


def run_check(options: argparse.Namespace) -> None:
    """Check a library."""
    from quartermap_deploy.native.check import check_plugin

    with results_only():
        report = check_plugin(options.library)
    _print(report, options)


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
                "TensorRT headers": build.get("tensorrt"),
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
