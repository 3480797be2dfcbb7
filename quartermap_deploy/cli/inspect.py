"""`quartermap inspect`: what a bundle holds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.common import (
    add_bundle_argument,
    add_command,
    add_output_options,
    bundle_facts,
    bundle_json,
    count_text,
    facts,
    print_json,
    show,
    size_text,
    table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from quartermap_deploy.cli.common import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "inspect",
        run,
        summary="show what a bundle holds: block map, operators, passes, files",
        description="""
            Show what a bundle holds: which blocks are pruned and what that saves, the operators of the graph before
            and after the passes, what each pass changed, and the versions and files behind it. First the files and
            the graph's operators are checked against the manifest, and the graph by onnx.checker. Nothing is run.

            Tokens are the positions that a block's scan walks for one image, over its four directions. FLOPs are
            multiply-accumulates of one image, a pruned block in its canonical form; the passes may save more.
            """,
        examples="""
            quartermap inspect bundles/vmamba_digits_k3
            quartermap inspect bundles/vmamba_digits_k3 --json | jq '.manifest.totals'
            """,
    )
    add_bundle_argument(parser)
    add_output_options(parser, quiet=False)


def run(options: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
        BundleError: if the bundle is damaged.
    """
    from quartermap_deploy.bundle import load_bundle

    bundle = load_bundle(options.bundle)
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
    totals = manifest["totals"]
    rows: list[tuple[object, ...]] = [
        (
            block["index"],
            block["stage"],
            size_text(block["map_size"]),
            size_text(block["scanned_size"]),
            "yes" if block["pruned"] else "",
            f"{block['tokens']:,}",
            _share(block["tokens"], block["tokens_unpruned"]),
            count_text(block["flops"]),
            _share(block["flops"], block["flops_unpruned"]),
        )
        for block in manifest["blocks"]
    ]
    headings = ["block", "stage", "map", "scanned", "pruned", ">tokens", ">of", ">FLOPs", ">of"]
    result = table("blocks", headings, rows)
    result.add_section()
    result.add_row(
        "model",
        "",
        "",
        "",
        str(sum(block["pruned"] for block in manifest["blocks"])),
        f"{totals['tokens']:,}",
        _share(totals["tokens"], totals["tokens_unpruned"]),
        count_text(totals["flops"]),
        _share(totals["flops"], totals["flops_unpruned"]),
    )
    return result


def operator_table(graph: dict[str, Any]) -> Table:
    """Return the operators of the main graph as exported and after the passes."""
    before, after = graph["before"]["operators"], graph["operators"]
    names = sorted({*before, *after}, key=lambda name: (-after.get(name, 0), name))
    rows = [(name, before.get(name, 0), after.get(name, 0), _change(before, after, name)) for name in names]
    result = table("operators of the main graph", ["operator", ">before", ">after", ">change"], rows)
    result.add_section()
    change = graph["nodes"] - graph["before"]["nodes"]
    result.add_row("all", str(graph["before"]["nodes"]), str(graph["nodes"]), f"{change:+}" if change else "")
    return result


def pass_table(passes: list[dict[str, Any]]) -> Table:
    """Return what each pass changed, and what it refused."""
    rows: list[tuple[object, ...]] = []
    for entry in passes:
        lines = [*entry["changed"]]
        lines += [f"block {block}: left as it was, {reason}" for block, reason in entry["refused"].items()]
        rows += [
            (entry["name"] if first == 0 else "", line)
            for first, line in enumerate(lines or ["nothing to do"])
        ]
    return table("passes", ["pass", "what it did"], rows or [("none", "nothing is pruned")])


def _share(part: int, whole: int) -> str:
    return "" if part == whole else f"{part / whole:.0%}"


def _change(before: dict[str, int], after: dict[str, int], name: str) -> str:
    change = after.get(name, 0) - before.get(name, 0)
    return f"{change:+}" if change else ""
