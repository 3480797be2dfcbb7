"""Which package of ONNX Runtime is installed, and which one brings a provider.

All of them hold the same module, `onnxruntime`: one at a time can be installed, and where two are, the files of the one
that came last stand, under both names.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from quartermap_deploy.targets.execution import CPU, CUDA, OPENVINO, SUFFIX, TENSORRT, short_names

_PACKAGE = re.compile(
    r"onnxruntime(-(gpu|openvino|directml|rocm|migraphx|qnn|training|trt-rtx))?|ort-.+", re.IGNORECASE
)

BROUGHT_BY = {
    CPU: "onnxruntime",
    CUDA: "onnxruntime-gpu",
    TENSORRT: "onnxruntime-gpu",
    OPENVINO: "onnxruntime-openvino",
    f"Dml{SUFFIX}": "onnxruntime-directml",
    f"QNN{SUFFIX}": "onnxruntime-qnn",
    f"ROCM{SUFFIX}": "onnxruntime-rocm",
    f"MIGraphX{SUFFIX}": "onnxruntime-migraphx",
}
"""The package that brings a provider."""
_WHERE = {
    f"Dml{SUFFIX}": "on Windows",
    f"CoreML{SUFFIX}": "which the package onnxruntime has on macOS alone",
}
_EXTRAS = {"onnxruntime-gpu": "[cuda,cudnn]"}
"""Extras of a package that bring the libraries which its providers load."""


def installed_packages() -> dict[str, str]:
    """Names and versions of the packages that hold the module `onnxruntime` which this process imports."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).resolve().parents[1]
    found = {}
    for package in importlib.metadata.distributions(path=[str(folder)]):
        name = package.metadata["Name"]
        # What was half removed has no name.
        if name and _PACKAGE.fullmatch(name):
            found[name.lower().replace("_", "-")] = package.version
    return dict(sorted(found.items()))


def missing_provider(name: str) -> str:
    """Say that a provider is not in the package that is installed, and how to change that."""
    import onnxruntime

    packages, has = installed_packages(), short_names(onnxruntime.get_available_providers())
    called = " and ".join(f"{package} {version}" for package, version in packages.items())
    called = called or f"ONNX Runtime {onnxruntime.__version__}"
    text = f"{name} is not in the ONNX Runtime that is installed ({called}), which has {has}"
    if name in _WHERE and name not in BROUGHT_BY:
        return f"{text}; it is one {_WHERE[name]}"
    package = BROUGHT_BY.get(name)
    if package is None:
        return f"{text}; install the package of ONNX Runtime that brings it"
    where = f", {_WHERE[name]}" if name in _WHERE else ""
    return f"{text}. It comes with the package {package}{where}: {change_to(package, packages)}"


def change_to(package: str, packages: dict[str, str]) -> str:
    """Say how another package takes the place of those that are installed."""
    others = " ".join(packages) or "onnxruntime"
    return (
        "the packages of ONNX Runtime exclude each other, as all hold the same module, so run "
        f"pip uninstall -y {others}, and then pip install '{package}{_EXTRAS.get(package, '')}'"
    )


def mixture(packages: dict[str, str]) -> str | None:
    """Say what is wrong where several packages hold the module; None where nothing is."""
    if len(packages) < 2:
        return None
    names = " and ".join(packages)
    return (
        f"{names} are both installed and overwrite each other's files; run pip uninstall -y {' '.join(packages)}, and "
        "then pip install the one that you want"
    )


def libraries_of(name: str) -> str | None:
    """Say what a provider of NVIDIA's needs beside its package; None of any other."""
    if name not in (CUDA, TENSORRT):
        return None
    package = BROUGHT_BY[name]
    own = "TensorRT's libraries, " if name == TENSORRT else ""
    return (
        f"It needs an NVIDIA driver, {own}and the libraries of CUDA and cuDNN, in the versions that it names, which "
        f"pip install '{package}{_EXTRAS[package]}' brings"
    )


def describe() -> dict[str, Any]:
    """Return the packages, and what is wrong with them, as plain values for JSON."""
    packages = installed_packages()
    return {"packages": packages, "problem": mixture(packages)}
