"""`quartermap rebuild`: make the engines of a bundle again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quartermap_deploy.cli.common import (
    add_bundle_argument,
    add_command,
    add_output_options,
    bundle_json,
    facts,
    file_or_folder,
    make_progress,
    print_json,
    results_only,
    show,
    terminable,
)

if TYPE_CHECKING:
    from quartermap_deploy.cli.common import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "rebuild",
        run,
        summary="make a bundle's engines again, for this machine",
        description="""
            Make the engines of a bundle again from its portable model: after another version of TensorRT, on another
            GPU, with another plugin, or where an engine file is damaged. The engines keep their options, and the bundle
            changes only when everything went well.
            """,
        examples="""
            quartermap rebuild bundles/vmamba_tiny_k3
            quartermap rebuild bundles/vmamba_tiny_k3 --target tensorrt-rtx
            """,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="build for this target alone (default: every engine that the bundle has)",
    )
    parser.add_argument(
        "--plugin",
        type=file_or_folder,
        metavar="FILE",
        help="plugin library for the target tensorrt (default: the environment variable QUARTERMAP_PLUGIN, or what "
        "`quartermap plugin build` left in ./plugin)",
    )
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Rebuild, then print what was built.

    Raises:
        QuartermapError: if an engine cannot be built.
    """
    from quartermap_deploy.rebuild import rebuild_bundle

    with terminable(), results_only():
        bundle = rebuild_bundle(
            options.bundle, options.target, plugin=options.plugin, progress=make_progress(options)
        )
    if options.json:
        print_json(bundle_json(bundle))
    elif not options.quiet:
        for name, entry in bundle.manifest["targets"].items():
            if "build" in entry and options.target in (None, name):
                show(facts(name, engine_facts(entry)), "")


def engine_facts(entry: dict[str, object]) -> dict[str, object]:
    """Return the summary of an engine's manifest entry, for `facts`."""
    build = entry["build"]
    assert isinstance(build, dict)
    capabilities = entry["compute_capabilities"]
    assert isinstance(capabilities, list)
    peak = build["peak_memory_bytes"]
    return {
        "engine": entry["file"],
        "TensorRT": entry["version"],
        "for": f"compute capability {', '.join(map(str, capabilities))}",
        "size": f"{build['engine_bytes'] / 1e6:.1f} MB",
        "built in": f"{build['seconds']:.1f} s" + (f", {peak / 1e9:.1f} GB of memory" if peak else ""),
        "layers": build["layers"],
    }
