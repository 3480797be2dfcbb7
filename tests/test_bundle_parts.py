"""What a bundle does with its manifest, on manifests written by hand: nothing is compiled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from quartermap_deploy.bundle import (
    Bundle,
    bundle_labels,
    describe_file,
    load_bundle,
    operators,
    read_manifest,
    require_folder,
    verify_file,
    write_json,
)
from quartermap_deploy.errors import BundleError, UnknownNameError

PAIR = """
<ir_version: 10, opset_import: ["": 20]>
pair (float[batch, 2] x) => (float[batch, 2] twice, float[batch, 2] sign) {
    sum = Add (x, x)
    twice = Identity (sum)
    sign = Sign (x)
}
"""
X = np.array([[1.0, -2.0]], np.float32)


def bundle(folder: Path, text: str = PAIR, **changes: Any) -> Bundle:
    """A folder with a model and what this needs of a manifest; no more of it is checked."""
    model = onnx.parser.parse_model(text)
    onnx.save(model, folder / "model.onnx")
    values = {
        "targets": {"onnxruntime": {"file": "model.onnx"}},
        "graph": operators(model),
        "size_rules": {},
        "files": {"model.onnx": describe_file(folder / "model.onnx")},
        **changes,
    }
    return Bundle(folder, values, {})


# Targets and sessions ---------------------------------------------------------------------------------------------


def test_onnx_runtime_is_the_default_where_it_is_there(tmp_path: Path) -> None:
    both = bundle(tmp_path, targets={"tensorrt": {}, "onnxruntime": {}})
    assert both.default_target == both.target(None) == "onnxruntime"
    assert both.target("tensorrt") == "tensorrt"
    two = bundle(tmp_path, targets={"tensorrt-rtx": {}, "tensorrt": {}})
    assert two.default_target == two.target(None) == "tensorrt-rtx"


def test_an_engine_that_was_not_built_is_told_apart_from_a_target_that_is_none(tmp_path: Path) -> None:
    own = bundle(tmp_path)
    with pytest.raises(UnknownNameError, match=r"has no engine for tensorrt, it has onnxruntime; .*rebuild"):
        own.target("tensorrt")
    with pytest.raises(UnknownNameError, match=r"onnxruntim.*onnxruntime") as found:
        own.target("onnxruntim")
    assert "rebuild" not in str(found.value)


def test_outputs_are_by_name_where_there_are_several(tmp_path: Path) -> None:
    own = bundle(tmp_path)
    for inputs in (X, {"x": X}):
        found = own.run(inputs)
        assert isinstance(found, dict)
        np.testing.assert_array_equal(found["twice"], 2 * X)
        np.testing.assert_array_equal(found["sign"], np.sign(X))
    alone = bundle(
        tmp_path, PAIR.replace(", float[batch, 2] sign)", ")").replace("    sign = Sign (x)\n", "")
    )
    np.testing.assert_array_equal(alone.run(X), 2 * X)
    assert list(alone.run({"x": X})) == ["twice"]


def test_one_session_serves_every_call(tmp_path: Path) -> None:
    own = bundle(tmp_path)
    assert own.session() is own.session("onnxruntime")
    files = {"b": 1, "a": 2}
    same = [Bundle(tmp_path, {"files": dict(sorted(files.items(), reverse=turned))}, {}) for turned in (0, 1)]
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    changed = bundle(tmp_path, PAIR.replace("Sign", "Neg"))
    assert hash(changed) != hash(own) and changed.session() is not own.session()
    np.testing.assert_array_equal(changed.run(X)["sign"], -X)  # type: ignore[index]


def test_what_the_manifest_leaves_open_is_none(tmp_path: Path) -> None:
    own = bundle(tmp_path, model={}, preprocessing=None, labels=[], task="features")
    assert (own.num_classes, own.preprocessing, own.labels, own.task) == (None, None, (), "features")
    named = bundle(tmp_path, model={"num_classes": 2.0}, labels=["cat", "dog"])
    assert repr(named.num_classes) == "2" and named.labels == ("cat", "dog")
    assert own.model_path == tmp_path / "model.onnx"


# The graph --------------------------------------------------------------------------------------------------------


def test_operators_are_counted_the_most_frequent_first() -> None:
    model = onnx.parser.parse_model(
        PAIR.replace("sum = Add (x, x)", "first = Sign (x)\n    sum = Add (first, x)")
    )
    assert operators(model) == {"nodes": 4, "operators": {"Sign": 2, "Add": 1, "Identity": 1}}
    assert next(iter(operators(model)["operators"])) == "Sign"


def test_a_graph_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    own = bundle(tmp_path)
    own.check_graph()
    for changes, words in (
        (
            {"nodes": 3, "operators": {"Add": 2, "Identity": 1}},
            r"has 3 nodes, its manifest lists 3 \(1 Add instead of 2, 1 Sign instead of 0\)",
        ),
        (
            {"nodes": 4, "operators": {"Add": 1, "Identity": 1, "Sign": 1, "Neg": 1}},
            r"lists 4 \(0 Neg instead of 1\)",
        ),
        ({"nodes": 4, "operators": {"Add": 1, "Identity": 1, "Sign": 1}}, r"lists 4 \(the same operators\)"),
        (
            {"nodes": 3, "operators": {"Add": 1, "Identity": 1, "Sign": 1, "Neg": 3}},
            r"\(0 Neg instead of 3\)",
        ),
        ({}, r"manifest lists None \(1 Add instead of 0, 1 Identity instead of 0, 1 Sign instead of 0\)"),
    ):
        own.manifest["graph"] = changes
        with pytest.raises(BundleError, match=words):
            own.check_graph()


def test_a_model_that_is_no_valid_onnx_is_refused(tmp_path: Path) -> None:
    own = bundle(tmp_path, PAIR.replace("Sign (x)", "Sign (x, sum)"))
    with pytest.raises(BundleError, match="is no valid ONNX model"):
        own.check_graph()


# Files ------------------------------------------------------------------------------------------------------------


def test_files_are_known_by_size_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345")
    own = describe_file(path)
    assert own == {"sha256": hashlib.sha256(b"12345").hexdigest(), "bytes": 5}
    verify_file(tmp_path, "a.bin", own)
    path.write_bytes(b"12346")
    with pytest.raises(
        BundleError, match=r"does not match its manifest: 5 bytes, sha256 \w{12}…, expected 5 bytes, sha256 "
    ):
        verify_file(tmp_path, "a.bin", own)
    path.write_bytes(b"1" * 1234)
    with pytest.raises(
        BundleError,
        match=rf"does not match its manifest: 1,234 bytes, expected 5 bytes, sha256 {own['sha256'][:12]}…",
    ):
        verify_file(tmp_path, "a.bin", own)


def test_missing_files_and_links_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    own = describe_file(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("link", "lost", "folder"):
        with pytest.raises(BundleError, match=f"{name} in the bundle .* is a link or no file"):
            verify_file(tmp_path, name, own)
    with pytest.raises(BundleError, match=r"none.bin is missing from the bundle") as found:
        verify_file(tmp_path, "none.bin", own)
    assert "rebuild" not in str(found.value)
    with pytest.raises(
        BundleError, match=r"is missing from the bundle .*; make it again: quartermap rebuild"
    ):
        verify_file(tmp_path, "model.tensorrt.engine", own)


def test_labels_of_bundles_of_one_name_are_numbered(tmp_path: Path) -> None:
    paths = [
        tmp_path / parent / name
        for parent, name in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "x"), ("e", "xy"))
    ]
    assert bundle_labels(paths) == ["x", "x (2)", "y", "x (3)", "xy"]
    assert bundle_labels([]) == []
    assert bundle_labels([tmp_path / "x" / ".."]) == [tmp_path.name]


def test_what_is_no_folder_is_told_of(tmp_path: Path) -> None:
    require_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is a file; expected the folder"):
        require_folder(tmp_path / "file")
    with pytest.raises(BundleError, match="there is no bundle"):
        load_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest.json"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "is not the manifest of a bundle"),
        ("{}", "is not the manifest of a bundle"),
        ("3", "is not the manifest of a bundle"),
        ('"format"', "is not the manifest of a bundle"),
        ('{"format": 0}', r"has format 0, this version of quartermap-deploy reads format \d+"),
        ('{"format": "1"}', r"has format '1', this version"),
        ("{", "cannot be read"),
        ('{"format": NaN}', "has format nan"),
    ],
)
def test_a_manifest_that_is_none_is_told_of(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=words):
        read_manifest(tmp_path)


def test_json_is_for_people_and_programs(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1], "é": "ß"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "a": [\n    1\n  ],\n  "é": "ß"\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": [1], "é": "ß"}
