"""`deploy_web`: a bundle as a folder of static files, which run the model in the browser of whoever visits them.

index.html  page.css  page.js …   the page, as it stands in `web_site`
onnxruntime.mjs  onnxruntime.wasm ONNX Runtime for browsers
model.onnx                        the bundle's model, its weights stored in fewer bits
golden.bin                        a golden input and what PyTorch computes for it, which each visitor's browser checks
facts.json                        what the page shows
packed.js  unpack.js              in the place of all that, where the site is also to work when it is opened as a file
licences/                         of all that a visitor is given
_headers                          what the server should send; some services read this file
quartermap-site.json              what is here, and the hash of every file

There is no code on a server, and the page's security policy lets it ask for its own files alone.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.bundle import describe_file, load_bundle, write_json
from quartermap_deploy.deploy.web_facts import Golden, SiteFacts, golden_of, site_facts
from quartermap_deploy.deploy.web_licences import write_licences
from quartermap_deploy.deploy.web_runtime import WebRuntime, find_runtime
from quartermap_deploy.errors import DeployError
from quartermap_deploy.files import FolderKind, check_outside
from quartermap_deploy.passes.store_weights import Storage
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.validation.tolerances import STORED

FORMAT = 1
MARKER = "quartermap-site.json"
SITE = FolderKind("site that quartermap wrote", MARKER, DeployError)
MODEL, RUNTIME, GOLDEN = "model.onnx", "onnxruntime.wasm", "golden.bin"
PARTS = {
    "worker": (
        *(GOLDEN, RUNTIME, MODEL, "facts.json", "onnxruntime.mjs"),
        *("resize.js", "prepare.js", "png.js", "decode.js", "answer.js", "worker.js"),
    ),
    "page": ("facts.json", "pad.js", "page.js"),
}
"""Every file that the worker and the page load, each after those that it names."""
PIECE = 3 << 18
"""Bytes of a piece of what is packed; base64 makes a third more of them."""
POLICY = (
    "default-src 'none'",
    "style-src 'self'",
    "img-src 'self' blob: data:",
    "base-uri 'none'",
    "form-action 'none'",
)
"""What the page may do whatever it was opened from."""
FROM_SERVER = ("script-src 'self' 'wasm-unsafe-eval'", "worker-src 'self'", "connect-src 'self'")
FROM_FILE = (
    "script-src 'self' blob: 'wasm-unsafe-eval'",
    "worker-src blob:",
    "connect-src blob:",
)
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""With the first two, browsers let the page share memory between threads."""
_SOURCES = Path(__file__).parent / "web_site"


@dataclass(frozen=True)
class WebOptions:
    """How a site is written.

    Attributes:
        storage: how weights are stored; see `passes.store_weights`.
        from_file: make it work when it is opened as a file too; then it has one thread everywhere.
        runtime: folder or tarball of the npm package onnxruntime-web; None takes the tested version from the user's
            cache, and has npm fetch it there.
        labels: file with the name of a class on each line, or a set of `data/labels.py`; None takes the bundle's.
        preprocessing: values of the bundle's preprocessing to replace, by name.
        signed_by: PEM files of public keys by all of which the bundle must be signed; see `load_bundle`.
    """

    storage: Storage = "float16"
    from_file: bool = False
    runtime: Path | None = None
    labels: str | Path | None = None
    preprocessing: Mapping[str, Any] | None = None
    signed_by: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Site:
    """A site that was written.

    Attributes:
        path: where it is.
        shows: what visitors see: "classes", "mask", "image" or "tensors".
        storage: how weights are stored.
        error: of the stored model on the golden inputs, as a share of the largest value.
        runtime: version of onnxruntime-web.
        model_bytes: size of the model.
        bytes: size of everything.
        files: every file, relative to the site.
        notes: what the one who publishes it has to know.
    """

    path: Path
    shows: str
    storage: str
    error: float
    runtime: str
    model_bytes: int
    bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def deploy_web(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: WebOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> Site:
    """Write a site that runs a bundle's model in its visitors' browsers.

    Args:
        bundle: folder of the bundle.
        out: folder of the site; it must not exist, unless `force` is given and it is one of ours.
        options: how.
        force: replace a site.
        progress: told about the steps.

    Raises:
        BundleError: if the bundle is none, or is damaged.
        DeployError: if it takes no images of float32, loses too much in the storage that is asked for, or something
            else is in the way; or if the runtime is none or cannot be fetched. Nothing is written then.
        InputError: if it takes no images, or the labels or the preprocessing do not fit.
        MissingDependencyError: if the runtime has to be fetched, and there is no npm.
        TrustError: if it is not signed by those who should have.
    """
    out, options = Path(out), options or WebOptions()
    check_outside(out, [Path(bundle)], DeployError)
    SITE.check_destination(out, force)
    with progress.step("checking the bundle"):
        loaded = load_bundle(bundle, signed_by=options.signed_by)
        facts = site_facts(loaded, options.labels, options.preprocessing)
        golden = golden_of(loaded)
    with progress.step("finding ONNX Runtime for browsers"):
        runtime = find_runtime(options.runtime)
    with SITE.new(out, force) as draft:
        with progress.step(f"storing the weights as {options.storage}"):
            error = facts.write_model(draft / MODEL, options.storage)
        with progress.step("writing the site"):
            _write(draft, facts, golden, runtime, options, error)
    files = tuple(sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()))
    entry = json.loads((out / MARKER).read_text(encoding="utf-8"))
    return Site(
        out,
        facts.shows,
        options.storage,
        error,
        runtime.version,
        entry["model"]["bytes"],
        sum((out / name).stat().st_size for name in files),
        files,
        _notes(options, facts),
    )


def _notes(options: WebOptions, facts: SiteFacts) -> tuple[str, ...]:
    threads = (
        "one thread, as it was written for --from-file too"
        if options.from_file
        else "several threads where the server sends the headers in _headers, else one"
    )
    left = [f"it runs on {threads}"]
    if facts.bundle.manifest["model"]["weights"] != "included":
        left.append(
            "whoever visits the site can keep the model: see that you may hand its weights on, and add their licence "
            "to licences/"
        )
    return tuple(left)


def _write(
    folder: Path,
    facts: SiteFacts,
    golden: Golden,
    runtime: WebRuntime,
    options: WebOptions,
    error: float,
) -> None:
    """Write everything but the model, which is there, into a folder."""
    (folder / GOLDEN).write_bytes(golden.data)
    (folder / RUNTIME).write_bytes(runtime.binary)
    (folder / "onnxruntime.mjs").write_bytes(runtime.script)
    files = {"golden": GOLDEN, "runtime": RUNTIME, "model": MODEL}
    described = {name: describe_file(folder / file) for name, file in files.items()}
    stored = {"as": options.storage, "error": error, "tolerance": STORED[options.storage].relative}
    values = {
        **facts.values(stored, runtime.version),
        "golden": golden.shapes,
        "files": described,
        "stored": stored,
        "threads": not options.from_file,
    }
    write_json(folder / "facts.json", values)
    for name in ("page.css", "start.js", *PARTS["worker"], *PARTS["page"]):
        if (_SOURCES / name).is_file():
            shutil.copyfile(_SOURCES / name, folder / name)
    _write_page(folder, options.from_file)
    write_licences(folder / "licences", runtime, facts.bundle)
    headers = "".join(f"  {name}: {value}\n" for name, value in HEADERS.items())
    (folder / "_headers").write_text(f"/*\n{headers}", encoding="utf-8")
    if options.from_file:
        _pack(folder)
    manifest = facts.bundle.manifest
    written = sorted(file for file in folder.rglob("*") if file.is_file())
    write_json(
        folder / MARKER,
        {
            "format": FORMAT,
            "bundle": {
                "name": facts.bundle.path.absolute().name,
                **{key: manifest.get(key) for key in ("created", "model", "plan", "versions")},
            },
            "runtime": runtime.version,
            "stored": stored,
            "model": described["model"],
            "files": {file.relative_to(folder).as_posix(): describe_file(file) for file in written},
        },
    )


def _write_page(folder: Path, from_file: bool) -> None:
    template = (_SOURCES / "index.html").read_text(encoding="utf-8")
    if from_file:
        scripts = '<script src="packed.js"></script>\n<script src="unpack.js"></script>'
        waiting = "Unpacking. If this line stays, JavaScript is off, or this browser is too old."
    else:
        scripts = '<script type="module" src="page.js"></script>'
        waiting = (
            "If this line stays, JavaScript is off, this browser is too old, or the page was opened as a file: it "
            "needs a web server, such as <code>python -m http.server</code> in its folder."
        )
    policy = "; ".join((*POLICY, *(FROM_FILE if from_file else FROM_SERVER)))
    for name, value in (("policy", policy), ("scripts", scripts), ("waiting", waiting)):
        template = template.replace("{{" + name + "}}", value)
    (folder / "index.html").write_text(template, encoding="utf-8")


def _pack(folder: Path) -> None:
    """Put what the page would fetch into one script, and add the script that takes it out again."""
    with (folder / "packed.js").open("w", encoding="ascii") as file:
        file.write("const PACKED = {\n")
        for reader, names in PARTS.items():
            file.write(f"{reader}: {{\n")
            for name in names:
                file.write(f"{json.dumps(name)}: [\n")
                file.writelines(f'"{piece}",\n' for piece in _pieces((folder / name).read_bytes()))
                file.write("],\n")
            file.write("},\n")
        file.write("};\n")
    for name in {"start.js", *PARTS["worker"], *PARTS["page"]}:
        (folder / name).unlink()
    shutil.copyfile(_SOURCES / "unpack.js", folder / "unpack.js")


def _pieces(data: bytes) -> Iterator[str]:
    # Without the time, so that the same bundle makes the same site.
    packed = gzip.compress(data, 9, mtime=0)
    for start in range(0, len(packed), PIECE):
        yield base64.b64encode(packed[start : start + PIECE]).decode("ascii")
