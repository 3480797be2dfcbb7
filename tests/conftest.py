"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cpu_builds
import pytest
import quicker_torch
import torch
from hypothesis import HealthCheck, settings

# The same examples at every run and on every machine; `HYPOTHESIS_PROFILE=search` looks for new ones.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("search", settings.get_profile("repeatable"), derandomize=False, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# One thread makes the sums of a run repeatable, and lets several test runs share a machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quicker_torch() -> None:
    """See `quicker_torch`: it takes a sixth off every export."""
    quicker_torch.look_less_for_garbage()
    quicker_torch.read_translations_once()


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests have a store of plugins and caches of their own, as have the processes that they start.

    So they find no CPU library but where they name one in QUARTERMAP_NATIVE.
    """
    cpu_builds.remember_library()
    os.environ["QUARTERMAP_HOME"] = str(tmp_path_factory.mktemp("home"))
    for name in (
        "QUARTERMAP_PLUGIN",
        "QUARTERMAP_NATIVE",
        "QUARTERMAP_NATIVE_CUDA",
        "QUARTERMAP_INSTRUCTION_SET",
    ):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tell `helpers` of a folder that all processes of this test run share; pytest removes it by and by."""
    own = tmp_path_factory.getbasetemp()
    os.environ["QUARTERMAP_TEST_FOLDER"] = str(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture(scope="session", autouse=True)
def _traced_once(_shared_folder: None) -> Iterator[None]:
    """Let torch export each model of `architectures` once in a test run; tests of the exporter call it themselves."""
    from traced_once import merging_once, traced_once

    from quartermap_deploy.exporting import merging
    from quartermap_deploy.sources import architectures

    with (
        mock.patch.object(architectures, "trace", traced_once),
        mock.patch.object(merging, "to_onnx", merging_once),
    ):
        yield


@pytest.fixture(scope="session")
def cpu_library(_own_folders: None, _shared_folder: None) -> Path:
    """A built CPU library; tests that want it skip where there is no C++ compiler."""
    return cpu_builds.library("all")


@pytest.fixture(scope="module")
def natively(_own_folders: None, _shared_folder: None) -> Iterator[None]:
    """For files that name it in `pytestmark`: their scans run by the native operators, where there are some."""
    with cpu_builds.native_where_it_can_be():
        yield


@pytest.fixture(scope="module")
def small_models() -> Iterator[None]:
    """For files that open many sessions and run each once: none plans which values may share memory.

    That takes a third of what opening one takes, and changes no number; where the operators of ours run, it is done.
    """
    from quartermap_deploy.targets.onnxruntime import opening

    options = opening._options

    def without_reuse(threads: int, profile: Path | None, library: Path | None, providers: Any) -> Any:
        made = options(threads, profile, library, providers)
        made.enable_mem_reuse = library is not None
        return made

    with mock.patch.object(opening, "_options", without_reuse):
        yield
