"""The store of plugins, by hash and age."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quartermap_deploy.errors import TrustError
from quartermap_deploy.native import cpu_build, cpu_library, cuda_library, store
from quartermap_deploy.native.errors import PluginError


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_libraries_in_the_store_are_found_by_hash_and_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    assert (
        store.stored_libraries() == []
        and store.newest_built() is None
        and store.find_stored("0" * 64) is None
    )

    def added(data: bytes, how: Any, year: int) -> store.StoredLibrary:
        made = store.add_library(data, "lib.so", how, "somewhere")
        assert made.path.read_bytes() == data and made.path.stat().st_mode & 0o777 == 0o700
        assert made.sha256 == hashlib.sha256(data).hexdigest() == made.path.parent.name
        written = json.loads((made.path.parent / store.ORIGIN_FILE).read_text())
        assert written == {"how": how, "origin": "somewhere", "added": made.added}
        (made.path.parent / store.ORIGIN_FILE).write_text(json.dumps({**written, "added": f"{year}-01-01"}))
        return replace(made, added=f"{year}-01-01")

    middle = added(b"middle", store.BUILT, 2020)
    oldest = added(b"oldest", store.BUILT, 2010)
    newest = added(b"newest", store.INSTALLED, 2030)
    kernels = added(b"kernels", store.KERNELS, 2025)
    same = added(b"same", store.INSTALLED, 2030)
    assert store.stored_libraries() == [
        *(oldest, middle, kernels),
        *sorted((newest, same), key=lambda library: library.sha256),
    ]
    # Only one with the plugin that was built here serves whoever asks for none by name.
    assert store.newest_built() == middle.path
    assert store.find_stored(kernels.sha256) == kernels.path and store.find_stored("0" * 64) is None
    assert kernels.to_dict()["path"] == str(kernels.path)
    # What was changed, or is no library, is passed over.
    newest.path.write_bytes(b"other")
    (same.path.parent / store.ORIGIN_FILE).write_text('{"how": "built"}')
    (tmp_path / "home" / "plugins" / "notes").mkdir()
    assert store.stored_libraries() == [oldest, middle, kernels] and store.find_stored(newest.sha256) is None
    for sha256 in (
        "",
        "g" * 64,
        middle.sha256 + "0",
        middle.sha256[: store.SHORTEST_HASH - 1],
        middle.sha256.upper(),
    ):
        with pytest.raises(PluginError, match=f"is no hash of a library; give {store.SHORTEST_HASH} letters"):
            store.remove_library(sha256)
    for sha256 in ("0" * 64, newest.sha256):
        with pytest.raises(
            PluginError, match=f"no libraries in the store have a hash that begins with {sha256}"
        ):
            store.remove_library(sha256)
    assert store.remove_library(middle.sha256[: store.SHORTEST_HASH]) == middle
    assert not middle.path.parent.exists() and store.newest_built() == oldest.path
    assert store.remove_library(oldest.sha256) == oldest and store.stored_libraries() == [kernels]
    assert store.newest_built() is None
    # One that is there already is described anew, and no draft is left.
    again = store.add_library(b"kernels", "lib.so", store.BUILT, "elsewhere")
    assert store.stored_libraries() == [again] and again.origin == "elsewhere"
    assert not [path for path in (tmp_path / "home" / "plugins").iterdir() if path.name.startswith(".")]


def test_who_has_no_home_has_no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (store, cpu_build, cpu_library, cuda_library):
        monkeypatch.setattr(module, "own_folder", lambda kind: None)
    assert store.stored_libraries() == [] and store.newest_built() is None
    for ask in (store.store_folder, store.open_store, cpu_build.built_folder, cuda_library._cached):
        with pytest.raises(TrustError, match="this user has no home"):
            ask()
    monkeypatch.delenv("QUARTERMAP_NATIVE", raising=False)
    assert not [origin for origin, _ in cpu_library._places([]) if origin == "built here"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders are private by their mode")
def test_a_store_that_others_may_write_to_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    store.add_library(b"one", "lib.so", store.BUILT, "here")
    folder = tmp_path / "home" / "plugins"
    folder.chmod(0o777)
    for ask in (store.stored_libraries, store.newest_built, store.open_store):
        with pytest.raises(TrustError, match="others may write to"):
            ask()
    folder.chmod(0o700)
    assert len(store.stored_libraries()) == 1
    # Neither links nor folders with two libraries are libraries of the store.
    (path,) = (library.path for library in store.stored_libraries())
    (path.parent / "second.so").touch()
    assert store.stored_libraries() == []
    (path.parent / "second.so").unlink()
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    assert store.stored_libraries() == []
