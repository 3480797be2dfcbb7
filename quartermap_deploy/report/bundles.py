"""The sections of a report that a bundle's own files fill: its blocks, parity, operators, passes and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quartermap_deploy.frontend.node_names import read_name
from quartermap_deploy.report.blockmap import block_map
from quartermap_deploy.report.charts import (
    Point,
    Series,
    chart,
    counting_axis,
    logarithmic_axis,
)
from quartermap_deploy.report.parts import Figure, Heading, Note, Part, Section, Table
from quartermap_deploy.tables.bundle import carried_text, execution_text, signed_text
from quartermap_deploy.tables.words import (
    count_text,
    error_text,
    origin_text,
    plan_text,
    preprocessing_text,
    ranges,
    reference_text,
    size_text,
    task_text,
    tensor_text,
    weights_text,
    worst_error,
)

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle

SMALLEST_ERROR = 1e-9
"""Errors below it, none at all among them, are drawn at it: a logarithmic axis has no zero."""


def overview(bundles: Mapping[str, Bundle]) -> Table:
    """Return the table that compares bundles, by their names in the report."""
    rows = []
    for name, bundle in bundles.items():
        manifest = bundle.manifest
        totals = manifest["totals"]
        pruned = [block["index"] for block in manifest["blocks"] if block["pruned"]]
        rows.append(
            (
                name,
                f"{manifest['model']['title']}, {manifest['recipe']['precision']}",
                manifest["task"],
                ranges(pruned) or "none",
                f"{totals['tokens']:,}{share(totals['tokens'], totals['tokens_unpruned'])}",
                f"{count_text(totals['flops'])}{share(totals['flops'], totals['flops_unpruned'])}",
                manifest["graph"]["nodes"],
                f"{_size(bundle) / 1e6:.1f} MB",
                "passed" if bundle.report["passed"] else "FAILED",
                error_text(worst_error(bundle.report)),
            )
        )
    columns = (
        "bundle",
        "model",
        "task",
        "pruned blocks",
        ">tokens scanned",
        ">FLOPs",
        ">nodes",
        ">size",
        "parity",
        ">worst error",
    )
    failed = tuple(i for i, bundle in enumerate(bundles.values()) if not bundle.report["passed"])
    caption = "the bundles; tokens and FLOPs are those of one image, or of another entry of a batch"
    return Table(caption, columns, tuple(rows), marked=failed)


def blocks_section(bundles: Mapping[str, Bundle]) -> Section:
    """Return the block maps."""
    parts: list[Part] = []
    for name, bundle in bundles.items():
        manifest = bundle.manifest
        parts += [
            Heading(name),
            Note(_model_text(bundle)),
            _facts_table(bundle),
            Figure(
                "The blocks of the network in their order. The outline is a block's map, filled is what its scans "
                "walk: all of it, or of a pruned block a lattice of positions, drawn coarser than it is. A block that "
                "scans a sequence has a map of one row. Tokens are the positions that its scans walk for one entry of "
                "a batch, over all their directions.",
                block_map(manifest["blocks"]),
            ),
            Table(
                "sizes, tokens and FLOPs (multiply-accumulates of one entry of a batch) of every block",
                BLOCK_COLUMNS,
                tuple(block_rows(manifest)),
                folded=True,
                marked=tuple(i for i, block in enumerate(manifest["blocks"]) if block["pruned"]),
            ),
        ]
    return Section("blocks", "Models and their blocks", tuple(parts))


def _model_text(bundle: Bundle) -> str:
    manifest = bundle.manifest
    model = manifest["model"]
    plan = plan_text(manifest["plan"])
    return (
        f"{model['title']} ({model['name']}), {origin_text(manifest)}: {model['parameters']:,} parameters, "
        f"{manifest['recipe']['precision']}. {'QuarterMap plan: ' + plan if plan else 'No QuarterMap plan'}."
    )


def _facts_table(bundle: Bundle) -> Table:
    """What the bundle says of its outputs, its inputs, its images, and where its weights come from."""
    manifest = bundle.manifest
    rows = [
        ("task", task_text(manifest)),
        *(("input", tensor_text(item)) for item in manifest["inputs"]),
        *(("output", tensor_text(item)) for item in manifest["outputs"]),
        *(("sizes", f"only with {rule}") for rule in manifest["size_rules"]),
        ("images", preprocessing_text(bundle.preprocessing)),
        ("weights", weights_text(manifest["model"])),
        *(("carries", text) for text in (carried_text(manifest),) if text),
        *(("signed", text) for text in (signed_text(bundle),) if text),
    ]
    return Table("what goes in and comes out", ("what", "value"), tuple(rows))


BLOCK_COLUMNS = ("block", "stage", "map", "scanned", "pruned", ">tokens", ">of", ">FLOPs", ">of", "module")


def block_rows(manifest: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """The rows of the table of blocks, the whole model last."""
    totals = manifest["totals"]
    rows: list[tuple[object, ...]] = [
        (
            block["index"],
            block["stage"],
            size_text(block["map_size"]),
            size_text(block["scanned_size"]),
            "yes" if block["pruned"] else "",
            f"{block['tokens']:,}",
            percent(block["tokens"], block["tokens_unpruned"]),
            count_text(block["flops"]),
            percent(block["flops"], block["flops_unpruned"]),
            block["path"] or "the model itself",
        )
        for block in manifest["blocks"]
    ]
    rows.append(
        (
            "model",
            "",
            "",
            "",
            sum(block["pruned"] for block in manifest["blocks"]),
            f"{totals['tokens']:,}",
            percent(totals["tokens"], totals["tokens_unpruned"]),
            count_text(totals["flops"]),
            percent(totals["flops"], totals["flops_unpruned"]),
            "",
        )
    )
    return rows


# Parity ---------------------------------------------------------------------------------------------------------


def parity_section(
    bundles: Mapping[str, Bundle], more: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> Section:
    """Return the parity of every bundle, and of reports that `quartermap validate --json` printed, by name."""
    parts: list[Part] = []
    for name, bundle in bundles.items():
        parts.append(Heading(name))
        parts += parity_parts(bundle.report)
        if (reference := reference_text(bundle.manifest, bundle.report)) is not None:
            parts.append(Note(f"A reference from the module's own environment: {reference}."))
        if rest := [target for target in bundle.manifest["targets"] if target != bundle.report["target"]]:
            parts.append(
                Note(
                    f"Not compared when the bundle was compiled: {', '.join(rest)}. Prove it on the machine that runs "
                    "it with quartermap validate --target, and give the JSON of that to --results.",
                    reason=True,
                )
            )
        parts += _precision_parts(bundle.report)
    for name, report in more:
        parts += [Heading(f"{name}: quartermap validate"), *parity_parts(report)]
    return Section("parity", "Parity with PyTorch", tuple(parts))


def parity_parts(report: Mapping[str, Any]) -> list[Part]:
    """A sentence, the chart and the table of one parity report."""
    tolerance = report["tolerance"]
    worst = worst_error(report)
    verdict = "passed" if report["passed"] else "FAILED"
    departs = report.get("first_departing_block")
    first = f" Block {departs} is the first that departs." if departs is not None else ""
    about = Note(
        f"Target {report['target']} against {report['reference']}: {verdict}, worst error {error_text(worst)} of the "
        f"largest value; tolerance {tolerance['relative']:.0e} for the outputs"
        + (
            f", {tolerance['block']:.0e} for every scan and block.{first}"
            if tolerance.get("block")
            else f".{first}"
        )
    )
    return [
        about,
        *_native_note(report),
        *_execution_note(report),
        *_parity_chart(report),
        _parity_table(report),
    ]


def _execution_note(report: Mapping[str, Any]) -> list[Part]:
    """What was found of other providers than the CPU's."""
    text = execution_text(report)
    return [] if text is None else [Note(f"Other providers of ONNX Runtime: {text}.")]


def _native_note(report: Mapping[str, Any]) -> list[Part]:
    """What was found of the native operator for CPUs, which takes the place of the scans in the file."""
    native = report.get("native")
    if native is None:
        return []
    if not native["run"]:
        return [Note(f"The native operator did not run there: {native['not_run']}.", reason=True)]
    verdict = "passed" if native["passed"] else "FAILED"
    return [
        Note(
            f"With the native operator ({native['instruction_set']}): {verdict}, worst error "
            f"{error_text(native['worst_relative_error'])} of the largest value."
        )
    ]


def _parity_chart(report: Mapping[str, Any]) -> list[Part]:
    """The worst error of each scan and block over all cases, against what is allowed."""
    worst: dict[str, float] = {}
    for case in report["cases"]:
        for output in case["outputs"]:
            error = output["relative_error"]
            worst[output["name"]] = max(
                worst.get(output["name"], 0.0), float("inf") if error is None else error
            )
    places = list(dict.fromkeys(_place(name) for name in worst))
    if not places:
        return []
    tolerance = report["tolerance"]
    allowed = {_place(name): _allowed(name, tolerance) for name in worst}
    shown = {name: min(max(error, SMALLEST_ERROR), 1.0) for name, error in worst.items()}
    points: dict[str, list[Point]] = {"scan": [], "block": [], "bad": []}
    for name, error in shown.items():
        place, own = _place(name), read_name(name)
        kind = "scan" if own is not None and own.scan else "block"
        said = "cannot be compared" if worst[name] == float("inf") else f"{worst[name]:.1e}"
        # Side by side, as the two are often equal.
        beside = {"scan": -0.16, "block": 0.16 if own is not None else 0.0}[kind]
        at = places.index(place) + 1.0 + beside
        point = Point(at, error, f"{name}: {said}, tolerance {allowed[place]:.0e}")
        points["bad" if worst[name] > allowed[place] else kind].append(point)
    texts = [place.removeprefix("block ") for place in places]
    values = [*shown.values(), *allowed.values()]
    series = [
        Series("the block's scan", tuple(points["scan"]), "circle", "a"),
        Series("what leaves the block, and the outputs", tuple(points["block"]), "diamond", "b"),
        Series("beyond the tolerance", tuple(points["bad"]), "cross", "bad"),
        Series("tolerance", _limit_points(places, allowed), "bar", "limit"),
    ]
    description = (
        f"Worst error of {len(worst)} outputs in {len(report['cases'])} cases: from {min(shown.values()):.1e} to "
        f"{max(shown.values()):.1e}; {len(points['bad'])} beyond the tolerance"
    )
    drawn = chart(
        series,
        counting_axis("block, in the order of the network", texts),
        logarithmic_axis("error, as a share of the largest value", values),
        description,
    )
    why = f"Why this tolerance, in {tolerance['element_type']}: {tolerance['reason']}."
    return [Figure(f"The worst error of every scan and every block over all cases. {why}", drawn)]


def _limit_points(places: Sequence[str], allowed: Mapping[str, float]) -> tuple[Point, ...]:
    return tuple(
        Point(i + 1.0, allowed[place], f"tolerance of {place}: {allowed[place]:.0e}")
        for i, place in enumerate(places)
    )


def _place(output: str) -> str:
    """Where an output stands along the network: its block, or itself if it is the model's."""
    name = read_name(output)
    return output if name is None else f"block {name.block}"


def _allowed(output: str, tolerance: Mapping[str, Any]) -> float:
    own = tolerance.get("block") if read_name(output) is not None else None
    return float(tolerance["relative"] if own is None else own)


def _parity_table(report: Mapping[str, Any]) -> Table:
    cases = [case["name"] for case in report["cases"]]
    cells: dict[str, dict[str, str]] = {}
    failed: set[str] = set()
    for case in report["cases"]:
        for output in case["outputs"]:
            mark = "" if output["passed"] else " FAILED"
            cells.setdefault(output["name"], {})[case["name"]] = error_text(output["relative_error"]) + mark
            if not output["passed"]:
                failed.add(output["name"])
    rows = tuple((name, *(by_case.get(case) for case in cases)) for name, by_case in cells.items())
    return Table(
        "the error of every output in every case, as a share of the largest value of the reference",
        ("output", *(f">{case}" for case in cases)),
        rows,
        folded=True,
        marked=tuple(i for i, name in enumerate(cells) if name in failed),
    )


def _precision_parts(report: Mapping[str, Any]) -> list[Part]:
    """What stayed float32 in a 16-bit bundle."""
    precision = report.get("precision")
    if not precision:
        return []
    kept = precision.get("kept_float32") or {}
    return [
        Table(
            f"kept in float32 in this bundle of {precision['type']}",
            ("operator or value", "why"),
            tuple(kept.items()) or (("nothing", ""),),
            folded=True,
        )
    ]


# Operators, passes and files --------------------------------------------------------------------------------------


def graph_section(bundles: Mapping[str, Bundle]) -> Section:
    """Return the operators before and after the passes, and what each pass did."""
    parts: list[Part] = []
    for name, bundle in bundles.items():
        graph = bundle.manifest["graph"]
        parts += [
            Heading(name),
            Table(
                "operators of the main graph, as exported and after the passes",
                ("operator", ">before", ">after", ">change"),
                tuple(operator_rows(graph)),
                folded=len(bundles) > 1,
            ),
            Table("what each pass did", ("pass", "what it did"), tuple(pass_rows(bundle.manifest["passes"]))),
        ]
    return Section("graph", "Operators and passes", tuple(parts))


def operator_rows(graph: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Operators of the main graph as exported and after the passes, the most frequent first, all of them last."""
    before, after = graph["before"]["operators"], graph["operators"]
    names = sorted({*before, *after}, key=lambda name: (-after.get(name, 0), name))
    counts = [(name, before.get(name, 0), after.get(name, 0)) for name in names]
    counts.append(("all", graph["before"]["nodes"], graph["nodes"]))
    return [(name, old, new, f"{new - old:+}" if new != old else "") for name, old, new in counts]


def pass_rows(passes: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """What each pass changed, and what it refused; its name in the first of its rows."""
    rows: list[tuple[object, ...]] = []
    for entry in passes:
        lines = [*entry["changed"]]
        lines += [f"block {block}: left as it was, {reason}" for block, reason in entry["refused"].items()]
        rows += [
            (entry["name"] if first == 0 else "", line)
            for first, line in enumerate(lines or ["nothing to do"])
        ]
    return rows or [("none", "nothing is pruned")]


def files_parts(bundles: Mapping[str, Bundle]) -> list[Part]:
    """The versions that compiled every bundle, and the hashes of its files."""
    packages = list(dict.fromkeys(p for bundle in bundles.values() for p in bundle.manifest["versions"]))
    versions = Table(
        "versions that compiled the bundles",
        ("package", *bundles),
        (
            *((p, *(bundle.manifest["versions"].get(p) for bundle in bundles.values())) for p in packages),
            ("compiled", *(bundle.manifest["created"] for bundle in bundles.values())),
        ),
    )
    files = Table(
        "files of the bundles",
        ("bundle", "file", ">bytes", "sha256"),
        tuple(
            (name, file, f"{entry['bytes']:,}", f"{entry['sha256'][:16]}…")
            for name, bundle in bundles.items()
            for file, entry in bundle.manifest["files"].items()
        ),
        folded=True,
    )
    return [versions, files]


# Text -----------------------------------------------------------------------------------------------------------


def percent(part: float, whole: float) -> str:
    """Return 25% for (1, 4), and nothing where nothing is missing."""
    return "" if part == whole else f"{part / whole:.0%}"


def share(part: float, whole: float) -> str:
    """Return " (25%)" for (1, 4), and nothing where nothing is missing."""
    return "" if part == whole else f" ({part / whole:.0%})"


def _size(bundle: Bundle) -> int:
    return sum(entry["bytes"] for entry in bundle.manifest["files"].values())
