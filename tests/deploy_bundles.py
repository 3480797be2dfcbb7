"""Bundles for the tests of `quartermap deploy`, and the command line in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from made_once import made_once

import quartermap_deploy as qm
from quartermap_deploy.bundle import describe_file, write_json
from quartermap_deploy.targets.tensorrt.options import EngineOptions, Profile

MODEL = "vmamba_digits"
PLUGIN = b"\x7fELF, in the place of a plugin library, which deploying never opens"
ENGINE = b"in the place of an engine, which deploying never opens"


def dynamic_bundle() -> Path:
    """The digits model, float32 and of any batch; compiled once in a test run, and not to be changed."""
    recipe = qm.Recipe(MODEL, quartermap=qm.QuarterMap(every=3))
    return made_once("deploy_dynamic", lambda path: qm.compile(recipe, path))


def static_bundle() -> Path:
    """The digits model for one image at a time, with input and output in float16; likewise."""
    recipe = qm.Recipe(MODEL, dynamic_batch=False, precision="float16", io="same")
    return made_once("deploy_static", lambda path: qm.compile(recipe, path))


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
        "outputs": ["logits"],
        "options": engine_options.to_dict(),
        "plugin": None if plugin is None else {"file": plugin.name, **_hash(plugin)},
        "key": "0" * 64,
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
