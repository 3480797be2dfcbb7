"""The page at /: one document that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from quartermap_deploy.frontend.node_names import read_name
from quartermap_deploy.serving.startup import Plan
from quartermap_deploy.tables.words import worst_error


class Page:
    """The page for one bundle.

    Attributes:
        html: the document.
        headers: what goes with it; nothing but its own script and style may be used by it.
    """

    def __init__(self, plan: Plan) -> None:
        template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        # A closing tag in a string must not end the script that holds it.
        values = json.dumps(page_values(plan)).replace("<", "\\u003c")
        document = template.replace("{{values}}", values)
        self.html = document.encode()
        script, style = (_source(document, tag) for tag in ("script", "style"))
        policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src blob: data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}


def page_values(plan: Plan) -> dict[str, object]:
    """Return what the page shows of a bundle."""
    manifest, report = plan.bundle.manifest, plan.bundle.report
    return {
        "name": plan.model.name,
        "shows": None if plan.images is None else plan.images.shows,
        "image_model": None if plan.images is None else plan.images.description.name,
        "no_images": plan.no_images,
        "title": manifest["model"]["title"],
        "properties": dict(plan.model.properties),
        "inputs": manifest["inputs"],
        "outputs": manifest["outputs"],
        "plan": manifest["plan"],
        "totals": manifest["totals"],
        "blocks": [
            {key: block[key] for key in ("index", "stage", "pruned", "map_size", "scanned_size", "tokens")}
            for block in manifest["blocks"]
        ],
        "changed": None if plan.bundle.changed is None else plan.bundle.name,
        "parity": {
            "passed": report["passed"],
            "worst": worst_error(report),
            "tolerance": report["tolerance"]["relative"],
            "block_tolerance": report["tolerance"]["block"],
            "element_type": report["tolerance"]["element_type"],
            "cases": [case["name"] for case in report["cases"]],
            "errors": block_errors(report),
        },
        "max_batch": plan.model.max_batch,
        "workers": plan.workers,
        "target": plan.target,
    }


def block_errors(report: Mapping[str, Any]) -> list[dict[str, object]]:
    """Return the worst error of the scans and of the output of every block, over all cases.

    Returns:
        For each scan or output that was compared: `block`, `scan` (whether it is one), `error` (None where the two
        could not be compared), `passed`.
    """
    worst: dict[tuple[int, bool], list[Mapping[str, Any]]] = {}
    for case in report["cases"]:
        for output in case["outputs"]:
            if (name := read_name(output["name"])) is not None:
                worst.setdefault((name.block, name.scan), []).append(output)
    return [
        {
            "block": block,
            "scan": scan,
            "error": None
            if any(one["relative_error"] is None for one in found)
            else max(one["relative_error"] for one in found),
            "passed": all(one["passed"] for one in found),
        }
        for (block, scan), found in sorted(worst.items())
    ]


def _source(document: str, tag: str) -> str:
    """Return the hashes by which a content security policy allows the elements of a document."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", document, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
