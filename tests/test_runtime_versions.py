"""Which ONNX Runtime and which Triton a file needs, and that one which is too old is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from deploy_bundles import MODEL, dynamic_bundle
from onnx import TensorProto, helper

from quartermap_deploy.cli import main
from quartermap_deploy.deploy.runtime_versions import check_triton, onnxruntime_for, triton_for, written
from quartermap_deploy.errors import DeployError
from quartermap_deploy.onnx_bounds import versions_of

# As each was seen to run; docs/other-tools.md has the same table.
NEEDED = {
    (17, 8): ((1, 17), (24, 3)),
    (18, 8): ((1, 17), (24, 3)),
    (19, 9): ((1, 17), (24, 3)),
    (20, 9): ((1, 17), (24, 3)),
    (20, 10): ((1, 18), (24, 5)),
    (21, 10): ((1, 18), (24, 5)),
    (22, 10): ((1, 21), (25, 3)),
    (23, 11): ((1, 23), (25, 8)),
    (24, 12): ((1, 23), (25, 8)),
}


@pytest.mark.parametrize("versions", NEEDED)
def test_what_a_file_needs(versions: tuple[int, int]) -> None:
    onnxruntime, triton = NEEDED[versions]
    assert onnxruntime_for(*versions) == onnxruntime and triton_for(onnxruntime) == triton


@pytest.mark.parametrize(
    "named",
    ["24.02", "23.05-py3", "24.02-py3", "nvcr.io/nvidia/tritonserver:23.12-py3", "tritonserver:24.01"],
)
def test_a_release_that_is_too_old_is_refused(named: str) -> None:
    with pytest.raises(
        DeployError, match=r"too old: .* ONNX Runtime 1\.17 or newer, which Triton has from 24\.03"
    ):
        check_triton(named, "the release", (1, 17))


@pytest.mark.parametrize(
    "named",
    [
        "24.03",
        "24.10-py3",
        "26.01-py3",
        "nvcr.io/nvidia/tritonserver:24.03-py3",
        "registry.example/own:23.05",
        "latest",
    ],
)
def test_a_newer_one_and_what_names_none_are_taken(named: str) -> None:
    check_triton(named, "the release", (1, 17))


def test_versions_are_written_as_their_makers_do() -> None:
    assert (written((1, 17)), written((24, 3), 2)) == ("1.17", "24.03")


@pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (20, 9), (23, 11)])
def test_versions_are_read_from_the_file(opset: int, ir_version: int, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "g", [value], [value])
    imports = [helper.make_opsetid("quartermap", 1), helper.make_opsetid("", opset)]
    path = tmp_path / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=imports, ir_version=ir_version).SerializeToString()
    )
    assert versions_of(path) == (opset, ir_version)


def test_commands_refuse_a_runtime_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = str(dynamic_bundle())
    old = {
        "kserve": (
            ["-o", "a.yaml", "--runtime-version", "23.05-py3"],
            "--runtime-version 23.05-py3 is Triton 23.05",
        ),
        "triton": (["-o", "repository", "--triton-version", "24.01"], "the release 24.01 is Triton 24.01"),
    }
    for command, (options, words) in old.items():
        assert main(["deploy", command, bundle, *options]) == 2
        assert words in capsys.readouterr().err
    image = ["-o", "b.yaml", "--container", "nvcr.io/nvidia/tritonserver:23.05-py3"]
    assert main(["deploy", "kserve", bundle, *image]) == 2
    assert not list(tmp_path.iterdir())
    assert main(["deploy", "triton", bundle, "-o", "repository", "--triton-version", "24.03"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "needs ONNX Runtime 1.17 or newer: Triton 24.03 or newer" in told
    assert main(["deploy", "triton", bundle, "-o", "other", "--triton-version", "new"]) == 2
    assert (tmp_path / "repository" / MODEL).is_dir()
