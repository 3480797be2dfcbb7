"""The summary of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quartermap_deploy.carried import carried_libraries
from quartermap_deploy.signatures import SHOWN, read_signatures
from quartermap_deploy.tables.layout import with_verdict
from quartermap_deploy.tables.words import (
    count_text,
    error_text,
    origin_text,
    plan_text,
    preprocessing_text,
    reference_text,
    task_text,
    tensor_text,
    weights_text,
    worst_error,
)
from quartermap_deploy.targets.placement import Placement

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle


def bundle_facts(bundle: Bundle) -> dict[str, object]:
    """Return the summary of a bundle, for `facts`."""
    manifest, totals, graph = bundle.manifest, bundle.manifest["totals"], bundle.manifest["graph"]
    pruned = [block["index"] for block in manifest["blocks"] if block["pruned"]]
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    tolerance = bundle.report["tolerance"]
    cases = bundle.report["cases"]
    checks = sum(len(case["outputs"]) for case in cases)
    native, execution = native_text(bundle.report), execution_text(bundle.report)
    reference, rules = reference_text(manifest, bundle.report), manifest["size_rules"]
    return {
        "model": origin_text(manifest),
        "task": task_text(manifest),
        "parity": with_verdict(
            bundle.report["passed"],
            f"{checks} outputs in {len(cases)} cases, worst error {error_text(worst_error(bundle.report))} of the "
            f"largest value, tolerance {tolerance['relative']:.0e} ({tolerance['element_type']})",
        ),
        **({} if native is None else {"native operator": native}),
        **({} if execution is None else {"providers": execution}),
        **({} if reference is None else {"reference": reference}),
        "pruned": f"blocks {', '.join(map(str, pruned))} of {len(manifest['blocks'])}"
        if pruned
        else "nothing",
        "plan": plan_text(manifest["plan"]),
        "tokens scanned": f"{totals['tokens']:,}{_of(totals['tokens'], totals['tokens_unpruned'])}",
        "FLOPs": f"{count_text(totals['flops'])}{_of(totals['flops'], totals['flops_unpruned'])}",
        "nodes": f"{graph['nodes']}, as exported {graph['before']['nodes']}",
        "weights": weights_text(manifest["model"]),
        "inputs": ", ".join(map(tensor_text, manifest["inputs"])),
        "outputs": ", ".join(map(tensor_text, manifest["outputs"])),
        "images": preprocessing_text(bundle.preprocessing),
        **({"sizes": f"only with {' and '.join(rules)}"} if rules else {}),
        "targets": ", ".join(manifest["targets"]),
        **({"carries": carried} if (carried := carried_text(manifest)) else {}),
        **({"signed": signed} if (signed := signed_text(bundle)) else {}),
        "size": f"{size / 1e6:.1f} MB in {len(manifest['files']) + 1} files",
        "where": bundle.path,
    }


def native_text(report: Mapping[str, Any]) -> str | None:
    """How the native operator did when the bundle was compiled, and whether there is one here; None without scans."""
    from quartermap_deploy.native.cpu_library import find_cpu_library

    native = report.get("native")
    if native is None:
        return None
    then = (
        f"{error_text(native['worst_relative_error'])} of the largest value with {native['instruction_set']}"
        if native["run"]
        else f"not compared when it was compiled: {native['not_run']}"
    )
    return f"{then}; here: {find_cpu_library().summary}"


def execution_text(report: Mapping[str, Any]) -> str | None:
    """How other providers than the CPU's did when the bundle was compiled; None where none was asked for."""
    entry = report.get("execution")
    if entry is None:
        return None
    placement = Placement(tuple(entry["providers"]), entry["nodes"], entry["on_cpu"])
    error = error_text(entry.get("worst_relative_error"))
    return f"{error} of the largest value by {placement}, scans {entry['scans']}, when it was compiled"


def carried_text(manifest: Mapping[str, Any]) -> str:
    """What libraries are among a bundle's files, and that nothing loads them; empty where there are none."""
    return ", ".join(
        f"{library.name}, sha256 {library.sha256[:16]}…: native code, which is not loaded from here"
        + ("; `quartermap plugin install` takes it over, after asking" if library.targets else "")
        for library in carried_libraries(manifest)
    )


def signed_text(bundle: Bundle) -> str:
    """By which keys a bundle says that it is signed; empty where it is not."""
    keys = ", ".join(f"{signature.key[:SHOWN]}…" for signature in read_signatures(bundle.path))
    return f"by {keys}, as it says; --require-signature checks that" if keys else ""


def _of(part: int, whole: int) -> str:
    return "" if part == whole else f", {part / whole:.0%} of the unpruned model's"
