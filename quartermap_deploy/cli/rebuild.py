"""`quartermap rebuild`: make the engines of a bundle again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.options import add_bundle_argument, add_output_options, add_plugin_option
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import bundle_json, print_json, results_only, show, signatures_dropped
from quartermap_deploy.tables.layout import facts, with_verdict
from quartermap_deploy.tables.words import error_text
from quartermap_deploy.targets.tensorrt.checks import SIXTEEN_BITS

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "rebuild",
        run,
        summary="make a bundle's engines again, for this machine",
        description="""
            Make the engines of a bundle again from its portable model: after another version of TensorRT, on another
            GPU, with another plugin, or where an engine file is damaged. The engines keep their options. Where there is
            a GPU that an engine is for, it is run and compared with the golden outputs. The bundle changes only when
            everything went well; its signatures then go.
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
        help="build for this target alone, also one that the bundle has no engine for yet (default: every engine "
        "that it has)",
    )
    add_plugin_option(parser)
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Rebuild, then print what was built.

    Raises:
        QuartermapError: if an engine cannot be built.
    """
    from quartermap_deploy.rebuild import rebuild_bundle

    with signatures_dropped(options.bundle), results_only():
        bundle = rebuild_bundle(
            options.bundle, options.target, plugin=options.plugin, progress=make_progress(options)
        )
    engines = engines_of(bundle, options.target)
    for name, entry in engines.items():
        for warning in engine_warnings(name, entry):
            message("warning", warning)
    if options.json:
        print_json(bundle_json(bundle))
    elif not options.quiet:
        for name, entry in engines.items():
            show(facts(name, engine_facts(entry)), "")


def engines_of(bundle: Bundle, target: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the manifest entries of a bundle's engines, all or that of one target, by target."""
    entries = bundle.manifest["targets"]
    return {name: entry for name, entry in entries.items() if "build" in entry and target in (None, name)}


def engine_warnings(target: str, entry: dict[str, Any]) -> list[str]:
    """Return what the user should know before believing an engine."""
    build, found = entry["build"], []
    halves = [kind for kind in SIXTEEN_BITS if build["network_types"].get(kind)]
    if halves and not build.get("types_checked"):
        found.append(
            f"the types in the {target} engine could not be read back, so nothing says that it computes in "
            f"{halves[0]}; `quartermap rebuild` on a machine with a GPU asks TensorRT itself"
        )
    if target == "tensorrt-rtx" and entry.get("plugin") and entry.get("parity") is None:
        found.append(
            "this engine of TensorRT for RTX with the plugin was built and read back, and has not run; before it "
            "serves, run `quartermap validate` with --target tensorrt-rtx where the GPU is"
        )
    return found


def _scans(entry: dict[str, Any]) -> str:
    """What became of the scans in an engine."""
    plugin, count = entry.get("plugin"), entry["build"].get("plugins")
    if not plugin:
        return "standard operators"
    number = "" if count is None else f"{count} by "
    return f"{number}the plugin, sha256 {plugin['sha256'][:12]}…"


def engine_facts(entry: dict[str, Any]) -> dict[str, object]:
    """Return the summary of an engine's manifest entry, for `facts`."""
    build, capabilities = entry["build"], entry["compute_capabilities"]
    peak, parity = build["peak_memory_bytes"], entry.get("parity")
    return {
        "engine": entry["file"],
        "TensorRT": entry["version"],
        "for": f"compute capability {', '.join(map(str, capabilities))}",
        "size": f"{build['engine_bytes'] / 1e6:.1f} MB",
        "built in": f"{build['seconds']:.1f} s" + (f", {peak / 1e9:.1f} GB of memory" if peak else ""),
        "layers": build["layers"],
        "scans": _scans(entry),
        "ran here": f"no: {entry.get('not_run') or 'that is not recorded'}"
        if parity is None
        else with_verdict(
            True,
            f"worst error {error_text(parity['worst_relative_error'])} of the largest logit, tolerance "
            f"{parity['tolerance']:.0e}",
        ),
    }
