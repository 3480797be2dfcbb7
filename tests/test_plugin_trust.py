"""Native code runs where the user put it, and from nowhere else: no bundle, recipe or folder can bring a library along.

The library of these attacks touches a file as soon as it is loaded, whatever is asked of it afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_stand_in as stand_in
import toy_bundles
from command_line import Outcome, call
from deploy_bundles import change_manifest
from tensorrt_stand_in import Engines

import quartermap_deploy as qm
from quartermap_deploy import gpu
from quartermap_deploy.errors import EngineError, TrustError
from quartermap_deploy.native import store
from quartermap_deploy.native.contract import CONTRACT
from quartermap_deploy.native.library import inspect
from quartermap_deploy.private_folders import check_private, make_private, own_folder
from quartermap_deploy.rebuild import rebuild_bundle
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.targets.tensorrt.caches import RuntimeCache, TimingCache
from quartermap_deploy.targets.tensorrt.flavour import TENSORRT
from quartermap_deploy.targets.tensorrt.options import EngineOptions
from quartermap_deploy.targets.tensorrt.plugin import WantedLibrary, find_library

ADA = gpu.Gpu("NVIDIA L4", "8.9")
VERSION = "10.7.0"
RECIPE = """
[model]
name = "vmamba_digits"
[targets]
names = ["tensorrt"]
[engine]
plugin = "plugin/libquartermap_plugin.so"
"""
EVIL = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void loaded() {
    if (char const* mark = std::getenv("QUARTERMAP_TEST_MARK")) { std::fclose(std::fopen(mark, "w")); }
}
"""


def _compiled(folder: Path, source: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = folder / "libquartermap_plugin.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture(scope="session")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that says that it is our plugin, and touches a file when it is loaded."""
    build = {"tensorrt": ["10", "11", "rtx"], "cuda": "13.0", "architectures": "89"}
    text = json.dumps({**CONTRACT.to_dict(), "build": build})
    contract = f'extern "C" char const* quartermap_plugin_contract() {{ return R"~({text})~"; }}'
    return _compiled(tmp_path_factory.mktemp("evil"), EVIL + contract)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """A machine with a GPU and TensorRT, as far as this package can tell."""
    monkeypatch.setattr(gpu, "find_gpu", lambda: ADA)
    with stand_in.installed(VERSION, stand_in.public_api("10.7")) as found:
        yield found


@pytest.fixture
def scene(evil: Path, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a stranger sent, and a user who goes into that folder: a bundle, a recipe, and a library in `plugin`.

    The bundle's engine wants the library by its hash, and the bundle carries it too.
    """
    folder, home = tmp_path / "sent", tmp_path / "home"
    (folder / "plugin").mkdir(parents=True)
    # A file of its own for each test: a library that is in the process already runs no constructor again.
    library = shutil.copy(evil, folder / "plugin" / "libquartermap_plugin.so")
    (folder / "evil.toml").write_text(RECIPE)
    bundle = folder / "bundle"
    shutil.copytree(toy_bundles.classifier(), bundle)
    shutil.copy(evil, bundle / "libquartermap_plugin.so")
    sha256 = hashlib.sha256(evil.read_bytes()).hexdigest()
    _with_engine(bundle, {"file": "libquartermap_plugin.so", "sha256": sha256, "tensorrt": "10, 11, rtx"})
    mark = tmp_path / "mark"
    monkeypatch.setenv("QUARTERMAP_HOME", str(home))
    monkeypatch.setenv("QUARTERMAP_TEST_MARK", str(mark))
    monkeypatch.delenv("QUARTERMAP_PLUGIN", raising=False)
    monkeypatch.chdir(folder)
    return SimpleNamespace(
        folder=folder, bundle=bundle, library=Path(library), sha256=sha256, mark=mark, home=home
    )


def _with_engine(bundle: Path, plugin: dict[str, Any]) -> None:
    (bundle / "model.tensorrt.engine").write_bytes(b"in the place of an engine")
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = {
        "file": "model.tensorrt.engine",
        "version": VERSION,
        "compute_capabilities": ["8.9"],
        "gpu": ADA.name,
        "inputs": {item["name"]: item["shape"] for item in manifest["inputs"]},
        "outputs": [item["name"] for item in manifest["outputs"]],
        "options": EngineOptions().to_dict(),
        "plugin": plugin,
        "key": "0" * 64,
        "build": {"engine_bytes": len(b"in the place of an engine")},
    }
    change_manifest(bundle, targets={**manifest["targets"], "tensorrt": entry})


def _edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


COMMANDS = {
    "validate": ("validate", "bundle", "--target", "tensorrt"),
    "localise": ("validate", "bundle", "--localise", "--target", "tensorrt"),
    "bench": ("bench", "bundle", "--target", "tensorrt"),
    "eval": ("eval", "bundle", "--target", "tensorrt"),
    "predict": ("predict", "bundle", "digit.png", "--target", "tensorrt"),
    "serve": ("serve", "bundle", "--target", "tensorrt", "--port", "0", "--grpc-port", "0"),
    "rebuild": ("rebuild", "bundle", "--target", "tensorrt"),
    "triton": ("deploy", "triton", "bundle", "-o", "repository", "--backend", "tensorrt"),
    "kserve": ("deploy", "kserve", "bundle", "-o", "service.yaml", "--storage-uri", "s3://a/b"),
}


def _refused(outcome: Outcome, scene: SimpleNamespace) -> str:
    assert not scene.mark.exists(), "the library ran"
    assert outcome.code == 2, outcome
    assert outcome.err.count("quartermap: error: ") == 1, outcome.err
    return outcome.err


# The attacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_neither_the_current_folder_nor_the_bundle_is_looked_into(name: str, scene: SimpleNamespace) -> None:
    """The folder that the user is in and the bundle both hold the library whose hash the manifest names."""
    from PIL import Image

    Image.new("RGB", (32, 32)).save("digit.png")
    said = _refused(call(*COMMANDS[name]), scene)
    if name != "localise":  # which is for bundles in 16 bits
        assert "--plugin" in said


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("place", ["options", "recipe"])
def test_a_manifest_cannot_name_a_library(name: str, place: str, scene: SimpleNamespace) -> None:
    def change(manifest: dict[str, Any]) -> None:
        where = (
            manifest["recipe"]["engine"] if place == "recipe" else manifest["targets"]["tensorrt"]["options"]
        )
        where["plugin"] = str(scene.library)

    _edit(scene.bundle, change)
    assert "--plugin" in _refused(call(*COMMANDS[name]), scene)


@pytest.mark.parametrize(
    "words",
    [
        ("compile", "evil.toml"),
        ("eval", "evil.toml", "--target", "tensorrt"),
        ("tune", "evil.toml", "--budget", "1%", "-o", "tuned.toml"),
        ("compare", "evil.toml", "-o", "compared.json"),
        ("ablate", "evil.toml", "-o", "ablated.json"),
    ],
    ids=lambda words: words[0],
)
def test_a_recipe_cannot_name_a_library(words: tuple[str, ...], scene: SimpleNamespace) -> None:
    said = _refused(call(*words), scene)
    assert "plugin/libquartermap_plugin.so" in said and "--plugin" in said


def test_compiling_takes_nothing_from_the_current_folder(scene: SimpleNamespace) -> None:
    words = ("compile", "vmamba_digits", "--targets", "tensorrt", "--out", "made")
    assert "quartermap plugin build" in _refused(call(*words), scene)


def test_a_library_that_is_named_is_loaded(scene: SimpleNamespace) -> None:
    """What the attacks rest on: the library does run where the user says so."""
    outcome = call(*COMMANDS["validate"], "--plugin", scene.library)
    assert scene.mark.exists()
    # What stands in the place of the engine is none.
    assert outcome.code == 2 and "refuses the engine" in outcome.err


def test_another_library_than_the_engines_is_not_loaded(scene: SimpleNamespace, tmp_path: Path) -> None:
    """Its hash is compared first."""
    other = tmp_path / "other.so"
    other.write_bytes(scene.library.read_bytes() + b"\0")
    assert "found another library" in _refused(call(*COMMANDS["validate"], "--plugin", other), scene)
    assert "found another library" in _refused(call(*COMMANDS["triton"], "--plugin", other), scene)


def test_the_environment_names_no_place_that_depends_on_the_folder(
    scene: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_PLUGIN", "plugin/libquartermap_plugin.so")
    assert "expected a path from / on" in _refused(call(*COMMANDS["validate"]), scene)
    monkeypatch.setenv("QUARTERMAP_HOME", "home")
    assert "expected a path from / on" in _refused(call("plugin", "list"), scene)


@pytest.mark.parametrize("value", [{"sha256": 5}, {"sha256": "../../plugin"}, {}, "plugin.so", ["a"]])
def test_a_wanted_library_is_a_hash(value: object) -> None:
    with pytest.raises(EngineError, match="expected its sha256"):
        WantedLibrary.of_entry({"plugin": value})


def test_a_foreign_library_is_not_loaded_to_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("QUARTERMAP_TEST_MARK", str(mark))
    outcome = call("plugin", "check", _compiled(tmp_path, EVIL))
    assert outcome.code == 2 and "no plugin of quartermap-deploy" in outcome.err and not mark.exists()


def test_what_is_no_library_for_this_machine_is_refused_unread(evil: Path, tmp_path: Path) -> None:
    data = evil.read_bytes()
    for name, change, said in (
        ("big-endian", data[:5] + b"\2" + data[6:], "another kind of machine"),
        ("machine", data[:18] + b"\x08\x00" + data[20:], "another kind of machine"),
        ("program", data[:16] + b"\x02\x00" + data[18:], "no shared library"),
        ("headers", data[:54] + b"\x01\x00" + data[56:], "program headers of 1 bytes"),
        ("cut", data[:9000], "cut short"),
    ):
        path = tmp_path / name
        path.write_bytes(change)
        with pytest.raises(qm.errors.QuartermapError, match=said):
            inspect(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(qm.errors.QuartermapError, match="no plugin library"):
        inspect(tmp_path / "pipe")


# What a bundle carries ------------------------------------------------------------------------------------------


def test_it_is_said_that_a_bundle_carries_native_code(
    scene: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = call("inspect", scene.bundle)
    assert outcome.code == 0 and "native code, which is not loaded from here" in " ".join(outcome.out.split())
    pytest.importorskip("jinja2")
    assert call("report", scene.bundle, "-o", "report.html").code == 0
    assert "native code, which is not loaded from here" in Path("report.html").read_text()
    assert not scene.mark.exists()


def test_a_carried_library_is_installed_on_purpose_alone(
    scene: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = call("plugin", "install", scene.bundle)
    assert refused.code == 2 and "--yes" in refused.err and scene.sha256 in refused.err
    assert not scene.home.exists()
    outcome = call("plugin", "install", scene.bundle, "--yes", "--json")
    assert outcome.code == 0 and outcome.json["sha256"] == scene.sha256
    assert not scene.mark.exists(), "installing runs nothing"
    kept = scene.home / "plugins" / scene.sha256
    assert Path(outcome.json["path"]).parent == kept
    assert [path.stat().st_mode & 0o077 for path in (kept.parent, kept)] == [0, 0]
    assert [entry["sha256"] for entry in call("plugin", "list", "--json").json["libraries"]] == [scene.sha256]
    monkeypatch.setenv("COLUMNS", "200")
    assert scene.sha256[:16] in call("plugin", "list").out
    # From now on the engine finds it, by its hash and without being told.
    call(*COMMANDS["validate"])
    assert scene.mark.exists()
    # Nothing but an engine that wants it does: what is built anew takes what was built here.
    with pytest.raises(EngineError, match="quartermap plugin build"):
        find_library()
    gone = call("plugin", "remove", scene.sha256[:8], "--json")
    assert gone.code == 0 and not kept.exists() and call("plugin", "list", "--json").json["libraries"] == []


def test_the_answer_decides(scene: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer in ("", "n\n", "no\n", "\n", "yess\n"):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        outcome = call("plugin", "install", scene.bundle)
        assert outcome.code == 2 and "nothing was installed" in outcome.err and not scene.home.exists()
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    outcome = call("plugin", "install", scene.bundle)
    assert outcome.code == 0 and scene.sha256 in outcome.err and scene.sha256 in outcome.out


def test_what_is_shown_before_the_answer_obeys_nobody(scene: SimpleNamespace) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["targets"]["tensorrt"]["plugin"]["tensorrt"] = "\x1b[2J\rsigned and safe"

    _edit(scene.bundle, change)
    outcome = call("plugin", "install", scene.bundle)
    assert outcome.code == 2 and "\x1b" not in outcome.err and "\r" not in outcome.err


def test_what_nothing_asks_for_is_not_installed(scene: SimpleNamespace) -> None:
    def other(manifest: dict[str, Any]) -> None:
        manifest["targets"]["tensorrt"]["plugin"]["sha256"] = "0" * 64

    _edit(scene.bundle, other)
    said = _refused(call("plugin", "install", scene.bundle, "--yes"), scene)
    assert "carries no plugin that an engine of it was built with" in said
    (scene.bundle / "libquartermap_plugin.so").write_bytes(b"no library")
    sha256 = hashlib.sha256(b"no library").hexdigest()
    _with_engine(scene.bundle, {"file": "x.so", "sha256": sha256})
    assert "no 64-bit ELF library" in _refused(call("plugin", "install", scene.bundle, "--yes"), scene)
    assert not scene.home.exists()


def test_a_library_is_carried_and_dropped(scene: SimpleNamespace) -> None:
    (scene.bundle / "libquartermap_plugin.so").unlink()
    change_manifest(scene.bundle)
    (scene.bundle / "manifest.sig").write_text("{}")
    assert call("plugin", "install", scene.bundle, "--yes").code == 2
    outcome = call("plugin", "carry", scene.bundle, "--plugin", scene.library)
    assert outcome.code == 0 and "signatures were dropped" in outcome.err and scene.sha256 in outcome.out
    assert call("plugin", "install", scene.bundle, "--yes").code == 0 and not scene.mark.exists()
    wrong = scene.folder / "wrong.so"
    wrong.write_bytes(scene.library.read_bytes() + b"\0")
    assert "found another library" in _refused(
        call("plugin", "carry", scene.bundle, "--plugin", wrong), scene
    )


def test_an_engine_that_is_built_again_leaves_no_library_of_the_old_one(
    scene: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another library builds the engine anew, so the carried one has nothing to do in the bundle any more."""
    other = scene.folder / "newer.so"
    other.write_bytes(scene.library.read_bytes() + b"\0")
    bundle = rebuild_bundle(scene.bundle, plugin=other)
    assert bundle.manifest["targets"]["tensorrt"]["plugin"]["sha256"] != scene.sha256
    assert "libquartermap_plugin.so" not in bundle.manifest["files"]


# The user's own folders -----------------------------------------------------------------------------------------


def _open_to_others(folder: Path, how: str, tmp_path: Path) -> str:
    """Do to a folder what somebody else may have done, and return what is said about it."""
    if how == "group":
        folder.chmod(0o770)
        return "others may write to"
    if how == "all":
        folder.chmod(0o707)
        return "others may write to"
    if how == "above":
        folder.parent.chmod(0o777)
        return "where another user can put another folder in its place"
    if how == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        return "is a link"
    if os.geteuid() != 0:
        pytest.skip("only the superuser can give a folder away")
    os.chown(folder.parent if how == "owner above" else folder, 12345, 12345)
    return "another user"


@pytest.mark.parametrize("how", ["group", "all", "above", "link", "owner", "owner above"])
def test_a_store_that_others_can_write_to_is_not_believed(
    how: str, scene: SimpleNamespace, tmp_path: Path
) -> None:
    assert call("plugin", "install", scene.bundle, "--yes").code == 0
    said = _open_to_others(scene.home / "plugins", how, tmp_path)
    for words in (COMMANDS["validate"], ("plugin", "list"), ("plugin", "install", scene.bundle, "--yes")):
        assert said in _refused(call(*words), scene)


def test_a_library_that_was_exchanged_in_the_store_is_none(scene: SimpleNamespace) -> None:
    assert call("plugin", "install", scene.bundle, "--yes").code == 0
    (kept,) = (library.path for library in store.stored_libraries())
    kept.write_bytes(kept.read_bytes() + b"\0")
    assert store.find_stored(scene.sha256) is None
    assert "--plugin" in _refused(call(*COMMANDS["validate"]), scene)


def test_the_store_has_what_was_built_here_last(
    scene: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scene.library.read_bytes()
    for index, how in enumerate((store.BUILT, store.BUILT, store.KERNELS, store.INSTALLED)):
        monkeypatch.setattr(store, "datetime", _clock(index))
        store.add_library(data + bytes([index]), "libquartermap_plugin.so", how, "a test")
    assert find_library().read_bytes() == data + b"\1"
    assert [library.how for library in store.stored_libraries()] == [
        store.BUILT,
        store.BUILT,
        store.KERNELS,
        store.INSTALLED,
    ]
    # Engines built with it do not tell where it lay, and the bundle's own word for a hash finds nothing else.
    with pytest.raises(EngineError, match="install BUNDLE"):
        find_library(None, WantedLibrary("f" * 64, "libquartermap_plugin.so", None))


def _clock(second: int) -> Any:
    import datetime

    moment = datetime.datetime(2026, 1, 1, 0, 0, second, tzinfo=datetime.timezone.utc)
    return SimpleNamespace(datetime=SimpleNamespace(now=lambda zone: moment), timezone=datetime.timezone)


def test_removing_takes_a_hash_and_no_path(scene: SimpleNamespace) -> None:
    assert call("plugin", "install", scene.bundle, "--yes").code == 0
    for text in ("../../..", "a", scene.sha256 + "0", "zzzzzzzz", "0" * 64):
        outcome = call("plugin", "remove", text)
        assert outcome.code == 2, text
    assert len(store.stored_libraries()) == 1


def test_own_folders_are_where_they_are_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUARTERMAP_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, which is passed over")
    assert own_folder("plugins") == tmp_path / ".local/share/quartermap/plugins"
    assert own_folder("cache") == tmp_path / ".cache/quartermap/cache"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert own_folder("plugins") == tmp_path / "data/quartermap/plugins"
    # Users without a home have one that is not there; a program of root's must not make it.
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))
    assert own_folder("cache") is None
    folder = make_private(tmp_path / "new" / "folder")
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(TrustError, match="no folder"):
        check_private(tmp_path / "file")


# Caches ---------------------------------------------------------------------------------------------------------


def test_caches_are_the_users_and_are_named_by_hashes(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    cache = RuntimeCache(b"engine", "1.7", ADA)
    assert cache.read() is None
    cache.write(b"kernels")
    assert cache.read() == b"kernels"
    assert cache.path is not None and cache.path.parent == tmp_path / "home" / "cache"
    assert len(cache.path.stem) == 32 and int(cache.path.stem, 16) >= 0
    assert cache.path.parent.stat().st_mode & 0o077 == 0
    # A bundle can say what it likes: its cache is known by the engine alone.
    assert RuntimeCache(b"other", "1.7", ADA).path != cache.path
    cache.path.parent.chmod(0o777)
    with pytest.raises(TrustError, match="others may write to"):
        RuntimeCache(b"engine", "1.7", ADA)
    trt: Any = engines.module
    config = trt.Builder(trt.Logger()).create_builder_config() if hasattr(trt, "Logger") else None
    with pytest.raises(TrustError, match="others may write to"):
        TimingCache(config, TENSORRT, None, "0" * 64)


@pytest.mark.parametrize("key", ["plugin", "cache"])
def test_no_file_says_what_is_loaded_or_where_is_written_to(key: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'[model]\nname = "vmamba_digits"\n[engine]\n{key} = "/tmp/somewhere"\n')
    with pytest.raises(qm.errors.RecipeError, match="does not belong in a file"):
        Recipe.load(path)
    # Nor is it written into one: a tuned recipe has to be read again.
    options = dataclasses.replace(EngineOptions(workspace=5), **{key: Path("/tmp/somewhere")})
    written = Recipe("vmamba_digits", targets=("tensorrt",), engine=options).to_toml(tmp_path)
    path.write_text(written)
    assert Recipe.load(path).engine == EngineOptions(workspace=5)


@pytest.mark.parametrize("kind", ["deep", "pipe"])
def test_what_is_no_library_of_the_store_is_passed_over(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
    place = store.open_store() / ("a" * 64)
    place.mkdir()
    (place / "x.so").write_bytes(b"x")
    if kind == "pipe":
        os.mkfifo(place / store.ORIGIN_FILE)
    else:
        (place / store.ORIGIN_FILE).write_text("[" * 100_000)
    assert store.stored_libraries() == []
