"""The page at /: one document that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources

from quartermap_deploy.serving.startup import Plan


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
        "image_model": plan.image_model.name,
        "title": manifest["model"]["title"],
        "properties": dict(plan.model.properties),
        "input": manifest["input"],
        "output": manifest["output"],
        "plan": manifest["plan"],
        "totals": manifest["totals"],
        "blocks": [
            {key: block[key] for key in ("index", "stage", "pruned", "map_size", "scanned_size", "tokens")}
            for block in manifest["blocks"]
        ],
        "parity": {
            "passed": report["passed"],
            "tolerance": report["tolerance"]["relative"],
            "block_tolerance": report["tolerance"]["block"],
            "element_type": report["tolerance"]["element_type"],
            "cases": [
                {
                    "name": case["name"],
                    "outputs": [
                        {key: output[key] for key in ("name", "relative_error", "passed")}
                        for output in case["outputs"]
                    ],
                }
                for case in report["cases"]
            ],
        },
        "max_batch": plan.model.max_batch,
        "workers": plan.workers,
        "target": plan.target,
    }


def _source(document: str, tag: str) -> str:
    """Return the hashes by which a content security policy allows the elements of a document."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", document, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
