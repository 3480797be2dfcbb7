"""The text of docs/evidence.md, made from results alone: the same results give the same page.

Sentences that depend on a number are chosen by that number, so that no run can contradict its own page.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import ReportError
from quartermap_deploy.report.parts import Note, Part, Table, from_rich, markdown
from quartermap_deploy.report.results import (
    accuracy_table,
    kind_of,
    measured_on,
    plan_name,
    search_text,
    shown,
)
from quartermap_deploy.tables import ablation, comparison, search
from quartermap_deploy.tables.words import ranges

Values = Mapping[str, Any]

RESULTS = ("run", "accuracy", "compare", "ablate", "tune")
"""Files that a page is made of; speed_*.json beside them are taken as they come."""

PUBLISHED = (
    ("VMamba-T", 1548, 1628, 82.60, 81.50),
    ("VMamba-S", 811, 890, 83.64, 82.42),
    ("VMamba-B", 590, 654, 83.88, 83.02),
)
"""Model, images/s without and with QuarterMap, top-1 without and with it (arXiv 2507.09514)."""
PUBLISHED_TOME = 0.72
"""Speed of ToMe relative to the unpruned model, from the same paper."""
ALIKE = 0.02
"""Speeds that differ by less are not called different: medians of one run move by as much."""


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results in a folder.

    Raises:
        ReportError: if one is missing, no result of its command, or not complete.
    """
    speeds = sorted(folder.glob("speed_*.json"))
    found: dict[str, Any] = {name: _read(folder / f"{name}.json") for name in RESULTS}
    expected = [(folder / f"{kind}.json", found[kind], kind) for kind in ("compare", "ablate", "tune")]
    expected += [(folder / "accuracy.json", entry, "eval") for entry in found["accuracy"]]
    found["speed"] = [_read(path) for path in speeds]
    expected += [(path, entry, "compare") for path, entry in zip(speeds, found["speed"], strict=True)]
    for path, entry, kind in expected:
        if kind_of(path, entry) != kind:
            raise ReportError(f"{path} holds a result of {kind_of(path, entry)}; expected one of {kind}")
        if entry.get("complete", True) is not True:
            raise ReportError(f"the results {path} are not complete; measure again")
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"there are no results {path}; measure them with: make evidence") from None
    except (OSError, json.JSONDecodeError) as error:
        raise ReportError(f"the results {path} cannot be read: {error}") from error


def page(results: Values) -> str:
    """Return the page in Markdown."""
    sections = [
        _introduction(results),
        _accuracy(results["accuracy"]),
        _comparison(results["compare"]),
        _speeds(results["speed"]),
        _ablations(results["ablate"]),
        _choice(results["tune"]),
        _differences(results),
        _commands(results["run"]),
    ]
    blocks = re.split(r"\n{2,}", "\n".join(sections).strip())
    return "\n\n".join(map(_wrapped, blocks)) + "\n"


def _wrapped(block: str) -> str:
    """A paragraph or list on lines of at most 120 characters; tables and headings stay as they are."""
    lines = block.splitlines()
    if block.startswith(("|", "#")):
        return block
    if not block.startswith("- "):
        return textwrap.fill(" ".join(lines), 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join(
        textwrap.fill(line, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in lines
    )


def _introduction(results: Values) -> str:
    run = results["run"]
    minutes = sum(entry["seconds"] for entry in run["commands"]) / 60
    model, data = results["compare"]["model"], results["compare"]["data"]
    blocks = sum(model["depths"])
    paragraphs = [
        "# Evidence",
        "The QuarterMap paper's evaluation, repeated with this project's commands. `make evidence` wrote this page, in "
        f"{minutes:.0f} minutes, from the results in [docs/evidence/](evidence/); every measurement on it comes from "
        "there, and so do the sentences about it.",
        measured_on(run),
        f"The model is {model['title']} (`{model['name']}`), {blocks} blocks in {len(model['depths'])} stages. It is "
        f"judged on {data['images']} images ({data['name']}) that training never saw, so one image is "
        f"{1 / data['images']:.2%}. Speeds are ratios of times that were taken in turns in one process, as medians "
        "over the rounds, with the quartiles of the rounds in brackets.",
    ]
    return "\n\n".join(paragraphs) + "\n"


# Accuracy -----------------------------------------------------------------------------------------------------------


def _accuracy(entries: Sequence[Values]) -> str:
    table = accuracy_table(entries)
    by_plan: dict[str, list[Values]] = {}
    for entry in entries:
        by_plan.setdefault(plan_name(entry["plan"]), []).append(entry)
    spreads = {
        plan: max(entry["top1"] for entry in found) - min(entry["top1"] for entry in found)
        for plan, found in by_plan.items()
    }
    widest = max(spreads, key=lambda plan: spreads[plan])
    images = entries[0]["images"]
    said = "Every plan has one accuracy, whatever it runs on."
    if spreads[widest] > 0:
        count = round(spreads[widest] * images)
        digits = "one digit" if count == 1 else f"{count} digits"
        said = f"Targets and precisions differ by {digits} of {images} at most ({widest})."
    return f"""
## Accuracy on every target

{said} On a CPU, ONNX Runtime computes float16 mostly in float32, so 16 bits save space, not time (ADR 0007). A bundle's
PyTorch model is in float32.

{markdown(table)}"""


# Comparison ---------------------------------------------------------------------------------------------------------


def _comparison(values: Values) -> str:
    return f"""
## QuarterMap, ToMe and the unpruned model

As the paper's tables 1 and 2: QuarterMap at every k-th block outside the first stage, and ToMe in the same blocks,
merging to as many tokens as QuarterMap keeps. Scan and added are milliseconds, by their shares of recorded
calls.

{_written(shown(comparison.tables(values)))}"""


def _speeds(entries: Sequence[Values]) -> str:
    title = "\n## VMamba-T, S and B at 224×224\n"
    if not entries:
        return f"{title}\nNot measured yet: docs/evidence/ holds no speed_*.json. benchmarks/evidence.py says how.\n"
    rows: list[tuple[object, ...]] = []
    slower = []
    for values in entries:
        for timing in values["timings"]:
            by_name = {entry["name"]: entry for entry in timing["variants"]}
            pruned, tome = by_name.get("QuarterMap k = 3"), by_name.get("ToMe k = 3")
            rows.append(
                (
                    values["model"]["title"],
                    timing["batch"],
                    f"{by_name['unpruned']['median_ms']:,.0f}",
                    *(
                        _speed(by_name.get(name))
                        for name in ("QuarterMap k = 3", "QuarterMap k = 2", "ToMe k = 3")
                    ),
                    _ratio(None if pruned is None else pruned["speed_to_tome"]),
                    _portable(by_name["unpruned"], "median_ms", ",.0f"),
                    _portable(pruned, "speed", ".2f"),
                    *(
                        f"{entry['scan_share']:.0%}" if entry else None
                        for entry in (by_name["unpruned"], pruned)
                    ),
                )
            )
            if pruned is None or tome is None or pruned["speed"] <= 1 or pruned["speed_to_tome"] <= 1:
                slower.append(f"{values['model']['title']} at batch {timing['batch']}")
    table = Table(
        "",
        (
            "model",
            ">batch",
            ">unpruned, ms",
            ">k = 3",
            ">k = 2",
            ">ToMe, k = 3",
            ">k = 3 to ToMe",
            ">portable: unpruned, ms",
            ">portable: k = 3",
            ">in the scans, unpruned",
            ">with k = 3",
        ),
        tuple(rows),
    )
    verdict = (
        "QuarterMap with k = 3 is faster than the unpruned model and than ToMe in every line."
        if not slower
        else f"QuarterMap with k = 3 is not faster than both the unpruned model and ToMe for {'; '.join(slower)}."
    )
    weights = (
        "The weights are newly initialised, which decides no time and makes accuracies meaningless; none are given."
        if all(values["model"]["weights"] == "new" for values in entries)
        else "Weights: " + ", ".join(f"{v['model']['title']} {v['model']['weights']}" for v in entries) + "."
    )
    before = [v["model"]["title"] for v in entries if v["variants"][0].get("scans") is None]
    portable = (
        f"{' and '.join(before)} ran in the portable form alone, before there was a native operator. "
        if before
        else ""
    )
    machines = "\n".join(dict.fromkeys(_where(values) for values in entries))
    return f"""{title}
{verdict} {portable}Speeds are relative to the unpruned model. {weights}

{markdown(table)}
{machines}
"""


def _where(values: Values) -> str:
    return (
        f"{values['model']['title']}: {values['target']}, {values['threads']} threads, {values['repeats']} rounds in "
        f"turns. {measured_on(values)}\n"
    )


def _speed(entry: Values | None) -> str | None:
    if entry is None:
        return None
    low, high = entry["speed_quartiles"]
    return f"{entry['speed']:.2f} × [{low:.2f} – {high:.2f}]"


def _portable(entry: Values | None, key: str, form: str) -> str | None:
    """A number of a variant whose scans ran in the portable form."""
    found = None if entry is None else entry.get("portable")
    return None if found is None else f"{found[key]:{form}}" + (" ×" if key == "speed" else "")


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} ×"


# Ablations ----------------------------------------------------------------------------------------------------------


def _ablations(values: Values) -> str:
    return f"""
## Ablations

As the paper's appendix, each setting beside the unpruned model in one run.

{_written(shown(ablation.tables(values)))}"""


# Choice of blocks ---------------------------------------------------------------------------------------------------


def _choice(values: Values) -> str:
    return f"""
## Choice of blocks

{search_text(values)}

{_against_fixed(values)}

{_written([from_rich(search.fixed_table(values)), from_rich(search.front_table(values))])}"""


def _against_fixed(values: Values) -> str:
    """Say whether what was found is at least as fast and as accurate as every k-th block, on other images."""
    judged = "accuracy" if values["verification"]["unpruned_accuracy"] is not None else "agreement"
    every = [entry["every"] for entry in values["fixed"]]
    worse = [
        k["every"] for k in values["fixed"] if _verified(k["tuned"], judged) < _verified(k["fixed"], judged)
    ]
    slower = [k["every"] for k in values["fixed"] if k["tuned"]["speed"] < k["fixed"]["speed"]]
    images = f"{values['verification']['images']} images of {values['verification']['name']}"
    found = [
        f"For every k from {every[0]} to {every[-1]} the search found a plan that is at least as fast by what its "
        f"blocks save, and of at least the same {judged} on {images}, on which no plan was calibrated."
    ]
    if worse or slower:
        found = [f"On {images}, on which no plan was calibrated:"]
        found += [f"the {judged} of what was found is lower for k = {ranges(worse)}."] if worse else []
        found += (
            [f"what was found is slower by what its blocks save for k = {ranges(slower)}."] if slower else []
        )
    timed = [entry for entry in values["fixed"] if entry["tuned"]["measured"] and entry["fixed"]["measured"]]
    behind = [k["every"] for k in timed if _timed(k["tuned"]) < _timed(k["fixed"]) * (1 - ALIKE)]
    if timed:
        found.append(
            "Timed by itself, it is as fast as every k-th block or faster for every k, to 2 %."
            if not behind
            else f"Timed by itself, it is more than 2 % slower than every k-th block for k = {ranges(behind)}."
        )
    return " ".join(found)


def _verified(entry: Values, judged: str) -> float:
    return float(entry["verification"][judged])


def _timed(entry: Values) -> float:
    return float(entry["measured"]["speed"])


# The paper ----------------------------------------------------------------------------------------------------------


def _differences(results: Values) -> str:
    reasons = [
        *_speed_reasons(results),
        *_accuracy_reasons(results["compare"]),
        *_stage_reasons(results["ablate"]),
        *_form_reasons(results["ablate"]),
        "Not repeated: accuracy on ImageNet-1K and on medical images, which needs weights and data that are not part "
        "of this project (`quartermap eval` and `compare` measure it where both are at hand), and segmentation on "
        "ADE20K, which this project does not do.",
    ]
    listed = "\n".join(f"- {reason}" for reason in reasons)
    return f"""
## Beside the paper

The paper's numbers are from an A100, in eager PyTorch at batch 128, on ImageNet-1K; this project's are from ONNX
Runtime on a CPU. Only ratios can be compared, and these only in their direction. ToMe falls to {PUBLISHED_TOME:.2f} of
the unpruned model's speed in the paper.

{markdown(_beside(results))}
What differs, and why:

{listed}
"""


def _beside(results: Values) -> Table:
    """The published numbers, and those of this project, with k = 3 at the largest batch."""
    rows: list[tuple[object, ...]] = [
        (
            f"{name}, paper",
            128,
            f"{before:,}",
            f"{after:,}",
            f"{after / before:.2f} ×",
            None,
            f"{top1:.2f} %",
            f"{pruned:.2f} %",
            f"{top1 - pruned:.2f}",
        )
        for name, before, after, top1, pruned in PUBLISHED
    ]
    for values in (*results["speed"], results["compare"]):
        timing = values["timings"][-1]
        by_name = {entry["name"]: entry for entry in timing["variants"]}
        accuracies = {entry["name"]: entry["accuracy"] for entry in values["variants"]}
        names = ("unpruned", "QuarterMap k = 3")
        if not all(name in by_name for name in (*names, "ToMe k = 3")):
            continue
        top1 = [100 * accuracies[name]["top1"] if accuracies[name] else None for name in names]
        drop = None if top1[0] is None or top1[1] is None else f"{top1[0] - top1[1]:.2f}"
        rows.append(
            (
                f"{values['model']['title']}, here",
                timing["batch"],
                *(f"{by_name[name]['images_per_second']:,.1f}" for name in names),
                f"{by_name['QuarterMap k = 3']['speed']:.2f} ×",
                f"{by_name['ToMe k = 3']['speed']:.2f} ×",
                *(None if share is None else f"{share:.2f} %" for share in top1),
                drop,
            )
        )
    columns = (
        "model",
        ">batch",
        ">images/s",
        ">QuarterMap",
        ">speed",
        ">speed of ToMe",
        ">top-1",
        ">QuarterMap",
        ">drop",
    )
    return Table("", columns, tuple(rows))


def _speed_reasons(results: Values) -> list[str]:
    """Speed of QuarterMap and ToMe against the published ones, where the paper's models were timed."""
    reasons = []
    published = [after / before for _, before, after, _, _ in PUBLISHED]
    ours = _speeds_of(results["speed"], "QuarterMap k = 3")
    if ours:
        shares = [
            timing["variants"][0]["scan_share"]
            for values in results["speed"]
            for timing in values["timings"]
            if timing["variants"][0]["scan_share"] is not None
        ]
        part = f"{min(shares):.0%} to {max(shares):.0%} of an unpruned call" if shares else "much of a call"
        reasons.append(
            f"Speed of QuarterMap: {_span(ours)} here, {_span(published)} in the paper. Here the scans take {part}, "
            "and hoisting and sinking shorten the convolution before and the projection after them as well, which the "
            "canonical form of the paper does not. Against that, the unpruned model here is no eager PyTorch but a "
            "graph with one operator for each scan."
        )
    tome = _speeds_of(results["speed"], "ToMe k = 3") or _speeds_of([results["compare"]], "ToMe k = 3")
    if not tome:
        return reasons
    where = "" if results["speed"] else ", on the digits"
    direction = "falls less than in the paper"
    if max(tome) < PUBLISHED_TOME - ALIKE:
        direction = "falls further than in the paper"
    elif min(tome) <= PUBLISHED_TOME + ALIKE:
        direction = "falls as in the paper, at least in part"
    if min(tome) > 1 + ALIKE:
        direction = "does not fall below the unpruned model, as it does in the paper"
    reasons.append(
        f"Speed of ToMe: {_span(tome)} here{where}, {PUBLISHED_TOME:.2f} × in the paper; it {direction}. Merging costs "
        "a product of tokens with tokens, a sorting and a gathering, as added ms shows. The scans that it shortens are "
        "slow on a CPU and fast in a kernel for GPUs, so the same work presumably weighs more there. This ToMe merges "
        "in two rounds to exactly QuarterMap's number of tokens; how the paper's does is not known here."
    )
    return reasons


def _speeds_of(entries: Sequence[Values], name: str) -> list[float]:
    return [
        float(variant["speed"])
        for values in entries
        for timing in values["timings"]
        for variant in timing["variants"]
        if variant["name"] == name
    ]


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low} ×" if low == high else f"{low} to {high} ×"


def _accuracy_reasons(values: Values) -> list[str]:
    top1 = {
        entry["name"]: 100 * entry["accuracy"]["top1"] for entry in values["variants"] if entry["accuracy"]
    }
    unpruned, pruned, tome = (top1.get(name) for name in ("unpruned", "QuarterMap k = 3", "ToMe k = 3"))
    if unpruned is None or pruned is None:
        return []
    drop = unpruned - pruned
    published = [before - after for *_, before, after in PUBLISHED]
    inside = min(published) <= drop <= max(published)
    reasons = [
        f"Accuracy of QuarterMap, k = 3: {drop:.2f} points are lost on the digits, {min(published):.2f} to "
        f"{max(published):.2f} in the paper. {'That they agree proves little' if inside else 'No wonder'}: these are "
        "other images and a model of half a million parameters, whose last maps have 4×4 and 2×2 positions."
    ]
    if tome is not None and abs(tome - pruned) > 0.005:
        more = "more" if tome > pruned else "less"
        reasons.append(
            f"Accuracy of ToMe: {tome:.2f} % on the digits, {abs(tome - pruned):.2f} points {more} than QuarterMap in "
            "the same blocks. It averages what it merges, where QuarterMap drops it."
        )
    return reasons


def _stage_reasons(values: Values) -> list[str]:
    group = next((found for found in values["groups"] if found["name"] == "stage"), None)
    if group is None or not all(entry["accuracy"] for entry in group["variants"]):
        return []
    unpruned, *stages = group["variants"]
    lost = {
        entry["name"]: 100 * (unpruned["accuracy"]["top1"] - entry["accuracy"]["top1"]) for entry in stages
    }
    best, worst = min(lost, key=lambda name: lost[name]), max(lost, key=lambda name: lost[name])
    speed = {entry["name"]: entry["speed"] for entry in stages}
    fastest = max(speed, key=lambda name: speed[name])
    said = (
        f"Sensitivity of the stages: pruning {best} alone costs the least ({lost[best]:.2f} points), {worst} alone the "
        f"most ({lost[worst]:.2f}), and {fastest} alone saves the most time ({speed[fastest]:.2f} ×)."
    )
    if worst != "stage 1":
        said += " The paper leaves the first stage out; of this model it is not the most sensitive one."
        if fastest == "stage 1":
            said += " So its rule leaves out what would help most, and `quartermap tune` does not."
    return [said]


def _form_reasons(values: Values) -> list[str]:
    group = next((found for found in values["groups"] if found["name"] == "form"), None)
    if group is None:
        return []
    speed = {entry["name"]: entry["speed"] for entry in group["variants"]}
    if not {"canonical", "hoisted and sunk"} <= speed.keys():
        return []
    ratio = speed["hoisted and sunk"] / speed["canonical"]
    gain = (
        f"{ratio:.2f} times as fast as the canonical form"
        if ratio > 1 + ALIKE
        else "not faster beyond the noise"
    )
    return [
        "Form: the paper prunes in the canonical form. Hoisting and sinking, which the paper does not do, change no "
        f"answer; on this small model the result is {gain}."
    ]


def _commands(run: Values) -> str:
    table = Table(
        "",
        ("command", ">seconds"),
        tuple((f"`{entry['command']}`", f"{entry['seconds']:.0f}") for entry in run["commands"]),
    )
    return f"""
## Commands

{markdown(table)}"""


def _written(parts: Sequence[Part]) -> str:
    """Tables with their captions, and notes, in Markdown."""
    lines = []
    for part in parts:
        if isinstance(part, Table):
            caption = f"{part.caption}:\n\n" if part.caption else ""
            lines.append(f"{caption}{markdown(part)}")
        elif isinstance(part, Note):
            lines.append(f"{part.text}\n")
    return "\n".join(lines)
