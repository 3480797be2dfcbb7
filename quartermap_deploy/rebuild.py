"""`rebuild_bundle`: make a bundle's engines again from its portable model, for this machine."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from quartermap_deploy.bundle import (
    MANIFEST,
    MODEL,
    Bundle,
    describe_file,
    load_bundle,
    new_bundle,
    read_manifest,
    require_folder,
    verify_file,
    write_json,
)
from quartermap_deploy.carried import carried_libraries
from quartermap_deploy.compiling.targets import check_target
from quartermap_deploy.errors import BundleError, UnknownNameError
from quartermap_deploy.plain_text import command
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets import load_target
from quartermap_deploy.targets.tensorrt.options import EngineOptions
from quartermap_deploy.validation.engines import prove_engine


def rebuild_bundle(
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    options: EngineOptions | None = None,
    plugin: Path | None = None,
    progress: Progress = SILENT,
) -> Bundle:
    """Make engines of a bundle again from its portable model. A signature of the bundle goes, as the bundle changes.

    Args:
        path: the bundle. Its engines may be damaged or missing; its other files must be whole.
        target: the target to build for, also one that the bundle has no engine for yet; None for all engines it has.
        options: how to build; None takes what the engines were built with.
        plugin: the plugin library, whatever the options say; None leaves it to them.
        progress: told about the steps.

    Returns:
        The bundle with its new engines, loaded from disk.

    Raises:
        BundleError: if it is no bundle, has no engine, or its portable model is damaged.
        UnknownNameError: if the target does not exist or has no engine.
        RecipeError: if the target does not take what the bundle was compiled for, such as input in 16 bits.
        ParityError: if a new engine was run and departs from PyTorch by more than the tolerance.
        QuartermapError: of the target, if an engine cannot be built. Then the bundle is what it was before.
    """
    folder = Path(path)
    require_folder(folder)
    manifest = read_manifest(folder)
    entries: dict[str, dict[str, Any]] = manifest["targets"]
    engines = {name: entry["file"] for name, entry in entries.items() if entry.get("file") != MODEL}
    names = list(engines) if target is None else [target]
    if not names:
        raise BundleError(
            f"the bundle {folder} has no engine; name a target to build one for, such as --target tensorrt-rtx"
        )
    modules = {name: load_target(name) for name in names}
    for name, module in modules.items():
        if not hasattr(module, "prepare"):
            raise UnknownNameError(f"the target {name} has no engine: it runs {MODEL} as it is")
    recipe, chosen = Bundle(folder, manifest, {}).recipe(), {}
    for name, module in modules.items():
        wanted = options or _options(manifest, entries.get(name))
        chosen[name] = dataclasses.replace(wanted, plugin=plugin or wanted.plugin)
        check_target(dataclasses.replace(recipe, targets=(name,), engine=chosen[name]), name, module)
    made = {engines[name] for name in names if name in engines}
    with new_bundle(folder, force=True) as draft:
        files = copy_files(folder, draft, {n: e for n, e in manifest["files"].items() if n not in made})
        for name, module in modules.items():
            with progress.step(f"building for {name}"):
                entry = module.build(draft / MODEL, draft, chosen[name], progress=progress)
            proved = prove_engine(
                name,
                module,
                draft,
                entry,
                recipe.precision,
                manifest["golden"],
                advice=lambda name=name: _advice(folder, recipe, name),  # type: ignore[misc]
                plugin=chosen[name].plugin,
                progress=progress,
            )
            entries[name] = {**entry, **proved}
            files[entry["file"]] = describe_file(draft / entry["file"])
        # Carried for an engine that is no more.
        for library in carried_libraries({"targets": entries, "files": files}):
            if not library.targets:
                (draft / library.name).unlink()
                del files[library.name]
        manifest["files"] = dict(sorted(files.items()))
        write_json(draft / MANIFEST, manifest)
        bundle = load_bundle(draft)
    return dataclasses.replace(bundle, path=folder)


def _advice(folder: Path, recipe: Recipe, target: str) -> str:
    """What to do about an engine that departs from PyTorch, as one sentence."""
    if recipe.precision == "float32":
        return "please report this with the recipe."
    line = command("quartermap", "validate", folder, "--localise", "--target", target)
    return f"`{line}` names the block that has to stay in float32."


def _options(manifest: dict[str, Any], entry: dict[str, Any] | None) -> EngineOptions:
    """What an engine was built with, or else what the recipe says."""
    return EngineOptions.from_dict((entry or {}).get("options", manifest["recipe"].get("engine", {})))


def copy_files(folder: Path, draft: Path, files: dict[str, Any]) -> dict[str, Any]:
    """Copy files of a bundle that are what its manifest says; returns what it says."""
    for name, expected in files.items():
        verify_file(folder, name, expected)
        shutil.copyfile(folder / name, draft / name, follow_symlinks=False)
        verify_file(draft, name, expected)
    return dict(files)
