"""`quartermap inspect`: what a bundle holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.options import add_bundle_argument, add_output_options, add_signature_option
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.results import bundle_json, print_json, show
from quartermap_deploy.report.bundles import BLOCK_COLUMNS, block_rows, operator_rows, pass_rows
from quartermap_deploy.tables.bundle import bundle_facts
from quartermap_deploy.tables.layout import facts, table

if TYPE_CHECKING:
    from rich.table import Table

    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "inspect",
        run,
        summary="show what a bundle holds: block map, operators, passes, files",
        description="""
            Show what a bundle holds: its task, inputs, outputs and class names, how images are prepared for it, where
            its weights come from, which blocks are pruned and what that saves, the operators of the graph before and
            after the passes, what each pass changed and refused, and the versions and files behind it. First the files
            and the graph's operators are checked against the manifest, and the graph by onnx.checker. Nothing is run.

            Tokens are the positions that a block's scans walk for one image, or other entry of a batch, over all their
            directions. FLOPs are multiply-accumulates of the same, a pruned block in its canonical form; the passes may
            save more. A block that scans a sequence has a map of one row.
            """,
        examples="""
            quartermap inspect bundles/vmamba_digits_k3
            quartermap inspect bundles/vmamba_digits_k3 --json | jq '.manifest.totals'
            """,
    )
    add_bundle_argument(parser)
    add_signature_option(parser)
    add_output_options(parser, quiet=False)


def run(options: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
        BundleError: if the bundle is damaged.
    """
    from quartermap_deploy.bundle import load_bundle

    bundle = load_bundle(options.bundle, signed_by=options.signed_by)
    bundle.check_graph()
    if options.json:
        print_json(bundle_json(bundle))
        return
    manifest = bundle.manifest
    title = f"{manifest['model']['title']} ({manifest['model']['name']})"
    files = [
        (name, f"{entry['bytes']:,}", f"{entry['sha256'][:16]}…") for name, entry in manifest["files"].items()
    ]
    parts = (
        facts(title, {**bundle_facts(bundle), "compiled": manifest["created"]}),
        block_map(manifest),
        operator_table(manifest["graph"]),
        pass_table(manifest["passes"]),
        table("files", ["file", ">bytes", "sha256"], files),
        facts("versions", manifest["versions"]),
    )
    for part in parts:
        show(part, "")


def block_map(manifest: dict[str, Any]) -> Table:
    """Return the table of blocks, with the totals below."""
    return _with_total("blocks", BLOCK_COLUMNS, block_rows(manifest))


def operator_table(graph: dict[str, Any]) -> Table:
    """Return the operators of the main graph as exported and after the passes."""
    columns = ["operator", ">before", ">after", ">change"]
    return _with_total("operators of the main graph", columns, operator_rows(graph))


def pass_table(passes: list[dict[str, Any]]) -> Table:
    """Return what each pass changed, and what it refused."""
    return table("passes", ["pass", "what it did"], pass_rows(passes))


def _with_total(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table whose last row is that of the whole, below a line."""
    result = table(title, columns, rows[:-1])
    result.add_section()
    result.add_row(*(str(cell) for cell in rows[-1]))
    return result
