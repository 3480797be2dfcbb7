"""The summary of a bundle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quartermap_deploy.tables.layout import with_verdict
from quartermap_deploy.tables.words import count_text, error_text, plan_text, weights_text, worst_error

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.tensor_info import TensorInfo


def bundle_facts(bundle: Bundle) -> dict[str, object]:
    """Return the summary of a bundle, for `facts`."""
    manifest, totals, graph = bundle.manifest, bundle.manifest["totals"], bundle.manifest["graph"]
    pruned = [block["index"] for block in manifest["blocks"] if block["pruned"]]
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    tolerance = bundle.report["tolerance"]
    cases = bundle.report["cases"]
    checks = sum(len(case["outputs"]) for case in cases)
    return {
        "parity": with_verdict(
            bundle.report["passed"],
            f"{checks} outputs in {len(cases)} cases, worst error {error_text(worst_error(bundle.report))} of the "
            f"largest value, tolerance {tolerance['relative']:.0e} ({tolerance['element_type']})",
        ),
        "pruned": f"blocks {', '.join(map(str, pruned))} of {len(manifest['blocks'])}"
        if pruned
        else "nothing",
        "plan": plan_text(manifest["plan"]),
        "tokens scanned": f"{totals['tokens']:,}{_of(totals['tokens'], totals['tokens_unpruned'])}",
        "FLOPs": f"{count_text(totals['flops'])}{_of(totals['flops'], totals['flops_unpruned'])}",
        "nodes": f"{graph['nodes']}, as exported {graph['before']['nodes']}",
        "weights": weights_text(manifest["model"]),
        "inputs": _values_text(bundle.inputs),
        "outputs": _values_text(bundle.outputs),
        "targets": ", ".join(manifest["targets"]),
        "size": f"{size / 1e6:.1f} MB in {len(manifest['files']) + 1} files",
        "where": bundle.path,
    }


def _values_text(values: Iterable[TensorInfo]) -> str:
    return ", ".join(f"{value.name} ({', '.join(map(str, value.shape))})" for value in values)


def _of(part: int, whole: int) -> str:
    return "" if part == whole else f", {part / whole:.0%} of the unpruned model's"
