"""Bundles for the tests of `quartermap deploy`, and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import quartermap_deploy as qm
from quartermap_deploy import cli
from quartermap_deploy.bundle import describe_file, write_json
from quartermap_deploy.targets.tensorrt_options import EngineOptions, Profile

MODEL = "vmamba_digits"
PLUGIN = b"\x7fELF, in the place of a plugin library, which deploying never opens"
ENGINE = b"in the place of an engine, which deploying never opens"


def call(*arguments: object) -> tuple[int, str, str]:
    """Run the command line; returns its exit code and what it wrote to the two streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, out.getvalue(), err.getvalue()


def dynamic_bundle() -> Path:
    """The digits model, float32 and of any batch; compiled once in a test run, and not to be changed."""
    return _compiled_once("dynamic", qm.Recipe(MODEL, quartermap=qm.QuarterMap(every=3)))


def static_bundle() -> Path:
    """The digits model for one image at a time, with input and output in float16; likewise."""
    return _compiled_once("static", qm.Recipe(MODEL, dynamic_batch=False, precision="float16", io="same"))


def _compiled_once(name: str, recipe: qm.Recipe) -> Path:
    """Return a bundle that whichever process of the test run asks first compiles."""
    folder = Path(os.environ["QUARTERMAP_TEST_FOLDER"])
    path, lock = folder / f"deploy_{name}", folder / f"deploy_{name}.lock"
    deadline = time.monotonic() + 600
    while not path.exists():
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process was to compile {path}, and did not") from None
            time.sleep(0.5)
            continue
        try:
            qm.compile(recipe, path)
        finally:
            lock.unlink()
    return path


def change_manifest(bundle: Path, **changes: Any) -> None:
    """Replace entries of a manifest, and list the files that are there."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest |= changes
    manifest["files"] = {file.name: describe_file(file) for file in sorted(bundle.iterdir()) if file != path}
    write_json(path, manifest)


def with_engine(
    bundle: Path,
    folder: Path,
    *,
    capability: str = "8.9",
    plugin: Path | None = None,
    profiles: tuple[Profile, ...] = (Profile(),),
    version: str = "10.13.3.9",
    **options: Any,
) -> Path:
    """Copy a bundle and give it an engine of TensorRT, whose file holds nothing that could run."""
    shutil.copytree(bundle, folder)
    (folder / "model.tensorrt.engine").write_bytes(ENGINE + capability.encode())
    engine_options = EngineOptions(profiles=profiles, **options)
    entry = {
        "file": "model.tensorrt.engine",
        "version": version,
        "compute_capabilities": [capability],
        "inputs": {"images": ["batch", 3, 64, 64]},
        "options": engine_options.to_dict(),
        "plugin": None if plugin is None else {"file": plugin.name, **_hash(plugin)},
        "key": "0",
        "build": {"engine_bytes": (folder / "model.tensorrt.engine").stat().st_size},
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    change_manifest(folder, targets={**manifest["targets"], "tensorrt": entry})
    return folder


def _hash(path: Path) -> dict[str, Any]:
    return {"sha256": describe_file(path)["sha256"]}


def write_plugin(folder: Path) -> Path:
    """Write a file in the place of a plugin library."""
    path = folder / "libquartermap_plugin.so"
    path.write_bytes(PLUGIN)
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, folders with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
