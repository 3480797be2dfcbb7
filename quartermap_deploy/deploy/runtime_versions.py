"""Which ONNX Runtime runs a file, and which release of Triton has it.

What a file needs is decided by its opset and its IR version. The versions of ONNX Runtime are those that were tried
(tests/test_other_tools.py); what came before 1.17 was not. The releases of Triton are those of its own build script.
"""

from __future__ import annotations

import re

from quartermap_deploy.errors import DeployError

Version = tuple[int, int]

_OPSETS: dict[int, Version] = {21: (1, 18), 22: (1, 21), 23: (1, 23)}
"""The first ONNX Runtime that runs our files in an opset; those below come with every version that was tried."""
_IR_VERSIONS: dict[int, Version] = {10: (1, 18), 11: (1, 23)}
"""The first ONNX Runtime that reads an IR version."""
OLDEST: Version = (1, 17)
"""The oldest ONNX Runtime that was tried."""
_TRITON: dict[Version, Version] = {
    (1, 17): (24, 3),
    (1, 18): (24, 5),
    (1, 19): (24, 8),
    (1, 20): (24, 12),
    (1, 21): (25, 3),
    (1, 22): (25, 5),
    (1, 23): (25, 8),
}
"""For each version of ONNX Runtime the first release of Triton that has it, as year and month."""


def onnxruntime_for(opset: int, ir_version: int) -> Version:
    """The oldest ONNX Runtime, major and minor version, that runs a file of ours."""
    newest_opset, newest_ir = max(_OPSETS), max(_IR_VERSIONS)
    return max(
        OLDEST,
        _OPSETS.get(min(opset, newest_opset), OLDEST),
        _IR_VERSIONS.get(min(ir_version, newest_ir), OLDEST),
    )


def triton_for(onnxruntime: Version) -> Version:
    """The first release of Triton, year and month, with this version of ONNX Runtime or a newer one."""
    return min(triton for version, triton in _TRITON.items() if version >= onnxruntime)


def written(version: Version, digits: int = 1) -> str:
    """A version as it is written: 1.17, or with two digits 24.03."""
    return f"{version[0]}.{version[1]:0{digits}}"


def check_triton(named: str, what: str, onnxruntime: Version) -> None:
    """Refuse a release of Triton whose ONNX Runtime is too old for a file.

    Args:
        named: a release, or a tag or image of one: "24.03", "24.03-py3", "nvcr.io/nvidia/tritonserver:24.03-py3". What
            names no release, as an image of somebody's own, is taken.
        what: what was named, for the message.
        onnxruntime: the oldest version that runs the file.

    Raises:
        DeployError: if it is too old.
    """
    found = re.fullmatch(r"(?:.*/)?(?:tritonserver:)?(\d\d)\.(\d\d)(?:-.*)?", named)
    if found is None:
        return
    release, least = (int(found[1]), int(found[2])), triton_for(onnxruntime)
    if release < least:
        raise DeployError(
            f"{what} {named} is Triton {written(release, 2)}, whose ONNX Runtime is too old: the model needs ONNX "
            f"Runtime {written(onnxruntime)} or newer, which Triton has from {written(least, 2)} on. Take a newer one"
        )
