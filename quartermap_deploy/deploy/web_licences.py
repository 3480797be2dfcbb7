"""The licences of what a site hands to its visitors."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from quartermap_deploy.errors import DeployError
from quartermap_deploy.tables.words import weights_text

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.deploy.web_runtime import WebRuntime

RUNTIME_LICENCES = ("LICENSE", "ThirdPartyNotices.txt")
"""The package of npm has none; ONNX Runtime's package for Python, made from the same sources, has both."""


def write_licences(folder: Path, runtime: WebRuntime, bundle: Bundle) -> None:
    """Write the licences into a new folder, with a list of what they are for.

    Raises:
        DeployError: if a text of a licence is missing here.
    """
    folder.mkdir()
    for name, text in _runtime_licences().items():
        (folder / f"onnxruntime-{name}").write_bytes(text)
    (folder / "quartermap-deploy-LICENSE").write_bytes(_own_licence())
    (folder / "README.txt").write_text(_listed(runtime, bundle), encoding="utf-8")


def _listed(runtime: WebRuntime, bundle: Bundle) -> str:
    model = bundle.manifest["model"]
    return (
        "What this site consists of, and under which licence.\n\n"
        "The page, its style and its scripts: quartermap-deploy, Apache License 2.0, in quartermap-deploy-LICENSE.\n\n"
        f"onnxruntime.mjs and onnxruntime.wasm: ONNX Runtime for browsers, onnxruntime-web {runtime.version}, MIT "
        "License, in onnxruntime-LICENSE; what is in it of others is in onnxruntime-ThirdPartyNotices.txt.\n\n"
        f"model.onnx: the model {model['name']} ({model['title']}). Its weights: {weights_text(model)}. They are under "
        "the licence of whoever made them, which nobody has told quartermap-deploy"
        + (
            ": the Apache License 2.0 for those that come with it.\n"
            if model["weights"] == "included"
            else ".\n"
        )
    )


def _runtime_licences() -> dict[str, bytes]:
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent
    try:
        return {name: (folder / name).read_bytes() for name in RUNTIME_LICENCES}
    except OSError as error:
        raise DeployError(
            f"a site has to carry the licences of ONNX Runtime, and {error.filename} cannot be read "
            f"({error.strerror}); install the package onnxruntime from PyPI"
        ) from error


def _own_licence() -> bytes:
    """The licence of this package: beside its sources, or where pip put it."""
    beside = Path(__file__).resolve().parents[2] / "LICENSE"
    if beside.is_file() and (beside.parent / "pyproject.toml").is_file():
        return beside.read_bytes()
    for file in metadata.files("quartermap-deploy") or ():
        if file.name == "LICENSE":
            return file.locate().read_bytes()  # type: ignore[attr-defined, no-any-return]
    raise DeployError(
        "a site has to carry the licence of quartermap-deploy, and its file LICENSE is missing here; install the "
        "package again"
    )
